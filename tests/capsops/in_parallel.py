"""`python -m tests.capsops.in_parallel RANK RANKS STORE`: one of several processes that split the input capsules.

Outputs and gradients must be those of a process that has them all, and the same bits on every rank and in every run.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import capsops
from capsops import parallel
from capsops.nn import CapsuleLayer

Arguments = dict[str, Tensor]
B, N, K, J, D = 3, 11, 4, 3, 5


def cases() -> Iterator[tuple[str, Callable[..., Tensor], Callable[..., Tensor], dict[str, Any], Arguments, int]]:
    """Name, the function of one process, that of several, options, tensors and the number of capsules."""

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*size, generator=generator, dtype=torch.float64)

    def of(N: int) -> Arguments:
        return {"u": normal(B, N, K), "weight": normal(N, K, J, D, scale=0.5)}

    def weights(N: int) -> Tensor:
        return 0.1 + torch.rand(B, N, generator=generator, dtype=torch.float64)

    mask = torch.rand(B, N, generator=generator) < 0.7
    mask[1] = False
    for capsules in (N, 2, 1):  # with three ranks some have none
        yield (
            "attention",
            capsops.attention_routing,
            parallel.attention_routing,
            {},
            of(capsules) | {"attn_weight": normal(J, J), "attn_bias": normal(J)},
            capsules,
        )
        yield "dynamic", capsops.dynamic_routing, parallel.dynamic_routing, {}, of(capsules), capsules
        yield (
            "over inputs",
            capsops.dynamic_routing,
            parallel.dynamic_routing,
            {"axis": "input"},
            of(capsules),
            capsules,
        )
    attention = {"attn_weight": normal(J, J), "attn_bias": normal(J)}
    extra = {"input_weight": weights(N), "mask": mask}
    one = capsops.attention_routing, parallel.attention_routing
    yield "attention, squash", *one, {"squash": "efficient"}, of(N) | attention | extra, N
    yield "attention, shared", *one, {}, of(N) | attention | {"weight": normal(K, J, D)}, N
    yield "attention, votes", *one, {"weight": None}, {"u": normal(B, N, J, D)} | attention, N
    given = {"weight": None}
    both = capsops.dynamic_routing, parallel.dynamic_routing
    logits = normal(B, N, J)
    logits[0, 2, 1], logits[2, :, 0] = -torch.inf, -torch.inf
    added = {"logits": logits, "bias": normal(J, D)}
    for axis in ("output", "input"):
        for detach in (False, True):
            for iterations in (1, 2, 3):
                options = {"axis": axis, "detach": detach, "iterations": iterations}
                name = f"dynamic {options}"
                yield f"{name}, plain", *both, options, of(N) | {"bias": normal(J, D)}, N
                yield f"{name}, all", *both, options | {"squash": "layer_norm"}, of(N) | added | extra, N
            options = {"axis": axis, "detach": detach}
            yield f"{options}, shared", *both, options, of(N) | extra | {"weight": normal(K, J, D)}, N
            matrix = {"weight": normal(K, D), "logits": normal(N, J)}
            yield f"{options}, one matrix", *both, options, of(N) | extra | matrix, N
            yield f"{options}, votes", *both, options | given, {"u": normal(B, N, J, D), "mask": mask}, N
            yield f"{options}, one vote", *both, options | given, {"u": normal(B, N, 1, D), "logits": normal(N, J)}, N
    own = capsops.self_attention_routing, parallel.self_attention_routing
    yield "self-attention", *own, {}, of(N) | {"prior": normal(N, J)} | extra, N
    yield "self-attention, scale", *own, {"scale": 0.1}, of(N), N
    yield "self-attention, shared", *own, {}, of(N) | {"weight": normal(K, J, D), "prior": normal(N, J)}, N
    yield "self-attention, votes", *own, given, {"u": normal(B, N, J, D), "prior": normal(N, J)}, N


def part_of(name: str, x: Tensor, capsules: int) -> tuple[slice, ...]:
    """Where this rank's part of an argument is; everything where it has no input capsules."""
    axis = {"u": 1, "input_weight": 1, "mask": 1, "prior": 0, "logits": x.dim() - 2}.get(name)
    if name == "weight" and x.dim() == 4:
        axis = 0
    if axis is None:
        return (slice(None),)
    return (*[slice(None)] * axis, parallel.part_of_rank(capsules))


