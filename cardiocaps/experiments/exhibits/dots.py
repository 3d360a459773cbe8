"""The figure of a table: a panel for each metric with a line for each system."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.lines import Line2D

from cardiocaps.evaluation.names import METRIC_NAMES, PAPER_NAMES
from cardiocaps.experiments.exhibits.panels import REPORTED, REPORTED_BINARY, SMALL, dot_panel, name_systems, wrapped
from cardiocaps.experiments.plan import MAIN
from cardiocaps.experiments.reported import BINARY_F1, ON
from cardiocaps.experiments.summaries import Summary
from cardiocaps.metrics import PUBLISHED
from cardiocaps.plots import BLUE, INK, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRICS = ("auroc", "average_precision", "f1", "accuracy", "sensitivity", "specificity", "brier")
_COLUMNS = 4


def draw(title: str, summaries: Sequence[Summary]) -> Figure:
    """Our metrics above, the published definitions below."""
    lines = math.ceil(len(_METRICS) / _COLUMNS)
    height = 0.27 * len(summaries) + 0.75
    figure = new_figure(11, (lines + 1) * height + 1.2, wrapped(title, 100))
    blocks: Any = figure.subfigures(2, 1, height_ratios=[lines * height + 0.35, height + 0.35])
    ours, published = blocks
    units = " and ".join(dict.fromkeys(s.unit for s in summaries))
    ours.suptitle(f"By {units}, decisions at a threshold chosen on the validation split", fontsize=10, color=INK)
    panels = ours.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axes, name in zip(panels, _METRICS, strict=False):
        estimates = [s.report.metrics[name] for s in summaries]
        seeds = [[run.metrics[name].value for run in s.report.runs] for s in summaries]
        dot_panel(axes, METRIC_NAMES[name], summaries, estimates, seeds)
        name_systems(axes, summaries, shown=axes.get_subplotspec().is_first_col())
    legend = panels[len(_METRICS)]
    legend.axis("off")
    for axes in panels[len(_METRICS) + 1 :]:
        axes.remove()
    _legend(legend, summaries)

    published.suptitle("As published: by frame, decisions at 0.5", fontsize=10, color=INK)
    for axes, name in zip(published.subplots(1, _COLUMNS), PUBLISHED, strict=True):
        estimates = [s.published.paper[name] for s in summaries]
        seeds = [[run.paper[name] for run in s.published.runs] for s in summaries]
        heading = "F1 (weighted)" if name == "f1" else PAPER_NAMES[name]
        dot_panel(axes, heading, summaries, estimates, seeds, paper=name)
        name_systems(axes, summaries, shown=axes.get_subplotspec().is_first_col())
    return figure


def _legend(axes: Axes, summaries: Sequence[Summary]) -> None:
    intervals = any(not math.isnan(e.low) for s in summaries for e in s.report.metrics.values())
    mean = "mean and its 95 % interval" if intervals else "mean"
    handles = [Line2D([], [], color=BLUE, marker="o", markersize=5.5, label=mean)]
    if any(s.system == MAIN for s in summaries) and len(summaries) > 1:
        handles.append(Line2D([], [], color=VERMILION, marker="o", markersize=5.5, label="the same of CardioCaps"))
    if any(s.seeds > 1 for s in summaries):
        handles.append(Line2D([], [], color=BLUE, marker=".", markersize=3.5, linestyle="none", label="single seeds"))
    if any(s.reported for s in summaries):
        handles.append(Line2D([], [], label=ON, **REPORTED))
    if any(s.reported and s.system.startswith(BINARY_F1) for s in summaries):
        handles.append(Line2D([], [], label="the same, F1 of abnormal", **REPORTED_BINARY))
    axes.legend(handles=handles, loc="center", frameon=False, fontsize=SMALL, labelspacing=0.9)
