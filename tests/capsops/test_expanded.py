"""Weights that were expanded (strides of 0) are not copied, and their gradients are those of autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import capsops
from capsops.backends import COMPILED

from .routings import OPERATORS, Routing, device_of, each, relative_error

BACKENDS = ["cpu"] + [
    b for b in ("cuda", "triton") if COMPILED[b].why_not("squash", device_of(b), torch.float32) is None
]
# Ways to expand fewer numbers to [N, K, J, D] or [K, J, D].
EXPANSIONS: dict[str, Callable[..., Tensor]] = {
    "all capsules": lambda randn, N, K, J, D: randn(K, J, D).expand(N, K, J, D),
    "all output capsules": lambda randn, N, K, J, D: randn(N, K, 1, D).expand(N, K, J, D),
    "both": lambda randn, N, K, J, D: randn(K, 1, D).expand(N, K, J, D),
    "rows": lambda randn, N, K, J, D: randn(N, 1, J, D).expand(N, K, J, D),
    "components": lambda randn, N, K, J, D: randn(N, K, J, 1).expand(N, K, J, D),
    "one number": lambda randn, N, K, J, D: randn(()).expand(N, K, J, D),
    "permuted": lambda randn, N, K, J, D: randn(D, 1, K).permute(2, 1, 0).expand(N, K, J, D),
    "shared": lambda randn, N, K, J, D: randn(K, 1, D).expand(K, J, D),
}
# Kernels with components in the vector lanes, with batch items in the lanes, and with votes in registers.
SHAPES = [(3, 21, 4, 3, 5), (33, 9, 5, 4, 3), (5, 12, 8, 2, 16)]
FEW = (
    "attention",
    "attention-weights",
    "dynamic3",
    "step",
    "self-attention-prior",
    "em2-rows4-renormalise",
    "em3",
    "votes",
)


def _run(routing: Routing, arguments: dict[str, Tensor], gradient: bool) -> list[Tensor]:
    leaves = {n: x.detach().requires_grad_(gradient or n != "weight") for n, x in arguments.items()}
    out = each(routing.call(**leaves))
    g = torch.Generator().manual_seed(1)
    torch.autograd.backward(out, [torch.randn(x.shape, generator=g).to(x.device, x.dtype) for x in out])
    return [*(x.detach() for x in out), *(x.grad for x in leaves.values() if x.grad is not None)]


# Triton's interpreter is slow, and its backend treats only expansion along N specially; for em3 as for the other EM.
GPU = torch.cuda.is_available()
CASES = [
    (backend, routing, expansion)
    for backend in BACKENDS
    for routing in OPERATORS
    for expansion in EXPANSIONS
    if routing.name in FEW
    if backend != "triton" or GPU or (expansion in ("all capsules", "both") and routing.name != "em3")
]


@pytest.mark.parametrize(("backend", "routing", "expansion"), CASES, ids=lambda x: getattr(x, "name", str(x)))
def test_as_a_copy(backend: str, routing: Routing, expansion: str) -> None:
    torch.manual_seed(0)
    interpreted = backend == "triton" and not GPU
    # dtypes that are read directly, and one that is converted; each with the tolerance for sums in another order.
    for dtype, error in ((torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.05)):
        if interpreted and dtype != torch.float32:
            continue
        for shape in ((2, 5, 2, 2, 3),) if interpreted else SHAPES:
            weight = EXPANSIONS[expansion](partial(torch.randn, dtype=dtype, device=device_of(backend)), *shape[1:])
            arguments = {n: x.to(weight.device, dtype) for n, x in routing.arguments(shape).items()}
            assert weight.numel() > weight.untyped_storage().nbytes() // weight.itemsize
            for gradient in (False, True):
                with capsops.use_backend(backend):
                    got = _run(routing, arguments | {"weight": weight}, gradient)
                    expected = _run(routing, arguments | {"weight": weight.contiguous()}, gradient)
                for x, y in zip(got, expected, strict=True):
                    assert x.shape == y.shape
                    assert relative_error(x.double(), y.double()) < error or (x - y).abs().max() < error / 100


def test_gradient_of_what_was_expanded() -> None:
    """The gradient passes through expand, whose backward sums over N."""
    base, u = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(2, 7, 4, dtype=torch.float64)
    for matrices in (base, base[None].expand(7, 4, 3, 5)):
        assert torch.autograd.gradcheck(
            lambda w, m=matrices: capsops.dynamic_routing(u, w.expand(m.shape)), (base.clone().requires_grad_(),)
        )


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc of Linux")
@pytest.mark.parametrize("backward", [False, True])
def test_memory(backward: bool) -> None:
    """The 1 KB of matrices is not copied: the copy would have 205 MB."""

    def memory(name: str) -> int:
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
        return int(line.split()[1]) << 10

    N, K, J, D = 100_000, 8, 4, 16
    for base in (torch.randn(K, J, D), torch.randn(K, 1, D)):
        u = torch.randn(1, N, K, requires_grad=backward)
        weight = base.expand(N, K, J, D)
        for routing in (capsops.dynamic_routing, capsops.self_attention_routing):
            routing(u[:, :8], weight[:8])
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = memory("VmRSS")
            v = routing(u, weight)
            if backward:
                v.sum().backward()
            assert memory("VmHWM") - before < 50 << 20
