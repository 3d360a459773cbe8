"""The input and the output that all networks have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CLASSES = 2
IN_CHANNELS = 9
RECONSTRUCTED_CHANNELS = 3


class Prediction(NamedTuple):
    """The output of a network for a batch. A part that the network does not have is None."""

    scores: Tensor  # [B, 2] lengths of the class capsules, activations, or logits
    probability: Tensor  # [B] of class 1, float32
    capsules: Tensor | None = None  # [B, 2, D] class capsules
    reconstruction: Tensor | None = (
        None  # [B, 3, S, S] of the first three input channels; in [0, 1] unless its decoder is linear
    )
    regression: Tensor | None = None  # [B] cm or percent


def of_logits(logits: Tensor) -> Prediction:
    """The output of a network that computes only logits [B, 2]; their softmax is the probability."""
    return Prediction(scores=logits, probability=logits.float().softmax(dim=1)[:, 1])


def share(scores: Tensor) -> Tensor:
    """The share of class 1 in two scores ≥ 0, s₁ / (s₀ + s₁), or one half if both are 0: [B, 2] -> float32 [B]."""
    scores = scores.float() + torch.finfo(torch.float32).tiny
    return scores[:, 1] / scores.sum(dim=1)


def check_image(network: str, image: Tensor, size: int) -> None:
    """Raise ValueError, which names the network, unless the image is [B, 9, size, size]."""
    expected = [IN_CHANNELS, size, size]
    if image.dim() != 4 or [*image.shape[1:]] != expected:
        raise ValueError(f"{network}: image has shape {list(image.shape)}; expected [B, {str(expected)[1:]}")
