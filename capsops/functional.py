"""The functions a user calls.

Each checks its arguments, picks a backend and is differentiable. Symbols: B batch, N input capsules, K their dimension,
J output capsules, D their dimension.

dtypes: float32, bfloat16 and float16 with sums kept in float32; float64 throughout. All floating arguments of one call
must have the same dtype and device.

Autocast: every function here runs in float32 (inputs of lower precision are cast up, as autocast does for norms and
softmax). The transformation matrices are by far the largest operand: casting them down would cost more than it saves.

Second derivatives: the compiled backends raise an error on double backward; `use_backend("reference")` has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import _ops, backends
from .backends import reference
from .dtypes import LOW_PRECISION, accumulation_dtype

# Votes that `coupling_coefficients` holds at a time.
_CHUNK = 1 << 22


def _settle(op: str, optional: dict[str, Tensor | None] | None = None, **tensors: Tensor) -> tuple[Any, ...]:
    """The tensors, then the optional ones, by the autocast rule. Raises TypeError for what is no tensor."""
    for name, x in (*tensors.items(), *(optional or {}).items()):
        if x is not None or name in tensors:
            _ops.check_tensor(op, name, x)
    first = next(iter(tensors))
    _ops.check_floating(op, **{first: tensors[first]})  # before a backend is asked whether it takes its dtype
    values = (*tensors.values(), *(optional or {}).values())
    device = values[0].device.type  # type: ignore[union-attr]
    if device == "meta" or not torch.is_autocast_enabled(device):
        return values
    return tuple(x.float() if isinstance(x, Tensor) and x.dtype in LOW_PRECISION else x for x in values)


def _plain(x: Tensor) -> bool:
    """Whether the reference takes tensors like this one."""
    return backends.select(x.device, x.dtype) == "reference"


def _float32(x: Tensor) -> torch.autocast:
    """No autocast inside; what should be in float32 already is."""
    return torch.autocast(x.device.type, enabled=False)


def squash(s: Tensor, dim: int = -1, kind: str = "sabour") -> Tensor:
    """Shrink vectors to a length below 1, keeping their direction.

    Args:
        s: any shape with at least one dimension.
        dim: the dimension that holds the vectors' components.
        kind: "sabour": n²/(1+n²) · s/n with n = ‖s‖ (Sabour et al. 2017, eq. 1); "efficient": (1 − e^{−n}) · s/n
            (Mazzia et al. 2021, eq. 4).

    Returns:
        v, of the shape and dtype of s. Finite, with a finite gradient, for every finite s, including 0.

    Raises:
        ValueError: a wrong dtype, dim or kind.
    """
    (s,) = _settle("squash", s=s)
    _ops.check_squash("squash", s, kind)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -s.dim() <= dim < s.dim():
        allowed = f"{-s.dim()} … {s.dim() - 1}"
        raise ValueError(f"squash: dim is {dim!r}; s has {s.dim()} dimensions, so allowed are {allowed}")
    last = dim in (-1, s.dim() - 1)
    x = s if last else s.movedim(dim, -1)
    if _plain(s):
        with _float32(s):
            v = reference.squash(x, kind)
    else:
        v = _ops.Squash.apply(x, kind)
    return v if last else v.movedim(-1, dim)


def affine_votes(u: Tensor, weight: Tensor) -> Tensor:
    """The votes û_ij = u_i W_ij, materialised. For inspection: the routings never hold them.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.

    Returns:
        votes [B, N, J, D].

    Raises:
        ValueError: wrong shapes, dtypes or devices.
    """
    u, weight = _settle("affine_votes", u=u, weight=weight)
    if _plain(u):
        _ops.check_votes("affine_votes", u, weight)
        with _float32(u):
            return reference.affine_votes(u, weight)
    return _ops.AffineVotes.apply(u, weight)


def attention_routing(
    u: Tensor, weight: Tensor, attn_weight: Tensor, attn_bias: Tensor | None = None, *, mask: Tensor | None = None
) -> Tensor:
    """Attention routing (CardioCaps, eq. 4): v = squash(Σ_i softmax(conv(û_i)) · û_i) in one pass.

    The convolution is 1×1 over the output capsules, the softmax runs over them, both for each component d alone:
    z_kd = Σ_j attn_weight_kj û_jd + attn_bias_k.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.
        attn_weight: [J, J]. attn_bias: [J].
        mask: bool [B, N], True where there is a capsule. A batch item without any gives 0 and no gradient.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        ValueError: wrong shapes, dtypes or devices. MemoryError: no room for the work space (a few MB).
    """
    op = "attention_routing"
    optional = {"attn_bias": attn_bias, "mask": mask}
    u, weight, attn_weight, attn_bias, mask = _settle(op, optional, u=u, weight=weight, attn_weight=attn_weight)
    if _plain(u):
        _ops.check_attention(op, u, weight, attn_weight, attn_bias, mask)
        with _float32(u):
            return reference.attention_routing(u, weight, attn_weight, attn_bias, mask)
    return _ops.AttentionRouting.apply(u, weight, attn_weight, attn_bias, mask)


def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    bias: Tensor | None = None,
    leaky: bool = False,
    detach: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Routing by agreement (Sabour et al. 2017, procedure 1), one pass an iteration.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.
        iterations: at least 1; with 1 all couplings are equal (uniform routing).
        bias: [J, D], added inside the squash of every iteration.
        leaky: the softmax has one more logit, always 0, whose share goes nowhere.
        detach: the gradient passes only through the last iteration's votes and takes the couplings as constants; by
            default it is exact.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives squash(bias), or 0.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        ValueError: wrong shapes, dtypes, devices or iterations. MemoryError: no room for the work space.
    """
    op = "dynamic_routing"
    u, weight, bias, mask = _settle(op, {"bias": bias, "mask": mask}, u=u, weight=weight)
    _ops.check_iterations(op, iterations)
    _ops.check_flags(op, leaky=leaky, detach=detach)
    if _plain(u):
        _ops.check_dynamic(op, u, weight, bias, mask, iterations)
        with _float32(u):
            return reference.dynamic_routing(u, weight, bias, mask, iterations, leaky, detach)
    return _ops.DynamicRouting.apply(u, weight, bias, mask, iterations, leaky, detach)


