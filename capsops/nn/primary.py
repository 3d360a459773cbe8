"""Primary capsules: a convolution whose output is read as capsules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import functional
from ..ops._checks import check_at_least, check_choice, check_floating, check_tensors, fail
from ..ops.primary_capsules import LAYOUTS
from ..ops.squash import SQUASH_KINDS
from .grid import check_window
from .layer import Layer


class PrimaryCapsules(Layer):
    """A convolution whose output is read as capsules, and squashed (Sabour et al. 2017, section 4).

    Args:
        in_channels: channels of the image or feature map.
        types: capsule types; the convolution has types · dim channels.
        dim: K, the dimension of a capsule.
        kernel_size: of the convolution, in both directions.
        stride: of the convolution, in both directions.
        padding: of the convolution, at all edges.
        layout: "channels": the components of a capsule are neighbouring channels at one location. "legacy": a plain
            reshape of [B, C, H, W], as in the published CardioCaps: the components are `dim` neighbouring pixels of one
            channel, and where H' · W' is not a multiple of `dim`, a capsule continues in the next channel.
        squash: "sabour" or "efficient"; see `capsops.squash`.
        device: of the parameters.
        dtype: of the parameters.

    Shape: [B, in_channels, H, W] -> [B, N, K] with N = types · H' · W'. In layout "channels" the capsules run over
    types, then rows, then columns.

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
        kernel_size: int = 9,
        stride: int = 2,
        padding: int = 0,
        *,
        layout: str = "channels",
        squash: str = "sabour",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("PrimaryCapsules", 1, in_channels=in_channels, types=types, dim=dim)
        check_at_least("PrimaryCapsules", 1, kernel_size=kernel_size, stride=stride)
        check_at_least("PrimaryCapsules", 0, padding=padding)
        check_choice("PrimaryCapsules", "layout", layout, LAYOUTS)
        check_choice("PrimaryCapsules", "squash", squash, SQUASH_KINDS)
        self.types, self.dim, self.layout, self.squash = types, dim, layout, squash
        self.conv = nn.Conv2d(in_channels, types * dim, kernel_size, stride, padding, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        layer, conv = "PrimaryCapsules", self.conv
        if not isinstance(x, torch.fx.Proxy):  # the placeholder of torch.fx, which has no shape
            check_tensors(layer, "x", x)
            if x.dim() != 4 or x.shape[1] != conv.in_channels:
                fail(
                    layer,
                    f"x has shape {list(x.shape)}; expected [B, in_channels, H, W] with in_channels = "
                    f"{conv.in_channels}",
                )
        try:
            features = conv(x)
        except RuntimeError:  # whose message does not name the layer
            check_window(layer, conv.kernel_size[0], int(conv.padding[0]), *x.shape[2:])
            check_floating(layer, "x weight", x, conv.weight)
            raise
        return functional.primary_capsules(features, self.types, layout=self.layout, squash=self.squash)

    def extra_repr(self) -> str:
        return f"types={self.types}, dim={self.dim}, layout={self.layout!r}, squash={self.squash!r}"
