"""Efficient-CapsNet (Mazzia et al. 2021): four convolutions, a depthwise convolution to 16 primary capsules of
dimension 8, self-attention routing to two class capsules of dimension 16, and the decoder of CardioCaps.

At the paper's size, of an input [9, 256, 256], the convolutions, all of stride 2, leave 128 × 14 × 14. In the code that
was published with CardioCaps only the last has stride 2; they leave 128 × 123 × 123, and 211,600 primary capsules.
"""

from __future__ import annotations

from torch import Tensor, nn

from capsops.functional import primary_capsules
from capsops.nn import CapsuleLayer
from cardiocaps.config import Preset
from cardiocaps.models.decoder import Decoder, seen_class
from cardiocaps.models.prediction import CLASSES, IN_CHANNELS, Prediction, check_image, share

# (channels, kernel) of the convolutions.
_CONVOLUTIONS = ((32, 5), (64, 3), (64, 3), (128, 3))
_TYPES, _DIM = 16, 8
# Side of the last map in the original network, for images of 28 pixels.
_LEAST_SIDE = 9


class EfficientCapsNet(nn.Module):
    """The network.

    The first convolutions have stride 2: as many as keep the last map at least 9 × 9, the size in the original network,
    whose images are smaller. As in its authors' code, ReLU comes before batch normalisation.

    Args:
        sizes: of the image, the class capsules and the decoder.
        published: as in the code published with CardioCaps: strides 1, 1, 1 and 2; a depthwise convolution 9×9, whose
            output is reshaped to capsules of neighbouring pixels; batch normalisation before ReLU.

    Shape: image [B, 9, S, S] in [0, 1] and, in training, label [B] int64 -> `Prediction` without a regression.

    Raises:
        ValueError: an image of another shape, or a preset whose images are too small.
    """

    def __init__(self, sizes: Preset, *, published: bool = False) -> None:
        super().__init__()
        self.size = sizes.size
        strides = (1, 1, 1, 2) if published else _strides(sizes.size)
        side = _side(sizes.size, strides)
        if side < _LEAST_SIDE:
            raise ValueError(f"EfficientCapsNet: images of {sizes.size} pixels are too small; they need at least 19")
        kernel = _LEAST_SIDE if published else side
        self.layout = "legacy" if published else "channels"
        layers: list[nn.Module] = []
        channels = IN_CHANNELS
        for (out_channels, size), stride in zip(_CONVOLUTIONS, strides, strict=True):
            conv = nn.Conv2d(channels, out_channels, size, stride)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            normal = nn.BatchNorm2d(out_channels)
            layers += [conv, normal, nn.ReLU()] if published else [conv, nn.ReLU(), normal]
            channels = out_channels
        self.convolutions = nn.Sequential(*layers)
        self.primary = nn.Conv2d(channels, _TYPES * _DIM, kernel, groups=channels)
        capsules = _TYPES * (side - kernel + 1) ** 2
        self.classes = CapsuleLayer(capsules, _DIM, CLASSES, sizes.out_dim, "self-attention")
        self.decoder = Decoder(sizes.out_dim, sizes.decoder, sizes.size)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        """The decoder sees the capsule of `label`, or without a label that of the predicted class."""
        check_image("EfficientCapsNet", image, self.size)
        features = self.primary(self.convolutions(image))
        primary = primary_capsules(features, _TYPES, layout=self.layout, squash="efficient")
        capsules = self.classes(primary)
        lengths = capsules.norm(dim=2)
        return Prediction(
            scores=lengths,
            probability=share(lengths),
            capsules=capsules,
            reconstruction=self.decoder(capsules, seen_class(lengths, label)),
        )


def _strides(size: int) -> tuple[int, ...]:
    """The strides of the convolutions: as many twos as keep the last map large enough."""
    for twos in range(len(_CONVOLUTIONS), 0, -1):
        strides = tuple(2 if i < twos else 1 for i in range(len(_CONVOLUTIONS)))
        if _side(size, strides) >= _LEAST_SIDE:
            return strides
    return (1,) * len(_CONVOLUTIONS)


def _side(size: int, strides: tuple[int, ...]) -> int:
    """The side of the last map."""
    for (_, kernel), stride in zip(_CONVOLUTIONS, strides, strict=True):
        size = (size - kernel) // stride + 1
    return size
