"""Routing against naive routing, side by side: `pytest benchmarks`.

The naive form is the reference backend, which materialises the votes. A correctness gate runs before each timing.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import capsops

from .memory import ROUTINGS
from .shapes import MNIST, Shape

# Paper's shape at a 32nd of its capsules: the naive forms need gigabytes at the full one.
SHAPES = [Shape("paper/32", B=8, N=14_400, K=8, J=2, D=16), MNIST]


def _forward(routing: str, inputs: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    def run() -> list[Tensor]:
        with torch.no_grad():
            return [ROUTINGS[routing](**inputs)]

    return run


def _both(routing: str, inputs: dict[str, Tensor]) -> Callable[[], list[Tensor]]:
    leaves = [inputs["u"], inputs["weight"]]

    def run() -> list[Tensor]:
        v = ROUTINGS[routing](**inputs)
        return [v, *torch.autograd.grad(v.square().sum(), leaves)]

    return run


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("direction", [_forward, _both], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_routing(benchmark, shape: Shape, routing: str, direction, backend: str) -> None:
    inputs = shape.inputs()
    run = direction(routing, inputs)
    with capsops.use_backend("reference"):
        expected = run()
    with capsops.use_backend(backend):
        for got, y in zip(run(), expected, strict=True):
            assert (got - y).abs().max() <= 1e-4 * y.abs().max()
        benchmark.group = f"{shape.name}, {routing}, {'forward' if direction is _forward else 'forward+backward'}"
        benchmark.pedantic(run, rounds=5, warmup_rounds=1)
