"""The routings in plain PyTorch: readable, differentiated by autograd, and materialising the votes.

This is the only oracle of the tests and the "naive routing" that the benchmarks compare with. It runs on any device and
any dtype. Symbols: u [B, N, K] input capsules, W [N, K, J, D] or [K, J, D], û [B, N, J, D] votes, c couplings,
v [B, J, D] output capsules.
"""

from __future__ import annotations

import torch
from torch import Tensor


def squash(s: Tensor, kind: str = "sabour") -> Tensor:
    """v = f(n) s with n = ‖s‖ along the last dimension. float16 and bfloat16 are computed in float32.

    sabour: f = n / (1 + n²) (Sabour et al. 2017, eq. 1). efficient: f = (1 − e^{−n}) / n (Mazzia et al. 2021, eq. 4).
    """
    x = s.float() if s.dtype in (torch.float16, torch.bfloat16) else s
    # Scaled to a largest component of 1, so that no square overflows or vanishes; the scale is a constant to autograd
    # because the length does not depend on it.
    scale = x.detach().abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_ones(())
    scale = torch.where(scale > 0, scale, 1)
    n = scale * torch.linalg.vector_norm(x / scale, dim=-1, keepdim=True)
    if kind == "sabour":
        # 1/(n + 1/n) where n² could overflow; each branch sees only lengths that it can take.
        long = n > 1
        factor = 1 / (torch.where(long, n, 1) + 1 / torch.where(long, n, 1))
        short = torch.where(long, 1, n)
        return (x * torch.where(long, factor, short / (1 + short * short))).to(s.dtype)
    small = n < 1e-3
    safe = torch.where(small, 1, n)
    near_0 = torch.where(small, n, 0)
    series = 1 - near_0 / 2 + near_0**2 / 6 - near_0**3 / 24
    return (x * torch.where(small, series, -torch.expm1(-safe) / safe)).to(s.dtype)


def affine_votes(u: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """û_ij = u_i W_ij; 0 where no capsule is, so that whatever stands there (a NaN, say) has no effect."""
    if mask is not None:
        u = torch.where(mask[:, :, None], u, 0)
        if weight.dim() == 4:
            weight = torch.where(mask.any(dim=0)[:, None, None, None], weight, 0)
    return torch.einsum("bnk,nkjd->bnjd" if weight.dim() == 4 else "bnk,kjd->bnjd", u, weight)


def attention_couplings(votes: Tensor, attn_weight: Tensor, attn_bias: Tensor | None) -> Tensor:
    """c [B, N, J, D]: a 1×1 convolution over the output capsules and a softmax over them (CardioCaps, eq. 4)."""
    z = torch.einsum("kj,bnjd->bnkd", attn_weight, votes)
    if attn_bias is not None:
        z = z + attn_bias[:, None]
    return z.softmax(dim=2)


def dynamic_couplings(logits: Tensor, leaky: bool) -> Tensor:
    """c [B, N, J]: softmax over the output capsules, with one more logit of 0 if leaky."""
    if not leaky:
        return logits.softmax(dim=2)
    leak = torch.zeros_like(logits[:, :, :1])
    return torch.cat([leak, logits], dim=2).softmax(dim=2)[:, :, 1:]


def _masked(c: Tensor, mask: Tensor | None) -> Tensor:
    """No coupling for the input capsules that are not there."""
    return c if mask is None else c * mask.reshape(*mask.shape, *[1] * (c.dim() - 2)).to(c.dtype)


def attention_routing(
    u: Tensor, weight: Tensor, attn_weight: Tensor, attn_bias: Tensor | None = None, mask: Tensor | None = None
) -> Tensor:
    """v = squash(Σ_i c_i · û_i), elementwise in D (CardioCaps, eq. 4)."""
    votes = affine_votes(u, weight, mask)
    c = _masked(attention_couplings(votes, attn_weight, attn_bias), mask)
    return squash((c * votes).sum(dim=1))


def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    iterations: int = 3,
    leaky: bool = False,
    detach: bool = False,
) -> Tensor:
    """Routing by agreement (Sabour et al. 2017, procedure 1); bias [J, D] is added inside the squash."""
    votes = affine_votes(u, weight, mask)
    agreeing = votes.detach() if detach else votes
    logits = torch.zeros_like(votes[..., 0])
    for iteration in range(iterations):
        last = iteration == iterations - 1
        c = _masked(dynamic_couplings(logits, leaky), mask)
        s = torch.einsum("bnj,bnjd->bjd", c, votes if last else agreeing)
        if bias is not None:
            s = s + (bias if last or not detach else bias.detach())
        v = squash(s)
        if not last:
            logits = logits + torch.einsum("bnjd,bjd->bnj", agreeing, v)
    return v