def routings() -> None:
    for name, single, split, options, tensors, capsules in cases():
        whole = {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in tensors.items()}
        expected = single(**whole, **options)
        g = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        expected.backward(g)
        results = []
        for _ in range(2):
            parts = {n: x[part_of(n, x, capsules)].clone() for n, x in tensors.items()}
            parts = {n: x.requires_grad_(x.is_floating_point()) for n, x in parts.items()}
            v = split(**parts, **options)
            v.backward(g)
            results.append([v, *[x.grad for x in parts.values() if x.requires_grad]])
            torch.testing.assert_close(
                v, expected, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
            )
            for n, x in parts.items():
                if not x.requires_grad:
                    continue
                wanted = whole[n].grad
                wanted = torch.zeros_like(whole[n]) if wanted is None else wanted
                got = torch.zeros_like(x) if x.grad is None else x.grad
                torch.testing.assert_close(
                    got,
                    wanted[part_of(n, whole[n], capsules)],
                    rtol=1e-11,
                    atol=1e-11,
                    msg=lambda text, name=name, n=n: f"{name}, gradient of {n}: {text}",
                )
        for x, y in zip(*results, strict=True):
            assert x is None or torch.equal(x, y), name
        everywhere = parallel.join_parts(v[None])
        assert all(torch.equal(x, v) for x in everywhere), name


def low_precision() -> None:
    """float32 and bfloat16: outputs have the dtype of the inputs."""
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        u, weight = torch.randn(B, N, K, generator=generator), torch.randn(N, K, J, D, generator=generator) / 2
        own = parallel.part_of_rank(N)
        for axis in ("output", "input"):
            v = parallel.dynamic_routing(u[:, own].to(dtype), weight[own].to(dtype), axis=axis)
            assert v.dtype == dtype
            expected = capsops.dynamic_routing(u.to(dtype), weight.to(dtype), axis=axis)
            assert (v - expected).abs().max() <= bound


def layers() -> None:
    for options in (
        {"routing": "attention"},
        {"routing": "dynamic", "logits": True},
        {"routing": "dynamic", "axis": "input", "detach": True},
        {"routing": "uniform"},
        {"routing": "self-attention"},
        {"routing": "attention", "shared": True},
    ):
        torch.manual_seed(3)
        layer = CapsuleLayer(N, K, J, D, **options, process_group=dist.group.WORLD)
        single = CapsuleLayer(N, K, J, D, **options)
        split = {"weight", "prior", "logits"} - ({"weight"} if layer.shared else set())
        state = {n: parallel.join_parts(x) if n in split else x for n, x in layer.state_dict().items()}
        single.load_state_dict(state)
        common = [x[None] for n, x in layer.state_dict().items() if n not in split]
        assert all(torch.equal(x, y) for c in common for x in parallel.join_parts(c) for y in c)
        if not layer.shared:
            assert len(state["weight"].unique()) == state["weight"].numel()  # no rank repeats another
        u = torch.randn(B, N, K, generator=generator)
        own = parallel.part_of_rank(N)
        torch.testing.assert_close(layer(u[:, own]), single(u))
        torch.testing.assert_close(layer(u[:, own], u[:, own, 0] > 0), single(u, u[..., 0] > 0))
        if options["routing"] in ("attention", "uniform"):
            torch.testing.assert_close(layer.coupling_coefficients(u[:, own]), single.coupling_coefficients(u)[:, own])
        else:
            refuses(ValueError, "coupling coefficients", layer.coupling_coefficients, u[:, own])
        held = own.stop - own.start
        if not layer.shared and held != N:
            refuses(ValueError, f"N = {held}", layer, u)


