"""Efficiency: the cost of naive and of fused routing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cardiocaps.evaluation.names import METRIC_NAMES
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.exhibits.panels import SMALL, dot_panel, dress_panel, name_systems, wrapped
from cardiocaps.experiments.plan import SYSTEMS
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.metrics import MeanEstimate
from cardiocaps.plots import BLUE, GREY, INK, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {"naive": VERMILION, "fused": BLUE}


@dataclass(frozen=True)
class Efficiency(Exhibit):
    """Puts the cost first, and draws it."""

    def sections(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        return [*self._cost(rows, found), *self._results(rows, found, bootstrap), *self._published(rows, found)]

    def draw(self, summaries: Sequence[Summary]) -> Figure:
        """Seconds per epoch and peak memory as bars, accuracy beside them; the colour tells naive from fused."""
        from matplotlib.patches import Patch

        height = 0.42 * len(summaries) + 1.5
        figure = new_figure(10, height + 0.7, wrapped(self.title, 90))
        blocks: Any = figure.subfigures(2, 1, height_ratios=[height, 0.3])
        body, foot = blocks
        time, memory, accuracy = body.subplots(1, 3)
        none = MeanEstimate(math.nan)
        mebibytes = [none if s.peak_memory is None else MeanEstimate(s.peak_memory / 2**20) for s in summaries]
        _bars(time, "Seconds per epoch", summaries, [s.cost("seconds_per_epoch") for s in summaries], "{:.1f}".format)
        _bars(memory, "Peak memory, MiB", summaries, mebibytes, "{:,.0f}".format)
        estimates = [s.report.metrics["accuracy"] for s in summaries]
        seeds = [[run.metrics["accuracy"].value for run in s.report.runs] for s in summaries]
        dot_panel(accuracy, METRIC_NAMES["accuracy"], summaries, estimates, seeds, colour=_colour)
        for axes in (time, memory, accuracy):
            name_systems(axes, summaries, shown=axes is time)
        handles = [Patch(color=colour, label=f"{name} routing") for name, colour in _COLOURS.items()]
        foot.legend(handles=handles, loc="center", ncols=len(handles), frameon=False, fontsize=SMALL)
        return figure


def _colour(summary: Summary) -> str:
    naive = SYSTEMS[summary.system].settings.get("backend") == "reference"
    return _COLOURS["naive" if naive else "fused"]


def _bars(
    axes: Axes, title: str, summaries: Sequence[Summary], values: Sequence[MeanEstimate], text: Callable[[float], str]
) -> None:
    """A bar for each system with its number at the end."""
    ends = [v.value + (v.sd if v.sd > 0 else 0) for v in values]
    for line, (summary, estimate, end) in enumerate(zip(summaries, values, ends, strict=True)):
        measured = not math.isnan(estimate.value)
        if measured:
            deviation = [estimate.sd] if estimate.sd > 0 else None
            axes.barh([line], [estimate.value], 0.62, xerr=deviation, color=_colour(summary), ecolor=INK, capsize=2)
        axes.annotate(
            text(estimate.value) if measured else "not measured",
            (end if measured else 0, line),
            (5 if measured else 4, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL if measured else 7,
            color=INK if measured else GREY,
        )
    axes.set_xlim(0, 1.25 * max((end for end in ends if not math.isnan(end)), default=1))
    dress_panel(axes, title, len(summaries), grid="x")
