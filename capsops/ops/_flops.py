"""How many floating-point operations an operator takes, for `torch.utils.flop_counter.FlopCounterMode`.

The convention is PyTorch's, which counts matrix products alone: a multiplication and its addition are two operations,
and work on single elements (exponentials, the softmax, squash, differences, squares) is not counted. What is left are
the votes, and what this file calls contractions: agreements, weighted sums, and terms of the votes' gradients. They
are counted as often as the CPU kernels compute them, so votes count again in every pass that recomputes them. What a
kernel saves for two output capsules, or for input capsules that a mask leaves out, is not subtracted.

Each operator declares a formula for itself and one for its gradient, beside its schema. A formula has the arguments of
the operator, with shapes in place of tensors.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

Shape = Sequence[int]
Formula = Callable[..., int]


class PassFlops(NamedTuple):
    """Operations of the parts of one pass over the input capsules.

    Attributes:
        votes: all votes û_ij = u_i W_ij, once; as many for the gradient of u from theirs, and for that of W.
        total: Σ_i û_ij, for which no votes are formed.
        contraction: one multiplication and addition for each component of each vote: the agreements of all votes, a
            weighted sum of them, or a term "coupling × state" of their gradients.
    """

    votes: int
    total: int
    contraction: int

    def gradients(self, contractions: int, u: bool, weight: bool) -> int:
        """The last pass of a gradient: votes, so many contractions, then the gradients of u and W that are wanted."""
        return (1 + u + weight) * self.votes + contractions * self.contraction


def pass_flops(u: Shape, weight: Shape | None, J: int = 1) -> PassFlops:
    """The operations of one pass, from the shapes of u [B, N, (P,) K] and the weight [(N,) K, J, D].

    Without a weight u is the votes [B, N, J, (P,) D]: they take no product, nor does their sum. Votes [B, N, 1, D] are
    compared with all J output capsules.
    """
    if weight is None:
        return PassFlops(0, 0, 2 * math.prod(u) * (J if u[2] == 1 else 1))
    B, N, *rows, K = u
    J, D = weight[-2:]
    of_one = 2 * B * J * math.prod(rows) * D  # contraction of one input capsule
    votes = N * K * of_one
    shared = len(weight) == 3  # then Σ_i û_ij = (Σ_i u_i) W_j, in which only the product counts
    return PassFlops(votes, K * of_one if shared else votes, N * of_one)


def elementwise(*_: Any, **__: Any) -> int:
    """The formula of an operator that has no products to be counted."""
    return 0


_COUNTER = "torch.utils.flop_counter"
_waiting: list[tuple[Any, Formula]] = []
"""Operators and formulas to register once the counter is imported."""


def register_flops(operator: Any, formula: Formula) -> None:
    """Let FlopCounterMode use the formula for calls of an operator."""
    _waiting.append((operator, formula))
    if _COUNTER in sys.modules:
        _register_waiting(sys.modules[_COUNTER])


def _register_waiting(counter: ModuleType) -> None:
    for operator, formula in _waiting:
        counter.register_flop_formula(operator)(_with_out_shape(formula))
    _waiting.clear()


def _with_out_shape(formula: Formula) -> Formula:
    """The formula as FlopCounterMode calls it."""

    def count(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return formula(*args, **kwargs)

    return count


class _AfterImport(MetaPathFinder):
    """Registers the formulas right after the counter is imported. capsops itself does not import it, because it imports
    Triton, which takes long."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            _register_waiting(module)

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
