"""Attention routing (CardioCaps, eq. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backends import reference
from ..dtypes import accumulation_dtype
from ._checks import (
    Sizes,
    check_choice,
    check_floating,
    check_pairs,
    check_shape,
    check_vectors,
    check_votes,
    of_every_capsule,
    vote_sizes,
)
from ._declare import Differentiable, Output
from ._flops import Shape, pass_flops
from .coupling_coefficients import Couplings, Votes, check_given, explains, widened
from .squash import ROUTING_SQUASHES


def check(
    op: str,
    u: Tensor,
    weight: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
    kind: str = "sabour",
) -> Sizes:
    """Check the arguments of attention routing and return B, N, K, J, D."""
    check_floating(op, "u weight attn_weight attn_bias", u, weight, attn_weight, attn_bias)
    check_vectors(op, u, weight)
    sizes = check_votes(op, u, weight, mask)
    J = sizes[3]
    check_shape(op, "attn_weight", attn_weight, "J, J", J, J)
    if attn_bias is not None:
        check_shape(op, "attn_bias", attn_bias, "J", J)
    check_pairs(op, None, input_weight, u, J)
    check_choice(op, "squash", kind, ROUTING_SQUASHES)
    return sizes


def _outputs(op: str, u: Tensor, *others: Any) -> list[Output]:
    B, _, _, J, D = check(op, u, *others)
    return [("B, J, D", (B, J, D), u.dtype), ("B, J, D", (B, J, D), accumulation_dtype(u.dtype))]


def _flops(u: Shape, weight: Shape | None, *_: Any) -> int:
    part, J = pass_flops(u, weight), vote_sizes(u, weight)[0]
    # The convolution mixes J output capsules into each of J; then a weighted sum.
    return part.votes + (J + 1) * part.contraction


def _gradient_flops(
    g_v: Shape,
    s: Shape,
    u: Shape,
    weight: Shape | None,
    attn_weight: Shape,
    attn_bias: Shape | None,
    input_weight: Shape | None,
    mask: Shape | None,
    kind: str,
    wanted: Sequence[bool],
) -> int:
    part, J, (g_u, g_weight, *g_attention, _) = pass_flops(u, weight), vote_sizes(u, weight)[0], wanted
    # The convolution and its transpose, the products with g_s, the term c g_s, and the gradient of the convolution.
    return part.gradients(2 * J + 2 + J * any(g_attention), g_u, g_weight)


_attention_routing = Differentiable(
    "attention_routing(Tensor u, Tensor? weight, Tensor attn_weight, Tensor? attn_bias, Tensor? input_weight,"
    " Tensor? mask, str kind) -> (Tensor v, Tensor s)",
    "attention_routing_backward(Tensor g_v, Tensor s, Tensor u, Tensor? weight, Tensor attn_weight, Tensor? attn_bias,"
    " Tensor? input_weight, Tensor? mask, str kind, bool[5] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_attn_weight, Tensor g_attn_bias, Tensor g_input_weight)",
    _outputs,
    batch={"u": 0, "input_weight": 0, "mask": 0, "v": 0, "s": 0},
    flops=_flops,
    gradient_flops=_gradient_flops,
)


def attention_routing(
    u: Tensor,
    weight: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None = None,
    *,
    squash: str = "sabour",
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention routing (CardioCaps, eq. 4): v = squash(Σ_i softmax(conv(û_i)) · û_i) in one pass.

    The convolution is 1×1 over the output capsules, and the softmax runs over them, both for each component d
    separately: z_kd = Σ_j attn_weight_kj û_jd + attn_bias_k.

    Args:
        u: input capsules [B, N, K]; without a weight the votes [B, N, J, D], which something else made.
        weight: transformation matrices [N, K, J, D]; [T, K, J, D] for T types of input capsules, N / T of each in a
            row; [K, J, D] to share them; None if u is the votes.
        attn_weight: weight [J, J] of the convolution.
        attn_bias: bias [J] of the convolution.
        squash: as in `dynamic_routing`.
        input_weight: [B, N], by which the couplings of an input capsule are multiplied after the softmax. That of a
            masked capsule has no effect.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives 0 and no gradient.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes or devices, an unknown squash.
        MemoryError: no memory for the workspace (a few MB).
    """
    u, weight, *others = _attention_routing.settle(u, weight, attn_weight, attn_bias, input_weight, mask)
    return _attention_routing(u, of_every_capsule(u, weight), *others, squash)


@explains("attention")
def _couplings(
    op: str,
    votes: Votes,
    attn_weight: Tensor | None,
    attn_bias: Tensor | None,
    input_weight: Tensor | None,
    **_: Any,
) -> tuple[tuple[int, ...], Couplings]:
    """c [B, N, J, D]."""
    check_given(op, "attention routing", attn_weight=attn_weight)
    given = attn_weight, attn_bias, input_weight, votes.mask
    B, N, _K, J, D = check(op, votes.u, votes.weight, *given)  # type: ignore[arg-type]
    mix, bias = widened(attn_weight, attn_bias)
    return (B, N, J, D), lambda part, some: reference.attention_couplings(some, mix, bias)
