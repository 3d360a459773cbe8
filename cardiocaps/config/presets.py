"""The presets: the sizes of a network, and the training that goes with them."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Sizes of a network and defaults of its training. The default values are those of the paper (section III-A).

    Lengths (`size`, kernels, strides) are in pixels of the layer's input. The channels and sizes describe, in this
    order, the first convolution, the primary capsules, the class capsules and the two hidden layers of the decoder.
    """

    size: int = 256
    conv_channels: int = 256
    conv_kernel: int = 9
    conv_stride: int = 1
    primary_types: int = 32
    primary_dim: int = 8
    primary_kernel: int = 9
    primary_stride: int = 2
    out_dim: int = 16
    decoder: tuple[int, int] = (512, 1024)
    frames_per_clip: int = 50
    batch_size: int = 8
    learning_rate: float = 1e-4
    epochs: int = 100
    patience: int = 5


TRAINING_DEFAULTS = ("frames_per_clip", "batch_size", "learning_rate", "epochs", "patience")
"""Fields of a preset that are only the defaults of the settings with the same names."""

PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        size=64,
        conv_channels=32,
        conv_stride=2,
        primary_types=8,
        primary_kernel=5,
        decoder=(128, 256),
        frames_per_clip=8,
        batch_size=32,
        learning_rate=1e-3,
        epochs=20,
    ),
    "small": Preset(
        size=128,
        conv_channels=64,
        primary_types=16,
        frames_per_clip=16,
        batch_size=16,
        learning_rate=3e-4,
        epochs=40,
        patience=6,
    ),
    "paper": Preset(),
}