def beside_data_parallelism() -> None:
    """The batch split before the layer and behind it: gradients of the mean of the ranks' losses."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(1)
    encoder, head = torch.nn.Linear(6, N * K).double(), torch.nn.Linear(J * D, 2).double()
    layer = CapsuleLayer(N, K, J, D, "dynamic", process_group=dist.group.WORLD).double()
    single = CapsuleLayer(N, K, J, D, "dynamic").double()
    single.load_state_dict({n: parallel.join_parts(x) if n == "weight" else x for n, x in layer.state_dict().items()})
    batches = [torch.randn(2 + r, 6, generator=generator, dtype=torch.float64) for r in range(ranks)]

    losses = [head(single(encoder(x).tanh().view(-1, N, K)).flatten(1)).square().mean() for x in batches]
    torch.stack(losses).mean().backward()
    parameters = [*encoder.parameters(), *head.parameters()]
    expected = [x.grad.clone() for x in parameters]
    for x in parameters:
        x.grad = None

    before, behind = DistributedDataParallel(encoder), DistributedDataParallel(head)
    own = batches[rank]
    u = parallel.capsules_of_rank(before(own).tanh().view(-1, N, K))
    v = parallel.items_of_rank(layer(u), len(own))
    behind(v.flatten(1)).square().mean().backward()
    for x, y in zip(parameters, expected, strict=True):
        torch.testing.assert_close(x.grad, y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.bias.grad, single.bias.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.weight.grad, single.weight.grad[parallel.part_of_rank(N)], rtol=1e-11, atol=1e-11)
    refuses(ValueError, "v has", parallel.items_of_rank, v, len(own) + 1)


def on_a_mesh() -> None:
    """Four ranks: two groups that each split the capsules; every rank has items of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "capsules"))
    group = mesh.get_group("capsules")
    torch.manual_seed(dist.get_rank())
    encoder = torch.nn.Linear(6, N * K).double()
    layer = CapsuleLayer(N, K, J, D, "dynamic", process_group=group).double()
    before = DistributedDataParallel(encoder)
    route = DistributedDataParallel(layer, process_group=mesh.get_group("data"))
    single = CapsuleLayer(N, K, J, D, "dynamic").double()
    single.load_state_dict(
        {n: parallel.join_parts(x, group) if n == "weight" else x for n, x in layer.state_dict().items()}
    )
    batches = [torch.randn(2 + r, 6, generator=generator, dtype=torch.float64) for r in range(4)]

    losses = [single(encoder(x).tanh().view(-1, N, K)).square().mean() for x in batches]
    torch.stack(losses).mean().backward()
    expected = encoder.weight.grad.clone()
    encoder.weight.grad = encoder.bias.grad = None

    own = batches[dist.get_rank()]
    u = parallel.capsules_of_rank(before(own).tanh().view(-1, N, K), group)
    parallel.items_of_rank(route(u), len(own), group).square().mean().backward()
    torch.testing.assert_close(encoder.weight.grad, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer.bias.grad, single.bias.grad, rtol=1e-11, atol=1e-11)
    part = parallel.part_of_rank(N, group)
    torch.testing.assert_close(layer.weight.grad, single.weight.grad[part], rtol=1e-11, atol=1e-11)


def bad_input() -> None:
    u, weight = torch.randn(B, 2, K), torch.randn(3, K, J, D)
    refuses(ValueError, "N = 2, the capsules of this rank", parallel.dynamic_routing, u, weight)
    refuses(ValueError, "logits is None", parallel.dynamic_routing, u, torch.randn(K, D))
    refuses(ValueError, "axis", parallel.dynamic_routing, u, weight[:2], axis="both")
    refuses(ValueError, "prior has shape", parallel.self_attention_routing, u, weight[:2], torch.zeros(3, J))
    refuses(TypeError, "weight is a", parallel.attention_routing, u, 3, torch.randn(J, J))
    group = dist.group.WORLD
    refuses(ValueError, "types is 1", CapsuleLayer, N, K, J, D, types=1, process_group=group)
    refuses(ValueError, "leaky is True", CapsuleLayer, N, K, J, D, "dynamic", leaky=True, process_group=group)
    refuses(ValueError, "in_capsules is 0", CapsuleLayer, 0, K, J, D, process_group=group)


def refuses(kind: type[Exception], text: str, call: Callable[..., Any], *args: Any, **options: Any) -> None:
    try:
        call(*args, **options)
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"nothing was raised; expected {text!r}")


if __name__ == "__main__":
    rank, ranks, store = sys.argv[1:]
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    refuses(RuntimeError, "init_process_group first", parallel.part_of_rank, 5)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks))
    usual = routings, low_precision, layers, beside_data_parallelism, bad_input
    for part in (on_a_mesh,) if ranks == "4" else usual:
        part()
    dist.destroy_process_group()
    print("done")
