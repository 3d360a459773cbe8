"""Attention routing to more output capsules than a program can mix in registers, in plain PyTorch.

Mixing J output capsules is a product with a J × J matrix, which for large J is most of the work and is done best by
PyTorch's own matrix product. Only the votes of a few input capsules are held at a time, and they are changed in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The bytes of all that is held at a time, and how many tensors of the size of the votes that is: the votes, their
# couplings, two gradients, and the copies that a matrix product makes.
_TILE_BYTES, _HELD = 24_000_000, 6


def _tiles(
    u: Tensor, weight: Tensor | None, mask: Tensor | None, wide: torch.dtype
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """A slice of input capsules, their u [B, n, K], 0 where the mask is False, and their matrices [(n,) K, J, D].

    Without a weight u is the votes [B, N, J, D].
    """
    B, N = u.shape[:2]
    J, D = (u if weight is None else weight).shape[-2:]
    size = max(_TILE_BYTES // max(_HELD * B * J * D * wide.itemsize, 1), 1)
    for start in range(0, N, size):
        at = slice(start, start + size)
        own = u[:, at].to(wide)
        if mask is not None:
            own = torch.where(mask[:, at].reshape(B, -1, *[1] * (u.dim() - 2)), own, 0)
        yield at, own, None if weight is None else (weight[at] if weight.dim() == 4 else weight).to(wide)


def _couplings(
    u: Tensor, weight: Tensor | None, attn_weight: Tensor, attn_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The votes [B, n, J, D] and their couplings."""
    votes = u
    if weight is not None:
        votes = torch.einsum("bnk,nkjd->bnjd" if weight.dim() == 4 else "bnk,kjd->bnjd", u, weight)
    c = torch.einsum("mj,bnjd->bnmd", attn_weight, votes)
    if attn_bias is not None:
        c += attn_bias[:, None]
    c -= c.amax(dim=2, keepdim=True)
    c.exp_()
    c /= c.sum(dim=2, keepdim=True)
    return votes, c


def _weights(input_weight: Tensor, at: slice, mask: Tensor | None, wide: torch.dtype) -> Tensor:
    """The weights of some input capsules, [B, n, 1, 1]; 0 where the mask is False."""
    own = input_weight[:, at].to(wide)
    return (own if mask is None else torch.where(mask[:, at], own, 0))[:, :, None, None]


def forward(
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
) -> None:
    """s [B, J, D] = Σ_i w_i c_i · û_i."""
    total = torch.zeros_like(s, dtype=torch.float64)
    for at, own, matrices in _tiles(u, weight, mask, s.dtype):
        votes, c = _couplings(own, matrices, attn_weight, attn_bias)
        c.mul_(votes)  # masked capsules add 0, because their votes are 0
        if input_weight is not None:
            c.mul_(_weights(input_weight, at, mask, s.dtype))
        total += c.sum(dim=1)
    s.copy_(total)


def backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_attn_weight: Tensor | None,
    g_attn_bias: Tensor | None,
    g_input_weight: Tensor | None,
    g_s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
) -> None:
    """Fill the gradients that are not None; g_s [B, J, D]."""
    shared = weight if weight is not None and weight.dim() == 3 else attn_weight[0]
    to_weight, to_attn_weight, to_attn_bias = (
        torch.zeros_like(x, dtype=torch.float64) for x in (shared, attn_weight, attn_weight[0])
    )
    for at, own, matrices in _tiles(u, weight, mask, g_s.dtype):
        votes, c = _couplings(own, matrices, attn_weight, attn_bias)
        g = c * g_s[:, None]
        dz = g * votes
        mean = dz.sum(dim=2, keepdim=True)
        dz.addcmul_(c, mean, value=-1)
        del c
        if g_input_weight is not None:
            g_input_weight[:, at] = mean.sum(dim=(2, 3))  # masked capsules get 0, because their votes are 0
        if input_weight is not None:
            w = _weights(input_weight, at, mask, g_s.dtype)
            g *= w
            dz *= w
        to_attn_weight += torch.einsum("bnmd,bnjd->mj", dz, votes)
        to_attn_bias += dz.sum(dim=(0, 1, 3))
        g += torch.einsum("mj,bnmd->bnjd", attn_weight, dz)
        if mask is not None:
            g = torch.where(mask[:, at, None, None], g, 0)
        if weight is None or matrices is None:
            if g_u is not None:
                g_u[:, at] = g
            continue
        if g_u is not None:
            g_u[:, at] = torch.einsum("bnjd,nkjd->bnk" if weight.dim() == 4 else "bnjd,kjd->bnk", g, matrices)
        if g_weight is not None and weight.dim() == 4:
            g_weight[at] = torch.einsum("bnk,bnjd->nkjd", own, g)
        elif g_weight is not None:
            to_weight += torch.einsum("bnk,bnjd->kjd", own, g)
    if g_weight is not None and g_weight.dim() == 3:
        g_weight.copy_(to_weight)
    if g_attn_weight is not None:
        g_attn_weight.copy_(to_attn_weight)
    if g_attn_bias is not None:
        g_attn_bias.copy_(to_attn_bias)
