"""The class capsules of CardioCaps with other affine maps than a learned matrix for each vote (table III of the paper).

Each is a `CapsuleLayer` whose matrices are computed or fixed, so that no routing holds the votes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from capsops.nn import CapsuleLayer
from cardiocaps.models.prediction import CLASSES

PUBLISHED_CONSTANT = 0.01
"""The constant of the published code; the paper says 1."""


class AffineLayer(CapsuleLayer):
    """A `CapsuleLayer` that changes its input capsules, or weighs them, before the routing."""

    def operands(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """The capsules and their weights that the routing takes.

        Args:
            u: primary capsules [B, N, K].

        Returns:
            [B, N, K'] with the K' rows of the matrices, and [B, N] or None.
        """
        return u, None

    def forward(self, u: Tensor) -> Tensor:  # type: ignore[override]
        """Primary capsules [B, N, K] -> class capsules [B, 2, D]."""
        u, weight = self.operands(u)
        capsules: Tensor = super().forward(u, input_weight=weight)
        return capsules


class ConstantVotes(AffineLayer):
    """Votes by a constant, which is not learned; see `affine` of `CardioCaps`. Arguments as `CapsuleLayer`.

    Args:
        published: 0.01 everywhere, as in the published code.
    """

    input_weight: Tensor | None

    def __init__(
        self, capsules: int, dim: int, out_dim: int, routing: str, *, published: bool = False, **options: Any
    ) -> None:
        super().__init__(capsules, dim, CLASSES, out_dim, routing, shared=True, **options)
        share = CLASSES / capsules
        # Uniform routing takes no weights of its input capsules; its couplings do not depend on the votes anyway.
        value = PUBLISHED_CONSTANT if published else share if routing == "uniform" else 1.0
        constant = torch.full_like(self.weight, value, requires_grad=False)
        del self.weight
        # Not part of checkpoints, so that loading cannot change it.
        self.register_buffer("weight", constant, persistent=False)
        # Part of checkpoints: those of older versions, in which the map was another one, do not fit.
        self.register_buffer("input_weight", None if published or routing == "uniform" else torch.tensor(share))

    def operands(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        return u, None if self.input_weight is None else self.input_weight.to(u.dtype).expand(u.shape[:2])


class PublishedConvolution(AffineLayer):
    """Votes by the published code's 1×1 convolution from one channel to two: x̂_ijd = w_j u_ik + b_j with k = d mod K.

    A capsule gets one more number, 1, and the matrix one more row for b_j. Arguments as `CapsuleLayer`.

    Parameters: scale [2] (w) and offset [2] (b), which start as those of `torch.nn.Conv2d(1, 2, 1)`.
    """

    def __init__(self, capsules: int, dim: int, out_dim: int, routing: str, **options: Any) -> None:
        super().__init__(capsules, dim + 1, CLASSES, out_dim, routing, shared=True, **options)
        del self.weight
        start = nn.Conv2d(1, CLASSES, 1)
        assert start.bias is not None
        self.scale, self.offset = nn.Parameter(start.weight.detach().flatten()), nn.Parameter(start.bias.detach())

    @property  # type: ignore[override]
    def weight(self) -> Tensor:
        """The matrices [K + 1, 2, D]."""
        if "weight" in self.__dict__["_parameters"]:  # that of the base, before it is deleted
            parameter: Tensor = self.__dict__["_parameters"]["weight"]
            return parameter
        dim = self.in_dim - 1
        component = torch.arange(self.out_dim, device=self.scale.device) % dim
        repeated = nn.functional.one_hot(component, dim).T.to(self.scale.dtype)  # [K, D]
        rows = repeated[:, None, :] * self.scale[:, None]
        return torch.cat([rows, self.offset[None, :, None].expand(1, -1, self.out_dim)])

    @weight.deleter
    def weight(self) -> None:
        nn.Module.__delattr__(self, "weight")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Without the base's care for the memory order of a weight, which is computed here."""
        nn.Module._apply(self, fn, recurse)
        return self

    def operands(self, u: Tensor) -> tuple[Tensor, Tensor | None]:
        return nn.functional.pad(u, (0, 1), value=1.0), None
