"""What all layers are: modules that torch.jit.script refuses, most of them with transformation matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from ..ops._checks import check_at_least, check_flag, check_iterations, fail, refuse_scripting


class Layer(nn.Module):
    """The base of all layers."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script before it compiles a module that has this layer."""
        refuse_scripting(type(self).__name__)


class Matrices(Layer):
    """The base of layers from N input capsules to J output capsules: their sizes and transformation matrices.

    layer: the name of the layer in error messages, that of the class which the user made.
    held: how many of the N input capsules this process holds; None: all of them.
    """

    def __init__(
        self,
        layer: str,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        iterations: int,
        shared: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        types: int | None = None,
        held: int | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_capsules": in_capsules, "in_dim": in_dim, "out_capsules": out_capsules, "out_dim": out_dim}
        check_at_least(layer, 1, **sizes)
        check_iterations(layer, iterations)
        check_flag(layer, "shared", shared)
        if types is not None:
            check_at_least(layer, 1, types=types)
            if shared or in_capsules % types != 0:
                wanted = "None, because shared is True" if shared else f"a divisor of in_capsules = {in_capsules}"
                fail(layer, f"types is {types}; expected {wanted}")
        self._layer = layer
        self.in_capsules, self.in_dim, self.out_capsules, self.out_dim = in_capsules, in_dim, out_capsules, out_dim
        self.iterations, self.shared, self.types = iterations, shared, types
        self._held = in_capsules if held is None else held
        matrix = (in_dim, out_capsules, out_dim)
        size = matrix if shared else (types or self._held, *matrix)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the matrices contiguous under `model.to(memory_format=torch.channels_last)`.

        That call means images, but it changes every parameter of four dimensions; matrices in that order would be
        copied at every call.
        """
        super()._apply(fn, recurse)
        for x in (self.weight, self.weight.grad):
            if x is not None:
                x.data = x.data.contiguous()
        return self

    def _sizes(self) -> str:
        """The sizes, for `extra_repr`."""
        return (
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}, "
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}"
        ) + (f", types={self.types}" if self.types else "")

    def _call(self, routing: Callable[[], Any], *inputs: Tensor | None) -> Any:
        """Call a routing; if it refuses the inputs, raise an error in the terms of the layer, not of the function."""
        u = inputs[0]
        if not self.shared and isinstance(u, Tensor) and u.dim() > 1 and u.shape[1] != self._held:
            self._refuse(*inputs)  # a function would take the matrices for those of types of capsules
        try:
            return routing()
        except (TypeError, ValueError):
            self._refuse(*inputs)
            raise

    def _refuse(self, *inputs: Any) -> None:
        """Raise for inputs that the layer cannot take; only called after a routing has failed."""
        raise NotImplementedError

    def _check_capsules(self, name: str, x: Tensor, axes: str, rows: tuple[int, ...] | None = None) -> None:
        """Require capsules of a shape that the matrices take; rows: the sizes between N and K, if fixed."""
        wrong = not self.shared and x.shape[1:2] != (self._held,)
        wrong = wrong or (rows is not None and x.shape[2:-1] != rows)
        if x.dim() not in (3, axes.count(",") + 1) or x.shape[-1] != self.in_dim or wrong:
            wanted = f"K = {self.in_dim}" if self.shared else f"N = {self._held} and K = {self.in_dim}"
            fail(self._layer, f"{name} has shape {list(x.shape)}; expected {axes} with {wanted}")
