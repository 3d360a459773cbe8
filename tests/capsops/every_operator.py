"""Runs every operator of a backend, forward and backward, on small shapes, for tools that observe the kernels.

    compute-sanitizer --tool memcheck python -m tests.capsops.every_operator --backend cuda

Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that every tensor is an allocation of its own. The results only have to
be finite; the test matrix checks their values. Prints a line at the end; the exit status is 1 if an operator fails.
"""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

import capsops
from capsops.backends import COMPILED

from .routings import OPERATORS, OVER_POSITIONS, ROUTINGS, SHAPES, device_of, run

# Ones; primes; the paper's J and D; those of MNIST, with more batch items than fit into registers; a wide batch.
FEW = [SHAPES[i] for i in (0, 1, 2, 8, 9)]


def rows(backend: str) -> int:
    """Run squash and primary capsules; return the number of calls."""
    device, calls = device_of(backend), 0
    for kind, dtype, shape in itertools.product(
        ("sabour", "efficient"), (torch.float32, torch.bfloat16), ((1, 1), (7, 5), (67, 16), (3, 300))
    ):
        s = torch.randn(shape).to(device, dtype).requires_grad_()
        with capsops.use_backend(backend):
            v = capsops.squash(s, kind=kind)
            (g,) = torch.autograd.grad(v, s, torch.randn(shape).to(v))
        assert v.isfinite().all() and g.isfinite().all(), f"squash {kind} {shape} {dtype}"
        calls += 2
    for layout, memory, (B, types, K, height, width) in itertools.product(
        ("channels", "legacy"),
        (torch.contiguous_format, torch.channels_last),
        ((1, 1, 1, 1, 1), (2, 3, 5, 5, 5), (2, 2, 8, 6, 8), (2, 2, 8, 6, 6)),
    ):
        features = torch.randn(B, types * K, height, width).to(device).to(memory_format=memory).requires_grad_()
        with capsops.use_backend(backend):
            u = capsops.primary_capsules(features, types, layout=layout)
            (g,) = torch.autograd.grad(u, features, torch.randn(u.shape).to(u))
        assert u.isfinite().all() and g.isfinite().all(), f"primary capsules {layout} {tuple(features.shape)}"
        calls += 2
    return calls


def routings(backend: str) -> int:
    """Run the routings and the votes; return the number of calls."""
    calls = 0
    for routing, shape, shared in itertools.product([*OPERATORS, *OVER_POSITIONS], FEW, (False, True)):
        arguments = routing.arguments(shape, shared=shared)
        mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(5)) < 0.6
        fixed: dict[str, torch.Tensor] = (
            {"mask": mask} if routing in [*ROUTINGS, *OVER_POSITIONS] and not shared else {}
        )
        dtypes = (torch.float32, torch.bfloat16) if shape == FEW[2] and not routing.em else (torch.float32,)
        for dtype in dtypes:
            results = run(routing, arguments, dtype, backend, **fixed)
            assert all(x.isfinite().all() for x in results), f"{routing.name} {shape} shared={shared} {dtype}"
            calls += 2
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.capsops.every_operator", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--backend", choices=tuple(COMPILED), default="cuda", help="default %(default)s")
    backend = parser.parse_args().backend
    why = COMPILED[backend].why_not("dynamic_routing", device_of(backend), torch.float32)
    if why is not None:
        sys.exit(f"the backend {backend} does not run here: {why}")
    calls = rows(backend) + routings(backend)
    if device_of(backend).type != "cpu":
        torch.cuda.synchronize()
    print(f"every operator ran: {calls} calls of the backend {backend}")


if __name__ == "__main__":
    main()
