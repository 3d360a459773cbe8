"""Capsules on a grid, routed from local receptive fields."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._checks import check_at_least, check_choice, check_floating, check_tensors, fail
from ..ops._declare import settle
from .capsules import ROUTINGS, CapsuleLayer
from .em import EMCapsules
from .grid import check_window
from .layer import Layer


class ConvCapsules(Layer):
    """Capsules on a grid, routed from local receptive fields with matrices that all positions share.

    As in the convolutional capsule layers of Hinton et al. 2018, an output position routes the capsules of the
    kernel_size × kernel_size window below it, N = kernel_size² · in_types of them. Positions in the padding hold no
    capsule: they are left out of the routing instead of being capsules of pose 0.

    Every position is an item of the batch of an ordinary routing. So the votes are never held, but the poses of the
    receptive fields are: (kernel_size / stride)² copies of the input.

    Args:
        in_types: the number of capsule types at a position.
        in_dim: K.
        out_types: J.
        out_dim: D.
        kernel_size: of the receptive fields, in both directions.
        stride: between receptive fields, in both directions.
        padding: of the grid, at all edges.
        routing: one of `CapsuleLayer`, or "em".
        options: further keyword arguments of the layer that routes: `CapsuleLayer` or, for "em", `EMCapsules`.

    Attributes:
        capsules: the layer that routes. Its input capsules run over the rows of the window, then the columns, then the
            types.

    Shape: u [B, in_types, H, W, K] -> v [B, out_types, H', W', D] with H' = (H + 2 padding − kernel_size) // stride + 1
    and W' alike. EM: pose [B, in_types, H, W, K] or [B, in_types, H, W, P, K] and activation [B, in_types, H, W] ->
    pose [B, out_types, H', W', D] or [B, out_types, H', W', P, D] and activation [B, out_types, H', W']. With a mask,
    bool [B, in_types, H, W], True where there is a capsule.

    Raises:
        TypeError: an input is not a tensor, or the routing does not have an option.
        ValueError: wrong sizes, an unknown routing; an input of a wrong shape, dtype or device, or smaller than a
            window.
        MemoryError: no memory for the workspace.
    """

    def __init__(
        self,
        in_types: int,
        in_dim: int,
        out_types: int,
        out_dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        routing: str = "dynamic",
        **options: Any,
    ) -> None:
        super().__init__()
        check_at_least("ConvCapsules", 1, in_types=in_types, in_dim=in_dim, out_types=out_types, out_dim=out_dim)
        check_at_least("ConvCapsules", 1, kernel_size=kernel_size, stride=stride)
        check_at_least("ConvCapsules", 0, padding=padding)
        check_choice("ConvCapsules", "routing", routing, (*ROUTINGS, "em"))
        self.in_types, self.in_dim, self.out_types, self.out_dim = in_types, in_dim, out_types, out_dim
        self.kernel_size, self.stride, self.padding, self.routing = kernel_size, stride, padding, routing
        sizes = (kernel_size**2 * in_types, in_dim, out_types, out_dim)
        kind = EMCapsules if routing == "em" else CapsuleLayer
        _check_options("ConvCapsules", routing, kind, options)
        if routing == "em":
            self.capsules: EMCapsules | CapsuleLayer = EMCapsules(*sizes, **options, _layer="ConvCapsules")
        else:
            self.capsules = CapsuleLayer(*sizes, routing, **options, _layer="ConvCapsules")

    def forward(
        self, pose: Tensor, activation: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        B, rows, columns = self._check(pose, activation, mask)
        present = self._present(pose, mask)
        if activation is None:
            return self._grid(self.capsules(self._receptive_fields(pose), present), B, rows, columns)
        out = self.capsules(self._receptive_fields(pose), self._receptive_fields(activation), present)
        return self._grid(out[0], B, rows, columns), self._grid(out[1], B, rows, columns)

    def _check(self, pose: Tensor, activation: Tensor | None, mask: Tensor | None) -> tuple[int, int, int]:
        """Check the inputs and return B, H' and W'."""
        layer, em = "ConvCapsules", self.routing == "em"
        check_tensors(layer, "pose activation? mask?", pose, activation, mask)
        dims, last = ((5, 6), "[B, in_types, H, W, (P,) K]") if em else ((5,), "[B, in_types, H, W, K]")
        if pose.dim() not in dims or pose.shape[1] != self.in_types or pose.shape[-1] != self.in_dim:
            fail(
                layer,
                f"pose has shape {list(pose.shape)}; expected {last} with in_types = {self.in_types} and "
                f"K = {self.in_dim}",
            )
        if em != (activation is not None):
            found, wanted = ("None", "a tensor") if em else ("a tensor", "None")
            fail(layer, f"activation is {found}; expected {wanted}, because routing is {self.routing!r}")
        for name, x in (("activation", activation), ("mask", mask)):
            if x is not None and x.shape != pose.shape[:4]:
                fail(
                    layer,
                    f"{name} has shape {list(x.shape)}; expected [B, in_types, H, W] = {list(pose.shape[:4])}",
                )
        tensors = settle(layer, "pose weight activation?", pose, self.capsules.weight, activation)
        check_floating(layer, "pose weight activation", *tensors)
        if mask is not None and (mask.dtype != torch.bool or mask.device != pose.device):
            fail(
                layer,
                f"mask is {mask.dtype} on {mask.device}; expected torch.bool (True where there is a capsule) on "
                f"{pose.device}, the device of pose",
            )
        B, _, height, width = pose.shape[:4]
        check_window(layer, self.kernel_size, self.padding, height, width)
        rows, columns = ((n + 2 * self.padding - self.kernel_size) // self.stride + 1 for n in (height, width))
        return B, rows, columns

    def _present(self, pose: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of the receptive fields [B · H' · W', N]; None if all of their positions hold capsules."""
        if mask is None and self.padding == 0:
            return None
        if mask is None:
            mask = pose.new_ones((), dtype=torch.bool).expand(pose.shape[:4])
        return self._receptive_fields(mask)

    def _receptive_fields(self, x: Tensor) -> Tensor:
        """[B, T, H, W, …] -> [B · H' · W', N, …]: a strided view, which is copied once, in the order of the routing."""
        further = x.dim() - 4
        if self.padding:
            p = self.padding
            x = nn.functional.pad(x, (0, 0) * further + (p, p, p, p))
        windows = x.unfold(2, self.kernel_size, self.stride).unfold(3, self.kernel_size, self.stride)
        # [B, T, H', W', …, row, column] -> [B, H', W', row, column, T, …]
        last = 4 + further
        windows = windows.permute(0, 2, 3, last, last + 1, 1, *range(4, last))
        return windows.flatten(3, 5).flatten(0, 2)

    def _grid(self, x: Tensor, B: int, rows: int, columns: int) -> Tensor:
        """[B · H' · W', J, …] -> [B, J, H', W', …], a view."""
        return x.unflatten(0, (B, rows, columns)).movedim(3, 1)

    def extra_repr(self) -> str:
        return (
            f"in_types={self.in_types}, out_types={self.out_types}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )


def _check_options(layer: str, routing: str, kind: type[nn.Module], options: dict[str, Any]) -> None:
    """Require options that are keyword arguments of the layer that routes."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and not p.name.startswith("_")]
    for name in options:
        if name not in allowed:
            raise TypeError(
                f"{layer}: option is {name!r}; expected one of {', '.join(allowed)} for routing {routing!r}"
            )
