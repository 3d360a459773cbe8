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
    check_flag,
    check_floating,
    check_iterations,
    check_logits,
    check_shape,
    check_vectors,
    check_votes,
    of_every_item,
)
from ._declare import Differentiable, Output, settle
from ._flops import Shape, pass_flops
from .coupling_coefficients import Couplings, Votes, explains, widened


def check(op: str, u: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, iterations: int) -> Sizes:
    """Check the arguments of dynamic routing and return B, N, K, J, D."""
    check_floating(op, "u weight bias", u, weight, bias)
    check_vectors(op, u)
    sizes = check_votes(op, u, weight, mask)
    if bias is not None:
        check_shape(op, "bias", bias, "J, D", sizes[3], sizes[4])
    check_iterations(op, iterations)
    return sizes


def _outputs(
    op: str, u: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, iterations: int, *_: bool
) -> list[Output]:
    B, _N, _K, J, D = check(op, u, weight, bias, mask, iterations)
    s = "iterations, B, J, D", (iterations, B, J, D), accumulation_dtype(u.dtype)
    return [("B, J, D", (B, J, D), u.dtype), s]


def _outputs_with_logits(
    op: str,
    u: Tensor,
    weight: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    *_: bool,
) -> list[Output]:
    outputs = _outputs(op, u, weight, bias, mask, iterations)
    check_logits(op, logits, u, weight)
    return outputs


def _flops(u: Shape, weight: Shape, bias: Shape | None, mask: Shape | None, iterations: int, *_: bool) -> int:
    part = pass_flops(u, weight)
    # The first iteration adds the votes up. Each later one is a pass with agreements and a weighted sum.
    return part.total + (iterations - 1) * (part.votes + 2 * part.contraction)


def _gradient_flops(
    g_v: Shape,
    s: Shape,
    u: Shape,
    weight: Shape,
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


def _flops_with_logits(u: Shape, weight: Shape, logits: Shape, *others: Any) -> int:
    part, iterations = pass_flops(u, weight), others[2]
    # The couplings of the first iteration differ, but compare nothing: a weighted sum.
    return iterations * (part.votes + part.contraction) + (iterations - 1) * part.contraction


def _gradient_flops_with_logits(g_v: Shape, s: Shape, u: Shape, weight: Shape, logits: Shape, *others: Any) -> int:
    part, (_, _, iterations, _, detach, (g_u, g_weight, g_logits, _)) = pass_flops(u, weight), others
    later = iterations - 1
    flops = 0 if detach else later * (part.votes + 3 * part.contraction)
    if g_u or g_weight or (g_logits and not detach):
        # As without logits; the first iteration has an agreement with g_s too.
        contractions = 1 + min(later, 1) if detach else 2 + 4 * later
        flops += part.gradients(contractions, g_u, g_weight)
    return flops


_dynamic_routing = Differentiable(
    "dynamic_routing(Tensor u, Tensor weight, Tensor? bias, Tensor? mask, int iterations, bool leaky, bool detach)"
    " -> (Tensor v, Tensor s)",
    "dynamic_routing_backward(Tensor g_v, Tensor s, Tensor u, Tensor weight, Tensor? bias, Tensor? mask,"
    " int iterations, bool leaky, bool detach, bool[3] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_bias)",
    _outputs,
    batch={"u": 0, "mask": 0, "v": 0, "s": 1},
    flops=_flops,
    gradient_flops=_gradient_flops,
)
# An operator of its own, because there are no GPU kernels for it: a GPU then says that it uses the reference, and why.
_with_logits = Differentiable(
    "dynamic_routing_with_logits(Tensor u, Tensor weight, Tensor logits, Tensor? bias, Tensor? mask, int iterations,"
    " bool leaky, bool detach) -> (Tensor v, Tensor s)",
    "dynamic_routing_with_logits_backward(Tensor g_v, Tensor s, Tensor u, Tensor weight, Tensor logits, Tensor? bias,"
    " Tensor? mask, int iterations, bool leaky, bool detach, bool[4] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_logits, Tensor g_bias)",
    _outputs_with_logits,
    batch={"u": 0, "logits": 0, "mask": 0, "v": 0, "s": 1},
    flops=_flops_with_logits,
    gradient_flops=_gradient_flops_with_logits,
)


def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    logits: Tensor | None = None,
    bias: Tensor | None = None,
    leaky: bool = False,
    detach: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Routing by agreement (Sabour et al. 2017, procedure 1), in one pass for each iteration.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.
        iterations: at least 1; with 1 all couplings are equal (uniform routing), unless there are logits.
        logits: [N, J], [1, N, J] or [B, N, J], where routing begins: they are added to the agreements in every
            iteration, and the first couplings are their softmax. −∞ removes a pair of an input and an output capsule:
            its coupling and its gradients are 0. An input capsule whose logits are all −∞ sends nothing. +∞ and NaN
            make v of their batch items NaN. They have no GPU kernel: there the reference runs.
        bias: [J, D], added inside the squash of every iteration.
        leaky: give the softmax one more logit, which is always 0 and whose share is dropped.
        detach: let the gradient pass only through the votes of the last iteration, with the couplings as constants, so
            that the gradient of the logits is 0; by default it is exact.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives squash(bias), or 0.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes, devices or iterations.
        MemoryError: no memory for the workspace.
    """
    op = "dynamic_routing"
    if logits is None:
        u, weight, bias, mask = _dynamic_routing.settle(u, weight, bias, mask)
    else:
        u, weight, logits, bias, mask = settle(op, "u weight logits bias mask", 3, u, weight, logits, bias, mask)
    check_iterations(op, iterations)
    check_flag(op, "leaky", leaky)
    check_flag(op, "detach", detach)
    if logits is None:
        return _dynamic_routing(u, weight, bias, mask, iterations, leaky, detach)
    check(op, u, weight, bias, mask, iterations)
    logits = of_every_item(op, logits, u, weight)
    return _with_logits(u, weight, logits, bias, mask, iterations, leaky, detach)


@explains("dynamic")
def _couplings(
    op: str, votes: Votes, bias: Tensor | None, logits: Tensor | None, iterations: int, leaky: bool, **_: Any
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]; the logits are û · V, with V the sum of the output capsules of the iterations before."""
    B, N, _K, J, _D = check(op, votes.u, votes.weight, bias, votes.mask, iterations)
    if logits is not None:
        logits = of_every_item(op, logits, votes.u, votes.weight)
    zero = votes.zero()
    bias, added = widened(bias, logits)
    V = zero

    def couplings(part: slice, some: Tensor) -> Tensor:
        agreement = torch.einsum("bnjd,bjd->bnj", some, V)
        return reference.dynamic_couplings(agreement, leaky, None if added is None else added[:, part])

    for _iteration in range(iterations - 1):
        s = zero if bias is None else zero + bias
        for part, some in votes:
            s = s + torch.einsum("bnj,bnjd->bjd", couplings(part, some), some)
        V = V + reference.squash(s)
    return (B, N, J), couplings


@explains("uniform")
def _uniform_couplings(
    op: str, votes: Votes, iterations: int, logits: Tensor | None, **options: Any
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]: those of one iteration of dynamic routing."""
    return _couplings(op, votes, iterations=1, logits=None, **options)
