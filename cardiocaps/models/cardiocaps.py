"""CardioCaps (Fig. 2 of the paper): convolution, primary capsules, affine votes and routing, decoder, regression head.

At the paper's size, of an input [9, 256, 256]: convolution 9×9 to 256 × 248 × 248; primary capsules by a convolution
9×9 of stride 2 to 32 types of dimension 8 on 120 × 120, that is 460,800 capsules; two class capsules of dimension 16;
decoder 32 → 512 → 1024 → 3·256·256; regression from the reconstruction. 325,722,375 parameters.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from capsops.functional import float32
from capsops.nn import CapsuleLayer, PrimaryCapsules
from cardiocaps.config import Preset
from cardiocaps.models.affine import ConstantVotes, PublishedConvolution
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
            ones, not learned. The vote of a capsule is then the sum of its numbers, the same for every class and in
            every component, so dynamic and uniform routing give equal class capsules and cannot classify. Attention
            routing can: its couplings depend on the vote. A class capsule is there the mean of the coupled votes times
            J = 2 before the squash (every capsule weighs 2 / N), because their sum would saturate the squash. The ones
            themselves are not divided by N: the couplings would then hardly depend on the image, the order of the two
            lengths would be that of the biases, and every image would get the same class.
        regression_start: bias with which the regression head starts, best the mean of the targets.
        published: as in the code published with the paper, where it differs: a linear decoder; affine "convolution" is
            a 1×1 convolution from one channel to two, x̂_j = w_j u + b_j, whose two numbers for each component of a
            capsule are repeated to fill the class capsule's (4 parameters in all); "constant" is 0.01 everywhere.

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
        published: bool = False,
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
        capsules, dim, out_dim = sizes.primary_types * side * side, sizes.primary_dim, sizes.out_dim
        options: dict[str, Any] = {
            "iterations": iterations,
            "bias": routing == "attention",
            "detach": routing == "dynamic",
        }
        if affine == "constant":
            self.classes: CapsuleLayer = ConstantVotes(capsules, dim, out_dim, routing, published=published, **options)
        elif affine == "convolution" and published:
            self.classes = PublishedConvolution(capsules, dim, out_dim, routing, **options)
        else:
            shared = affine == "convolution"
            self.classes = CapsuleLayer(capsules, dim, CLASSES, out_dim, routing, shared=shared, **options)
        self.decoder = Decoder(out_dim, sizes.decoder, sizes.size, linear=published)
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
