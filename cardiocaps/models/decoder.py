"""The decoder of capsule networks (Sabour et al. 2017, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cardiocaps.models.prediction import CLASSES, RECONSTRUCTED_CHANNELS


class Decoder(nn.Sequential):
    """Three layers from one class capsule to an image; the other capsule is set to 0.

    Args:
        capsule_dim: D.
        hidden: units of the first two layers.
        size: S.
        linear: without the logistic function at the end, as in the code published with CardioCaps.

    Shape: capsules [B, 2, D], seen int64 [B], the class of the capsule -> [B, 3, S, S] in [0, 1]; unbounded if linear.
    """

    def __init__(self, capsule_dim: int, hidden: tuple[int, int], size: int, *, linear: bool = False) -> None:
        first, second = hidden
        super().__init__(
            nn.Linear(CLASSES * capsule_dim, first),
            nn.ReLU(),
            nn.Linear(first, second),
            nn.ReLU(),
            nn.Linear(second, RECONSTRUCTED_CHANNELS * size**2),
            nn.Identity() if linear else nn.Sigmoid(),
        )
        self.size = size

    def forward(self, capsules: Tensor, seen: Tensor) -> Tensor:  # type: ignore[override]
        mask = nn.functional.one_hot(seen, CLASSES).to(capsules.dtype)
        pixels = super().forward((capsules * mask[:, :, None]).flatten(1))
        return pixels.view(-1, RECONSTRUCTED_CHANNELS, self.size, self.size)


def seen_class(scores: Tensor, label: Tensor | None) -> Tensor:
    """The class whose capsule the decoder sees, int64 [B]: the label (Sabour et al. 2017), or without a label the class
    with the larger of the scores [B, 2]."""
    return torch.argmax(scores, dim=1) if label is None else label
