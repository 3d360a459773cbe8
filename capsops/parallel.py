"""Capsule parallelism: the input capsules of a routing, and their matrices, split over the ranks of a process group.

The input capsules meet only in sums over them, s_j = Σ_i c_ij û_ij. Rank r holds the capsules i of its part, with their
u_i and W_i. It computes its part of the sum, and the parts are added: B · J · D numbers in each pass, forward and
backward. The matrices, their gradients and the optimiser's state are never sent, and no rank holds those of another.

    part = parallel.part_of_rank(N)
    v = parallel.dynamic_routing(u[:, part], weight[part])    # v is the same on every rank

Every rank has the same batch items and gets the same v, and everything that is computed from v must be the same on
every rank, for its gradient is not sent either. Where the rest of the network is split over the batch,
`capsules_of_rank` and `items_of_rank` pass from one split to the other. `capsops.nn.CapsuleLayer(…, process_group=…)`
is the layer.

Parts are added in the order of the ranks, so results do not depend on which arrives first. In float16 and bfloat16 they
are rounded before they are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import functional
from .dtypes import accumulation_dtype
from .ops import dynamic, self_attention
from .ops._checks import (
    check_axis,
    check_choice,
    check_flag,
    check_iterations,
    check_one_matrix,
    check_pairs,
    check_tensors,
    fail,
    of_every_item,
    vote_sizes,
)
from .ops._declare import settle
from .ops.squash import ROUTING_SQUASHES, squash_routed

__all__ = [
    "attention_routing",
    "capsules_of_rank",
    "dynamic_routing",
    "items_of_rank",
    "join_parts",
    "part_of_rank",
    "self_attention_routing",
]

Group = Any
"""A process group of torch.distributed, or None for that of all ranks."""


# ---- parts --------------------------------------------------------------------------------------------------------


def part_of_rank(capsules: int, group: Group = None, rank: int | None = None) -> slice:
    """Which of the input capsules a rank holds: a run of them, as long as the others' or shorter by one.

    Args:
        capsules: N, of all ranks together.
        group: a process group; None for that of all ranks.
        rank: in the group; by default this process's.
    """
    ranks, own = _place("part_of_rank", group)
    r = own if rank is None else rank
    size, longer = divmod(capsules, ranks)
    begin = r * size + min(r, longer)
    return slice(begin, begin + size + (r < longer))


def join_parts(x: Tensor, group: Group = None, dim: int = 0) -> Tensor:
    """The parts of all ranks one after the other along a dimension, on every rank; without a gradient.

    For checkpoints: with W of the layer it is the weight of a layer that is not split.
    """
    return torch.cat(_gather_runs(x.detach().movedim(dim, 0), group)).movedim(0, dim)


def capsules_of_rank(u: Tensor, group: Group = None) -> Tensor:
    """From a split of the batch to a split of the input capsules: [B of this rank, N, K] -> [B, N of this rank, K].

    Each rank sends the others what they hold of its items: B · N · K numbers in all, but its own part. The batches of
    the ranks follow one another in the result. The ranks may have different numbers of items.

    With `items_of_rank` behind the routing, gradients are those of the mean of the ranks' losses, as
    DistributedDataParallel has them: that of u is what the rank's own loss gives, because DistributedDataParallel
    divides it later, and those of the layer's parameters are divided already.
    """
    check_tensors("capsules_of_rank", "u", u)
    if u.dim() < 2:
        fail("capsules_of_rank", f"u has shape {list(u.shape)}; expected [B, N, …]")
    return _CapsulesOfRank.apply(u, group)


def items_of_rank(v: Tensor, items: int, group: Group = None) -> Tensor:
    """From all batch items to those of this rank: [B, …] -> [items, …], after `capsules_of_rank`.

    Args:
        v: the same on every rank, with the items of the ranks one after the other.
        items: of this rank.
        group: a process group; None for that of all ranks.
    """
    check_tensors("items_of_rank", "v", v)
    counts = _counts(items, group, v.device)
    if sum(counts) != v.shape[0]:
        fail("items_of_rank", f"v has {v.shape[0]} items; expected {sum(counts)}, those of the ranks: {counts}")
    return _ItemsOfRank.apply(v, counts, group)


def generator_of_rank(device: torch.device, group: Group = None) -> torch.Generator | None:
    """A generator that differs from rank to rank, seeded by the default one, which need not; None for device meta."""
    _, rank = _place("generator_of_rank", group)
    seed = int(torch.randint(2**62, ()))
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed + rank)


@torch.no_grad()
def copy_of_first_rank(tensors: Sequence[Tensor | None], group: Group = None) -> None:
    """Give every rank the numbers that the first rank has."""
    _place("copy_of_first_rank", group)
    for x in tensors:
        if x is not None and not x.is_meta:
            dist.broadcast(x, group_src=0, group=group)


# ---- routings -----------------------------------------------------------------------------------------------------


def attention_routing(
    u: Tensor,
    weight: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None = None,
    *,
    group: Group = None,
    squash: str = "sabour",
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`capsops.attention_routing`, with u, weight, input_weight and mask of this rank's input capsules.

    attn_weight and attn_bias are the same on every rank, and so is the result [B, J, D].
    """
    op = "parallel.attention_routing"
    check_tensors(op, "u weight? attn_weight attn_bias?", u, weight, attn_weight, attn_bias)
    check_choice(op, "squash", squash, ROUTING_SQUASHES)
    part = functional.attention_routing(
        u,
        _own_weight(op, u, weight, group),
        _Share.apply(attn_weight, group),
        None if attn_bias is None else _Share.apply(attn_bias, group),
        squash="none",
        input_weight=input_weight,
        mask=mask,
    )
    return squash_routed(_Sum.apply(part, group), squash)


