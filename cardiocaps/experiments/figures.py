"""Figures of the exhibits, as PNG files, in the style of `cardiocaps.plots`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cardiocaps.evaluation.names import METRIC_NAMES, PAPER_NAMES
from cardiocaps.experiments.exhibits import Exhibit
from cardiocaps.experiments.reported import BINARY_F1, CONFUSION_OF, LAMBDAS, ON
from cardiocaps.experiments.summaries import CALIBRATION_BINS, Summary, lambda_of
from cardiocaps.metrics import PUBLISHED, MeanEstimate, reliability
from cardiocaps.plots import BLUE, GREEN, GREY, INK, VERMILION, draw_confusion, dress, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRICS = ("auroc", "average_precision", "f1", "accuracy", "sensitivity", "specificity", "brier")
_MAIN = "cardiocaps"
_SMALL = 8  # points
_COLUMNS = 4
_MEAN_AND_INTERVAL: dict[str, Any] = {
    "marker": "o",
    "markersize": 5.5,
    "capsize": 2,
    "elinewidth": 1.3,
    "linestyle": "none",
}
_REPORTED: dict[str, Any] = {
    "marker": "D",
    "markersize": 5.5,
    "markerfacecolor": "white",
    "color": INK,
    "linestyle": "none",
}
_REPORTED_BINARY: dict[str, Any] = {**_REPORTED, "marker": "s", "color": GREY}


def draw_exhibit(exhibit: Exhibit, summaries: Sequence[Summary], path: Path) -> None:
    """Draw what the exhibit shows of its rows that have results, at least one. Raises OutputError."""
    if exhibit.name in CONFUSION_OF:
        figure = _confusions(exhibit, summaries)
    elif exhibit.name == "fig6":
        figure = _sweep(exhibit, summaries)
    elif exhibit.name == "calibration":
        figure = _reliability(exhibit, summaries)
    elif exhibit.name == "efficiency":
        figure = _efficiency(exhibit, summaries)
    else:
        figure = _dots(exhibit, summaries)
    save(figure, path)


def _dots(exhibit: Exhibit, summaries: Sequence[Summary]) -> Figure:
    """A panel for each metric, a line in it for each system; below them the published definitions."""
    lines = math.ceil(len(_METRICS) / _COLUMNS)
    height = 0.27 * len(summaries) + 0.75
    figure = new_figure(11, (lines + 1) * height + 1.2, _wrapped(exhibit.title, 100))
    blocks: Any = figure.subfigures(2, 1, height_ratios=[lines * height + 0.35, height + 0.35])
    ours, published = blocks
    units = " and ".join(dict.fromkeys(s.unit for s in summaries))
    ours.suptitle(f"By {units}, decisions at a threshold chosen on the validation split", fontsize=10, color=INK)
    panels = ours.subplots(lines, _COLUMNS, squeeze=False).ravel()
    for axes, name in zip(panels, _METRICS, strict=False):
        estimates = [s.report.metrics[name] for s in summaries]
        seeds = [[run.metrics[name].value for run in s.report.runs] for s in summaries]
        _dot_panel(axes, METRIC_NAMES[name], summaries, estimates, seeds)
        _system_names(axes, summaries, shown=axes.get_subplotspec().is_first_col())
    legend = panels[len(_METRICS)]
    legend.axis("off")
    for axes in panels[len(_METRICS) + 1 :]:
        axes.remove()
    _legend(legend, summaries)

    published.suptitle("As published: by frame, decisions at 0.5", fontsize=10, color=INK)
    for axes, name in zip(published.subplots(1, _COLUMNS), PUBLISHED, strict=True):
        estimates = [s.published.paper[name] for s in summaries]
        seeds = [[run.paper[name] for run in s.published.runs] for s in summaries]
        title = "F1 (weighted)" if name == "f1" else PAPER_NAMES[name]
        _dot_panel(axes, title, summaries, estimates, seeds, paper=name)
        _system_names(axes, summaries, shown=axes.get_subplotspec().is_first_col())
    return figure


def _dot_panel(
    axes: Axes,
    title: str,
    summaries: Sequence[Summary],
    estimates: Sequence[MeanEstimate],
    seeds: Sequence[Sequence[float]],
    paper: str | None = None,
) -> None:
    """Means with their intervals, the seeds as small dots and the paper's figures, a line for each system."""
    shown: list[float] = []
    for line, (summary, estimate, values) in enumerate(zip(summaries, estimates, seeds, strict=True)):
        colour = _colour(summary)
        if math.isnan(estimate.value):
            at = (0.5, line)
            axes.text(*at, "undefined", ha="center", va="center", fontsize=7, color=GREY, transform=_across(axes))
        else:
            bounds = [] if math.isnan(estimate.low) else [estimate.low, estimate.high]
            # The interval of a mean of percentiles need not hold the mean itself.
            error = [[max(0, estimate.value - b) for b in bounds[:1]], [max(0, b - estimate.value) for b in bounds[1:]]]
            axes.errorbar(
                [estimate.value], [line], xerr=error if bounds else None, color=colour, zorder=3, **_MEAN_AND_INTERVAL
            )
            shown += [estimate.value, *bounds]
        if len(values) > 1:
            finite = [value for value in values if math.isfinite(value)]
            axes.plot(finite, [line + 0.24] * len(finite), ".", color=colour, markersize=3.5, alpha=0.8, zorder=2)
            shown += finite
        if paper and summary.reported:
            figure = summary.reported[paper]
            binary = paper == "f1" and summary.system.startswith(BINARY_F1)
            axes.plot([figure.value], [line - 0.24], zorder=4, **(_REPORTED_BINARY if binary else _REPORTED))
            shown.append(figure.value)
    axes.set_title(title[0].upper() + title[1:], fontsize=9, color=INK)
    axes.grid(color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=_SMALL)
    axes.set_ylim(len(summaries) - 0.45, -0.55)
    axes.set_xlim(*_limits(shown))
    axes.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])


