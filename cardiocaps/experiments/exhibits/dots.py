"""The figure of a table: a panel for each of the main metrics with a line for each system.

The Markdown and the CSV of the table have all metrics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cardiocaps.evaluation.names import METRIC_NAMES, PAPER_NAMES
from cardiocaps.experiments.exhibits.panels import REPORTED, REPORTED_BINARY, SMALL, dot_panel, name_systems, wrapped
from cardiocaps.experiments.plan import MAIN
from cardiocaps.experiments.reported import BINARY_F1, ON
from cardiocaps.experiments.summaries import Summary
from cardiocaps.metrics import PUBLISHED
from cardiocaps.plots import BLUE, INK, VERMILION, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

_METRICS = ("auroc", "average_precision", "f1", "accuracy")  # those of the main table of the index


def draw(title: str, summaries: Sequence[Summary]) -> Figure:
    """Our metrics above, the published definitions below, the legend at the foot."""
    figure = new_figure(11, 2 * (0.27 * len(summaries) + 1.1) + 0.9, wrapped(title, 100))
    blocks: Any = figure.subfigures(3, 1, height_ratios=[0.27 * len(summaries) + 1.1] * 2 + [0.3])
    ours, published, foot = blocks
    units = " and ".join(dict.fromkeys(s.unit for s in summaries))
    ours.suptitle(f"By {units}, decisions at a threshold chosen on the validation split", fontsize=10, color=INK)
    for axes, name in zip(ours.subplots(1, len(_METRICS)), _METRICS, strict=True):
        estimates = [s.report.metrics[name] for s in summaries]
        seeds = [[run.metrics[name].value for run in s.report.runs] for s in summaries]
        dot_panel(axes, METRIC_NAMES[name], summaries, estimates, seeds)
        name_systems(axes, summaries, shown=axes.get_subplotspec().is_first_col())

    published.suptitle("As published: by frame, decisions at 0.5", fontsize=10, color=INK)
    for axes, name in zip(published.subplots(1, len(PUBLISHED)), PUBLISHED, strict=True):
        estimates = [s.published.paper[name] for s in summaries]
        seeds = [[run.paper[name] for run in s.published.runs] for s in summaries]
        heading = "F1 (weighted)" if name == "f1" else PAPER_NAMES[name]
        dot_panel(axes, heading, summaries, estimates, seeds, paper=name)
        name_systems(axes, summaries, shown=axes.get_subplotspec().is_first_col())
    handles = _legend(summaries)
    foot.legend(handles=handles, loc="center", ncols=len(handles), frameon=False, fontsize=SMALL)
    return figure


def _legend(summaries: Sequence[Summary]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    intervals = any(not math.isnan(e.low) for s in summaries for e in s.report.metrics.values())
    mean = "mean and its 95 % interval" if intervals else "mean"
    handles = [Line2D([], [], color=BLUE, marker="o", markersize=5.5, label=mean)]
    if any(s.system == MAIN for s in summaries) and len(summaries) > 1:
        handles.append(Line2D([], [], color=VERMILION, marker="o", markersize=5.5, label="the same of CardioCaps"))
    if any(s.seeds > 1 for s in summaries):
        handles.append(Line2D([], [], color=BLUE, marker=".", markersize=3.5, linestyle="none", label="single seeds"))
    if any(s.reported for s in summaries):
        handles.append(Line2D([], [], label=f"on grey: {ON}, other data", **REPORTED))
    if any(s.reported and s.system.startswith(BINARY_F1) for s in summaries):
        handles.append(Line2D([], [], label="the same, F1 of abnormal", **REPORTED_BINARY))
    return handles
