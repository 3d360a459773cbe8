"""Capsules on a grid, routed from local receptive fields."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._checks import check_at_least, check_choice, check_floating, check_tensors, fail
from ..ops._declare import settle
from .capsules import ROUTINGS, CapsuleLayer
from .em import EMCapsules
from .grid import AXES, Sizes, Windows
from .layer import Layer
from .loops import InvertedAttentionCapsules, KMeansCapsules, SelfRoutingCapsules

_LAYERS: dict[str, Any] = {
    "em": EMCapsules,
    "self-routing": SelfRoutingCapsules,
    "inverted-attention": InvertedAttentionCapsules,
    "k-means": KMeansCapsules,
}


class ConvCapsules(Layer):
    """Capsules on a grid, routed from local receptive fields with matrices that all positions share.

    As in the convolutional capsule layers of Hinton et al. 2018, an output position routes the capsules of the window
    below it, N = places of the kernel · in_types of them. Positions in the padding hold no capsule: they are left out
    of the routing instead of being capsules of pose 0.

    With EM routing windows that overlap compete, as in the paper: each input capsule divides itself among the output
    capsules of all positions whose windows contain it. With competition "window", and in the other routings, it divides
    itself anew at each position, as if the position were alone.

    Every position is an item of the batch of an ordinary routing. So the votes are never held, but the poses of the
    receptive fields are: (kernel_size / stride)² copies of the input. Where positions compete, each iteration but the
    first takes one more pass over the votes than in a routing of positions that are alone.

    Args:
        in_types: the number of capsule types at a position.
        in_dim: K.
        out_types: J.
        out_dim: D.
        kernel_size: of the receptive fields; as the next two an integer, or a tuple with one for each axis of the grid.
        stride: between receptive fields.
        padding: of the grid, at all edges.
        routing: one of `CapsuleLayer`; or "em", "self-routing", "inverted-attention" or "k-means", that of
            `EMCapsules`, `SelfRoutingCapsules`, `InvertedAttentionCapsules` or `KMeansCapsules`.
        dilation: between the positions that a receptive field takes, as in `torch.nn.Conv2d`.
        groups: parts of the types that are routed by themselves: those of the output from those of the input in the
            same place of the order. A divisor of in_types and out_types.
        dims: of the grid: 1, 2 or 3.
        competition: for EM routing only, "positions" (the default) or "window".
        options: further keyword arguments of the layer that routes.

    Attributes:
        capsules: the layer that routes. Its input capsules run over the rows of the window, then the columns, then the
            types. None if there are several groups.
        parts: a layer of this class for each group, if there are several.

    Shape: u [B, in_types, H, W, K] -> v [B, out_types, H', W', D] with
    H' = (H + 2 padding − dilation (kernel_size − 1) − 1) // stride + 1 and W' alike. EM: pose [B, in_types, H, W, K] or
    [B, in_types, H, W, P, K] and activation [B, in_types, H, W] -> pose [B, out_types, H', W', D] or
    [B, out_types, H', W', P, D] and activation [B, out_types, H', W']; self-routing the same, without P;
    inverted-attention with its option `rows` takes and gives poses with P. With a mask, bool [B, in_types, H, W], True
    where there is a capsule. A grid of one dimension has W, one of three L, H, W in place of H, W.

    Raises:
        TypeError: an input is not a tensor, or the routing does not have an option.
        ValueError: wrong sizes, an unknown routing or competition; an input of a wrong shape, dtype or device, or
            smaller than a window.
        MemoryError: no memory for the workspace.
    """

    def __init__(
        self,
        in_types: int,
        in_dim: int,
        out_types: int,
        out_dim: int,
        kernel_size: Sizes = 3,
        stride: Sizes = 1,
        padding: Sizes = 0,
        routing: str = "dynamic",
        *,
        dilation: Sizes = 1,
        groups: int = 1,
        dims: int = 2,
        competition: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        layer = "ConvCapsules"
        check_at_least(layer, 1, in_types=in_types, in_dim=in_dim, out_types=out_types, out_dim=out_dim, groups=groups)
        for name, types in (("in_types", in_types), ("out_types", out_types)):
            if types % groups:
                fail(layer, f"groups is {groups}; expected a divisor of {name} = {types}")
        self.windows = Windows.of(
            layer, dims, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation
        )
        check_choice(layer, "routing", routing, (*ROUTINGS, *_LAYERS))
        if routing != "em" and competition is not None:
            fail(layer, f"competition is {competition!r}; expected None, because routing is {routing!r} and not 'em'")
        self.in_types, self.in_dim, self.out_types, self.out_dim = in_types, in_dim, out_types, out_dim
        self.dims, self.routing = dims, routing
        self.competition = "window"
        if routing == "em":
            self.competition = "positions" if competition is None else competition
            check_choice(layer, "competition", self.competition, ("positions", "window"))
        _check_options(layer, routing, _LAYERS.get(routing, CapsuleLayer), options)
        self.capsules: Any = None
        self.parts = nn.ModuleList()
        if groups > 1:
            of_part: Any = (
                in_types // groups,
                in_dim,
                out_types // groups,
                out_dim,
                kernel_size,
                stride,
                padding,
                routing,
            )
            options |= {"dilation": dilation, "dims": dims, "competition": competition}
            self.parts.extend(ConvCapsules(*of_part, **options) for _ in range(groups))
            return
        sizes = (math.prod(self.windows.kernel_size) * in_types, in_dim, out_types, out_dim)
        if routing in _LAYERS:
            self.capsules = _LAYERS[routing](*sizes, **options, _layer=layer)
        else:
            self.capsules = CapsuleLayer(*sizes, routing, **options, _layer=layer)

    def forward(
        self, pose: Tensor, activation: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        grid = self._check(pose, activation, mask)
        if self.parts:
            out = [
                part(*inputs)
                for part, *inputs in zip(self.parts, *map(self._split, (pose, activation, mask)), strict=True)
            ]
            if activation is None:
                return torch.cat(out, dim=1)
            return torch.cat([x for x, _ in out], dim=1), torch.cat([a for _, a in out], dim=1)
        fields, present = self.windows.receptive_fields, self._present(pose, mask)
        places = pose.shape[0], *self.windows.positions(grid)
        if activation is None:
            return self._grid(self.capsules(fields(pose), present), places)
        if self.competition == "positions" and self.windows.overlap(grid):
            batch = pose.shape[0], math.prod(places[1:])
            if mask is not None:
                activation = torch.where(mask, activation, 0)
            if present is not None:
                present = present.unflatten(0, batch)
            of_capsules = self.windows.places(grid, self.in_types, pose.device)
            poses = fields(pose).unflatten(0, batch)
            out = [x.flatten(0, 1) for x in self.capsules._route(poses, activation.flatten(1), present, of_capsules)]
        else:
            out = self.capsules(fields(pose), fields(activation), present)
        return self._grid(out[0], places), self._grid(out[1], places)

    def step(self, pose: Tensor, v: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """One iteration of the routings "inverted-attention" and "k-means", for `ConcurrentCapsules`.

        Args:
            pose: input capsules, as for the layer.
            v: output capsules of the iteration before, of the shape of the result. None: the first iteration.
            mask: as for the layer.
        """
        layer, capsules = "ConvCapsules", self._first
        if not hasattr(capsules, "step"):
            fail(layer, f"routing is {self.routing!r}; expected 'inverted-attention' or 'k-means', which have steps")
        places = pose.shape[0], *self.windows.positions(self._check(pose, None, mask))
        if v is not None:
            check_tensors(layer, "v", v)
            wanted = (pose.shape[0], self.out_types, *places[1:], *pose.shape[2 + self.dims : -1], self.out_dim)
            if v.shape != wanted:
                fail(layer, f"v has shape {list(v.shape)}; expected {list(wanted)}, that of the result")
        if self.parts:
            inputs = zip(self.parts, *map(self._split, (pose, v, mask)), strict=True)
            return torch.cat([part.step(*of_part) for part, *of_part in inputs], dim=1)
        if v is not None:
            v = v.movedim(1, 1 + self.dims).flatten(0, self.dims)
        out = capsules.step(self.windows.receptive_fields(pose), v, self._present(pose, mask))
        return self._grid(out, places)

    @property
    def _first(self) -> Any:
        """The layer that routes, of the first group."""
        return self.parts[0].capsules if self.parts else self.capsules

    def _split(self, x: Tensor | None) -> Sequence[Tensor | None]:
        """What has the types, by groups."""
        return [None] * len(self.parts) if x is None else x.chunk(len(self.parts), dim=1)

    def _present(self, pose: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of the receptive fields [B · positions, N]; None if all of their positions hold capsules."""
        if mask is None and any(self.windows.padding):
            mask = pose.new_ones((), dtype=torch.bool).expand(pose.shape[: 2 + self.dims])
        return None if mask is None else self.windows.receptive_fields(mask)

    def _check(self, pose: Tensor, activation: Tensor | None, mask: Tensor | None) -> tuple[int, ...]:
        """Check the inputs and return the sizes of the grid."""
        layer, capsules, axes = "ConvCapsules", self._first, AXES[self.dims]
        by_activation = self.routing in ("em", "self-routing")
        check_tensors(layer, "pose activation? mask?", pose, activation, mask)
        last = self.dims + 3  # the dimensions of a pose that is a vector
        dims, wanted = {last}, "K"
        if self.routing == "em":
            dims, wanted = {last, last + 1}, "(P,) K"
        elif getattr(capsules, "rows", None) is not None:
            dims, wanted = {last + 1}, "P, K"
        if pose.dim() not in dims or pose.shape[1] != self.in_types or pose.shape[-1] != self.in_dim:
            fail(
                layer,
                f"pose has shape {list(pose.shape)}; expected [B, in_types, {axes}, {wanted}] with "
                f"in_types = {self.in_types} and K = {self.in_dim}",
            )
        if by_activation != (activation is not None):
            found, wanted = ("None", "a tensor") if by_activation else ("a tensor", "None")
            fail(layer, f"activation is {found}; expected {wanted}, because routing is {self.routing!r}")
        grid = pose.shape[: 2 + self.dims]
        for name, x in (("activation", activation), ("mask", mask)):
            if x is not None and x.shape != grid:
                fail(layer, f"{name} has shape {list(x.shape)}; expected [B, in_types, {axes}] = {list(grid)}")
        names = "pose weight activation?"
        check_floating(layer, names.replace("?", ""), *settle(layer, names, pose, capsules.weight, activation))
        if mask is not None and (mask.dtype != torch.bool or mask.device != pose.device):
            fail(
                layer,
                f"mask is {mask.dtype} on {mask.device}; expected torch.bool (True where there is a capsule) on "
                f"{pose.device}, the device of pose",
            )
        self.windows.check(layer, grid[2:])
        return grid[2:]

    def _grid(self, x: Tensor, places: Sequence[int]) -> Tensor:
        """[B · positions, J, …] -> [B, J, *positions, …], a view; places: B and the positions."""
        return x.unflatten(0, places).movedim(1 + self.dims, 1)

    def extra_repr(self) -> str:
        text = f"in_types={self.in_types}, out_types={self.out_types}, {self.windows}"
        text += f", groups={len(self.parts)}" if self.parts else ""
        return f"{text}, competition={self.competition!r}" if self.routing == "em" else text


def _check_options(layer: str, routing: str, kind: type[nn.Module], options: dict[str, Any]) -> None:
    """Require options that are keyword arguments of the layer that routes."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and not p.name.startswith("_")]
    allowed = [name for name in allowed if name != "process_group"]  # of a window there are few capsules
    for name in options:
        if name not in allowed:
            raise TypeError(
                f"{layer}: option is {name!r}; expected one of {', '.join(allowed)} for routing {routing!r}"
            )