def _system_names(axes: Axes, summaries: Sequence[Summary], shown: bool) -> None:
    axes.set_yticks(range(len(summaries)), [_wrapped(s.title, 34) if shown else "" for s in summaries], fontsize=_SMALL)
    axes.tick_params(axis="y", length=0)


def _legend(axes: Axes, summaries: Sequence[Summary]) -> None:
    from matplotlib.lines import Line2D

    intervals = any(not math.isnan(e.low) for s in summaries for e in s.report.metrics.values())
    mean = "mean and its 95 % interval" if intervals else "mean"
    handles = [Line2D([], [], color=BLUE, marker="o", markersize=5.5, label=mean)]
    if any(s.system == _MAIN for s in summaries) and len(summaries) > 1:
        handles.append(Line2D([], [], color=VERMILION, marker="o", markersize=5.5, label="the same of CardioCaps"))
    if any(s.seeds > 1 for s in summaries):
        handles.append(Line2D([], [], color=BLUE, marker=".", markersize=3.5, linestyle="none", label="single seeds"))
    if any(s.reported for s in summaries):
        handles.append(Line2D([], [], label=ON, **_REPORTED))
    if any(s.reported and s.system.startswith(BINARY_F1) for s in summaries):
        handles.append(Line2D([], [], label="the same, F1 of abnormal", **_REPORTED_BINARY))
    axes.legend(handles=handles, loc="center", frameon=False, fontsize=_SMALL, labelspacing=0.9)


