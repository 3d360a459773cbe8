"""How an operator is split over devices when its tensors are DTensors (torch.distributed.tensor).

An operator that is computed along an axis independently, as every routing is along B, can be sharded along it: each
device calls the operator with its shard. Tensors with that axis are sharded along it, other arguments are replicated,
and the gradient of such an argument is a sum over the devices (`Partial`). For any other placement DTensor moves the
arguments first, to the nearest placement that is allowed here. So the result is exact for every placement; only the
communication differs.

Importing DTensor takes long, so the rules are registered with it when the first DTensor arrives.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

Axes = Mapping[str, int]
"""Where an axis is in each tensor of an operator, by name. A tensor that is not named does not have it. A negative
number counts from the end. The gradient g_x has the axis where x has it."""

_unregistered: list[tuple[Any, Sequence[Axes] | None]] = []


def declare_sharding(operator: Any, axes: Sequence[Axes] | None) -> None:
    """Allow DTensors to be sharded along any of these axes; None: all but the last, which all tensors share."""
    _unregistered.append((operator, axes))


def register_shardings() -> None:
    """Register the rules with DTensor, once it is imported.

    DTensor's interface is experimental. With a torch that has another one nothing is registered, and DTensor itself
    says that it does not know the operators.
    """
    if not _unregistered or "torch.distributed.tensor" not in sys.modules:
        return
    rules = _unregistered[:]
    _unregistered.clear()
    with suppress(ImportError, AttributeError, KeyError, TypeError):
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor.experimental import register_sharding

        known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
        for operator, axes in rules:
            register_sharding(operator)(_Rule(operator, axes))
            # DTensor remembers what it found for equal arguments. It must compare all arguments that are not tensors,
            # because `wanted` decides which gradients have elements; `register_sharding` compares from the first
            # integer on.
            tensors = [a.name for a in operator._schema.arguments if "Tensor" in str(a.type)]
            known[operator] = replace(known[operator], static_argnum=len(tensors))


class _Rule:
    """Lists the placements that are allowed for an operator, as `register_sharding` wants them.

    It is called with the operator's arguments, where a specification with `ndim` and `placements` stands for each
    tensor. It returns pairs of the placements of all outputs and those of all arguments.
    """

    def __init__(self, operator: Any, axes: Sequence[Axes] | None) -> None:
        self.axes = axes
        self.arguments = [a.name for a in operator._schema.arguments]
        self.returns = [r.name for r in operator._schema.returns]

    def __call__(self, *args: Any) -> list[tuple[list[Any], list[Any]]]:
        from torch.distributed.tensor import Partial, Replicate, Shard

        dims = {name: x.ndim for name, x in zip(self.arguments, args, strict=True) if hasattr(x, "placements")}
        wanted = args[-1] if self.arguments[-1] == "wanted" else [True] * len(self.returns)
        axes = self.axes
        if axes is None:
            names = [name.removeprefix("g_") for name in (*self.arguments, *self.returns)]
            axes = [dict.fromkeys(names, axis) for axis in range(dims[self.arguments[0]] - 1)]

        def allowed(of: Axes) -> tuple[list[Any], list[Any]]:
            def shard(tensor: str) -> Any:
                name = tensor.removeprefix("g_")
                axis = of.get(name)
                if axis is not None and axis < 0:
                    axis += dims[name]
                return None if axis is None or axis < 0 else Shard(axis)

            # A gradient that is not wanted is a tensor without elements.
            results = zip(self.returns, wanted, strict=True)
            outputs = [(shard(name) or Partial()) if want else Replicate() for name, want in results]
            return outputs, [(shard(name) or Replicate()) if name in dims else None for name in self.arguments]

        replicated = [Replicate() for _ in self.returns], [Replicate() if n in dims else None for n in self.arguments]
        return [replicated, *map(allowed, axes)]
