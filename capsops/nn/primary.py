"""Primary capsules: a convolution whose output is read as capsules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..ops._checks import check_at_least, check_choice, check_floating, check_tensors, fail
from ..ops.primary_capsules import LAYOUTS
from ..ops.squash import SQUASH_KINDS
from .grid import AXES, Sizes, Windows
from .layer import Layer

_CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class PrimaryCapsules(Layer):
    """A convolution whose output is read as capsules, and squashed (Sabour et al. 2017, section 4).

    Args:
        in_channels: channels of the image or feature map.
        types: capsule types; the convolution has types · dim channels.
        dim: K, the dimension of a capsule.
        kernel_size: of the convolution; as the next two an integer, or a tuple with one for each axis of the image.
        stride: of the convolution.
        padding: of the convolution, at all edges.
        dilation: of the convolution, like kernel_size.
        groups: of the convolution; see `torch.nn.Conv2d`. With groups = in_channels each channel makes its own
            capsules, as in Efficient-CapsNet.
        dims: of the image: 1, 2 or 3.
        layout: "channels": the components of a capsule are neighbouring channels at one location. "legacy": a plain
            reshape of [B, C, H, W], as in the published CardioCaps: the components are `dim` neighbouring pixels of one
            channel, and where H' · W' is not a multiple of `dim`, a capsule continues in the next channel.
        squash: "sabour" or "efficient"; see `capsops.squash`.
        device: of the parameters.
        dtype: of the parameters.

    Shape: [B, in_channels, H, W] -> [B, N, K] with N = types · H' · W'. In layout "channels" the capsules run over
    types, then rows, then columns. An image of one dimension has W, one of three L, H, W in place of H, W.

    Raises:
        TypeError: the image is not a tensor.
        ValueError: wrong sizes, an unknown layout or squash; an image of a wrong shape, dtype or device, or smaller
            than the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        types: int,
        dim: int,
        kernel_size: Sizes = 9,
        stride: Sizes = 2,
        padding: Sizes = 0,
        *,
        dilation: Sizes = 1,
        groups: int = 1,
        dims: int = 2,
        layout: str = "channels",
        squash: str = "sabour",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        layer = "PrimaryCapsules"
        check_at_least(layer, 1, in_channels=in_channels, types=types, dim=dim, groups=groups)
        self.windows = Windows.of(
            layer, dims, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation
        )
        for name, channels in (("in_channels", in_channels), ("types · dim", types * dim)):
            if channels % groups:
                fail(layer, f"groups is {groups}; expected a divisor of {name} = {channels}")
        check_choice(layer, "layout", layout, LAYOUTS)
        check_choice(layer, "squash", squash, SQUASH_KINDS)
        self.types, self.dim, self.dims, self.layout, self.squash = types, dim, dims, layout, squash
        self.conv = _CONVOLUTIONS[dims](
            in_channels, types * dim, *self.windows, groups=groups, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        layer, conv = "PrimaryCapsules", self.conv
        if not isinstance(x, torch.fx.Proxy):  # the placeholder of torch.fx, which has no shape
            check_tensors(layer, "x", x)
            if x.dim() != 2 + self.dims or x.shape[1] != conv.in_channels:
                fail(
                    layer,
                    f"x has shape {list(x.shape)}; expected [B, in_channels, {AXES[self.dims]}] with in_channels = "
                    f"{conv.in_channels}",
                )
        try:
            features = conv(x)
        except RuntimeError:  # whose message does not name the layer
            self.windows.check(layer, x.shape[2:])
            check_floating(layer, "x weight", x, conv.weight)
            raise
        # A grid of another number of dimensions is read like the rows of an image.
        if self.dims == 1:
            features = features.unsqueeze(2)
        elif self.dims == 3:
            features = features.flatten(2, 3)
        return functional.primary_capsules(features, self.types, layout=self.layout, squash=self.squash)

    def extra_repr(self) -> str:
        return f"types={self.types}, dim={self.dim}, layout={self.layout!r}, squash={self.squash!r}"