def _confusions(exhibit: Exhibit, summaries: Sequence[Summary]) -> Figure:
    figure = new_figure(3.6 * len(summaries) + 0.6, 4.9, _wrapped(exhibit.title, 38 * len(summaries)))
    panels = figure.subplots(1, len(summaries), squeeze=False)[0]
    for axes, summary in zip(panels, summaries, strict=True):
        image = draw_confusion(axes, np.array(summary.report.confusion))
        seeds = f" over {summary.seeds} seeds" if summary.seeds > 1 else ""
        threshold = " ± ".join(f"{x:.2f}" for x in (summary.threshold.value, summary.threshold.sd) if math.isfinite(x))
        title = f"{_wrapped(summary.title, 34)}\n{summary.unit}s{seeds}, threshold {threshold}"
        axes.set_title(title, fontsize=10, color=INK)
    bar = figure.colorbar(image, ax=panels, fraction=0.045 / len(summaries), format=lambda x, _: f"{x:.0%}")
    bar.set_label("Share of the true class")
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def _sweep(exhibit: Exhibit, summaries: Sequence[Summary]) -> Figure:
    """Three metrics over λ_reg."""
    figure = new_figure(6.6, 4.6, _wrapped(exhibit.title, 60))
    axes = figure.add_subplot()
    ordered = sorted(summaries, key=lambda s: lambda_of(s.system))
    at = [lambda_of(s.system) for s in ordered]
    lines = (("auroc", BLUE, "o-"), ("average_precision", VERMILION, "s--"), ("accuracy", GREEN, "^-."))
    for place, (name, colour, style) in enumerate(lines):
        estimates = [s.report.metrics[name] for s in ordered]
        # A little apart, so that the bars of one value do not cover one another.
        x = [value * 1.06 ** (place - 1) for value in at]
        axes.errorbar(
            x,
            [e.value for e in estimates],
            yerr=[0 if math.isnan(e.sd) else e.sd for e in estimates],
            fmt=style,
            color=colour,
            markersize=5,
            linewidth=1.5,
            capsize=2.5,
            label=METRIC_NAMES[name],
        )
    axes.set_xscale("log")
    for value in LAMBDAS:
        axes.axvline(value, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        axes.text(
            value,
            1.01,
            f"paper: {value:g}",
            ha="center",
            va="bottom",
            fontsize=_SMALL,
            color=GREY,
            transform=axes.get_xaxis_transform(),
        )
    axes.set_xticks(at, [f"{value:g}" for value in at], fontsize=_SMALL)
    axes.minorticks_off()
    dress(axes, "λ_reg (weight of the regression loss)", "Mean over the seeds, with standard deviation")
    axes.set_xlim(min(*at, *LAMBDAS) / 1.5, max(*at, *LAMBDAS) * 1.5)
    axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def _reliability(exhibit: Exhibit, summaries: Sequence[Summary]) -> Figure:
    """Predicted probability against observed share, a panel for each system; the predictions of all seeds together."""
    columns = min(_COLUMNS, len(summaries))
    lines = math.ceil(len(summaries) / columns)
    figure = new_figure(2.75 * columns + 0.5, 3.15 * lines + 0.9, _wrapped(exhibit.title, 30 * columns))
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes, summary in zip(panels, summaries, strict=False):
        parts = [result.test.samples(summary.unit)[:2] for result in summary.row.results]
        probability, label = (np.concatenate(part) for part in zip(*parts, strict=True))
        predicted, observed, size = reliability(probability, label, CALIBRATION_BINS)
        axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
        axes.plot(predicted, observed, "o-", color=_colour(summary), markersize=4.5, linewidth=1.3, clip_on=False)
        axes.set_title(_wrapped(summary.title, 30), fontsize=9, color=INK)
        error, brier = summary.calibration_error, summary.report.metrics["brier"]
        axes.text(
            0.03,
            0.97,
            f"Brier {brier.value:.3f}\nECE {error.value:.3f}\n{len(size)} bins of about {size.mean():.0f}",
            va="top",
            fontsize=7.5,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
            transform=axes.transAxes,
        )
        dress(axes, "", "")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_aspect("equal")
        axes.tick_params(labelsize=_SMALL, labelbottom=True)
    for axes in panels[len(summaries) :]:
        axes.remove()
    for place, axes in enumerate(panels[: len(summaries)]):
        if place % columns == 0:
            axes.set_ylabel("Observed share of abnormal", fontsize=9)
        if place + columns >= len(summaries):
            axes.set_xlabel("Predicted probability", fontsize=9)
    return figure


def _efficiency(exhibit: Exhibit, summaries: Sequence[Summary]) -> Figure:
    """Seconds per epoch and peak memory as bars, accuracy beside."""
    figure = new_figure(10, 0.42 * len(summaries) + 1.9, _wrapped(exhibit.title, 90))
    time, memory, accuracy = figure.subplots(1, 3)
    none = MeanEstimate(math.nan)
    mebibytes = [none if s.peak_memory is None else MeanEstimate(s.peak_memory / 2**20) for s in summaries]
    _bars(time, "Seconds per epoch", summaries, [s.cost("seconds_per_epoch") for s in summaries], "{:.1f}".format)
    _bars(memory, "Peak memory, MiB", summaries, mebibytes, "{:,.0f}".format)
    estimates = [s.report.metrics["accuracy"] for s in summaries]
    seeds = [[run.metrics["accuracy"].value for run in s.report.runs] for s in summaries]
    _dot_panel(accuracy, METRIC_NAMES["accuracy"], summaries, estimates, seeds)
    for axes in (time, memory, accuracy):
        _system_names(axes, summaries, shown=axes is time)
    return figure


def _bars(
    axes: Axes, title: str, summaries: Sequence[Summary], values: Sequence[MeanEstimate], text: Callable[[float], str]
) -> None:
    for line, (summary, estimate) in enumerate(zip(summaries, values, strict=True)):
        if math.isnan(estimate.value):
            axes.annotate(
                "not measured", (0, line), (4, 0), textcoords="offset points", va="center", fontsize=7, color=GREY
            )
            continue
        deviation = [estimate.sd] if estimate.sd > 0 else None
        axes.barh([line], [estimate.value], 0.62, xerr=deviation, color=_colour(summary), ecolor=INK, capsize=2)
        end = estimate.value + (0 if deviation is None else estimate.sd)
        axes.annotate(
            text(estimate.value),
            (end, line),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=_SMALL,
            color=INK,
        )
    largest = max((v.value + (0 if math.isnan(v.sd) else v.sd) for v in values if not math.isnan(v.value)), default=1)
    axes.set_xlim(0, 1.25 * largest)
    axes.set_ylim(len(summaries) - 0.45, -0.55)
    axes.set_title(title, fontsize=9, color=INK)
    axes.grid(axis="x", color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", labelsize=_SMALL)
    axes.locator_params(axis="x", nbins=5, steps=[1, 2, 5, 10])


def _colour(summary: Summary) -> str:
    return VERMILION if summary.system == _MAIN else BLUE


def _across(axes: Axes) -> Any:
    """Across: shares of the panel; down: the lines."""
    return axes.get_yaxis_transform()


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The range of the values with some room, at least 0.1 wide and within what a metric can be."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = max(0.06 * (high - low), (0.1 - (high - low)) / 2, 0.01)
    return max(-0.03, low - room), min(1.03, high + room)


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, break_on_hyphens=False)
