"""The shapes that are measured, and their random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """B batch, N input capsules of dimension K, J output capsules of dimension D."""

    name: str
    B: int
    N: int
    K: int
    J: int
    D: int

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """u, weight, attn_weight and attn_bias in float32, needing gradients; fresh random numbers."""
        g = torch.Generator().manual_seed(seed)
        u = torch.rand(self.B, self.N, self.K, generator=g).mul_(2).sub_(1)
        weight = torch.randn(self.N, self.K, self.J, self.D, generator=g).mul_(self.J / (self.N * self.D) ** 0.5)
        attn_weight = torch.randn(self.J, self.J, generator=g)
        attn_bias = torch.randn(self.J, generator=g)
        tensors = {"u": u, "weight": weight, "attn_weight": attn_weight, "attn_bias": attn_bias}
        return {name: x.requires_grad_() for name, x in tensors.items()}


PAPER = Shape("paper", B=8, N=460_800, K=8, J=2, D=16)
QUARTER = Shape("paper/4", B=8, N=115_200, K=8, J=2, D=16)
MNIST = Shape("mnist", B=128, N=1152, K=8, J=10, D=16)
