"""How primary capsules lie in the features of a convolution (layouts "channels" and "legacy"), for the kernels of
the backends cpu, cuda and triton; `reference.py` has a formula of its own.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Capsules in features [B, C, H, W]: B · outer · inner of them, of K components each, with the strides of all."""

    features: Tensor  # contiguous or channels_last; a copy of those that are neither
    B: int
    outer: int
    inner: int
    K: int
    strides: tuple[int, int, int, int]  # of B, outer, inner and K

    @staticmethod
    def of(features: Tensor, K: int, legacy: bool) -> Grid:
        """The capsules of `capsops.primary_capsules`; its layout is "legacy" or "channels"."""
        B, C, height, width = features.shape
        pixels = height * width
        straddling = legacy and pixels % K != 0  # a capsule continues in the next channel
        last = features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()
        if last and not straddling:
            channel, pixel = 1, C
        else:
            features = features.contiguous()
            channel, pixel = pixels, 1
        if straddling:
            outer, inner, strides = 1, C * pixels // K, (0, K, 1)
        elif legacy:
            outer, inner, strides = C, pixels // K, (channel, K * pixel, pixel)
        else:
            outer, inner, strides = C // K, pixels, (K * channel, pixel, channel)
        return Grid(features, B, outer, inner, K, (C * pixels, *strides))

    def gradient(self, g_features: Tensor) -> Tensor:
        """Where a kernel writes the gradient, with the strides of `features`: g_features, or memory to copy from."""
        return g_features if g_features.stride() == self.features.stride() else torch.empty_like(self.features)
