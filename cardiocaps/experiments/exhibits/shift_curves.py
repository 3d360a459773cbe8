"""Figures of the exhibit `robustness`: metrics over shifts of the test, and features over the angle."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cardiocaps.evaluation.names import METRIC_NAMES
from cardiocaps.experiments.exhibits.curves import STYLES
from cardiocaps.experiments.exhibits.panels import SMALL, draw_line, wrapped
from cardiocaps.experiments.plan import SYSTEMS
from cardiocaps.experiments.robustness.equivariance import JUDGED, PatientRatio, mean_estimate
from cardiocaps.experiments.robustness.measured import Measured
from cardiocaps.experiments.robustness.shifts import AXES, UNSHIFTED, ShiftedTest, neutral
from cardiocaps.metrics import MeanEstimate
from cardiocaps.plots import GREY, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLUMNS = 3
_OTHERS = "other systems"
_TINY = 6.5  # points


def curves(found: Measured, metric: str, tests: Sequence[ShiftedTest], highlighted: Sequence[str]) -> Figure:
    """A panel for each axis of the tests: the highlighted systems with intervals, the others as thin grey lines.

    Args:
        found: of these tests.
        metric: one of `measured.CURVES`.
        tests: one axis at least.
        highlighted: keys of systems.
    """
    shown = [axis for axis in AXES if any(test.axis == axis for test in tests)]
    lines = math.ceil(len(shown) / _COLUMNS)
    name = METRIC_NAMES[metric]
    name = f"{name[0].upper()}{name[1:]}"
    figure = new_figure(9.6, 2.7 * lines + 1.3, f"{name} of trained systems under shifts of the test")
    blocks: Any = figure.subfigures(2, 1, height_ratios=[2.7 * lines, 0.5])
    body, foot = blocks
    panels = body.subplots(lines, _COLUMNS, squeeze=False, sharey=True).ravel()
    for place, (axes, axis) in enumerate(zip(panels, shown, strict=False)):
        sizes = {neutral(axis): UNSHIFTED.name, **{test.size: test.name for test in tests if test.axis == axis}}
        sizes = dict(sorted(sizes.items()))
        # A little to the side of each other, so that intervals can be told apart.
        step = 0.012 * (max(sizes) - min(sizes))
        for key in found.systems:
            values = [found.points[key, test].metrics[metric] for test in sizes.values()]
            _line(axes, list(sizes), values, key, highlighted, step)
        _dress(axes, axis, list(sizes))
        if place % _COLUMNS == 0:
            axes.set_ylabel(name, fontsize=9)
    for axes in panels[len(shown) :]:
        axes.remove()
    _legend(foot, panels[0])
    return figure


def draw_equivariance(found: Measured, highlighted: Sequence[str]) -> Figure:
    """Change and linear map over the angle, and how well the angle can be read from the features."""
    figure = new_figure(9.6, 4.4, "Features of trained networks when the heart is turned")
    blocks: Any = figure.subfigures(2, 1, height_ratios=[3.6, 0.5])
    body, foot = blocks
    change, linear, angle = body.subplots(1, 3)

    def estimate(ratio: PatientRatio) -> MeanEstimate:
        return mean_estimate(ratio, found.label, found.bootstrap)

    turns: list[float] = []
    for line, (key, own) in enumerate(found.equivariance.items()):
        turns = list(own.changes)
        _line(change, turns, [estimate(own.changes[turn]) for turn in turns], key, highlighted)
        _line(linear, turns, [estimate(own.maps[JUDGED, turn]) for turn in turns], key, highlighted)
        x = estimate(own.angles[JUDGED])
        style = STYLES[highlighted.index(key)] if key in highlighted else {"color": GREY, "marker": "o"}
        bounds = [] if math.isnan(x.low) else [[max(0.0, x.value - x.low)], [max(0.0, x.high - x.value)]]
        look = {"markersize": 5, "capsize": 2, **style, "linestyle": "none"}
        angle.errorbar([x.value], [line], xerr=bounds or None, **look)
    dress(change, "Turn, degrees", "Relative cosine distance")
    change.set_yscale("log")  # networks differ by factors of hundreds
    dress(linear, "Turn, degrees", f"R² of a linear map, {JUDGED} components")
    dress(angle, f"R² of the angle, {JUDGED} components", "")
    for axes in (change, linear):
        axes.set_xticks(turns)
    for axes in (change, linear, angle):
        axes.tick_params(labelsize=SMALL)
    names = [wrapped(SYSTEMS[key].title, 26) for key in found.equivariance]
    angle.set_yticks(range(len(names)), names, fontsize=_TINY)
    angle.tick_params(axis="y", labelsize=_TINY, length=0)
    angle.set_ylim(len(names) - 0.5, -0.5)
    _legend(foot, change)
    return figure


def _line(
    axes: Axes,
    at: Sequence[float],
    values: Sequence[MeanEstimate],
    key: str,
    highlighted: Sequence[str],
    step: float = 0.0,
) -> None:
    """A system: with marks and intervals if it is highlighted, each by a `step` beside the one before."""
    if key in highlighted:
        number = highlighted.index(key)
        places = [x + step * (number - 1) for x in at]
        look = {"markersize": 4.5, "zorder": 3, **STYLES[number]}
        draw_line(axes, places, values, label=SYSTEMS[key].title, **look)
    else:
        axes.plot(at, [x.value for x in values], "-", color="#BDBDBD", linewidth=0.8, zorder=1, label=_OTHERS)


def _dress(axes: Axes, axis: str, sizes: Sequence[float]) -> None:
    name = "machine" if axis == "machine" else AXES[axis]
    dress(axes, "", "")
    axes.set_xlabel(f"{name[0].upper()}{name[1:]}", fontsize=9)
    axes.tick_params(labelsize=SMALL)
    axes.set_xticks(list(sizes), ["usual", "another"] if axis == "machine" else [f"{x:g}" for x in sizes])
    room = 0.12 * (max(sizes) - min(sizes))
    axes.set_xlim(min(sizes) - room, max(sizes) + room)


def _legend(foot: Any, axes: Axes) -> None:
    """The highlighted systems, then the others under one name."""
    lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = sorted(lines, key=lambda name: name == _OTHERS)
    handles = [lines[name] for name in names]
    foot.legend(handles, names, loc="center", ncols=len(names), frameon=False, fontsize=SMALL, handlelength=4)
