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
    check_choice,
    check_flag,
    check_floating,
    check_iterations,
    check_one_matrix,
    check_pairs,
    check_shape,
    check_vectors,
    check_votes,
    fail,
    of_every_capsule,
    of_every_item,
    outputs_of,
    shape_of,
)
from ._declare import Differentiable, Output, float32, settle
from ._flops import Shape, pass_flops
from .coupling_coefficients import Couplings, Votes, explains, softmax_of_agreements, widened
from .squash import ROUTING_SQUASHES, squash_routed
from .step import routing_step

_FEW_PRODUCTS = 1 << 30
"""B · N · J · K · D up to which a GPU gets one matrix [K, D] repeated for the output capsules."""


def check(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    kind: str,
    logits: Tensor | None = None,
) -> Sizes:
    """Check the arguments of dynamic routing and return B, N, K, J, D. Of the logits it only reads the number J."""
    check_floating(op, "u weight bias", u, weight, bias)
    check_vectors(op, u, weight)
    B, N, K, _, D = check_votes(op, u, weight, mask)
    J = outputs_of(u, weight, -1, logits)
    if bias is not None:
        check_shape(op, "bias", bias, "J, D", J, D)
    check_iterations(op, iterations)
    check_choice(op, "squash", kind, ROUTING_SQUASHES)
    return B, N, K, J, D


def _outputs(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    kind: str,
    logits: Tensor | None = None,
) -> list[Output]:
    B, _N, _K, J, D = check(op, u, weight, bias, mask, iterations, kind, logits)
    s = "iterations, B, J, D", (iterations, B, J, D), accumulation_dtype(u.dtype)
    return [("B, J, D", (B, J, D), u.dtype), s]


def _outputs_with_logits(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    input_weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    kind: str,
) -> list[Output]:
    outputs = _outputs(op, u, weight, bias, mask, iterations, leaky, detach, kind, logits)
    check_pairs(op, logits, input_weight, u, outputs[0][1][1])
    return outputs


def _outputs_over_inputs(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    input_weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    detach: bool,
    kind: str,
) -> list[Output]:
    outputs = _outputs_with_logits(op, u, weight, logits, input_weight, bias, mask, iterations, False, detach, kind)
    B, J, _ = outputs[0][1]
    return [*outputs, ("iterations, B, J", (iterations, B, J), accumulation_dtype(u.dtype))]


def _flops(u: Shape, weight: Shape | None, bias: Shape | None, mask: Shape | None, iterations: int, *_: Any) -> int:
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
    kind: str,
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


def _flops_with_logits(
    u: Shape, weight: Shape | None, logits: Shape | None, input_weight: Shape | None, *others: Any
) -> int:
    part, iterations = pass_flops(u, weight, 1 if logits is None else logits[2]), others[2]
    # The couplings of the first iteration differ, but compare nothing: a weighted sum.
    return iterations * (part.votes + part.contraction) + (iterations - 1) * part.contraction


def _gradient_flops_with_logits(
    g_v: Shape,
    s: Shape,
    u: Shape,
    weight: Shape | None,
    logits: Shape | None,
    input_weight: Shape | None,
    *others: Any,
) -> int:
    part = pass_flops(u, weight, g_v[1])
    _, _, iterations, _, detach, _, (g_u, g_weight, g_logits, g_input_weight, _) = others
    later = iterations - 1
    flops = 0 if detach else later * (part.votes + 3 * part.contraction)
    if g_u or g_weight or g_input_weight or (g_logits and not detach):
        # As without logits; the first iteration has an agreement with g_s too.
        contractions = 1 + min(later, 1) + g_input_weight if detach else 2 + 4 * later
        flops += part.gradients(contractions, g_u, g_weight)
    return flops


def _flops_over_inputs(
    u: Shape, weight: Shape | None, logits: Shape | None, input_weight: Shape | None, *others: Any
) -> int:
    if logits is None and input_weight is None:
        return _flops(u, weight, *others)
    return _flops_with_logits(u, weight, logits, input_weight, *others)


def _gradient_flops_over_inputs(
    g_v: Shape,
    s: Shape,
    log_sums: Shape,
    u: Shape,
    weight: Shape | None,
    logits: Shape | None,
    input_weight: Shape | None,
    bias: Shape | None,
    mask: Shape | None,
    iterations: int,
    detach: bool,
    kind: str,
    wanted: Sequence[bool],
) -> int:
    # As with logits, also where there are none: the gradient of the first couplings is not left out.
    others = bias, mask, iterations, False, detach, kind, wanted
    return _gradient_flops_with_logits(g_v, s, u, weight, logits, input_weight, *others)


