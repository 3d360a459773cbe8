"""One pass of routing by agreement, from which loops can be written in Python."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ..dtypes import accumulation_dtype
from ._checks import (
    Sizes,
    check_axis,
    check_floating,
    check_logits,
    check_shape,
    check_vectors,
    check_votes,
    of_every_item,
)
from ._declare import Differentiable, Output, settle
from ._flops import Shape, pass_flops
from .coupling_coefficients import Couplings, Votes, check_given, explains, softmax_of_agreements, widened

# A state with more numbers gets its gradient in a pass of its own, as in csrc/cpu/ops/iterations.h.
_MOST_WITH_GRADIENTS = 1 << 15


def check(op: str, u: Tensor, weight: Tensor | None, state: Tensor, mask: Tensor | None) -> Sizes:
    """Check the arguments of a routing step and return B, N, K, J, D."""
    check_floating(op, "u weight state", u, weight, state)
    check_vectors(op, u, weight)
    sizes = check_votes(op, u, weight, mask)
    B, _, _, J, D = sizes
    check_shape(op, "state", state, "B, J, D", B, J, D)
    return sizes


def _outputs(op: str, u: Tensor, *others: Any) -> list[Output]:
    B, _, _, J, D = check(op, u, *others)
    return [("B, J, D", (B, J, D), u.dtype)]


def _outputs_with_logits(
    op: str, u: Tensor, weight: Tensor | None, state: Tensor, logits: Tensor, mask: Tensor | None
) -> list[Output]:
    B, _, _, J, D = check(op, u, weight, state, mask)
    check_logits(op, logits, u, weight)
    return [("B, J, D", (B, J, D), u.dtype)]


def _outputs_over_inputs(
    op: str, u: Tensor, weight: Tensor | None, state: Tensor, logits: Tensor | None, mask: Tensor | None
) -> list[Output]:
    B, _, _, J, D = check(op, u, weight, state, mask)
    if logits is not None:
        check_logits(op, logits, u, weight)
    exact = accumulation_dtype(u.dtype)
    return [("B, J, D", (B, J, D), u.dtype), ("B, J, D", (B, J, D), exact), ("B, J", (B, J), exact)]


def _flops(u: Shape, weight: Shape | None, *_: Any) -> int:
    part = pass_flops(u, weight)
    # Agreements, and a weighted sum.
    return part.votes + 2 * part.contraction


def _gradient_flops(g_s: Shape, u: Shape, weight: Shape | None, state: Shape, *others: Any) -> int:
    part, (g_u, g_weight, g_state, *g_logits) = pass_flops(u, weight), others[-1]
    flops = 0
    if g_u or g_weight or any(g_logits):
        # The agreements with the state and with g_s, the terms c g_s and δ state, and with them the sum of δ û.
        flops += part.gradients(4, g_u, g_weight)
        if g_state and math.prod(state) <= _MOST_WITH_GRADIENTS:
            return flops + part.contraction
    if g_state:
        flops += part.votes + 3 * part.contraction  # a pass of its own: both agreements and the sum
    return flops


def _gradient_flops_over_inputs(g_s: Shape, total: Shape, log_sums: Shape, u: Shape, *others: Any) -> int:
    return _gradient_flops(g_s, u, *others)


_routing_step = Differentiable(
    "routing_step(Tensor u, Tensor? weight, Tensor state, Tensor? mask) -> Tensor s",
    "routing_step_backward(Tensor g_s, Tensor u, Tensor? weight, Tensor state, Tensor? mask, bool[3] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_state)",
    _outputs,
    batch={"u": 0, "state": 0, "mask": 0, "s": 0},
    flops=_flops,
    gradient_flops=_gradient_flops,
)
# An operator of its own, because there are no GPU kernels for it: a GPU then says that it uses the reference, and why.
_with_logits = Differentiable(
    "routing_step_with_logits(Tensor u, Tensor? weight, Tensor state, Tensor logits, Tensor? mask) -> Tensor s",
    "routing_step_with_logits_backward(Tensor g_s, Tensor u, Tensor? weight, Tensor state, Tensor logits, Tensor? mask,"
    " bool[4] wanted) -> (Tensor g_u, Tensor g_weight, Tensor g_state, Tensor g_logits)",
    _outputs_with_logits,
    batch={"u": 0, "state": 0, "logits": 0, "mask": 0, "s": 0},
    flops=_flops,
    gradient_flops=_gradient_flops,
)
# It saves more for the gradient: s in the accumulation dtype (total), and log_sums, log Σ_i exp(b_ij).
_over_inputs = Differentiable(
    "routing_step_over_inputs(Tensor u, Tensor? weight, Tensor state, Tensor? logits, Tensor? mask)"
    " -> (Tensor s, Tensor total, Tensor log_sums)",
    "routing_step_over_inputs_backward(Tensor g_s, Tensor total, Tensor log_sums, Tensor u, Tensor? weight,"
    " Tensor state, Tensor? logits, Tensor? mask, bool[4] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_state, Tensor g_logits)",
    _outputs_over_inputs,
    batch={"u": 0, "state": 0, "logits": 0, "mask": 0, "s": 0, "total": 0, "log_sums": 0},
    flops=_flops,
    gradient_flops=_gradient_flops_over_inputs,
)


def routing_step(
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    logits: Tensor | None = None,
    *,
    axis: str = "output",
    mask: Tensor | None = None,
) -> Tensor:
    """One pass of routing by agreement: s_j = Σ_i c_ij û_ij with c_ij = softmax_j(û_ij · state_j + logits_ij).

    The gradient, also that of the state and the logits, is exact. So a routing with another squash or another rule for
    the state can be written as a loop in Python. With `state` the sum of the v before,
    `v = squash(routing_step(u, weight, state))` is one iteration of `dynamic_routing`; a state of 0 gives the equal
    couplings of its first iteration.

    Args:
        u: input capsules [B, N, K]; without a weight the votes [B, N, J, D], which something else made.
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them; None if u is the votes.
        state: [B, J, D], with which the votes are compared.
        logits: [N, J], [1, N, J] or [B, N, J], added to the agreements. −∞ removes a pair of an input and an output
            capsule: its coupling and its gradients are 0. An input capsule whose logits are all −∞ sends nothing. +∞
            and NaN make s of their batch items NaN, or with axis "input" that of their output capsule.
        axis: the capsules over which the couplings add up to 1: "output", softmax_j, or "input", softmax_i.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives 0 and no gradient.

    Logits, axis "input" and votes in place of u and the weight have no GPU kernel: there the reference runs.

    Returns:
        s [B, J, D], not squashed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes or devices, an unknown axis.
        MemoryError: no memory for the workspace.
    """
    if logits is None and axis == "output":
        return _routing_step(*_routing_step.settle(u, weight, state, mask))
    op = "routing_step"
    u, weight, state, logits, mask = settle(op, "u weight? state logits? mask?", u, weight, state, logits, mask)
    check_axis(op, axis)
    check(op, u, weight, state, mask)
    if logits is not None:
        logits = of_every_item(op, logits, u, weight)
    return (_over_inputs if axis == "input" else _with_logits)(u, weight, state, logits, mask)


@explains("step")
def _couplings(
    op: str, votes: Votes, state: Tensor | None, logits: Tensor | None, axis: str, **_: Any
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]."""
    check_given(op, "a routing step", state=state)
    B, N, _K, J, _D = check(op, votes.u, votes.weight, state, votes.mask)  # type: ignore[arg-type]
    check_axis(op, axis)
    if logits is not None:
        logits = of_every_item(op, logits, votes.u, votes.weight)
    V, added = widened(state, logits)
    return (B, N, J), softmax_of_agreements(votes, V, added, axis)
