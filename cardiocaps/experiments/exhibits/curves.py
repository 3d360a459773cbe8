"""Learning curve and prevalence: metrics over a property of the training data, a line for each system."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

from cardiocaps.evaluation.names import METRIC_NAMES
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.exhibits.panels import SMALL, draw_line, logarithmic, wrapped
from cardiocaps.experiments.markdown import DASH, failure, plus_minus, table, with_interval
from cardiocaps.experiments.plan import (
    LEARNING_CURVE,
    MAIN,
    PREVALENCE,
    PREVALENCES,
    SYSTEMS,
    TRAINING_VIDEOS,
    prevalence_key,
    training_key,
)
from cardiocaps.experiments.reference_rows import ANOTHER_READER, BAYES_BOUND, BOUNDS
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.metrics import MeanEstimate
from cardiocaps.plots import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, VERMILION, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES: tuple[dict[str, Any], ...] = (
    {"color": VERMILION, "marker": "o", "linestyle": "-"},
    {"color": BLUE, "marker": "s", "linestyle": "--"},
    {"color": GREEN, "marker": "^", "linestyle": "-."},
    {"color": INK, "marker": "D", "linestyle": ":", "markerfacecolor": "white"},
    {"color": PURPLE, "marker": "v", "linestyle": (0, (6, 1, 1, 1, 1, 1)), "markerfacecolor": "white"},
    {"color": ORANGE, "marker": "P", "linestyle": (0, (3, 3))},
)
"""Of the lines, in their order: each differs from the others by its marker and by its dashes, so also in grey."""

_ACROSS: Mapping[str, Any] = {BAYES_BOUND: (0, (1, 2)), ANOTHER_READER: (0, (8, 2))}
"""Dashes of the bounds, which are grey lines across a panel."""

_SPREAD = 0.035
"""Step between the lines along the axis, in natural logarithms, so that their intervals lie side by side."""


@dataclass(frozen=True)
class Curve(Exhibit):
    """Puts a table of each metric first, with a column for each place on the axis, and draws the metrics over it."""

    places: ClassVar[Mapping[str, tuple[str, float]]]  # system -> the line that it belongs to, its place on the axis
    axis: ClassVar[str]
    column: ClassVar[str]  # of the CSV
    metrics: ClassVar[tuple[str, ...]]
    about: ClassVar[str]

    @property
    def has_references(self) -> bool:
        return True

    def draws(self, system: str) -> bool:
        return super().draws(system) or system in BOUNDS

    def varied(self, system: str) -> Mapping[str, float]:
        return {self.column: self.places[system][1]} if system in self.places else {}

    def compared_with(self, system: str, systems: Sequence[str]) -> str | None:
        """CardioCaps at the same place of the axis; CardioCaps itself with that of the other tables."""
        line, at = self.places[system]
        reference = MAIN if line == MAIN else next(key for key, place in self.places.items() if place == (MAIN, at))
        return None if reference == system else reference

    def sections(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        own = [f"## {self.axis}", self.about]
        for name in self.metrics:
            heading = _name(name)
            own += [f"{heading[0].upper()}{heading[1:]}:", self._table(rows, found, name)]
        return own + super().sections(rows, found, bootstrap)

    def _table(self, rows: Sequence[Row], found: Mapping[str, Summary], name: str) -> str:
        """A line for each line of the figure, and for each row that depends on no training."""
        by_place = {self.places[row.system]: row for row in rows if row.system in self.places}
        columns = sorted({at for _, at in by_place})

        def text(row: Row | None) -> str:
            if row is None:
                return DASH
            return with_interval(_estimate(found[row.system], name)) if row.system in found else failure(row)

        lines = [
            (SYSTEMS[line].title, *(text(by_place.get((line, at))) for at in columns))
            for line in dict.fromkeys(line for line, _ in by_place)
        ]
        for row in rows:
            if row.system in found and row.system not in self.places:
                lines.append((row.title, *[plus_minus(_estimate(found[row.system], name))] * len(columns)))
        return table(("system", *(self.tick(at) for at in columns)), lines)

    def tick(self, at: float) -> str:
        raise NotImplementedError

    def draw(self, summaries: Sequence[Summary]) -> Figure:
        """A panel for each metric: the means over the seeds with their intervals, and the bounds across."""
        from matplotlib.lines import Line2D

        columns = 2
        lines = math.ceil(len(self.metrics) / columns)
        figure = new_figure(5.0 * columns, 3.5 * lines + 1.5, wrapped(self.title, 90))
        blocks: Any = figure.subfigures(2, 1, height_ratios=[3.5 * lines, 0.8])
        body, foot = blocks
        panels = body.subplots(lines, columns, squeeze=False, sharex=True).ravel()
        of_lines: dict[str, list[Summary]] = {}
        for summary in summaries:
            if summary.system in self.places:
                of_lines.setdefault(self.places[summary.system][0], []).append(summary)
        order = list(dict.fromkeys(line for line, _ in self.places.values()))
        every = sorted({self.places[s.system][1] for own in of_lines.values() for s in own})
        for axes, name in zip(panels, self.metrics, strict=True):
            for line, own in of_lines.items():
                number = order.index(line)
                own = sorted(own, key=lambda s: self.places[s.system][1])
                shift = math.exp(_SPREAD * (number - (len(order) - 1) / 2))
                draw_line(
                    axes,
                    [self.places[s.system][1] * shift for s in own],
                    [_estimate(s, name) for s in own],
                    label=SYSTEMS[line].title,
                    **STYLES[number],
                )
            for summary in summaries:
                bound = _estimate(summary, name).value
                if summary.system in BOUNDS and not math.isnan(bound):
                    style = _ACROSS[summary.system]
                    axes.axhline(bound, color=GREY, linewidth=1.2, linestyle=style, label=summary.title, zorder=1)
            heading = _name(name)
            dress(axes, "", heading[0].upper() + heading[1:])
            logarithmic(axes, every, [self.tick(at) for at in every])
            axes.tick_params(labelsize=SMALL, labelbottom=True)
            axes.set_xlabel(self.axis)
        handles, _ = panels[0].get_legend_handles_labels()
        if any(not math.isnan(_estimate(s, name).low) for s in summaries for name in self.metrics):
            text = "95 % interval of the mean"
            handles.append(Line2D([], [], marker="|", markersize=10, linestyle="none", color=INK, label=text))
        foot.legend(handles=handles, loc="center", ncols=2, frameon=False, fontsize=SMALL, handlelength=4)
        return figure


def _name(metric: str) -> str:
    return "expected calibration error" if metric == "calibration_error" else METRIC_NAMES[metric]


def _estimate(summary: Summary, metric: str) -> MeanEstimate:
    return summary.calibration_error if metric == "calibration_error" else summary.report.metrics[metric]


@dataclass(frozen=True)
class LearningCurve(Curve):
    """Over the number of training videos."""

    places: ClassVar[Mapping[str, tuple[str, float]]] = {
        training_key(key, videos): (key, videos) for key, videos in product(LEARNING_CURVE, TRAINING_VIDEOS)
    }
    axis = "Training videos"
    column = "training_videos"
    metrics = ("auroc", "average_precision")
    about = (
        "All are tested on the same videos; the training and validation videos of a smaller number are among those of "
        "a larger one, and validation grows with training. A row of the other tables that names no number has 300."
    )

    def tick(self, at: float) -> str:
        return f"{at:g}"


@dataclass(frozen=True)
class Prevalence(Curve):
    """Over the share of abnormal training videos."""

    places: ClassVar[Mapping[str, tuple[str, float]]] = {
        prevalence_key(key, share): (key, share) for key, share in product(PREVALENCE, PREVALENCES)
    }
    axis = "Share of abnormal training videos"
    column = "abnormal_share"
    metrics = ("auroc", "average_precision", "brier", "calibration_error")
    about = (
        "All are trained on equally many videos and tested on the same ones, of which 20 % are abnormal. Validation, "
        "where training stops and the threshold is chosen, has the share of training. Probabilities are those of the "
        "networks, before any calibration: where the shares of training and test differ, Brier score and calibration "
        "error show it. A row of the other tables that names no share has 20 %."
    )

    def tick(self, at: float) -> str:
        return f"{100 * at:g} %"