_dynamic_routing = Differentiable(
    "dynamic_routing(Tensor u, Tensor? weight, Tensor? bias, Tensor? mask, int iterations, bool leaky, bool detach,"
    " str kind) -> (Tensor v, Tensor s)",
    "dynamic_routing_backward(Tensor g_v, Tensor s, Tensor u, Tensor? weight, Tensor? bias, Tensor? mask,"
    " int iterations, bool leaky, bool detach, str kind, bool[3] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_bias)",
    _outputs,
    batch={"u": 0, "mask": 0, "v": 0, "s": 1},
    flops=_flops,
    gradient_flops=_gradient_flops,
)
# An operator of its own, because one with fewer arguments has faster kernels.
_with_logits = Differentiable(
    "dynamic_routing_with_logits(Tensor u, Tensor? weight, Tensor? logits, Tensor? input_weight, Tensor? bias,"
    " Tensor? mask, int iterations, bool leaky, bool detach, str kind) -> (Tensor v, Tensor s)",
    "dynamic_routing_with_logits_backward(Tensor g_v, Tensor s, Tensor u, Tensor? weight, Tensor? logits,"
    " Tensor? input_weight, Tensor? bias, Tensor? mask, int iterations, bool leaky, bool detach, str kind,"
    " bool[5] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_logits, Tensor g_input_weight, Tensor g_bias)",
    _outputs_with_logits,
    batch={"u": 0, "logits": 0, "input_weight": 0, "mask": 0, "v": 0, "s": 1},
    flops=_flops_with_logits,
    gradient_flops=_gradient_flops_with_logits,
)
# Operators of their own, for the same reason, and because they save more for the gradient: log_sums, log Σ_i exp(b_ij).
_over_inputs = Differentiable(
    "dynamic_routing_over_inputs(Tensor u, Tensor? weight, Tensor? logits, Tensor? input_weight, Tensor? bias,"
    " Tensor? mask, int iterations, bool detach, str kind) -> (Tensor v, Tensor s, Tensor log_sums)",
    "dynamic_routing_over_inputs_backward(Tensor g_v, Tensor s, Tensor log_sums, Tensor u, Tensor? weight,"
    " Tensor? logits, Tensor? input_weight, Tensor? bias, Tensor? mask, int iterations, bool detach, str kind,"
    " bool[5] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_logits, Tensor g_input_weight, Tensor g_bias)",
    _outputs_over_inputs,
    batch={"u": 0, "logits": 0, "input_weight": 0, "mask": 0, "v": 0, "s": 1, "log_sums": 1},
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
    squash: str = "sabour",
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Routing by agreement (Sabour et al. 2017, procedure 1), in one pass for each iteration.

    Args:
        u: input capsules [B, N, K]; without a weight the votes [B, N, J, D], which something else made.
        weight: transformation matrices [N, K, J, D]; [T, K, J, D] for T types of input capsules, N / T of each in a
            row; [K, J, D] to share them among the input capsules; [K, D] to share one matrix among the output capsules
            too (MIND): logits then tell these apart. None if u is the votes.
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
        squash: what makes v of s in every iteration. "sabour" and "efficient": see `capsops.squash`; "none": v = s;
            "layer_norm": layer normalisation over D without parameters, as `torch.nn.functional.layer_norm` does it.
        input_weight: [B, N], by which the couplings of an input capsule are multiplied after the softmax.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives squash(bias), or 0.

    Votes [B, N, 1, D] are the same for all output capsules, as those of a weight [K, D] are; logits then tell their
    number J.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes, devices or iterations, an unknown axis or squash, leaky with axis "input".
        MemoryError: no memory for the workspace.
    """
    op = "dynamic_routing"
    plain = logits is None and input_weight is None and axis == "output"
    if plain:
        u, weight, bias, mask = _dynamic_routing.settle(u, weight, bias, mask)
    else:
        u, weight, logits, input_weight, bias, mask = settle(
            op, "u weight? logits? input_weight? bias? mask?", u, weight, logits, input_weight, bias, mask
        )
    weight = of_every_capsule(u, weight)
    check_iterations(op, iterations)
    check_flag(op, "leaky", leaky)
    check_flag(op, "detach", detach)
    if weight is not None and weight.dim() == 2:
        if logits is None:
            fail(
                op,
                f"logits is None and weight has shape {shape_of(weight)}; expected logits [B, N, J], [1, N, J] or "
                "[N, J], because the output capsules of one matrix [K, D] differ by them alone",
            )
        if leaky:
            fail(op, "leaky is True; expected False, because weight is one matrix [K, D]")
        check_axis(op, axis)
        check_one_matrix(op, u, weight)
        J = logits.shape[-1] if logits.dim() else 0
        if not _is_quicker_repeated(u, J, weight):
            return _route_by_one_matrix(
                op, u, weight, iterations, logits, axis, bias, detach, squash, input_weight=input_weight, mask=mask
            )
        weight = weight[:, None].expand(-1, J, -1)
    if plain:
        return _dynamic_routing(u, weight, bias, mask, iterations, leaky, detach, squash)
    check_axis(op, axis, leaky)
    J = check(op, u, weight, bias, mask, iterations, squash, logits)[3]
    if logits is not None:
        logits = of_every_item(op, logits, u, J)
    if axis == "input":
        return _over_inputs(u, weight, logits, input_weight, bias, mask, iterations, detach, squash)
    return _with_logits(u, weight, logits, input_weight, bias, mask, iterations, leaky, detach, squash)


def _is_quicker_repeated(u: Tensor, J: int, matrix: Tensor) -> bool:
    """Whether to route by one matrix [K, D] as by a shared weight [K, J, D], which repeats it.

    That takes more arithmetic, but the loop below launches many small kernels: with 2e8 products a pass it took 1.7 ms
    on an H100, forward and backward, and a shared weight 0.56 (benchmarks/results/h100-20261127: mind, recommender).
    """
    return u.is_cuda and u.shape[:2].numel() * J * matrix.numel() <= _FEW_PRODUCTS


def _route_by_one_matrix(
    op: str,
    u: Tensor,
    matrix: Tensor,
    iterations: int,
    logits: Tensor,
    axis: str,
    bias: Tensor | None,
    detach: bool,
    kind: str,
    **others: Tensor | None,
) -> Tensor:
    """Dynamic routing with one matrix [K, D], in passes over u.

    With û_i = u_i W, û_i · V_j = u_i · (W V_j) and Σ_i c_ij û_i = (Σ_i c_ij u_i) W. So the products with W take B · J
    rows instead of B · N, and no votes are stored.
    """
    J = logits.shape[-1] if logits.dim() else 0
    check(op, u, matrix[:, None].expand(-1, J, -1), bias, others["mask"], iterations, kind)
    logits = of_every_item(op, logits, u, J)
    exact = accumulation_dtype(u.dtype)
    state = u.new_zeros(u.shape[0], J, u.shape[2], dtype=exact)  # W V
    with float32(u):
        for iteration in range(iterations):
            last = iteration == iterations - 1
            each = u, matrix, bias, logits, others["input_weight"]
            if detach and not last:
                each = tuple([x if x is None else x.detach() for x in each])  # type: ignore[assignment]
            capsules, W, b, start, w = each
            if detach and last:
                # The couplings are constants: their agreements come as logits, and the state is 0.
                start = logits.detach()
                if iteration > 0:
                    start = start + torch.bmm(u.detach(), state.to(u.dtype).mT)
                    state = torch.zeros_like(state)
            s = routing_step(
                capsules.unsqueeze(2), None, state.to(u.dtype), start, axis=axis, input_weight=w, mask=others["mask"]
            )
            s = s.to(exact) @ W.to(exact)
            if b is not None:
                s = s + b
            v = squash_routed(s, kind)
            if not last:
                state = state + v @ W.to(exact).T
    return v.to(u.dtype)


@explains("dynamic")
def _couplings(
    op: str,
    votes: Votes,
    bias: Tensor | None,
    logits: Tensor | None,
    input_weight: Tensor | None,
    axis: str,
    iterations: int,
    leaky: bool,
    squash: str,
    **_: Any,
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]; the logits are û · V, with V the sum of the output capsules of the iterations before."""
    B, N, _K, J, _D = check(op, votes.u, votes.weight, bias, votes.mask, iterations, squash)
    check_axis(op, axis, leaky)
    if logits is not None:
        logits = of_every_item(op, logits, votes.u, J)
    check_pairs(op, logits, input_weight, votes.u, J)
    bias, added, weights = widened(bias, logits, input_weight)
    V = votes.zero()
    for iteration in range(iterations):
        couplings = softmax_of_agreements(votes, V, added, axis, leaky)
        if iteration < iterations - 1:
            s = votes.weighted_sum(couplings, weights)
            V = V + reference.squash(s if bias is None else s + bias, squash)
    return (B, N, J), couplings


@explains("uniform")
def _uniform_couplings(
    op: str,
    votes: Votes,
    iterations: int,
    logits: Tensor | None,
    input_weight: Tensor | None,
    axis: str,
    **options: Any,
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]: those of one iteration of dynamic routing."""
    return _couplings(op, votes, iterations=1, logits=None, input_weight=None, axis="output", **options)
