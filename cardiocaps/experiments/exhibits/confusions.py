"""Figures 3 to 5: the confusion matrices of a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.exhibits.panels import STRIP, wrapped
from cardiocaps.experiments.markdown import Column, rows_table
from cardiocaps.experiments.plan import corrected_key
from cardiocaps.experiments.reported import ON, confusion_of
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.plots import INK, draw_confusion, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage


@dataclass(frozen=True)
class Confusions(Exhibit):
    """Adds the confusion matrices, summed over the seeds, and draws them beside those behind the paper's figures."""

    def sections(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        def cell(truth: int, predicted: int) -> Callable[[Summary], str]:
            def text(summary: Summary) -> str:
                row = summary.report.confusion[truth]
                share = f" ({row[predicted] / sum(row):.1%})" if sum(row) else ""
                return f"{row[predicted]:,}{share}"

            return text

        classes = ("normal", "abnormal")
        columns: list[Column] = [
            (f"{classes[truth]}, called {classes[predicted]}", cell(truth, predicted))
            for truth in (0, 1)
            for predicted in (0, 1)
        ]
        text = "Counts summed over the seeds, and shares of the true class."
        own = ["## Confusion matrices", text, rows_table(rows, found, columns)]
        return own + super().sections(rows, found, bootstrap)

    def draw(self, summaries: Sequence[Summary]) -> Figure:
        """A column for each system: our matrix, and below it on grey the one of the paper, if it is known.

        Both forms of a system have the same one of the paper, which stands below the first.
        """
        keys = [corrected_key(s.system) for s in summaries]
        paper = [confusion_of(self.table, key) if key not in keys[:k] else None for k, key in enumerate(keys)]
        heights = [4.4, 4.5] if any(paper) else [4.6]
        figure = new_figure(3.6 * len(summaries) + 0.6, sum(heights), wrapped(self.title, 38 * len(summaries)))
        blocks: Any = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        panels = blocks[0].subplots(1, len(summaries), squeeze=False)[0]
        for axes, summary in zip(panels, summaries, strict=True):
            image = draw_confusion(axes, np.array(summary.report.confusion))
            threshold = summary.threshold.value, summary.threshold.sd
            at = " ± ".join(f"{x:.2f}" for x in threshold if math.isfinite(x))
            title = f"{wrapped(summary.title, 38)}\n{_counted(summary)}\nthreshold {at}"
            axes.set_title(title, fontsize=10, color=INK)
        _bar(blocks[0], image, panels)
        if any(paper):
            blocks[1].set_facecolor(STRIP)  # of another data set: nobody should compare the two at first sight
            panels = blocks[1].subplots(1, len(summaries), squeeze=False)[0]
            for axes, summary, counts in zip(panels, summaries, paper, strict=True):
                if counts is None:
                    axes.axis("off")
                    continue
                matrix = np.array([[counts["tn"], counts["fp"]], [counts["fn"], counts["tp"]]])
                image = draw_confusion(axes, matrix, "Greys")
                title = f"{wrapped(summary.title, 38)},\n{ON}\nn = {matrix.sum():,} frames of one run, other data"
                axes.set_title(title, fontsize=10, color=INK)
            _bar(blocks[1], image, panels)
        return figure


def _bar(block: SubFigure, image: AxesImage, panels: Any) -> None:
    bar = block.colorbar(image, ax=panels, fraction=0.045 / len(panels), format=lambda x, _: f"{x:.0%}")
    bar.set_label("Share of the true class")
    bar.outline.set_visible(False)  # type: ignore[operator]


def _counted(summary: Summary) -> str:
    """What the matrix counts, for example "n = 270: 90 videos × 3 seeds"."""
    sizes = [run.n for run in summary.report.runs]
    unit = f"{summary.unit}s"
    if len(sizes) == 1:
        return f"n = {sizes[0]:,} {unit}"
    if len(set(sizes)) > 1:
        return f"n = {sum(sizes):,} {unit} over {len(sizes)} seeds"
    return f"n = {sum(sizes):,}: {sizes[0]:,} {unit} × {len(sizes)} seeds"
