"""Dynamic routing, or routing by agreement (Sabour et al. 2017, procedure 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..dtypes import accumulation_dtype
from ._checks import (
    Sizes,
    check_axis,
    check_flag,
    check_floating,
    check_iterations,
    check_logits,
    check_shape,
    check_vectors,
    check_votes,
    of_every_item,
    vote_sizes,
)
from ._declare import Differentiable, Output, settle
from ._flops import Shape, pass_flops
from .coupling_coefficients import Couplings, Votes, explains, softmax_of_agreements, widened


def check(
    op: str, u: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, iterations: int
) -> Sizes:
    """Check the arguments of dynamic routing and return B, N, K, J, D."""
    check_floating(op, "u weight bias", u, weight, bias)
    check_vectors(op, u, weight)
    sizes = check_votes(op, u, weight, mask)
    if bias is not None:
        check_shape(op, "bias", bias, "J, D", sizes[3], sizes[4])
    check_iterations(op, iterations)
    return sizes


def _outputs(
    op: str, u: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, iterations: int, *_: bool
) -> list[Output]:
    B, _N, _K, J, D = check(op, u, weight, bias, mask, iterations)
    s = "iterations, B, J, D", (iterations, B, J, D), accumulation_dtype(u.dtype)
    return [("B, J, D", (B, J, D), u.dtype), s]


def _outputs_with_logits(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    *_: bool,
) -> list[Output]:
    outputs = _outputs(op, u, weight, bias, mask, iterations)
    check_logits(op, logits, u, weight)
    return outputs


def _outputs_over_inputs(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    *_: bool,
) -> list[Output]:
    outputs = _outputs(op, u, weight, bias, mask, iterations)
    if logits is not None:
        check_logits(op, logits, u, weight)
    B, J = u.shape[0], vote_sizes(u, weight)[0]
    return [*outputs, ("iterations, B, J", (iterations, B, J), accumulation_dtype(u.dtype))]


def _flops(u: Shape, weight: Shape | None, bias: Shape | None, mask: Shape | None, iterations: int, *_: bool) -> int:
    part = pass_flops(u, weight)
    # The first iteration adds the votes up. Each later one is a pass with agreements and a weighted sum.
    return part.total + (iterations - 1) * (part.votes + 2 * part.contraction)


def _gradient_flops(
    g_v: Shape,
    s: Shape,
    u: Shape,
    weight: Shape | None,
    bias: Shape | None,
    mask: Shape | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    wanted: Sequence[bool],
) -> int:
    part, later, (g_u, g_weight, _) = pass_flops(u, weight), iterations - 1, wanted
    # A pass for each later iteration: agreements with V and with g_s, and the sum of δ û.
    flops = 0 if detach else later * (part.votes + 3 * part.contraction)
    if g_u or g_weight:
        # The term c g_s; in later iterations also the agreements and, with couplings that have a gradient, δ V.
        contractions = 1 + min(later, 1) if detach else 1 + 4 * later
        flops += part.gradients(contractions, g_u, g_weight)
    return flops


def _flops_with_logits(u: Shape, weight: Shape | None, logits: Shape, *others: Any) -> int:
    part, iterations = pass_flops(u, weight), others[2]
    # The couplings of the first iteration differ, but compare nothing: a weighted sum.
    return iterations * (part.votes + part.contraction) + (iterations - 1) * part.contraction


def _gradient_flops_with_logits(
    g_v: Shape, s: Shape, u: Shape, weight: Shape | None, logits: Shape | None, *others: Any
) -> int:
    part, (_, _, iterations, _, detach, (g_u, g_weight, g_logits, _)) = pass_flops(u, weight), others
    later = iterations - 1
    flops = 0 if detach else later * (part.votes + 3 * part.contraction)
    if g_u or g_weight or (g_logits and not detach):
        # As without logits; the first iteration has an agreement with g_s too.
        contractions = 1 + min(later, 1) if detach else 2 + 4 * later
        flops += part.gradients(contractions, g_u, g_weight)
    return flops


def _flops_over_inputs(u: Shape, weight: Shape | None, logits: Shape | None, *others: Any) -> int:
    if logits is None:
        return _flops(u, weight, *others)
    return _flops_with_logits(u, weight, logits, *others)


def _gradient_flops_over_inputs(
    g_v: Shape, s: Shape, log_sums: Shape, u: Shape, weight: Shape | None, logits: Shape | None, *others: Any
) -> int:
    # As with logits, also where there are none: the gradient of the first couplings is not left out.
    bias, mask, iterations, detach, wanted = others
    return _gradient_flops_with_logits(g_v, s, u, weight, logits, bias, mask, iterations, False, detach, wanted)


_dynamic_routing = Differentiable(
    "dynamic_routing(Tensor u, Tensor? weight, Tensor? bias, Tensor? mask, int iterations, bool leaky, bool detach)"
    " -> (Tensor v, Tensor s)",
    "dynamic_routing_backward(Tensor g_v, Tensor s, Tensor u, Tensor? weight, Tensor? bias, Tensor? mask,"
    " int iterations, bool leaky, bool detach, bool[3] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_bias)",
    _outputs,
    batch={"u": 0, "mask": 0, "v": 0, "s": 1},
    flops=_flops,
    gradient_flops=_gradient_flops,
)
# An operator of its own, because there are no GPU kernels for it: a GPU then says that it uses the reference, and why.
_with_logits = Differentiable(
    "dynamic_routing_with_logits(Tensor u, Tensor? weight, Tensor logits, Tensor? bias, Tensor? mask, int iterations,"
    " bool leaky, bool detach) -> (Tensor v, Tensor s)",
    "dynamic_routing_with_logits_backward(Tensor g_v, Tensor s, Tensor u, Tensor? weight, Tensor logits, Tensor? bias,"
    " Tensor? mask, int iterations, bool leaky, bool detach, bool[4] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_logits, Tensor g_bias)",
    _outputs_with_logits,
    batch={"u": 0, "logits": 0, "mask": 0, "v": 0, "s": 1},
    flops=_flops_with_logits,
    gradient_flops=_gradient_flops_with_logits,
)
# Operators of their own, for the same reason, and because they save more for the gradient: log_sums, log Σ_i exp(b_ij).
_over_inputs = Differentiable(
    "dynamic_routing_over_inputs(Tensor u, Tensor? weight, Tensor? logits, Tensor? bias, Tensor? mask, int iterations,"
    " bool detach) -> (Tensor v, Tensor s, Tensor log_sums)",
    "dynamic_routing_over_inputs_backward(Tensor g_v, Tensor s, Tensor log_sums, Tensor u, Tensor? weight,"
    " Tensor? logits, Tensor? bias, Tensor? mask, int iterations, bool detach, bool[4] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_logits, Tensor g_bias)",
    _outputs_over_inputs,
    batch={"u": 0, "logits": 0, "mask": 0, "v": 0, "s": 1, "log_sums": 1},
    flops=_flops_over_inputs,
    gradient_flops=_gradient_flops_over_inputs,
)


def dynamic_routing(
    u: Tensor,
    weight: Tensor | None,
    iterations: int = 3,
    *,
    logits: Tensor | None = None,
    axis: str = "output",
    bias: Tensor | None = None,
    leaky: bool = False,
    detach: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Routing by agreement (Sabour et al. 2017, procedure 1), in one pass for each iteration.

    Args:
        u: input capsules [B, N, K]; without a weight the votes [B, N, J, D], which something else made.
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them; None if u is the votes.
        iterations: at least 1; with 1 all couplings are equal (uniform routing), unless there are logits.
        logits: [N, J], [1, N, J] or [B, N, J], where routing begins: they are added to the agreements in every
            iteration, and the first couplings are their softmax. −∞ removes a pair of an input and an output capsule:
            its coupling and its gradients are 0. An input capsule whose logits are all −∞ sends nothing. +∞ and NaN
            make v of their batch items NaN, or with axis "input" that of their output capsule.
        axis: the capsules over which the couplings add up to 1. "output": an input capsule divides itself among the
            output capsules, as in the paper. "input": an output capsule weighs the input capsules, as in many other
            implementations; masked ones take no part.
        bias: [J, D], added inside the squash of every iteration.
        leaky: give the softmax one more logit, which is always 0 and whose share is dropped; for axis "output".
        detach: let the gradient pass only through the votes of the last iteration, with the couplings as constants, so
            that the gradient of the logits is 0; by default it is exact.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives squash(bias), or 0.

    Logits, axis "input" and votes in place of u and the weight have no GPU kernel: there the reference runs.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes, devices or iterations, an unknown axis, leaky with axis "input".
        MemoryError: no memory for the workspace.
    """
    op = "dynamic_routing"
    plain = logits is None and axis == "output"
    if plain:
        u, weight, bias, mask = _dynamic_routing.settle(u, weight, bias, mask)
    else:
        u, weight, logits, bias, mask = settle(op, "u weight? logits? bias? mask?", u, weight, logits, bias, mask)
    check_iterations(op, iterations)
    check_flag(op, "leaky", leaky)
    check_flag(op, "detach", detach)
    if plain:
        return _dynamic_routing(u, weight, bias, mask, iterations, leaky, detach)
    check_axis(op, axis, leaky)
    check(op, u, weight, bias, mask, iterations)
    if logits is not None:
        logits = of_every_item(op, logits, u, weight)
    if axis == "input":
        return _over_inputs(u, weight, logits, bias, mask, iterations, detach)
    return _with_logits(u, weight, logits, bias, mask, iterations, leaky, detach)


@explains("dynamic")
def _couplings(
    op: str,
    votes: Votes,
    bias: Tensor | None,
    logits: Tensor | None,
    axis: str,
    iterations: int,
    leaky: bool,
    **_: Any,
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]; the logits are û · V, with V the sum of the output capsules of the iterations before."""
    B, N, _K, J, _D = check(op, votes.u, votes.weight, bias, votes.mask, iterations)
    check_axis(op, axis, leaky)
    if logits is not None:
        logits = of_every_item(op, logits, votes.u, votes.weight)
    zero = votes.zero()
    bias, added = widened(bias, logits)
    V = zero
    for iteration in range(iterations):
        couplings = softmax_of_agreements(votes, V, added, axis, leaky)
        if iteration < iterations - 1:
            s = zero if bias is None else zero + bias
            for part, some in votes:
                s = s + torch.einsum("bnj,bnjd->bjd", couplings(part, some), some)
            V = V + reference.squash(s)
    return (B, N, J), couplings


@explains("uniform")
def _uniform_couplings(
    op: str, votes: Votes, iterations: int, logits: Tensor | None, axis: str, **options: Any
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]: those of one iteration of dynamic routing."""
    return _couplings(op, votes, iterations=1, logits=None, axis="output", **options)
