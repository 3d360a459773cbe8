"""The test matrix of the routings: every operator with fresh random arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from zlib import crc32

import torch
from torch import Tensor

import capsops

# B, N, K, J, D: ones, primes, one past a vector width, the paper's J and D, MNIST's.
SHAPES = [
    (1, 1, 1, 1, 1),
    (2, 7, 5, 3, 11),
    (3, 129, 8, 2, 16),
    (2, 65, 9, 17, 1),
    (5, 33, 8, 10, 17),
    (9, 1, 3, 2, 5),
]

Arguments = dict[str, Tensor]


@dataclass(frozen=True)
class Routing:
    """One operator with its options fixed: `call(**arguments)`, and the names of what has a gradient."""

    name: str
    call: Callable[..., Tensor]
    parameters: Callable[[int, int], dict[str, tuple[int, ...]]]
    detached: bool = False

    def arguments(self, shape: tuple[int, ...], *, shared: bool = False, seed: int = 0) -> Arguments:
        """Random arguments in float64; votes of about unit length."""
        B, N, K, J, D = shape
        g = torch.Generator().manual_seed(crc32(repr((self.name, shape, shared, seed)).encode()))

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, dtype=torch.float64)

        u = normal(B, N, K) / K**0.5
        weight = normal(*((K, J, D) if shared else (N, K, J, D))) / D**0.5
        return {"u": u, "weight": weight, **{n: normal(*size) for n, size in self.parameters(J, D).items()}}


def _dynamic(iterations: int, *, detach: bool, leaky: bool, bias: bool) -> Routing:
    def call(**arguments: Tensor) -> Tensor:
        return capsops.dynamic_routing(iterations=iterations, detach=detach, leaky=leaky, **arguments)

    name = f"dynamic{iterations}" + "-detach" * detach + "-leaky" * leaky + "-bias" * bias
    return Routing(name, call, lambda J, D: {"bias": (J, D)} if bias else {}, detach)


ATTENTION = Routing("attention", capsops.attention_routing, lambda J, D: {"attn_weight": (J, J), "attn_bias": (J,)})
ROUTINGS = [
    ATTENTION,
    Routing("attention-no-bias", capsops.attention_routing, lambda J, D: {"attn_weight": (J, J)}),
    _dynamic(1, detach=False, leaky=False, bias=False),
    _dynamic(3, detach=False, leaky=False, bias=False),
    _dynamic(3, detach=True, leaky=False, bias=True),
    _dynamic(2, detach=False, leaky=True, bias=True),
    _dynamic(5, detach=True, leaky=True, bias=False),
]
VOTES = Routing("votes", capsops.affine_votes, lambda J, D: {})
OPERATORS = [*ROUTINGS, VOTES]


def run(routing: Routing, arguments: Arguments, dtype: torch.dtype, backend: str, **fixed: Tensor) -> list[Tensor]:
    """The output and the gradient of every argument, for one fixed random gradient of the output, in float64."""
    leaves = {n: x.detach().to(dtype, copy=True).requires_grad_() for n, x in arguments.items()}
    with capsops.use_backend(backend):
        out = routing.call(**leaves, **fixed)
        assert out.dtype == dtype
        g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
        out.backward(g)
    return [out.detach().double(), *(x.grad.double() for x in leaves.values())]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest number expected."""
    if expected.numel() == 0:
        assert got.shape == expected.shape
        return 0.0
    scale = expected.abs().max().clamp(min=1e-30)
    return float(((got - expected).abs().max() / scale).nan_to_num(nan=float("inf")))
