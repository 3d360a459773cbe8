"""coupling_coefficients: the function that hands over to the couplings of a routing, which stand in its own file.

Each routing registers its own with `explains`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backends import reference
from ..dtypes import accumulation_dtype
from ._checks import check_flag, fail, of_every_capsule, vote_sizes
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
    """The votes of u and weight, in the accumulation dtype, made in chunks of input capsules.

    Args:
        recomputed: whether autograd may see functions of the votes. It then keeps no votes, but makes them once more.
    """

    def __init__(self, u: Tensor, weight: Tensor | None, mask: Tensor | None, recomputed: bool = False) -> None:
        self.u, self.weight, self.mask = u, weight, mask
        self.dtype = accumulation_dtype(u.dtype)
        # Transforms and torch.compile do not take checkpoints everywhere; they keep the votes.
        hindered = torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
        self.recomputed = recomputed and not hindered

    @property
    def sizes(self) -> tuple[int, int]:
        """J and H."""
        J, D = vote_sizes(self.u, self.weight)
        return J, math.prod(self.u.shape[3 if self.weight is None else 2 : -1]) * D

    def _of(self, part: slice) -> Tensor:
        u, weight, mask = self.u, self.weight, self.mask
        matrices = weight
        if weight is not None:
            matrices = (weight[part] if weight.dim() == 4 else weight).to(self.dtype)
        present = None if mask is None else mask[:, part]
        return reference.affine_votes(u[:, part].to(self.dtype), matrices, present).flatten(start_dim=3)

    def each(self, function: Callable[[slice, Tensor], Tensor]) -> Iterator[tuple[slice, Tensor]]:
        """Yield `part, function(part, votes)` for every chunk.

        A part is a slice of input capsules; its votes are [B, n, J, H], H = P · D, and 0 where the mask says that there
        is no capsule.
        """
        step = max(1, _CHUNK // max(self.u.shape[0] * math.prod(self.sizes), 1))
        for i in range(0, self.u.shape[1], step):
            part = slice(i, i + step)

            def result(part: slice = part) -> Tensor:
                return function(part, self._of(part))

            yield part, checkpoint(result, use_reentrant=False) if self.recomputed else result()

    def total(self, function: Callable[[slice, Tensor], Tensor], start: Tensor) -> Tensor:
        """start + the sum of `function(part, votes)` over all chunks."""
        for _, x in self.each(function):
            start = start + x
        return start

    def weighted_sum(self, couplings: Couplings, input_weight: Tensor | None = None) -> Tensor:
        """Σ_i c_ij û_ij, [B, J, H], with the couplings [B, n, J] multiplied by the weights of the input capsules."""

        def of(part: slice, some: Tensor) -> Tensor:
            c = couplings(part, some)
            if input_weight is not None:
                c = c * input_weight[:, part, None]
            if self.mask is not None:
                c = c.masked_fill(~self.mask[:, part, None], 0)
            return torch.einsum("bnj,bnjd->bjd", c, some)

        return self.total(of, self.zero())

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

    if axis == "output":

        def over_outputs(part: slice, some: Tensor) -> Tensor:
            b = torch.einsum("bnjd,bjd->bnj", some, V)
            return reference.dynamic_couplings(b, leaky, None if logits is None else logits[:, part])

        return over_outputs

    def present(part: slice, some: Tensor) -> tuple[Tensor, Tensor]:
        """b, with the lowest number for pairs that are removed, because −∞ has no gradient; and which these are."""
        b = torch.einsum("bnjd,bjd->bnj", some, V)
        removed = torch.zeros_like(b, dtype=torch.bool)
        if votes.mask is not None:
            removed = removed | ~votes.mask[:, part, None]
        if logits is not None:
            removed = removed | (logits[:, part] == -torch.inf)
            b = b + logits[:, part]
        return torch.where(removed, torch.finfo(b.dtype).min, b), removed

    # log Σ_i exp(b_ij), chunk by chunk.
    log_sum = V.new_full(V.shape[:2], torch.finfo(V.dtype).min)
    for _, x in votes.each(lambda part, some: present(part, some)[0].logsumexp(dim=1)):
        log_sum = torch.logaddexp(log_sum, x)

    def over_inputs(part: slice, some: Tensor) -> Tensor:
        b, removed = present(part, some)
        return (b - log_sum[:, None]).exp().masked_fill(removed, 0)

    return over_inputs


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
    squash: str = "sabour",
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
    differentiable: bool = False,
) -> Tensor:
    """The coupling coefficients c that a routing ends with, for explanation or, with a gradient, for a loss.

    The votes are made in chunks of input capsules and never all held, neither here nor in the backward pass. That is
    plain PyTorch on every device, so it takes longer than the routing.

    Args:
        routing: "attention", "dynamic", "uniform", "self-attention", "em" or "step". The other arguments mean what they
            mean in its function; those of other routings are ignored.
        u: input capsules [B, N, K]; for EM routing their poses [B, N, K] or [B, N, P, K]; without a weight the votes.
        weight: transformation matrices [N, K, J, D], [T, K, J, D] by type, or [K, J, D] to share them; for dynamic
            routing and a routing step also [K, D]; None if u is the votes.
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
        squash: for dynamic routing.
        input_weight: [B, N], for attention, dynamic routing and self-attention. The couplings returned are not yet
            multiplied by it, so it matters to dynamic routing alone, where it changes the earlier output capsules.
        mask: bool [B, N], True where there is a capsule.
        differentiable: whether c has a gradient: exact, through all iterations. By default it has none.

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
        "input_weight": input_weight,
    }
    names = f"u weight? {' '.join(f'{name}?' for name in small)} mask?"
    u, weight, *settled, mask = settle(op, names, u, weight, *small.values(), mask)
    if routing not in _ROUTINGS:
        fail(op, f"routing is {routing!r}; expected one of {', '.join(map(repr, sorted(_ROUTINGS)))}")
    check_flag(op, "differentiable", differentiable)
    weight = of_every_capsule(u, weight)
    if routing == "step" and state is not None and state.dim() == 3:
        u, weight = _for_each_output(u, weight, state.shape[1])
    if routing == "dynamic" and logits is not None and logits.dim() > 1:
        u, weight = _for_each_output(u, weight, logits.shape[-1])
    with float32(u), torch.set_grad_enabled(differentiable and torch.is_grad_enabled()):
        votes = Votes(u, weight, mask, differentiable)
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
            squash=squash,
        )
        parts = [found.to(u.dtype) for _, found in votes.each(couplings)]
        if not parts:
            return u.new_empty(shape)
        c = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        return c if mask is None else c.masked_fill(~mask.reshape(*mask.shape, *[1] * (c.dim() - 2)), 0)


def _for_each_output(u: Tensor, weight: Tensor | None, J: int | None) -> tuple[Tensor, Tensor | None]:
    """Votes [B, N, 1, D] and a weight [K, D], expanded for J output capsules."""
    if J is not None and weight is None and u.dim() == 4 and u.shape[2] == 1:
        u = u.expand(-1, -1, J, -1)
    if J is not None and weight is not None and weight.dim() == 2:
        weight = weight[:, None].expand(-1, J, -1)
    return u, weight
