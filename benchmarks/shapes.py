"""What is measured: shapes, routings, and their random inputs. Imports torch only when inputs are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from zlib import crc32

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORWARD, BOTH = "forward", "forward + backward"
DIRECTIONS = (FORWARD, BOTH)


@dataclass(frozen=True)
class Shape:
    """B batch, N input capsules of dimension K, J output capsules of dimension D.

    rows: P of matrix capsules [P, K], 0 for vectors. shared: one weight [K, J, D] for all input capsules. one_matrix: a
    shared weight [K, D], for all output capsules too. given: votes [B, N, J, D] in place of capsules and weight, and K
    is 0. masked: the batch items have different numbers of capsules, from one to N.
    """

    name: str
    B: int
    N: int
    K: int
    J: int
    D: int
    rows: int = 0
    shared: bool = False
    one_matrix: bool = False
    given: bool = False
    masked: bool = False

    @property
    def u_numbers(self) -> int:
        """Of the capsules, or of the votes that are given."""
        return self.vote_numbers if self.given else self.B * self.N * self.K * max(self.rows, 1)

    @property
    def weight_numbers(self) -> int:
        return self.K * self.D * (1 if self.one_matrix else self.J) * (1 if self.shared else self.N)

    @property
    def vote_numbers(self) -> int:
        return self.B * self.N * self.J * self.D * max(self.rows, 1)

    def __str__(self) -> str:
        capsule = f" K={self.rows}×{self.K}," if self.rows else f" K={self.K}," * (not self.given)
        arrangement = ", one matrix" if self.one_matrix else ", shared weight" * self.shared
        extras = ", votes given" * self.given + ", masked" * self.masked
        return f"B={self.B}, N={self.N:,},{capsule} J={self.J}, D={self.D}{arrangement}{extras}"


@dataclass(frozen=True)
class Routing:
    """A routing with its options fixed. passes: over the input capsules, forward and backward (see ROUTINGS).

    axis: over which capsules the coupling coefficients add up to 1. logits: initial ones are given, as constants.
    """

    name: str
    passes: tuple[int, int]
    iterations: int = 1
    detach: bool = False
    axis: str = "output"
    logits: bool = False


# A backward of n passes: n − 1 that reduce and one that emits the gradients.
ROUTINGS = {
    routing.name: routing
    for routing in (
        Routing("uniform", passes=(1, 1)),
        Routing("attention", passes=(1, 1)),
        Routing("dynamic", passes=(3, 3), iterations=3),
        Routing("dynamic, detached", passes=(3, 1), iterations=3, detach=True),
        Routing("dynamic, over inputs", passes=(3, 3), iterations=3, axis="input"),
        Routing("dynamic, detached, logits", passes=(3, 1), iterations=3, detach=True, logits=True),
        Routing("step", passes=(1, 1)),
        Routing("self-attention", passes=(2, 2)),
        Routing("em", passes=(3, 3), iterations=3),
    )
}


@dataclass(frozen=True)
class Case:
    """One comparison: a routing at a shape, in some directions. dtype: of everything but the mask, by torch's name."""

    shape: Shape
    routing: Routing
    directions: tuple[str, ...] = DIRECTIONS
    ladder: bool = False
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.label}"

    @property
    def label(self) -> str:
        """The routing, and a dtype that is not the usual one."""
        return self.routing.name + f", {self.dtype}" * (self.dtype != "float32")

    @property
    def itemsize(self) -> int:
        return {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}[self.dtype]

    def at(self, N: int) -> Case:
        """The same with another number of input capsules."""
        return replace(self, shape=replace(self.shape, N=N))

    def reduced(self) -> Case:
        """With so few input capsules that float64 and every form are quick: for the gate."""
        s = self.shape
        return self.at(max(1, min(s.N, (1 << 20) * s.N // max(s.vote_numbers, 1))))

    def inputs(self, seed: int = 0, dtype: torch.dtype | None = None, device: str = "cpu") -> dict[str, Tensor]:
        """Fresh random inputs: u (for em pose), weight [N, K, J, D], [K, J, D] or [K, D], and what else is taken.

        Votes that are given are u, without a weight. Everything but logits and mask needs gradients. The scale is such
        that uniform routing gives ‖s‖ ≈ 1 (for em, votes of about unit size).
        """
        import torch

        s, routing = self.shape, self.routing.name
        g = torch.Generator(device).manual_seed(crc32(repr((self.shape, routing, seed)).encode()))

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*size, generator=g, device=device).mul_(scale)

        def uniform(*size: int, low: float = 0.0) -> Tensor:
            return torch.rand(*size, generator=g, device=device).mul_(1 - low).add_(low)

        matrix = (s.K, s.D) if s.one_matrix else (s.K, s.J, s.D) if s.shared else (s.N, s.K, s.J, s.D)
        if routing == "em":
            tensors = {
                "pose": normal(s.B, s.N, s.rows, s.K) if s.rows else normal(s.B, s.N, s.K),
                "activation": uniform(s.B, s.N, low=0.05),
                "weight": normal(*matrix, scale=s.K**-0.5),
                "beta_u": normal(s.J),
                "beta_a": normal(s.J),
            }
        elif s.given:
            tensors = {"u": normal(s.B, s.N, s.J, s.D, scale=s.J / math.sqrt(s.N * s.D))}
        else:
            tensors = {
                "u": uniform(s.B, s.N, s.K, low=-1.0),
                "weight": normal(*matrix, scale=s.J / math.sqrt(s.N * s.D * s.K / 3)),
            }
        if routing == "attention":
            tensors |= {"attn_weight": normal(s.J, s.J, scale=s.J**-0.5), "attn_bias": normal(s.J)}
        if routing == "step":
            tensors |= {"state": normal(s.B, s.J, s.D, scale=s.D**-0.5)}
        if routing == "self-attention":
            tensors |= {"prior": normal(s.N, s.J, scale=1 / s.J)}
        kind = dtype or getattr(torch, self.dtype)
        tensors = {name: x.to(kind).requires_grad_() for name, x in tensors.items()}
        if self.routing.logits:
            tensors["logits"] = normal(s.B, s.N, s.J).to(kind)
        if s.masked:
            lengths = torch.randint(1, s.N + 1, (s.B,), generator=g, device=device)
            tensors["mask"] = torch.arange(s.N, device=device) < lengths[:, None]
        return tensors

    def output_gradients(self, dtype: torch.dtype | None = None, device: str = "cpu") -> list[Tensor]:
        """One fixed random gradient for every output."""
        import torch

        s = self.shape
        g = torch.Generator().manual_seed(1)
        sizes = [(s.B, s.J, s.rows, s.D) if s.rows else (s.B, s.J, s.D)] + [(s.B, s.J)] * (self.routing.name == "em")
        kind = dtype or getattr(torch, self.dtype)
        return [torch.randn(*size, generator=g).to(device, kind) for size in sizes]


PAPER = Shape("paper", B=8, N=460_800, K=8, J=2, D=16)  # CardioCaps
QUARTER = Shape("paper/4", B=8, N=115_200, K=8, J=2, D=16)
MNIST = Shape("mnist", B=128, N=1152, K=8, J=10, D=16)  # Sabour et al. 2017
EFFICIENT = Shape("efficient-capsnet", B=256, N=16, K=8, J=10, D=16)  # Mazzia et al. 2021, the MNIST network
GIVEN = Shape("votes", B=128, N=1152, K=0, J=10, D=16, given=True)  # those of MNIST
RECOMMENDER = Shape("recommender", B=256, N=50, K=64, J=4, D=64, shared=True, masked=True)
MIND = replace(RECOMMENDER, name="mind", one_matrix=True)  # Li et al. 2019
EM = Shape("em", B=64, N=288, K=4, J=32, D=4, rows=4)  # matrix capsules 4×4, Hinton et al. 2018


def _ladder(N: int) -> Shape:
    """As many output as input capsules: the votes and the weight grow with N²."""
    return Shape(f"ladder {N}", B=4, N=N, K=8, J=N, D=8)


def _cases(shape: Shape, *routings: str, **options: object) -> list[Case]:
    return [Case(shape, ROUTINGS[name], **options) for name in routings]  # type: ignore[arg-type]


def _all(ladder: Sequence[int], attention_up_to: int, shapes: Sequence[Shape]) -> list[Case]:
    paper, quarter, mnist, given, efficient, recommender, mind, em = shapes
    cases = [
        *_cases(paper, "attention", "dynamic, detached", "dynamic", "dynamic, over inputs", "step"),
        *_cases(quarter, "attention", "dynamic, over inputs"),
        *_cases(mnist, "dynamic", "dynamic, detached", "dynamic, over inputs", "attention", "step"),
        *_cases(given, "dynamic"),
        *_cases(efficient, "self-attention"),
        *_cases(recommender, "dynamic, detached"),
        *_cases(mind, "dynamic, detached, logits"),
        *_cases(em, "em"),
    ]
    for N in ladder:
        # Attention's own J × J convolution costs O(J²) for every capsule, O(N³) on this ladder: it is no saving there,
        # so the one-pass peer of all rungs is uniform routing, and attention is shown on the lower rungs.
        routings = ["dynamic", "uniform"] + ["attention"] * (attention_up_to >= N)
        cases += _cases(_ladder(N), *routings, directions=(BOTH,), ladder=True)
    return cases


CASES = _all([64, 128, 256, 512, 1024, 2048], 512, [PAPER, QUARTER, MNIST, GIVEN, EFFICIENT, RECOMMENDER, MIND, EM])

# Toy sizes, for trying out.
QUICK_CASES = _all(
    [4, 8],
    4,
    [
        replace(PAPER, B=2, N=500),
        replace(QUARTER, B=2, N=125),
        replace(MNIST, B=3, N=48),
        replace(GIVEN, B=3, N=48),
        replace(EFFICIENT, B=4),
        replace(RECOMMENDER, B=4, N=10, K=8, D=8),
        replace(MIND, B=4, N=10, K=8, D=8),
        replace(EM, B=2, N=18, J=5),
    ],
)


def for_gpus(cases: Sequence[Case]) -> list[Case]:
    """The same for a GPU: what decides most first, in case time runs out; the paper's attention in bfloat16 too."""
    first = [("paper", "attention"), ("mnist", "dynamic"), ("paper", "dynamic"), ("recommender", "dynamic, detached")]
    last = [QUARTER.name]

    def rank(case: Case) -> int:
        name = (case.shape.name, case.routing.name)
        return first.index(name) if name in first else len(first) + case.ladder + 2 * (case.shape.name in last)

    ranked = sorted(cases, key=rank)  # stable
    low = [replace(c, dtype="bfloat16") for c in cases if (c.shape.name, c.routing.name) == first[0]]
    return ranked[:1] + low + ranked[1:]


def families(cases: Sequence[Case]) -> list[str]:
    """The names that `--only` takes: the shapes, with the ladder as one."""
    return list(dict.fromkeys(family(case) for case in cases))


def family(case: Case) -> str:
    return "ladder" if case.ladder else case.shape.name
