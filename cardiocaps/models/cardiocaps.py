"""CardioCaps (Fig. 2 of the paper): convolution, primary capsules, affine votes and routing, decoder, regression head.

At the paper's size, of an input [9, 256, 256]: convolution 9×9 to 256 × 248 × 248; primary capsules by a convolution
9×9 of stride 2 to 32 types of dimension 8 on 120 × 120, that is 460,800 capsules; two class capsules of dimension 16;
decoder 32 → 512 → 1024 → 3·256·256; regression from the reconstruction. 325,722,375 parameters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from capsops.functional import float32
from capsops.nn import CapsuleLayer, PrimaryCapsules
from cardiocaps.config import Preset

CLASSES = 2
IN_CHANNELS = 9
RECONSTRUCTED_CHANNELS = 3


class Prediction(NamedTuple):
    """What the network says of a batch."""

    capsules: Tensor  # [B, 2, D] class capsules
    lengths: Tensor  # [B, 2] their lengths: the class scores
    reconstruction: Tensor  # [B, 3, S, S] of the first three input channels, in [0, 1]
    regression: Tensor  # [B] cm or percent

    @property
    def probability(self) -> Tensor:
        """Of class 1, [B]: l₁ / (l₀ + l₁); one half where both lengths are zero."""
        lengths = self.lengths.float() + torch.finfo(torch.float32).tiny
        return lengths[:, 1] / lengths.sum(dim=1)


class CardioCaps(nn.Module):
    """The network.

    Args:
        sizes: of the network; `cardiocaps.config.PRESETS` has those of the paper.
        routing: "attention" (the paper's), "dynamic" (DR-CapsNet) or "uniform".
        iterations: of dynamic routing, whose logits are detached as in the published code.
        primary_layout: see `capsops.nn.PrimaryCapsules`.
        regression_start: bias that the regression head starts with, best the mean of the targets.
        device: where the parameters are made; "meta" makes none.

    Shape: image [B, 9, S, S] in [0, 1] and, in training, label [B] int64 -> `Prediction`.

    Raises:
        ValueError: an image of another shape, or a preset whose convolutions leave nothing.
    """

    def __init__(
        self,
        sizes: Preset,
        *,
        routing: str = "attention",
        iterations: int = 3,
        primary_layout: str = "channels",
        regression_start: float = 0.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.size = sizes.size
        side = _after(
            _after(sizes.size, sizes.conv_kernel, sizes.conv_stride), sizes.primary_kernel, sizes.primary_stride
        )
        if side < 1:
            raise ValueError(f"CardioCaps: images of {sizes.size} pixels leave no primary capsule with {sizes}")
        with torch.device(device or torch.get_default_device()):
            self.conv = nn.Sequential(
                nn.Conv2d(IN_CHANNELS, sizes.conv_channels, sizes.conv_kernel, sizes.conv_stride), nn.ReLU()
            )
            self.primary = PrimaryCapsules(
                sizes.conv_channels,
                sizes.primary_types,
                sizes.primary_dim,
                sizes.primary_kernel,
                sizes.primary_stride,
                layout=primary_layout,
            )
            self.classes = CapsuleLayer(
                sizes.primary_types * side * side,
                sizes.primary_dim,
                CLASSES,
                sizes.out_dim,
                routing,
                iterations=iterations,
                bias=routing == "attention",
                detach=routing == "dynamic",
            )
            pixels = RECONSTRUCTED_CHANNELS * sizes.size**2
            first, second = sizes.decoder
            self.decoder = nn.Sequential(
                nn.Linear(CLASSES * sizes.out_dim, first),
                nn.ReLU(),
                nn.Linear(first, second),
                nn.ReLU(),
                nn.Linear(second, pixels),
                nn.Sigmoid(),
            )
            self.regression = nn.Linear(pixels, 1)
            nn.init.constant_(self.regression.bias, regression_start)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        """The decoder sees the capsule of `label` (Sabour et al. 2017), or without one that of the predicted class."""
        expected = [IN_CHANNELS, self.size, self.size]
        if image.dim() != 4 or [*image.shape[1:]] != expected:
            raise ValueError(f"CardioCaps: image has shape {list(image.shape)}; expected [B, {str(expected)[1:]}")
        capsules = self.classes(self.primary(self.conv(image)))
        lengths = capsules.norm(dim=2)
        seen = lengths.argmax(dim=1) if label is None else label
        mask = nn.functional.one_hot(seen, CLASSES).to(capsules.dtype)
        pixels = self.decoder((capsules * mask[:, :, None]).flatten(1))
        return Prediction(
            capsules=capsules,
            lengths=lengths,
            reconstruction=pixels.view(-1, RECONSTRUCTED_CHANNELS, self.size, self.size),
            regression=self._regressed(pixels),
        )

    def _regressed(self, pixels: Tensor) -> Tensor:
        """Of decoded pixels [B, 3·S·S], [B]; never below the weights' precision, for bfloat16 would give an ejection
        fraction in steps of a quarter of a percent."""
        wide = self.regression.weight.dtype
        if pixels.dtype == wide:
            return self.regression(pixels).squeeze(1)
        with float32(pixels):
            return self.regression(pixels.to(wide)).squeeze(1)


def _after(size: int, kernel: int, stride: int) -> int:
    """Pixels along a side after a convolution without padding."""
    return (size - kernel) // stride + 1
