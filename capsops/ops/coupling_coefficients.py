"""coupling_coefficients: the function that hands over to the couplings of a routing, which stand in its own file.

Each routing registers its own with `explains`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..dtypes import accumulation_dtype
from ._checks import fail, vote_sizes
from ._declare import float32, settle

# How many numbers of the votes are held at a time.
_CHUNK = 1 << 22

Couplings = Callable[[slice, Tensor], Tensor]
"""couplings(part, votes): the couplings of the input capsules in `part`, from their votes [B, n, J, H]."""

_ROUTINGS: dict[str, Callable[..., tuple[tuple[int, ...], Couplings]]] = {}


def explains(routing: str) -> Callable[..., Any]:
    """Register the couplings of a routing.

    The decorated function takes `op`, the `Votes` and, by name, the arguments of `coupling_coefficients` after weight.
    It checks them and returns the shape of c and its `Couplings`.
    """

    def register(function: Any) -> Any:
        _ROUTINGS[routing] = function
        return function

    return register


class Votes:
    """The votes of u and weight, in the accumulation dtype. Iterating makes them in chunks of input capsules.

    Each iteration yields a slice of input capsules and their votes [B, n, J, H], H = P · D, which are 0 where the mask
    says that there is no capsule.
    """

    def __init__(self, u: Tensor, weight: Tensor | None, mask: Tensor | None) -> None:
        self.u, self.weight, self.mask = u, weight, mask
        self.dtype = accumulation_dtype(u.dtype)

    @property
    def sizes(self) -> tuple[int, int]:
        """J and H."""
        J, D = vote_sizes(self.u, self.weight)
        return J, math.prod(self.u.shape[3 if self.weight is None else 2 : -1]) * D

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        u, weight, mask = self.u, self.weight, self.mask
        step = max(1, _CHUNK // max(u.shape[0] * math.prod(self.sizes), 1))
        for i in range(0, u.shape[1], step):
            part = slice(i, i + step)
            matrices = weight
            if weight is not None:
                matrices = (weight[part] if weight.dim() == 4 else weight).to(self.dtype)
            present = None if mask is None else mask[:, part]
            yield part, reference.affine_votes(u[:, part].to(self.dtype), matrices, present).flatten(start_dim=3)

    def zero(self) -> Tensor:
        """A sum over the input capsules to begin with, [B, J, H]."""
        return self.u.new_zeros(self.u.shape[0], *self.sizes, dtype=self.dtype)


def check_given(op: str, routing: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that a routing needs and that was not given."""
    for name, x in tensors.items():
        if x is None:
            fail(op, f"{name} is None; expected a tensor for {routing}")


def widened(*operands: Tensor | None) -> Any:
    """Small operands in the accumulation dtype; None stays None."""
    return [x if x is None else x.to(accumulation_dtype(x.dtype)) for x in operands]


def softmax_of_agreements(votes: Votes, V: Tensor, logits: Tensor | None, axis: str, leaky: bool = False) -> Couplings:
    """The couplings with the logits û · V + logits, V [B, J, D] and logits [B, N, J] or None."""

    def logits_of(part: slice, some: Tensor) -> Tensor:
        b = torch.einsum("bnjd,bjd->bnj", some, V)
        return b if logits is None else b + logits[:, part]

    if axis == "output":

        def over_outputs(part: slice, some: Tensor) -> Tensor:
            b = torch.einsum("bnjd,bjd->bnj", some, V)
            return reference.dynamic_couplings(b, leaky, None if logits is None else logits[:, part])

        return over_outputs

    def present(part: slice, b: Tensor) -> Tensor:
        return b if votes.mask is None else b.masked_fill(~votes.mask[:, part, None], -torch.inf)

    # log Σ_i exp(b_ij), chunk by chunk; −∞ where an output capsule has no pairs.
    log_sum = V.new_full(V.shape[:2], -torch.inf)
    for part, some in votes:
        log_sum = torch.logaddexp(log_sum, present(part, logits_of(part, some)).logsumexp(dim=1))

    def over_inputs(part: slice, some: Tensor) -> Tensor:
        b = present(part, logits_of(part, some))
        return (b - log_sum[:, None]).exp().masked_fill(b == -torch.inf, 0)

    return over_inputs


@torch.no_grad()
def coupling_coefficients(
    routing: str,
    u: Tensor,
    weight: Tensor | None,
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
    state: Tensor | None = None,
    logits: Tensor | None = None,
    axis: str = "output",
    mask: Tensor | None = None,
) -> Tensor:
    """The coupling coefficients c that a routing ends with, for explanation; without gradient.

    The votes are made in chunks of input capsules and never all held.

    Args:
        routing: "attention", "dynamic", "uniform", "self-attention", "em" or "step". The other arguments mean what they
            mean in its function; those of other routings are ignored.
        u: input capsules [B, N, K]; for EM routing their poses [B, N, K] or [B, N, P, K]; without a weight the votes.
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them; None if u is the votes.
        attn_weight: [J, J], for attention, which needs it.
        attn_bias: [J], for attention.
        iterations: for dynamic and EM routing.
        bias: [J, D], for dynamic and uniform routing.
        leaky: for dynamic routing.
        prior: [N, J], for self-attention.
        scale: for self-attention.
        activation: [B, N], for EM routing, which needs it.
        beta_u: [J], for EM routing, which needs it.
        beta_a: [J], for EM routing, which needs it.
        inverse_temperature: for EM routing.
        renormalise: for EM routing.
        state: [B, J, D], for a routing step, which needs it.
        logits: [N, J], [1, N, J] or [B, N, J], for dynamic routing and a routing step.
        axis: "output" or "input", for dynamic routing and a routing step.
        mask: bool [B, N], True where there is a capsule.

    Returns:
        c [B, N, J]; for attention [B, N, J, D]; for EM the responsibilities r of the last iteration. 0 where the mask
        says that there is no capsule. Sums to 1 over J, with axis "input" over N; if leaky, to less, by the leak's
        share; with a prior, to more, by the prior's sum; 0 where all logits are −∞.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: an unknown routing, or arguments that the routing function itself refuses.
    """
    op = "coupling_coefficients"
    small = {
        "attn_weight": attn_weight,
        "attn_bias": attn_bias,
        "bias": bias,
        "prior": prior,
        "activation": activation,
        "beta_u": beta_u,
        "beta_a": beta_a,
        "state": state,
        "logits": logits,
    }
    names = f"u weight? {' '.join(f'{name}?' for name in small)} mask?"
    u, weight, *settled, mask = settle(op, names, u, weight, *small.values(), mask)
    if routing not in _ROUTINGS:
        fail(op, f"routing is {routing!r}; expected one of {', '.join(map(repr, _ROUTINGS))}")
    votes = Votes(u, weight, mask)
    with float32(u):
        shape, couplings = _ROUTINGS[routing](
            op,
            votes,
            **dict(zip(small, settled, strict=True)),
            iterations=iterations,
            leaky=leaky,
            scale=scale,
            inverse_temperature=inverse_temperature,
            renormalise=renormalise,
            axis=axis,
        )
        c: Tensor | None = None
        for part, some in votes:
            found = couplings(part, some)
            if c is None:
                # From the couplings, not from u: under torch.func.vmap u may be the same for the whole batch.
                c = found.new_empty(shape, dtype=u.dtype)
            c[:, part] = found
    if c is None:
        return u.new_empty(shape)
    return c if mask is None else c.masked_fill_(~mask.reshape(*mask.shape, *[1] * (c.dim() - 2)), 0)
