"""Self-attention routing (Efficient-CapsNet, Mazzia et al. 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.jit._trace import is_tracing

from ..backends import reference
from ..dtypes import accumulation_dtype
from ._checks import (
    Sizes,
    check_floating,
    check_number,
    check_pairs,
    check_shape,
    check_vectors,
    check_votes,
    of_every_capsule,
)
from ._declare import Differentiable, Output
from ._flops import Shape, pass_flops
from .coupling_coefficients import Couplings, Votes, explains, widened


def check(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Sizes:
    """Check the arguments of self-attention routing and return B, N, K, J, D."""
    check_floating(op, "u weight prior", u, weight, prior)
    check_vectors(op, u, weight)
    sizes = check_votes(op, u, weight, mask)
    if prior is not None:
        check_shape(op, "prior", prior, "N, J", sizes[1], sizes[3])
    check_pairs(op, None, input_weight, u, sizes[3])
    if not is_tracing():  # torch.jit.trace turns sizes into tensors, and with them the default scale
        check_number(op, "scale", scale)
    return sizes


def _outputs(op: str, u: Tensor, *others: Any) -> list[Output]:
    B, _, _, J, D = check(op, u, *others)
    sums = "B, J, D", (B, J, D), accumulation_dtype(u.dtype)
    return [("B, J, D", (B, J, D), u.dtype), sums, sums]


def _flops(u: Shape, weight: Shape | None, *_: Any) -> int:
    part = pass_flops(u, weight)
    # One pass for T, and one with agreements and a weighted sum.
    return part.total + part.votes + 2 * part.contraction


def _gradient_flops(
    g_v: Shape,
    total: Shape,
    s: Shape,
    u: Shape,
    weight: Shape | None,
    prior: Shape | None,
    input_weight: Shape | None,
    mask: Shape | None,
    scale: float,
    wanted: Sequence[bool],
) -> int:
    part, (g_u, g_weight, *_) = pass_flops(u, weight), wanted
    # A pass with the agreements with T and with g_s, and the sum H of δ û; then the agreements again, c g_s and δ T.
    return part.votes + 3 * part.contraction + part.gradients(4, g_u, g_weight)


_self_attention_routing = Differentiable(
    "self_attention_routing(Tensor u, Tensor? weight, Tensor? prior, Tensor? input_weight, Tensor? mask, float scale)"
    " -> (Tensor v, Tensor total, Tensor s)",
    "self_attention_routing_backward(Tensor g_v, Tensor total, Tensor s, Tensor u, Tensor? weight, Tensor? prior,"
    " Tensor? input_weight, Tensor? mask, float scale, bool[4] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_prior, Tensor g_input_weight)",
    _outputs,
    batch={"u": 0, "input_weight": 0, "mask": 0, "v": 0, "total": 0, "s": 0},
    flops=_flops,
    gradient_flops=_gradient_flops,
)


def self_attention_routing(
    u: Tensor,
    weight: Tensor | None,
    prior: Tensor | None = None,
    *,
    scale: float | None = None,
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Self-attention routing (Efficient-CapsNet, Mazzia et al. 2021), in two passes.

    T_j = Σ_i û_ij; c_ij = softmax_j(û_ij · T_j · scale) + prior_ij; v_j = squash(Σ_i c_ij û_ij), with the "efficient"
    squash. û_ij · T_j is the row sum of the paper's N×N attention matrix, which is never materialised.

    Args:
        u: input capsules [B, N, K]; without a weight the votes [B, N, J, D], which something else made.
        weight: transformation matrices [N, K, J, D]; [T, K, J, D] for T types of input capsules, N / T of each in a
            row; [K, J, D] to share them; None if u is the votes.
        prior: [N, J], added to the couplings after the softmax.
        scale: the factor of the logits; D**-0.5 by default.
        input_weight: [B, N], by which the couplings of an input capsule are multiplied, in the last sum alone: T_j, and
            with it the couplings, do not depend on it. That of a masked capsule has no effect.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives 0 and no gradient.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes, devices or scale.
        MemoryError: no memory for the workspace.
    """
    op = "self_attention_routing"
    u, weight, prior, input_weight, mask = _self_attention_routing.settle(u, weight, prior, input_weight, mask)
    weight = of_every_capsule(u, weight)
    if scale is None:
        scale = _default_scale(u, weight)
    else:
        check_number(op, "scale", scale)
    return _self_attention_routing(u, weight, prior, input_weight, mask, scale)


def _default_scale(u: Tensor, weight: Tensor | None) -> float:
    """D**-0.5; any number for an operand without a D above 0, which the operator refuses."""
    of = u if weight is None else weight
    return of.shape[-1] ** -0.5 if of.dim() and of.shape[-1] else 1.0


@explains("self-attention")
def _couplings(
    op: str, votes: Votes, prior: Tensor | None, scale: float | None, input_weight: Tensor | None, **_: Any
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J]."""
    scale = _default_scale(votes.u, votes.weight) if scale is None else scale
    B, N, _K, J, _D = check(op, votes.u, votes.weight, prior, input_weight, votes.mask, scale)
    (prior,) = widened(prior)
    total = votes.total(lambda part, some: some.sum(dim=1), votes.zero())

    def couplings(part: slice, some: Tensor) -> Tensor:
        return reference.self_attention_couplings(some, total, None if prior is None else prior[part], scale)

    return (B, N, J), couplings
