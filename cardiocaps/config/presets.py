"""The presets: sizes of a network, and how it is trained."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """Sizes of the network (lengths in pixels of the input or of the map before), and the training that goes
    with them."""

    size: int
    conv_channels: int
    conv_kernel: int
    conv_stride: int
    primary_types: int
    primary_dim: int
    primary_kernel: int
    primary_stride: int
    out_dim: int
    decoder: tuple[int, int]
    frames_per_clip: int
    batch_size: int
    learning_rate: float
    epochs: int
    patience: int


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        size=64,
        conv_channels=32,
        conv_kernel=9,
        conv_stride=2,
        primary_types=8,
        primary_dim=8,
        primary_kernel=5,
        primary_stride=2,
        out_dim=16,
        decoder=(128, 256),
        frames_per_clip=8,
        batch_size=32,
        learning_rate=1e-3,
        epochs=20,
        patience=5,
    ),
    "small": Preset(
        size=128,
        conv_channels=64,
        conv_kernel=9,
        conv_stride=1,
        primary_types=16,
        primary_dim=8,
        primary_kernel=9,
        primary_stride=2,
        out_dim=16,
        decoder=(512, 1024),
        frames_per_clip=16,
        batch_size=16,
        learning_rate=3e-4,
        epochs=40,
        patience=6,
    ),
    "paper": Preset(  # CardioCaps, section III-A
        size=256,
        conv_channels=256,
        conv_kernel=9,
        conv_stride=1,
        primary_types=32,
        primary_dim=8,
        primary_kernel=9,
        primary_stride=2,
        out_dim=16,
        decoder=(512, 1024),
        frames_per_clip=50,
        batch_size=8,
        learning_rate=1e-4,
        epochs=100,
        patience=5,
    ),
}
