"""Calibration: predicted probabilities against the observed share of abnormal samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.exhibits.panels import SMALL, colour_of, wrapped
from cardiocaps.experiments.markdown import DASH, Column, count, metric_columns, plus_minus, rows_table
from cardiocaps.experiments.summaries import CALIBRATION_BINS, Row, Summary
from cardiocaps.metrics import bins_of_equal_mass, calibration_error_by_chance, exact_interval, reliability
from cardiocaps.plots import GREY, INK, dress, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 4


@dataclass(frozen=True)
class Calibration(Exhibit):
    """Adds the calibration errors and draws reliability diagrams."""

    def sections(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        text = (
            "Expected calibration error: the mean distance between predicted probability and observed share of "
            f"abnormal, over {CALIBRATION_BINS} bins of equally many samples. In the figure, the bins hold the "
            "predictions of all seeds, and the bars are 95 % intervals of the observed share (Clopper and Pearson; a "
            f"{' or '.join(dict.fromkeys(s.drawn for s in found.values()))} counts once in a bin). By chance: the "
            "error that the same probabilities would have if they were perfectly calibrated, with independent samples. "
            "Probabilities are those before calibration."
        )
        errors: list[Column] = [
            ("expected calibration error", lambda s: plus_minus(s.calibration_error)),
            ("by chance", lambda s: DASH if not s.results else f"{_by_chance(s):.3f}"),
        ]
        own = ["## Calibration", text, rows_table(rows, found, [*metric_columns(("brier",)), *errors])]
        return own + super().sections(rows, found, bootstrap)

    def draw(self, summaries: Sequence[Summary]) -> Figure:
        """A panel for each system, with the predictions of all seeds together.

        The bars are the intervals of Clopper and Pearson for the observed shares. A video (or patient) with several
        predictions in a bin counts once there, because these are no independent samples.
        """
        columns = min(_COLUMNS, len(summaries))
        lines = math.ceil(len(summaries) / columns)
        figure = new_figure(2.75 * columns + 0.5, 3.15 * lines + 0.9, wrapped(self.title, 30 * columns))
        panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, summary in zip(panels, summaries, strict=False):
            parts = [result.test.samples(summary.unit) for result in summary.results]
            probability, label, group = (np.concatenate(part) for part in zip(*parts, strict=True))
            predicted, observed, size = reliability(probability, label, CALIBRATION_BINS)
            member = bins_of_equal_mass(probability, CALIBRATION_BINS)
            trials = [len(set(group[member == i])) for i in range(len(size))]
            bounds = np.array([exact_interval(share * n, n) for share, n in zip(observed, trials, strict=True)])
            axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1)
            colour = colour_of(summary)
            axes.vlines(predicted, *bounds.T, color=colour, linewidth=1, alpha=0.45, clip_on=False)
            axes.plot(predicted, observed, "o-", color=colour, markersize=4.5, linewidth=1.3, clip_on=False)
            axes.set_title(wrapped(summary.title, 36), fontsize=8.5, color=INK)
            error, brier = summary.calibration_error, summary.report.metrics["brier"]
            axes.text(
                0.03,
                0.97,
                f"Brier {brier.value:.3f}\nECE {error.value:.3f}\n{count(len(size), 'bin')} of about {size.mean():.0f}",
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
            axes.tick_params(labelsize=SMALL, labelbottom=True)
        for axes in panels[len(summaries) :]:
            axes.remove()
        for place, axes in enumerate(panels[: len(summaries)]):
            if place % columns == 0:
                axes.set_ylabel("Observed share of abnormal\nwith its 95 % interval", fontsize=9)
            if place + columns >= len(summaries):
                axes.set_xlabel("Predicted probability", fontsize=9)
        return figure


def _by_chance(summary: Summary) -> float:
    """The mean over the seeds."""
    parts = [result.test.samples(summary.unit)[0] for result in summary.results]
    return fmean(calibration_error_by_chance(probability, CALIBRATION_BINS) for probability in parts)
