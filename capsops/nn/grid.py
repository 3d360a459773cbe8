"""Windows on a grid of capsules, as a convolution has them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._checks import fail

# The axes of a grid of 1, 2 and 3 dimensions, as messages call them.
AXES = {1: "W", 2: "H, W", 3: "L, H, W"}

Sizes = int | Sequence[int]
"""An integer for all axes of the grid, or one for each."""


class Windows(NamedTuple):
    """The windows of a layer: an integer for each axis of its grid. The terms and their order: `torch.nn.Conv2d`."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @classmethod
    def of(
        cls, layer: str, dims: int, *, kernel_size: Sizes, stride: Sizes, padding: Sizes, dilation: Sizes
    ) -> Windows:
        """Check what the user gave.

        Raises:
            ValueError: `dims` is not 1, 2 or 3, or the sizes are not integers, one or one for each axis.
        """
        if isinstance(dims, bool) or dims not in AXES:
            fail(layer, f"dims is {dims!r}; expected 1, 2 or 3, the dimensions of the grid")
        return cls(
            _of_each_axis(layer, "kernel_size", kernel_size, dims, 1),
            _of_each_axis(layer, "stride", stride, dims, 1),
            _of_each_axis(layer, "padding", padding, dims, 0),
            _of_each_axis(layer, "dilation", dilation, dims, 1),
        )

    def check(self, layer: str, sizes: Sequence[int]) -> None:
        """Require a grid of these sizes to be at least as large as a window."""
        axes = zip(sizes, self.padding, self.dilation, strict=True)
        most = tuple([(n + 2 * p - 1) // d + 1 for n, p, d in axes])
        if any(k > m for k, m in zip(self.kernel_size, most, strict=True)):
            same = len(set(self.kernel_size)) == 1
            dilated = "" if set(self.dilation) == {1} else f" and dilation {_short(self.dilation)}"
            fail(
                layer,
                f"kernel_size is {_short(self.kernel_size)}; expected at most {min(most) if same else most}, because "
                f"the grid is {' × '.join([str(n) for n in sizes])} with padding {_short(self.padding)}{dilated}",
            )

    def positions(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many windows a grid of these sizes has along each axis."""
        axes = zip(sizes, self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        return tuple([(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes])

    def overlap(self, sizes: Sequence[int]) -> bool:
        """Whether two windows on a grid of these sizes have a position in common."""
        # Places a and b > a of a kernel meet where a window begins (b − a) · dilation after another one.
        return any(
            steps * d % s == 0 and steps * d // s < m
            for m, k, s, d in zip(self.positions(sizes), self.kernel_size, self.stride, self.dilation, strict=True)
            for steps in range(1, k)
        )

    def pad(self, x: Tensor) -> Tensor:
        """[B, T, *grid, …] with the padding, which is 0."""
        if not any(self.padding):
            return x
        further = (0, 0) * (x.dim() - 2 - len(self.padding))
        return nn.functional.pad(x, (*further, *[n for p in reversed(self.padding) for n in (p, p)]))

    def places(self, sizes: Sequence[int], types: int, device: torch.device) -> Tensor:
        """Where each capsule of a grid lies in the receptive fields of one item: `places` of `capsops.em_routing`.

        Returns:
            int64 [types · capsules of a type, windows that contain one at most].
        """
        kernel, positions = self.kernel_size, self.positions(sizes)
        found = torch.zeros(1, 1, dtype=torch.int64, device=device)
        for axis, n in enumerate(sizes):
            k, s, d = kernel[axis], self.stride[axis], self.dilation[axis]
            number = torch.arange(k, device=device)
            begin = torch.arange(n, device=device)[:, None] + self.padding[axis] - number * d
            window = begin.div(s, rounding_mode="floor")
            inside = (window * s == begin) & (window >= 0) & (window < positions[axis])
            of_window = math.prod(positions[axis + 1 :]) * math.prod(kernel) * types
            at = window * of_window + number * (math.prod(kernel[axis + 1 :]) * types)
            at = torch.where(inside, at, -1)
            apart = s // math.gcd(s, d)  # the next number of the kernel at which a window can have the same capsule
            if apart > 1:
                at = at.sort(dim=1, descending=True).values[:, : -(-k // apart)]
            there = (found >= 0)[:, None, :, None] & (at >= 0)[None, :, None, :]
            found = torch.where(there, found[:, None, :, None] + at[None, :, None, :], -1).flatten(2).flatten(0, 1)
        return torch.where(found >= 0, found + torch.arange(types, device=device)[:, None, None], -1).flatten(0, 1)

    def receptive_fields(self, x: Tensor) -> Tensor:
        """[B, T, *grid, …] -> [B · positions, N, …]: a strided view, which is copied once, in the order of the routing.

        The N = places · T capsules of a window run over the rows, then the columns, then T.
        """
        dims = len(self.kernel_size)
        last = x.dim()
        x = self.pad(x)
        for axis in range(dims):
            k, d = self.kernel_size[axis], self.dilation[axis]
            x = x.unfold(2 + axis, d * (k - 1) + 1, self.stride[axis])[..., ::d]
        # [B, T, *positions, …, *places] -> [B, *positions, *places, T, …]
        places = range(last, last + dims)
        x = x.permute(0, *range(2, 2 + dims), *places, 1, *range(2 + dims, last))
        return x.flatten(1 + dims, 1 + 2 * dims).flatten(0, dims)

    def __str__(self) -> str:
        """For the `extra_repr` of a layer."""
        text = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return text if set(self.dilation) == {1} else f"{text}, dilation={self.dilation}"


def _short(values: tuple[int, ...]) -> str:
    """One integer if all are the same."""
    return str(values[0] if len(set(values)) == 1 else values)


def _of_each_axis(layer: str, name: str, value: Any, dims: int, least: int) -> tuple[int, ...]:
    """Require an integer of at least `least`, or one for each axis; return one for each axis."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    good = len(values) == dims
    for n in values:
        good = good and isinstance(n, int) and not isinstance(n, bool) and n >= least
    if not good:
        fail(layer, f"{name} is {value!r}; expected an integer of at least {least}, or a tuple of {dims}")
    return values
