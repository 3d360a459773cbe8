"""CNN-(1) and CNN-(2), the convolutional baselines of the paper (table V).

Two convolutions to 32 and 64 channels, a 1×1 convolution to 32, fully connected layers of 16, 8 and 2 units, ReLU
between all of them. CNN-(1) pools after each convolution; CNN-(2) after the last only, as the paper says (its published
code does not pool there at all), which keeps 32 · 120 · 120 features at the paper's size.
"""

from __future__ import annotations

from torch import Tensor, nn

from cardiocaps.config import Preset
from cardiocaps.models.prediction import CLASSES, IN_CHANNELS, Prediction, check_image, of_logits

_CHANNELS = (32, 64, 32)
_HIDDEN = (16, 8)


class CNN(nn.Module):
    """The network.

    Pooling is the maximum of 3×3 neighbours with stride 1, which keeps the size of a map. The last pooling of CNN-(1)
    is the maximum of the whole map.

    Args:
        sizes: of the image; also kernels and strides of the first two convolutions, which are those of CardioCaps.
        pooled: True for CNN-(1), False for CNN-(2).
        published: as in the published code: the pooling of CNN-(1) has no padding, and CNN-(2) does not pool at all.

    Shape: image [B, 9, S, S] in [0, 1] -> `Prediction` with logits; label is ignored.

    Raises:
        ValueError: an image of another shape.
    """

    def __init__(self, sizes: Preset, *, pooled: bool, published: bool = False) -> None:
        super().__init__()
        self.size = sizes.size
        first, second, last = _CHANNELS
        side = (sizes.size - sizes.conv_kernel) // sizes.conv_stride + 1
        side = (side - sizes.primary_kernel) // sizes.primary_stride + 1

        def pooling() -> nn.Module:
            return nn.MaxPool2d(3, stride=1, padding=0 if published else 1)

        self.features = nn.Sequential(
            nn.Conv2d(IN_CHANNELS, first, sizes.conv_kernel, sizes.conv_stride),
            nn.ReLU(),
            pooling() if pooled else nn.Identity(),
            nn.Conv2d(first, second, sizes.primary_kernel, sizes.primary_stride),
            nn.ReLU(),
            pooling() if pooled else nn.Identity(),
            nn.Conv2d(second, last, 1),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(1) if pooled else nn.Identity() if published else pooling(),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(last if pooled else last * side**2, _HIDDEN[0]),
            nn.ReLU(),
            nn.Linear(*_HIDDEN),
            nn.ReLU(),
            nn.Linear(_HIDDEN[1], CLASSES),
        )

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        check_image("CNN", image, self.size)
        return of_logits(self.classifier(self.features(image)))