def dynamic_routing(
    u: Tensor,
    weight: Tensor | None,
    iterations: int = 3,
    *,
    group: Group = None,
    logits: Tensor | None = None,
    axis: str = "output",
    bias: Tensor | None = None,
    detach: bool = False,
    squash: str = "sabour",
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`capsops.dynamic_routing`, with u, weight, logits, input_weight and mask of this rank's input capsules.

    bias [J, D] is the same on every rank, and so is the result [B, J, D]. A weight [K, J, D] or [K, D] that all input
    capsules share is the same on every rank too, and its gradient is a sum over the ranks.

    Where the gradient is exact, every iteration has a pass of its own that writes the gradients of u and W, and they
    are added; with `detach` there is one such pass.
    """
    op = "parallel.dynamic_routing"
    names = "u weight? logits? input_weight? bias? mask?"
    u, weight, logits, input_weight, bias, mask = settle(op, names, u, weight, logits, input_weight, bias, mask)
    check_iterations(op, iterations)
    check_flag(op, "detach", detach)
    check_axis(op, axis)
    weight = _own_weight(op, u, weight, group)
    of_votes = weight
    if weight is not None and weight.dim() == 2:
        check_one_matrix(op, u, weight)
        if logits is None:
            fail(op, f"logits is None and weight has shape {list(weight.shape)}; expected logits [N, J]")
        of_votes = weight[:, None].expand(-1, logits.shape[-1] if logits.dim() else 0, -1)
    J = dynamic.check(op, u, of_votes, bias, mask, iterations, squash, logits)[3]
    if logits is not None:
        logits = of_every_item(op, logits, u, J)
    check_pairs(op, logits, input_weight, u, J)
    step = _Steps(u, weight, J, logits, input_weight, mask, group, axis)
    state = v = None
    for iteration in range(iterations):
        last = iteration == iterations - 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and (last or not detach)):
            s = step(state, constant=detach)
            v = squash_routed(s if bias is None else s + bias, squash)
            state = v if state is None else state + v
    assert v is not None
    return v


def self_attention_routing(
    u: Tensor,
    weight: Tensor | None,
    prior: Tensor | None = None,
    *,
    group: Group = None,
    scale: float | None = None,
    input_weight: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """`capsops.self_attention_routing`, with u, weight, prior [N, J], input_weight and mask of this rank's capsules.

    The share of the prior, Σ_i prior_ij û_ij, is a pass with the matrices prior_ij W_ij, which are as large as W.
    """
    op = "parallel.self_attention_routing"
    names = "u weight? prior? input_weight? mask?"
    u, weight, prior, input_weight, mask = settle(op, names, u, weight, prior, input_weight, mask)
    weight = _own_weight(op, u, weight, group)
    *_, J, D = self_attention.check(op, u, weight, prior, input_weight, mask, 1.0 if scale is None else scale)
    total = _Steps(u, weight, J, None, None, mask, group)() * J
    s = _Steps(u, weight, J, None, input_weight, mask, group)(total * (D**-0.5 if scale is None else scale))
    if prior is not None:
        if weight is None:
            u = u * prior[:, :, None]
        else:
            weight = (weight if weight.dim() == 4 else weight[None]) * prior[:, None, :, None]
        s = s + _Steps(u, weight, J, None, input_weight, mask, group)() * J
    return squash_routed(s, "efficient")


class _Steps:
    """Iterations of routing by agreement over the capsules of all ranks: s [B, J, D], not squashed, of a state."""

    def __init__(
        self,
        u: Tensor,
        weight: Tensor | None,
        J: int,
        logits: Tensor | None,
        input_weight: Tensor | None,
        mask: Tensor | None,
        group: Group,
        axis: str = "output",
    ) -> None:
        self.matrix = None
        if weight is not None and weight.dim() == 2:
            # û_i · V_j = u_i · (W V_j), and Σ_i c_ij û_i = (Σ_i c_ij u_i) W: u takes the place of the votes.
            u, self.matrix, weight = u.unsqueeze(2), weight, None
        self.u, self.weight, self.group, self.axis = u, weight, group, axis
        self.state = u.shape[0], J, vote_sizes(u, weight)[1]
        self.pairs = logits, input_weight, mask

    def __call__(self, state: Tensor | None = None, constant: bool = False) -> Tensor:
        """One pass.

        Args:
            state: [B, J, D]; None stands for 0, with which couplings are equal if there are no logits.
            constant: whether the couplings, and with them the logits, have no gradient.
        """
        logits, input_weight, mask = self.pairs
        if state is None and logits is None and self.axis == "output":
            part = functional.dynamic_routing(
                self.u, self.weight, 1, squash="none", input_weight=input_weight, mask=mask
            )
            return _Sum.apply(part, self.group)
        if state is None:
            state = self.u.new_zeros(self.state)
        elif self.matrix is not None:
            state = state @ self.matrix.T
        if self.axis == "output" and not constant:
            state = _Share.apply(state, self.group)
            part = functional.routing_step(self.u, self.weight, state, logits, input_weight=input_weight, mask=mask)
            s = _Sum.apply(part, self.group)
        else:
            state = state.detach() if constant else state
            s = _Step.apply(self.u, self.weight, state, *self.pairs, self.group, self.axis, constant)
        return s if self.matrix is None else s @ self.matrix


class _Step(Function):
    """A pass whose gradient needs what all ranks computed: a softmax over the input capsules, or constant couplings."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor | None,
        state: Tensor,
        logits: Tensor | None,
        input_weight: Tensor | None,
        mask: Tensor | None,
        group: Group,
        axis: str,
        constant: bool,
    ) -> Tensor:
        operands = u, weight, state, logits, input_weight, mask
        total = log_sums = None
        if axis == "input":
            _, own, own_log_sums = torch.ops.capsops.routing_step_over_inputs(*operands)
            # The ranks' sums are merged as those of blocks: s = Σ_r exp(L_r − L) s_r with L = log Σ_r exp(L_r). The
            # operators write 0 for the L of an output capsule without pairs, which stands for −∞.
            own_log_sums = own_log_sums.masked_fill(~_with_pairs(u, logits, mask), -torch.inf)
            gathered = torch.stack(_gather(torch.cat([own, own_log_sums[..., None]], dim=-1), group))
            sums, logs = gathered[..., :-1], gathered[..., -1]
            log_sums = logs.logsumexp(dim=0)
            log_sums = log_sums.masked_fill(log_sums == -torch.inf, 0)
            shares = (logs - log_sums).exp()
            total = _in_order(list(shares[..., None] * sums))
            s = total.to(u.dtype)
        else:
            plain = logits is None and input_weight is None
            own = (
                torch.ops.capsops.routing_step(u, weight, state, mask)
                if plain
                else torch.ops.capsops.routing_step_with_logits(*operands)
            )
            s = _total(own, group)
        ctx.save_for_backward(*operands, total, log_sums)
        ctx.group, ctx.constant = group, constant
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_s: Tensor) -> tuple[Tensor | None, ...]:
        u, weight, state, logits, input_weight, mask, total, log_sums = ctx.saved_tensors
        of_u, of_weight, of_state, of_logits, of_input_weight, *_ = ctx.needs_input_grad
        operands, ops = (u, weight, state, logits, input_weight, mask), torch.ops.capsops
        g_s = g_s.contiguous()
        if not ctx.constant:
            g = ops.routing_step_over_inputs_backward(g_s, total, log_sums, *operands, ctx.needs_input_grad[:5])
            g = [x if wanted else None for x, wanted in zip(g, ctx.needs_input_grad, strict=False)]
            if of_state:
                g[2] = _total(g[2], ctx.group)
            return (*g, None, None, None, None)
        # The second of two iterations without a squash, the first of which made the state. Its couplings are constant.
        exact = accumulation_dtype(u.dtype)
        s = torch.stack([state, state]).to(exact)
        iterations, kind, wanted = 2, "none", [of_u, of_weight, False, of_input_weight, False]
        if log_sums is not None:
            both = torch.stack([log_sums, log_sums])
            g_u, g_weight, _, g_input_weight, _ = ops.dynamic_routing_over_inputs_backward(
                g_s, s, both, u, weight, logits, input_weight, None, mask, iterations, True, kind, wanted
            )
        elif logits is not None or input_weight is not None:
            g_u, g_weight, _, g_input_weight, _ = ops.dynamic_routing_with_logits_backward(
                g_s, s, u, weight, logits, input_weight, None, mask, iterations, False, True, kind, wanted
            )
        else:
            g_u, g_weight, _ = ops.dynamic_routing_backward(
                g_s, s, u, weight, None, mask, iterations, False, True, kind, [of_u, of_weight, False]
            )
            g_input_weight = None
        return (
            g_u if of_u else None,
            g_weight if of_weight else None,
            None,
            torch.zeros_like(logits) if of_logits else None,
            g_input_weight if of_input_weight else None,
            *[None] * 4,
        )


