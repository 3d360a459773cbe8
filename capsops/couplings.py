"""The coupling coefficients that a routing ends with, for a look inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from . import _ops
from .backends import reference
from .dtypes import accumulation_dtype
from .functional import float32, renormalised, settle

ROUTINGS = ("attention", "dynamic", "uniform", "self-attention", "em")

# Votes that are held at a time.
_CHUNK = 1 << 22

# Goes once through the input capsules: some of them at a time, and their votes [B, n, J, H].
Pass = Callable[[], Iterator[tuple[slice, Tensor]]]


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
    prior: Tensor | None = None,
    scale: float | None = None,
    activation: Tensor | None = None,
    beta_u: Tensor | None = None,
    beta_a: Tensor | None = None,
    inverse_temperature: float | Sequence[float] = 0.01,
    renormalise: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The coupling coefficients c that a routing ends with, for explanation; without gradient.

    The votes are made in chunks of input capsules and never all held.

    Args:
        routing: "attention", "dynamic", "uniform", "self-attention" or "em". The other arguments are those of the
            routing function; of EM routing u is the pose.

    Returns:
        c [B, N, J]; for attention [B, N, J, D]; for EM the responsibilities r of the last iteration. 0 where the mask
        says there is no capsule. Sums to 1 over J; to less if leaky, by the leak's share; to more with a prior, by its
        sum.

    Raises:
        ValueError: an unknown routing, or what the routing function itself refuses.
    """
    op = "coupling_coefficients"
    names = "u weight attn_weight attn_bias bias prior activation beta_u beta_a mask"
    tensors = settle(op, names, 2, u, weight, attn_weight, attn_bias, bias, prior, activation, beta_u, beta_a, mask)
    u, weight, attn_weight, attn_bias, bias, prior, activation, beta_u, beta_a, mask = tensors
    wide = accumulation_dtype(u.dtype)

    def votes() -> Iterator[tuple[slice, Tensor]]:
        """0 where no capsule is."""
        rows = u.shape[2] if u.dim() == 4 else 1
        step = max(1, _CHUNK // max(u.shape[0] * rows * weight.shape[-2] * weight.shape[-1], 1))
        for i in range(0, u.shape[1], step):
            part = slice(i, i + step)
            matrices = (weight[part] if weight.dim() == 4 else weight).to(wide)
            there = None if mask is None else mask[:, part]
            yield part, reference.affine_votes(u[:, part].to(wide), matrices, there).flatten(start_dim=3)

    def widen(*small: Tensor | None) -> list[Tensor]:
        return [x if x is None else x.to(wide) for x in small]  # type: ignore[misc]

    with float32(u):
        if routing == "attention":
            _need(op, "attention routing", attn_weight=attn_weight)
            B, N, _, J, D = _ops.check_attention(op, u, weight, attn_weight, attn_bias, mask)  # type: ignore[arg-type]
            size: tuple[int, ...] = (B, N, J, D)
            couplings = _attention(*widen(attn_weight, attn_bias))
        elif routing in ("dynamic", "uniform"):
            iterations = 1 if routing == "uniform" else iterations
            B, N, _, J, D = _ops.check_dynamic(op, u, weight, bias, mask, iterations)
            size = (B, N, J)
            zero = u.new_zeros(B, J, D, dtype=wide)
            couplings = _dynamic(votes, zero, iterations, leaky, *widen(bias))
        elif routing == "self-attention":
            B, N, _, J, D = _ops.check_self_attention(op, u, weight, prior, mask)
            scale = D**-0.5 if scale is None else scale
            _ops.check_number(op, "scale", scale)
            size = (B, N, J)
            couplings = _self_attention(votes, u.new_zeros(B, J, D, dtype=wide), scale, *widen(prior))
        elif routing == "em":
            _need(op, "EM routing", activation=activation, beta_u=beta_u, beta_a=beta_a)
            temperatures = _ops.inverse_temperatures(op, inverse_temperature, iterations)
            _ops.check_flag(op, "renormalise", renormalise)
            B, N, _, J, D = _ops.check_em(op, u, activation, weight, beta_u, beta_a, mask)  # type: ignore[arg-type]
            size = (B, N, J)
            activation, beta_u, beta_a = widen(activation, beta_u, beta_a)
            if mask is not None:
                activation = torch.where(mask, activation, 0)
            if renormalise:
                activation = renormalised(activation)
            zero = u.new_zeros(B, J, D * (u.shape[2] if u.dim() == 4 else 1), dtype=wide)
            couplings = _em(votes, zero, activation, beta_u, beta_a, temperatures)
        else:
            raise ValueError(f"{op}: routing is {routing!r}; allowed are {', '.join(map(repr, ROUTINGS))}")

        c: Tensor | None = None
        for part, some in votes():
            found = couplings(part, some)
            if c is None:
                # Of the couplings, not of u: under torch.func.vmap u may be the same for the whole batch.
                c = found.new_empty(size, dtype=u.dtype)
            c[:, part] = found
    if c is None:
        return u.new_empty(size)
    return c if mask is None else c.masked_fill_(~mask.reshape(*mask.shape, *[1] * (c.dim() - 2)), 0)


def _need(op: str, routing: str, **tensors: Tensor | None) -> None:
    for name, x in tensors.items():
        if x is None:
            raise ValueError(f"{op}: {name} is None; {routing} needs it")


# Of some input capsules and their votes, the couplings.
Couplings = Callable[[slice, Tensor], Tensor]


def _attention(attn_weight: Tensor, attn_bias: Tensor | None) -> Couplings:
    return lambda part, votes: reference.attention_couplings(votes, attn_weight, attn_bias)


def _dynamic(each: Pass, zero: Tensor, iterations: int, leaky: bool, bias: Tensor | None) -> Couplings:
    """The logits are û · V, with V the sum of the output capsules of the iterations before."""
    V = zero

    def couplings(part: slice, votes: Tensor) -> Tensor:
        return reference.dynamic_couplings(torch.einsum("bnjd,bjd->bnj", votes, V), leaky)

    for _ in range(iterations - 1):
        s = zero if bias is None else zero + bias
        for part, votes in each():
            s = s + torch.einsum("bnj,bnjd->bjd", couplings(part, votes), votes)
        V = V + reference.squash(s)
    return couplings


def _self_attention(each: Pass, zero: Tensor, scale: float, prior: Tensor | None) -> Couplings:
    total = zero
    for _, votes in each():
        total = total + votes.sum(dim=1)
    return lambda part, votes: reference.self_attention_couplings(
        votes, total, None if prior is None else prior[part], scale
    )


def _em(
    each: Pass,
    zero: Tensor,
    activation: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    inverse_temperatures: Sequence[float],
) -> Couplings:
    """The Gaussians of every iteration but the last, in two passes each: the mean, then the variance about it."""
    gaussians: tuple[Tensor, Tensor, Tensor] | None = None  # mean, variance, log activation

    def responsibilities(part: slice, votes: Tensor) -> Tensor:
        if gaussians is None:
            return torch.full_like(votes[..., 0], 1 / votes.shape[2])
        return reference.em_responsibilities(votes, *gaussians)

    for inverse_temperature in inverse_temperatures[:-1]:
        support, moment, spread = zero[:, :, 0], zero, zero
        for part, votes in each():
            w = responsibilities(part, votes) * activation[:, part, None]
            support = support + w.sum(dim=1)
            moment = moment + torch.einsum("bnj,bnjh->bjh", w, votes)
        mean = moment / (support + reference.EM_EPSILON)[:, :, None]
        for part, votes in each():
            w = responsibilities(part, votes) * activation[:, part, None]
            spread = spread + torch.einsum("bnj,bnjh->bjh", w, (votes - mean[:, None]).square())
        variance = spread / (support + reference.EM_EPSILON)[:, :, None] + reference.EM_EPSILON
        logit = inverse_temperature * (beta_a - reference.em_cost(support, variance, beta_u))
        gaussians = mean, variance, torch.nn.functional.logsigmoid(logit)
    return responsibilities
