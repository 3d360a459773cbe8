"""Parts of the figures: a panel with a line for each system."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from cardiocaps.experiments.plan import MAIN, corrected_key
from cardiocaps.experiments.reported import BINARY_F1
from cardiocaps.experiments.summaries import Summary
from cardiocaps.metrics import MeanEstimate
from cardiocaps.plots import BLUE, GREY, INK, VERMILION

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = 8  # points
STRIP = "#ECECEC"
REPORTED: dict[str, Any] = {
    "marker": "D",
    "markersize": 4.5,
    "markerfacecolor": "white",
    "color": INK,
    "linestyle": "none",
}
REPORTED_BINARY: dict[str, Any] = {**REPORTED, "marker": "s", "color": GREY}


def dot_panel(
    axes: Axes,
    title: str,
    summaries: Sequence[Summary],
    estimates: Sequence[MeanEstimate],
    seeds: Sequence[Sequence[float]],
    paper: str | None = None,
    colour: Callable[[Summary], str] | None = None,
) -> None:
    """Means with their intervals, the seeds as small dots, and the paper's figures `paper`: a line for each system.

    The paper's figures are of another data set. They stand above ours on a strip of grey, so that nobody compares the
    two at first sight.

    Args:
        colour: of a system; by default that of `colour_of`.
    """
    shown: list[float] = []
    for line, (summary, estimate, values) in enumerate(zip(summaries, estimates, seeds, strict=True)):
        own = (colour or colour_of)(summary)
        if math.isnan(estimate.value):
            middle = axes.get_yaxis_transform()  # across: shares of the panel; down: the lines
            axes.text(0.5, line, "undefined", ha="center", va="center", fontsize=7, color=GREY, transform=middle)
        else:
            bounds = [] if math.isnan(estimate.low) else [estimate.low, estimate.high]
            # The interval of a mean of percentiles need not hold the mean itself.
            error = [[max(0, estimate.value - b) for b in bounds[:1]], [max(0, b - estimate.value) for b in bounds[1:]]]
            axes.errorbar(
                [estimate.value],
                [line],
                xerr=error if bounds else None,
                color=own,
                zorder=3,
                marker="o",
                markersize=5.5,
                capsize=2,
                elinewidth=1.3,
                linestyle="none",
            )
            shown += [estimate.value, *bounds]
        if len(values) > 1:
            finite = [value for value in values if math.isfinite(value)]
            axes.plot(finite, [line + 0.24] * len(finite), ".", color=own, markersize=3.5, alpha=0.8, zorder=2)
            shown += finite
        if paper and summary.reported:
            value = summary.reported[paper].value
            binary = paper == "f1" and summary.system.startswith(BINARY_F1)
            axes.axhspan(line - 0.42, line - 0.14, color=STRIP, linewidth=0, zorder=0.5)
            axes.plot([value], [line - 0.28], zorder=4, **(REPORTED_BINARY if binary else REPORTED))
            shown.append(value)
    axes.set_xlim(*_limits(shown))
    dress_panel(axes, title[0].upper() + title[1:], len(summaries))


def draw_line(
    axes: Axes,
    at: Sequence[float],
    estimates: Sequence[MeanEstimate],
    *,
    label: str,
    interval_label: str = "_intervals",
    **style: Any,
) -> None:
    """The means of a system at places on the x axis, joined by a line, each with its interval if it has one.

    Args:
        interval_label: of the intervals in the legend, which leaves out texts that begin with "_".
        style: of the line, as `Axes.plot` takes it; at least its colour.
    """
    axes.plot(at, [e.value for e in estimates], label=label, **{"markersize": 5, "linewidth": 1.5, **style})
    known = [(x, e.low, e.high) for x, e in zip(at, estimates, strict=True) if not math.isnan(e.low)]
    if known:
        axes.vlines(*zip(*known, strict=True), color=style["color"], linewidth=1.3, alpha=0.6, label=interval_label)


def logarithmic(axes: Axes, at: Sequence[float], texts: Sequence[str]) -> None:
    """Make the x axis logarithmic, with ticks at these places alone."""
    axes.set_xscale("log")
    axes.set_xticks(at, texts, fontsize=SMALL)
    axes.minorticks_off()
    axes.grid(axis="x", visible=False)


def dress_panel(axes: Axes, title: str, lines: int, grid: Literal["both", "x"] = "both") -> None:
    axes.set_title(title, fontsize=9, color=INK)
    axes.grid(axis=grid, color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.set_ylim(lines - 0.45, -0.55)
    axes.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])


def name_systems(axes: Axes, summaries: Sequence[Summary], shown: bool) -> None:
    axes.set_yticks(range(len(summaries)), [wrapped(s.title, 34) if shown else "" for s in summaries], fontsize=SMALL)
    axes.tick_params(axis="y", length=0)


def colour_of(summary: Summary) -> str:
    return VERMILION if corrected_key(summary.system) == MAIN else BLUE


def wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with some room, at least 0.1 wide and within what a metric can be."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), (0.1 - (high - low)) / 2, 0.01)
    return max(-0.03, low - room), min(1.03, high + room)