def _with_pairs(u: Tensor, logits: Tensor | None, mask: Tensor | None) -> Tensor:
    """Bool [B, J], or [B, 1] without logits: which output capsules have a pair with an input capsule of this rank."""
    present = u.new_ones(u.shape[:2], dtype=torch.bool) if mask is None else mask
    pairs = present[..., None] if logits is None else present[..., None] & (logits != -torch.inf)
    return pairs.any(dim=1)


# ---- sums over ranks ----------------------------------------------------------------------------------------------


class _Sum(Function):
    """The sum of the ranks' parts. What follows is the same on every rank, and so is the gradient of each part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, group: Group) -> Tensor:
        return _total(part, group)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g, None


class _Share(Function):
    """A tensor that is the same on every rank, used by each for its part: the parts of its gradient are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _total(g, ctx.group), None


class _CapsulesOfRank(Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.counts, ctx.capsules = group, _counts(u.shape[0], group, u.device), u.shape[1]
        parts = [part_of_rank(u.shape[1], group, rank) for rank in range(len(ctx.counts))]
        own = parts[_place("capsules_of_rank", group)[1]]
        shapes = [(items, own.stop - own.start, *u.shape[2:]) for items in ctx.counts]
        return torch.cat(_exchange([u[:, part] for part in parts], shapes, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        ranks, rank = _place("capsules_of_rank", ctx.group)
        parts = [part_of_rank(ctx.capsules, ctx.group, r) for r in range(ranks)]
        shapes = [(ctx.counts[rank], part.stop - part.start, *g.shape[2:]) for part in parts]
        return torch.cat(_exchange(list(g.split(ctx.counts)), shapes, ctx.group), dim=1) * ranks, None


class _ItemsOfRank(Function):
    @staticmethod
    def forward(ctx: Any, v: Tensor, counts: list[int], group: Group) -> Tensor:
        ctx.group = group
        rank = _place("items_of_rank", group)[1]
        return v.split(counts)[rank].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        parts = _gather_runs(g, ctx.group)
        return torch.cat(parts) / len(parts), None, None


def _place(op: str, group: Group) -> tuple[int, int]:
    """The number of ranks, and this process's."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{op}: torch.distributed is not initialised; call torch.distributed.init_process_group first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{op}: this process is not in the process group")
    return dist.get_world_size(group), rank


def _own_weight(op: str, u: Tensor, weight: Tensor | None, group: Group) -> Tensor | None:
    """The weight, of this rank's capsules or shared by all."""
    _place(op, group)
    if weight is None:
        return None
    if weight.dim() == 4 and weight.shape[0] != u.shape[1]:
        fail(
            op,
            f"weight has shape {list(weight.shape)}; expected [N, K, J, D] with N = {u.shape[1]}, the capsules of this "
            "rank in u, or a shared weight [K, J, D]",
        )
    # One matrix [K, D] multiplies sums that are the same on every rank (`_Steps`).
    return _Share.apply(weight, group) if weight.dim() == 3 else weight


def _total(part: Tensor, group: Group) -> Tensor:
    return _in_order(_gather(part, group))


def _in_order(parts: list[Tensor]) -> Tensor:
    """Their sum, from the first rank to the last."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _gather(x: Tensor, group: Group) -> list[Tensor]:
    """The tensors of all ranks, in their order; all of one shape."""
    ranks, _ = _place("parallel", group)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
    dist.all_gather(parts, x.contiguous(), group=group)
    return parts


def _gather_runs(x: Tensor, group: Group) -> list[Tensor]:
    """The tensors of all ranks, in their order, which may differ in the first size."""
    counts = _counts(x.shape[0], group, x.device)
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: x.shape[0]] = x
    return [part[:count] for part, count in zip(_gather(padded, group), counts, strict=True)]


def _counts(number: int, group: Group, device: torch.device) -> list[int]:
    """The numbers of all ranks."""
    ranks, _ = _place("parallel", group)
    parts = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(ranks)]
    dist.all_gather(parts, torch.tensor([number], device=device), group=group)
    return [int(part) for part in parts]


def _exchange(parts: list[Tensor], shapes: list[tuple[int, ...]], group: Group) -> list[Tensor]:
    """Send a part to each rank, and return what each sends, of these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    received = parts[0].new_empty(sum(sizes))
    sent = torch.cat([part.flatten() for part in parts])
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts], group=group)
    return [x.view(shape) for x, shape in zip(received.split(sizes), shapes, strict=True)]
