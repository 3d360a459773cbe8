"""`python -m tests.capsops.sharded RANK STORE`: one of two processes that call the operators with DTensors.

Values and gradients must be those of ordinary tensors, and the placements those that need no communication.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import capsops
from capsops import nn

from .routings import OPERATORS, Arguments, each

SHAPE = 5, 6, 3, 4, 5  # B is 3 in the first process and 2 in the second

# DTensor is imported after capsops here, and first used after the first call.
capsops.squash(torch.ones(2, 3))

from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor  # noqa: E402
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402


def check(
    call: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Arguments,
    shards: dict[str, int],
    out_shard: int,
    moved: bool = False,
) -> None:
    """Compare a call with sharded arguments, and its gradients, with the same call with ordinary tensors.

    Args:
        call: takes the arguments by name.
        arguments: ordinary tensors.
        shards: the axis along which an argument is sharded; the others are replicated.
        out_shard: the axis along which the outputs should be sharded.
        moved: whether DTensor has to move an argument first, and so chooses the placement of the outputs itself.
    """
    mesh = init_device_mesh("cpu", (2,))

    def placement(name: str) -> Shard | Replicate:
        return Shard(shards[name]) if name in shards else Replicate()

    plain = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in arguments.items()}
    split = {n: distribute_tensor(x.detach(), mesh, [placement(n)]) for n, x in plain.items()}
    split = {n: x.requires_grad_(x.is_floating_point()) for n, x in split.items()}
    expected = each(call(**plain))
    with CommDebugMode() as communication:
        out = each(call(**split))
    assert moved or communication.get_total_counts() == 0
    torch.testing.assert_close([x.full_tensor() for x in out], list(expected))
    g = [torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype) for x in expected]
    torch.autograd.backward(expected, g)
    torch.autograd.backward(out, [distribute_tensor(x, mesh, y.placements) for x, y in zip(g, out, strict=True)])
    for name, x in plain.items():
        if x.is_floating_point():
            assert x.grad.abs().max() > 0
            torch.testing.assert_close(split[name].grad.full_tensor(), x.grad)
    if not moved:
        assert all(x.placements == (Shard(out_shard),) for x in out)
        placements = {n: x.grad.placements[0] for n, x in split.items() if x.requires_grad}
        assert placements == {n: placement(n) if n in shards else Partial() for n in placements}, placements


def batches() -> None:
    """Every operator along B, and the operators on rows along any axis but the last."""
    for routing in OPERATORS:
        for shared in (False, True):
            arguments = routing.arguments(SHAPE, shared=shared)
            names = ("u", "pose", "activation", "state", "logits", "input_weight")
            batched = {n: 0 for n in names if n in arguments}
            mask = {} if routing.name == "votes" else {"mask": torch.rand(5, 6, generator=generator) < 0.7}
            check(routing.call, arguments | mask, batched | dict.fromkeys(mask, 0), 0)
    for axis in (0, 1):
        check(capsops.squash, {"s": torch.randn(5, 4, 3, generator=generator)}, {"s": axis}, axis)
    features = torch.randn(5, 4, 3, 2, generator=generator)
    check(lambda features: capsops.primary_capsules(features, 2), {"features": features}, {"features": 0}, 0)


def votes() -> None:
    """Votes along N, J and D."""
    for shared in (False, True):
        arguments = next(r for r in OPERATORS if r.name == "votes").arguments(SHAPE, shared=shared)
        along_N = {"u": 1} if shared else {"u": 1, "weight": 0}
        J = arguments["weight"].dim() - 2
        for shards, out in ((along_N, 1), ({"weight": J}, 2), ({"weight": J + 1}, 3)):
            check(capsops.affine_votes, arguments, shards, out)


def other_placements() -> None:
    """Arguments that are sharded along an axis that their operator adds up or compares are moved first."""
    for routing in OPERATORS:
        if not routing.em and routing.name != "votes":
            arguments = routing.arguments(SHAPE)
            check(routing.call, arguments, {"u": 1, "weight": 0}, 0, moved=True)
            check(routing.call, arguments, {"weight": 2}, 0, moved=True)
    check(capsops.squash, {"s": torch.randn(2, 4, generator=generator)}, {"s": 1}, 0, moved=True)


def gradients_that_are_not_wanted() -> None:
    """DTensor remembers placements by the arguments; `wanted` is one of them."""
    mesh = init_device_mesh("cpu", (2,))
    arguments = OPERATORS[0].arguments(SHAPE)
    tensors = {n: distribute_tensor(x, mesh, [Shard(0) if n == "u" else Replicate()]) for n, x in arguments.items()}
    for wanted in (["u"], ["weight"], ["u", "weight"], ["attn_bias"], ["u"]):
        leaves = {n: x.detach().requires_grad_(n in wanted) for n, x in tensors.items()}
        capsops.attention_routing(**leaves).sum().backward()
        assert [n for n, x in leaves.items() if x.grad is not None] == wanted
        assert all(leaves[n].grad.shape == leaves[n].shape for n in wanted)


def layers() -> None:
    """A layer whose parameters are replicated, on a batch that is sharded."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    u = torch.randn(5, 6, 4)
    layer, single = (nn.CapsuleLayer(6, 4, 3, 5, "attention") for _ in range(2))
    single.load_state_dict(layer.state_dict())
    distribute_module(layer, mesh)
    out = layer(distribute_tensor(u, mesh, [Shard(0)]))
    expected = single(u)
    assert isinstance(out, DTensor) and out.placements == (Shard(0),)
    torch.testing.assert_close(out.full_tensor(), expected)
    out.sum().backward()
    expected.sum().backward()
    for x, y in zip(layer.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(x.grad.full_tensor(), y.grad)


def sharded_parameters() -> None:
    """fully_shard: every process holds a part of the parameters, and its own part of the batch."""
    torch.manual_seed(0)
    u = torch.randn(4, 6, 4)
    layer, single = (nn.CapsuleLayer(6, 4, 3, 5, "attention") for _ in range(2))
    single.load_state_dict(layer.state_dict())
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    own = u.chunk(2)[dist.get_rank()]
    out = layer(own)
    torch.testing.assert_close(out, single(own))
    out.sum().backward()
    single.zero_grad()
    single(u).sum().backward()
    for x, y in zip(layer.parameters(), single.parameters(), strict=True):
        # With gloo, torch 2.8 adds the gradients of the processes, and torch 2.13 takes their mean.
        g = x.grad.full_tensor()
        torch.testing.assert_close(g / g.norm(), y.grad / y.grad.norm())


if __name__ == "__main__":
    rank, store = sys.argv[1:]
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    for part in (batches, votes, other_placements, gradients_that_are_not_wanted, layers, sharded_parameters):
        part()
    dist.destroy_process_group()
    print("done")
