"""CardioCaps (Fig. 2 of the paper): convolution, primary capsules, affine votes and routing, decoder, regression head.

At the paper's size, of an input [9, 256, 256]: convolution 9×9 to 256 × 248 × 248; primary capsules by a convolution
9×9 of stride 2 to 32 types of dimension 8 on 120 × 120, that is 460,800 capsules; two class capsules of dimension 16;
decoder 32 → 512 → 1024 → 3·256·256; regression from the reconstruction. 325,722,375 parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from capsops.functional import float32
from capsops.nn import CapsuleLayer, PrimaryCapsules
from cardiocaps.config import Preset
from cardiocaps.models.decoder import Decoder, seen_class
from cardiocaps.models.prediction import (
    CLASSES,
    IN_CHANNELS,
    RECONSTRUCTED_CHANNELS,
    Prediction,
    check_image,
    share,
)

AFFINE = ("matrices", "convolution", "constant")


class CardioCaps(nn.Module):
    """The network.

    Args:
        sizes: of the network. `cardiocaps.config.PRESETS` has those of the paper.
        routing: "attention" (the paper's), "dynamic" (DR-CapsNet) or "uniform".
        iterations: of dynamic routing. Its logits are detached, as in the published code.
        primary_layout: see `capsops.nn.PrimaryCapsules`.
        affine: what makes the votes (table III of the paper). "matrices": a learned matrix for each primary capsule and
            class. "convolution": a learned 1×1 convolution, that is one matrix for all primary capsules. "constant":
            2 / N everywhere, not learned. Under uniform routing a class capsule is then the squashed mean of its votes.
            (With ones in place of 2 / N it would be their sum, which saturates the squash.) Constant votes are the
            same for every class, so dynamic and uniform routing give equal class capsules and cannot classify;
            attention routing can still weigh the classes differently.
        regression_start: bias with which the regression head starts, best the mean of the targets.

    Shape: image [B, 9, S, S] in [0, 1] and, in training, label [B] int64 -> `Prediction`, in all its parts.

    Raises:
        ValueError: an image of another shape, or an unknown affine map.
    """

    def __init__(
        self,
        sizes: Preset,
        *,
        routing: str = "attention",
        iterations: int = 3,
        primary_layout: str = "channels",
        affine: str = "matrices",
        regression_start: float = 0.0,
    ) -> None:
        super().__init__()
        self.size = sizes.size
        if affine not in AFFINE:
            raise ValueError(f"CardioCaps: affine is {affine!r}; expected one of {', '.join(AFFINE)}")
        side = _after(
            _after(sizes.size, sizes.conv_kernel, sizes.conv_stride), sizes.primary_kernel, sizes.primary_stride
        )
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
            shared=affine != "matrices",
        )
        if affine == "constant":
            value = CLASSES / self.classes.in_capsules
            constant = torch.full_like(self.classes.weight, value, requires_grad=False)
            del self.classes.weight
            # Not part of checkpoints, so that loading cannot change it.
            self.classes.register_buffer("weight", constant, persistent=False)
        self.decoder = Decoder(sizes.out_dim, sizes.decoder, sizes.size)
        self.regression = nn.Linear(RECONSTRUCTED_CHANNELS * sizes.size**2, 1)
        nn.init.constant_(self.regression.bias, regression_start)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        """The decoder sees the capsule of `label`, or without a label that of the predicted class."""
        check_image("CardioCaps", image, self.size)
        capsules = self.classes(self.primary(self.conv(image)))
        lengths = capsules.norm(dim=2)
        reconstruction = self.decoder(capsules, seen_class(lengths, label))
        return Prediction(
            scores=lengths,
            probability=share(lengths),
            capsules=capsules,
            reconstruction=reconstruction,
            regression=self._regressed(reconstruction.flatten(1)),
        )

    def _regressed(self, pixels: Tensor) -> Tensor:
        """Regression from decoded pixels: [B, 3·S·S] -> [B].

        It is computed in the precision of the weights: bfloat16 would round an ejection fraction to a quarter of a
        percent.
        """
        wide = self.regression.weight.dtype
        if pixels.dtype == wide:
            return self.regression(pixels).squeeze(1)
        with float32(pixels):
            return self.regression(pixels.to(wide)).squeeze(1)


def _after(size: int, kernel: int, stride: int) -> int:
    """The side in pixels of a map after a convolution without padding."""
    return (size - kernel) // stride + 1