@torch.no_grad()
def coupling_coefficients(
    routing: str,
    u: Tensor,
    weight: Tensor,
    attn_weight: Tensor | None = None,
    attn_bias: Tensor | None = None,
    *,
    iterations: int = 3,
    bias: Tensor | None = None,
    leaky: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The coupling coefficients c that a routing ends with, for explanation; without gradient.

    The votes are made in chunks of input capsules and never all held.

    Args:
        routing: "attention", "dynamic" or "uniform". The other arguments are those of the routing function.

    Returns:
        c [B, N, J]; for attention [B, N, J, D]. 0 where the mask says there is no capsule. Sums to 1 over J (to
        less if leaky, by the leak's share).

    Raises:
        ValueError: an unknown routing, or what the routing function itself refuses.
    """
    op = "coupling_coefficients"
    optional = {"attn_weight": attn_weight, "attn_bias": attn_bias, "bias": bias, "mask": mask}
    u, weight, attn_weight, attn_bias, bias, mask = _settle(op, optional, u=u, weight=weight)
    if routing == "attention":
        if attn_weight is None:
            raise ValueError(f"{op}: attn_weight is None; attention routing needs it, [J, J]")
        B, N, _, J, D = _ops.check_attention(op, u, weight, attn_weight, attn_bias, mask)
        c = u.new_empty(B, N, J, D)
    elif routing in ("dynamic", "uniform"):
        iterations = 1 if routing == "uniform" else iterations
        B, N, _, J, D = _ops.check_dynamic(op, u, weight, bias, mask, iterations)
        c = u.new_empty(B, N, J)
    else:
        raise ValueError(f"{op}: routing is {routing!r}; allowed are 'attention', 'dynamic' and 'uniform'")

    wide = accumulation_dtype(u.dtype)
    attn_weight, attn_bias, bias = (x if x is None else x.to(wide) for x in (attn_weight, attn_bias, bias))

    def chunks() -> Iterator[tuple[slice, Tensor]]:
        """The votes of some input capsules at a time, 0 where no capsule is."""
        step = max(1, _CHUNK // max(B * J * D, 1))
        for i in range(0, N, step):
            part = slice(i, i + step)
            matrices = weight[part] if weight.dim() == 4 else weight
            yield (
                part,
                reference.affine_votes(u[:, part].to(wide), matrices.to(wide), None if mask is None else mask[:, part]),
            )

    def couplings(votes: Tensor) -> Tensor:
        if routing == "attention":
            return reference.attention_couplings(votes, attn_weight, attn_bias)  # type: ignore[arg-type]
        return reference.dynamic_couplings(torch.einsum("bnjd,bjd->bnj", votes, V), leaky)

    with _float32(u):
        # The logits are û · V, with V the sum of the output capsules of the iterations before.
        V = torch.zeros(B, J, D, dtype=wide, device=u.device)
        for _ in range(iterations - 1 if routing == "dynamic" else 0):
            s = torch.zeros_like(V) if bias is None else bias.expand(B, J, D).clone()
            for _part, votes in chunks():
                s += torch.einsum("bnj,bnjd->bjd", couplings(votes), votes)
            V = V + reference.squash(s)
        for part, votes in chunks():
            c[:, part] = couplings(votes)
    if mask is not None:
        c[~mask] = 0
    return c
