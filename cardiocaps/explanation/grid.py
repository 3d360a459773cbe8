"""Where the cells of a feature map lie on the network's input, and the values of cells brought there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The places of a feature map's cells along one axis of the input; both axes of an image are alike.

    Attributes:
        start: the centre of the first cell's receptive field, in pixels from the centre of the input's first pixel.
        step: pixels from one cell to the next.
    """

    start: float = 0.0
    step: float = 1.0

    def after(self, kernel: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Grid:
        """The grid after a convolution or a pooling of this one."""
        return Grid(self.start + self.step * (dilation * (kernel - 1) / 2 - padding), self.step * stride)

    def on_input(self, cells: Tensor, size: int) -> Tensor:
        """Bring values of cells to the pixels of the input, with their sum unchanged.

        A cell's value is spread around the centre of its receptive field by a triangle of the width of two steps along
        each axis, cut off at the edge of the input. Inside the grid this is bilinear interpolation.

        Args:
            cells: [B, H, H].
            size: S, side of the input in pixels.

        Returns:
            [B, S, S] in the dtype of `cells`. The sums over the last two axes are those of `cells`.
        """
        spread = self._spread(cells.shape[-1], size).to(cells)
        return torch.einsum("yr,brc,xc->byx", spread, cells, spread)

    def _spread(self, cells: int, size: int) -> Tensor:
        """[S, H]: the share of each cell that each pixel gets, float64."""
        centres = (self.start + self.step * torch.arange(cells, dtype=torch.float64)).clamp(0, size - 1)
        distance = torch.arange(size, dtype=torch.float64)[:, None] - centres
        weight = (1 - distance.abs() / max(self.step, 1.0)).clamp(min=0)
        return weight / weight.sum(dim=0)
