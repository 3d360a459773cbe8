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
    check_one_matrix,
    check_pairs,
    check_shape,
    check_vectors,
    check_votes,
    of_every_capsule,
    of_every_item,
    outputs_of,
)
from ._declare import Differentiable, Output, float32, settle
from ._flops import Shape, pass_flops
from .coupling_coefficients import Couplings, Votes, check_given, explains, softmax_of_agreements, widened

# A state with more numbers gets its gradient in a pass of its own, as in csrc/cpu/ops/iterations.h.
_MOST_WITH_GRADIENTS = 1 << 15


def check(op: str, u: Tensor, weight: Tensor | None, state: Tensor, mask: Tensor | None) -> Sizes:
    """Check the arguments of a routing step and return B, N, K, J, D."""
    check_floating(op, "u weight state", u, weight, state)
    check_vectors(op, u, weight)
    B, N, K, _, D = check_votes(op, u, weight, mask)
    J = outputs_of(u, weight, 1, state)
    check_shape(op, "state", state, "B, J, D", B, J, D)
    return B, N, K, J, D


def _outputs(op: str, u: Tensor, *others: Any) -> list[Output]:
    B, _, _, J, D = check(op, u, *others)
    return [("B, J, D", (B, J, D), u.dtype)]


def _outputs_with_logits(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    logits: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
) -> list[Output]:
    B, _, _, J, D = check(op, u, weight, state, mask)
    check_pairs(op, logits, input_weight, u, J)
    return [("B, J, D", (B, J, D), u.dtype)]


def _outputs_over_inputs(op: str, u: Tensor, *others: Any) -> list[Output]:
    s = _outputs_with_logits(op, u, *others)
    _, shape, _ = s[0]
    exact = accumulation_dtype(u.dtype)
    return [*s, ("B, J, D", shape, exact), ("B, J", shape[:2], exact)]


def _flops(u: Shape, weight: Shape | None, state: Shape, *_: Any) -> int:
    part = pass_flops(u, weight, state[1])
    # Agreements, and a weighted sum.
    return part.votes + 2 * part.contraction


def _gradient_flops(g_s: Shape, u: Shape, weight: Shape | None, state: Shape, *others: Any) -> int:
    part, (g_u, g_weight, g_state, *g_others) = pass_flops(u, weight, state[1]), others[-1]
    flops = 0
    if g_u or g_weight or any(g_others):
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
# An operator of its own, because one with fewer arguments has faster kernels.
_with_logits = Differentiable(
    "routing_step_with_logits(Tensor u, Tensor? weight, Tensor state, Tensor? logits, Tensor? input_weight,"
    " Tensor? mask) -> Tensor s",
    "routing_step_with_logits_backward(Tensor g_s, Tensor u, Tensor? weight, Tensor state, Tensor? logits,"
    " Tensor? input_weight, Tensor? mask, bool[5] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_state, Tensor g_logits, Tensor g_input_weight)",
    _outputs_with_logits,
    batch={"u": 0, "state": 0, "logits": 0, "input_weight": 0, "mask": 0, "s": 0},
    flops=_flops,
    gradient_flops=_gradient_flops,
)
# It saves more for the gradient: s in the accumulation dtype (total), and log_sums, log Σ_i exp(b_ij).
_over_inputs = Differentiable(
    "routing_step_over_inputs(Tensor u, Tensor? weight, Tensor state, Tensor? logits, Tensor? input_weight,"
    " Tensor? mask) -> (Tensor s, Tensor total, Tensor log_sums)",
    "routing_step_over_inputs_backward(Tensor g_s, Tensor total, Tensor log_sums, Tensor u, Tensor? weight,"
    " Tensor state, Tensor? logits, Tensor? input_weight, Tensor? mask, bool[5] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_state, Tensor g_logits, Tensor g_input_weight)",
    _outputs_over_inputs,
    batch={"u": 0, "state": 0, "logits": 0, "input_weight": 0, "mask": 0, "s": 0, "total": 0, "log_sums": 0},
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
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One pass of routing by agreement: s_j = Σ_i c_ij û_ij with c_ij = softmax_j(û_ij · state_j + logits_ij).

    The gradient, also that of the state, the logits and the weights of the input capsules, is exact. So a routing with
    another squash or another rule for the state can be written as a loop in Python. With `state` the sum of the v
    before, `v = squash(routing_step(u, weight, state))` is one iteration of `dynamic_routing`; a state of 0 gives the
    equal couplings of its first iteration.

    Args:
        u: input capsules [B, N, K]; without a weight the votes [B, N, J, D], which something else made, or [B, N, 1, D]
            if they are the same for all output capsules.
        weight: transformation matrices [N, K, J, D]; [T, K, J, D] for T types of input capsules, N / T of each in a
            row; [K, J, D] to share them among the input capsules; [K, D] to share one matrix among the output capsules
            too. None if u is the votes.
        state: [B, J, D], with which the votes are compared.
        logits: [N, J], [1, N, J] or [B, N, J], added to the agreements. −∞ removes a pair of an input and an output
            capsule: its coupling and its gradients are 0. An input capsule whose logits are all −∞ sends nothing. +∞
            and NaN make s of their batch items NaN, or with axis "input" that of their output capsule.
        axis: the capsules over which the couplings add up to 1: "output", softmax_j, or "input", softmax_i.
        input_weight: [B, N], by which the couplings of an input capsule are multiplied after the softmax.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives 0 and no gradient.

    Returns:
        s [B, J, D], not squashed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes or devices, an unknown axis.
        MemoryError: no memory for the workspace.
    """
    op = "routing_step"
    plain = logits is None and input_weight is None and axis == "output"
    if plain:
        u, weight, state, mask = _routing_step.settle(u, weight, state, mask)
    else:
        u, weight, state, logits, input_weight, mask = settle(
            op, "u weight? state logits? input_weight? mask?", u, weight, state, logits, input_weight, mask
        )
    if weight is not None and weight.dim() == 2:
        # û_i · state_j = u_i · (W state_j), and Σ_i c_ij û_i = (Σ_i c_ij u_i) W: u takes the place of the votes.
        check_one_matrix(op, u, weight)
        check_shape(op, "state", state, "B, J, D", u.shape[0], *state.shape[1:2], weight.shape[1])
        options: Any = {"axis": axis, "input_weight": input_weight, "mask": mask}
        with float32(u):
            return routing_step(u.unsqueeze(2), None, state @ weight.T, logits, **options) @ weight
    weight = of_every_capsule(u, weight)
    if plain:
        return _routing_step(u, weight, state, mask)
    check_axis(op, axis)
    J = check(op, u, weight, state, mask)[3]
    if logits is not None:
        logits = of_every_item(op, logits, u, J)
    return (_over_inputs if axis == "input" else _with_logits)(u, weight, state, logits, input_weight, mask)


@explains("step")
def _couplings(
    op: str, votes: Votes, state: Tensor | None, logits: Tensor | None, axis: str, **_: Any
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]."""
    check_given(op, "a routing step", state=state)
    B, N, _K, J, _D = check(op, votes.u, votes.weight, state, votes.mask)  # type: ignore[arg-type]
    check_axis(op, axis)
    if logits is not None:
        logits = of_every_item(op, logits, votes.u, J)
    V, added = widened(state, logits)
    return (B, N, J), softmax_of_agreements(votes, V, added, axis)
