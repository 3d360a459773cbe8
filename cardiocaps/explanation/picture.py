"""The picture of an explanation: the middle frame, the maps laid over it, and the probability over the frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cardiocaps.explanation.maps import TITLES
from cardiocaps.plots import BLUE, GREY, dress, new_figure, save

COLOURS = "viridis"  # its brightness rises evenly, so that colour-blind readers can read it
OPACITY = 0.75  # of the largest value


def draw(
    path: Path,
    frame: NDArray[np.uint8],
    aspect: float,
    maps: Mapping[str, NDArray[np.float32]],
    title: str,
    numbers: Sequence[int],
    probabilities: Sequence[float],
    threshold: float,
) -> None:
    """Draw the explanation of a video. It shows no name.

    Args:
        path: of the PNG file.
        frame: uint8 [3, S, S].
        aspect: width of the video over its height.
        maps: name of a method -> [H, H], on the whole frame. Only positive values are drawn.
        title: class and probability.
        numbers: of the frames that the network saw.
        probabilities: of these frames.
        threshold: of the probability.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib

    figure = new_figure(4.0 * (1 + len(maps)) + 0.6, 5.6, title)
    grid = figure.add_gridspec(2, 1 + len(maps), height_ratios=(2.4, 1))
    image = np.ascontiguousarray(frame.transpose(1, 2, 0))
    extent = (0.0, aspect, 1.0, 0.0)
    panels = [figure.add_subplot(grid[0, i]) for i in range(1 + len(maps))]
    for axes in panels:
        axes.imshow(image, extent=extent)
        axes.set_axis_off()
    panels[0].set_title("middle frame", fontsize=10)
    colours = matplotlib.colormaps[COLOURS]
    for axes, (name, values) in zip(panels[1:], maps.items(), strict=True):
        share = np.maximum(values, 0)
        empty = not share.max() > 0
        share = share if empty else share / share.max()
        drawn = axes.imshow(
            share, cmap=colours, vmin=0, vmax=1, alpha=OPACITY * share, extent=extent, interpolation="bilinear"
        )
        axes.set_title(TITLES[name] + (": nothing" if empty else ""), fontsize=10)
        bar = figure.colorbar(drawn, ax=axes, fraction=0.045)
        bar.solids.set_alpha(1)  # type: ignore[union-attr]
        bar.set_label("share of the largest value", fontsize=8)
    curve = figure.add_subplot(grid[1, :])
    curve.plot(numbers, probabilities, "o-", color=BLUE, markersize=3)
    curve.axhline(threshold, color=GREY, linestyle=":", linewidth=1)
    curve.set_ylim(-0.02, 1.02)
    dress(curve, "frame (dotted: the threshold)", "probability of abnormal")
    save(figure, path)
