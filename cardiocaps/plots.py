"""Figures of a run, as PNG files.

They are drawn without pyplot, global state or a display. The colours are those of Okabe and Ito, which colour-blind
readers can distinguish; lines also differ in style.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps import DISCLAIMER
from cardiocaps.metrics import Report, expected_calibration_error, reliability, threshold_counts
from cardiocaps.runtime.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

CLASSES = ("normal", "abnormal")

BLUE, VERMILION, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#767676"
PURPLE, ORANGE = "#CC79A7", "#E69F00"
_STYLES = {"train": (BLUE, "-", "training"), "val": (VERMILION, "--", "validation")}
_LABELS = {
    "loss": "Loss",
    "margin": "Margin loss",
    "reconstruction": "Reconstruction loss (weighted)",
    "regression": "Squared regression error",
    "auroc": "AUROC",
    "mae": "Mean absolute error",
}


def learning_curves(history: Sequence[Mapping[str, float]], path: Path, judged_by: str = "val_loss") -> None:
    """Draw a panel for each part of the loss and for the AUROC or the error, and mark the best epoch.

    An AUROC that is undefined in every epoch has no panel. The legend takes the place of a missing panel, if there is
    one.

    Args:
        history: the rows of metrics.csv, at least one.
        path: of the PNG file.
        judged_by: the column whose least value is that of the best epoch.

    Raises:
        OutputError: the file cannot be written.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    names = [name for name in _LABELS if any(math.isfinite(row.get(f"val_{name}", math.nan)) for row in history)]
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure = new_figure(4.6 * columns, 3.3 * rows + 0.7, "Learning curves")
    epochs = [row["epoch"] for row in history]
    best = min(history, key=lambda row: row[judged_by])["epoch"]
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, columns, place)
        keys = [key for key in (f"train_{name}", f"val_{name}") if key in history[0]]
        for key in keys:
            colour, style, label = _STYLES[key.partition("_")[0]]
            values = [row[key] for row in history]
            axes.plot(epochs, values, style, color=colour, label=label, marker="o", markersize=3)
        axes.axvline(
            best,
            color=GREY,
            linewidth=1,
            linestyle=":",
            label=f"least validation {'error' if judged_by == 'val_mae' else 'loss'}",
        )
        dress(axes, "Epoch", _LABELS[name])
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        shown = [row[key] for row in history for key in keys]
        if name != "auroc" and 0 < 10 * min(shown) <= max(shown):  # the first epoch is often far larger than the others
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
    first = figure.axes[0]
    if len(names) == rows * columns:
        first.legend(frameon=False, fontsize=8)
    else:
        spare = figure.add_subplot(rows, columns, rows * columns)
        spare.axis("off")
        spare.legend(*first.get_legend_handles_labels(), frameon=False, loc="center", fontsize=11, labelspacing=0.9)
    save(figure, path)


def confusion_matrices(counts: Mapping[str, ArrayLike], path: Path) -> None:
    """Draw confusion matrices side by side, with the percentages of each row.

    Args:
        counts: name -> matrix [2, 2]: rows are true classes, columns are predicted ones.
        path: of the PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = new_figure(4.2 * len(counts) + 0.8, 4.8, "Confusion matrix")
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, (name, matrix) in zip(panels, counts.items(), strict=True):
        image = draw_confusion(axes, np.asarray(matrix))
        axes.set_title(name, fontsize=10, color=INK)
    bar = figure.colorbar(image, ax=panels, fraction=0.045 / len(counts), format=lambda x, _: f"{x:.0%}")
    bar.set_label("Share of the true class")
    bar.outline.set_visible(False)  # type: ignore[operator]
    save(figure, path)


def draw_confusion(axes: "Axes", matrix: "np.ndarray[Any, Any]", colours: str = "Blues") -> "AxesImage":
    """Draw the counts `matrix` [2, 2], coloured by their share of the row, whose sum n stands at the left.

    `colours` is a sequential colour map of matplotlib, from light to dark.

    Returns:
        The image for a colour bar.
    """
    total = matrix.sum(axis=1, keepdims=True)
    share = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    image = axes.imshow(share, cmap=colours, vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(matrix):
        percent = f"{share[row, column]:.1%}" if total[row, 0] else "no sample"
        axes.text(
            column,
            row,
            f"{count:,}\n{percent}",
            ha="center",
            va="center",
            fontsize=13,
            color="white" if share[row, column] > 0.55 else INK,
        )
    axes.set_xticks(range(len(CLASSES)), CLASSES)
    names = [f"{name}\nn = {n:,}" for name, n in zip(CLASSES, total[:, 0], strict=True)]
    axes.set_yticks(range(len(CLASSES)), names, rotation=90, va="center", ma="center")
    axes.set_xlabel("Predicted class")
    axes.set_ylabel("True class")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def roc_curve(probability: ArrayLike, label: ArrayLike, path: Path, *, report: Report) -> None:
    """Draw the ROC curve with the AUROC and the operating point.

    Args:
        probability: of class 1, [n].
        label: 0 or 1, [n], both present.
        path: of the PNG file.
        report: of the same samples.

    Raises:
        OutputError: the file cannot be written.
    """
    figure, axes = _square("Receiver operating characteristic")
    _, tp, fp = threshold_counts(probability, label)
    axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1, label="chance: 0.500")
    axes.plot(fp / fp[-1], tp / tp[-1], color=BLUE, linewidth=2, label=f"AUROC {report.metrics['auroc']}")
    sensitivity, specificity = report.metrics["sensitivity"].value, report.metrics["specificity"].value
    text = f"sensitivity {sensitivity:.3f},\nspecificity {specificity:.3f}"
    _mark_threshold(axes, report, 1 - specificity, sensitivity, text)
    dress(axes, "1 − specificity (false positive rate)", "Sensitivity (true positive rate)")
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    save(figure, path)


def precision_recall_curve(probability: ArrayLike, label: ArrayLike, path: Path, *, report: Report) -> None:
    """Draw precision against recall, the average precision, the operating point and the prevalence.

    Arguments and errors as in `roc_curve`.
    """
    figure, axes = _square("Precision and recall")
    _, tp, fp = threshold_counts(probability, label)
    recall, precision = tp[1:] / tp[-1], tp[1:] / (tp[1:] + fp[1:])
    prevalence = report.positives / report.n
    axes.axhline(prevalence, color=GREY, linestyle=":", linewidth=1, label=f"prevalence: {prevalence:.3f}")
    # Average precision is the area under these steps, not under straight lines between the points.
    axes.step(
        np.concatenate(([0], recall)),
        np.concatenate((precision[:1], precision)),
        where="pre",
        color=BLUE,
        linewidth=2,
        label=f"average precision {report.metrics['average_precision']}",
    )
    (_, false_positives), (_, true_positives) = report.confusion
    flagged = true_positives + false_positives
    if flagged:
        at = true_positives / report.positives, true_positives / flagged
        _mark_threshold(axes, report, *at, f"recall {at[0]:.3f},\nprecision {at[1]:.3f}")
    dress(axes, "Recall (sensitivity)", "Precision (positive predictive value)")
    axes.legend(frameon=False, fontsize=9, loc="best")
    save(figure, path)


def reliability_diagram(
    probability: ArrayLike, calibrated: ArrayLike, label: ArrayLike, method: str, path: Path
) -> None:
    """Draw the observed share of abnormal samples against the mean probability, before and after calibration.

    Args:
        probability: of class 1, [n].
        calibrated: the same after calibration, [n].
        label: 0 or 1, [n].
        method: of the calibration; "none" leaves `calibrated` out.
        path: of the PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    figure, axes = _square("Reliability")
    axes.plot([0, 1], [0, 1], ":", color=GREY, linewidth=1, label="perfect calibration")
    kinds = [("the network's", probability, BLUE, "-", "o")]
    if method != "none":
        kinds.append((f"calibrated ({method})", calibrated, VERMILION, "--", "s"))
    for name, values, colour, style, marker in kinds:
        predicted, observed, _ = reliability(values, label)
        error = expected_calibration_error(values, label)
        text = f"{name}: calibration error {error:.3f}"
        axes.plot(predicted, observed, style, color=colour, marker=marker, markersize=5, clip_on=False, label=text)
    dress(axes, "Mean probability (bins of equal size)", "Observed share of abnormal")
    axes.legend(framealpha=0.9, edgecolor="none", fontsize=8, loc="lower right")
    save(figure, path)


def regression(predicted: ArrayLike, truth: ArrayLike, mean: float, target: str, path: Path) -> None:
    """Draw predictions against the measured values, with the diagonal and the mean of the training.

    Args:
        predicted: [n].
        truth: [n]; NaN where it was not measured.
        mean: of the training targets.
        target: its name and unit.
        path: of the PNG file.

    Raises:
        OutputError: the file cannot be written.
    """
    figure = new_figure(5.0, 5.4, "Regression")
    axes = figure.add_subplot()
    said, measured = np.asarray(predicted), np.asarray(truth)
    shown = measured[~np.isnan(measured)]
    ends = [min(said.min(), shown.min()), max(said.max(), shown.max())]
    axes.plot(ends, ends, "-", color=GREY, linewidth=1, label="right")
    axes.axhline(mean, color=VERMILION, linestyle="--", linewidth=1, label="training mean")
    axes.plot(measured, said, "o", color=BLUE, markersize=3, alpha=0.7, label="test split")
    axes.set_aspect("equal")
    dress(axes, f"Measured {target}", f"Predicted {target}")
    axes.legend(frameon=False, fontsize=8)
    save(figure, path)


def _square(title: str) -> "tuple[Figure, Axes]":
    """A figure whose axes go from 0 to 1 at one scale."""
    figure = new_figure(5.0, 5.2, title)
    return figure, figure.add_subplot(xlim=(0, 1), ylim=(0, 1.005), aspect="equal")


def _mark_threshold(axes: "Axes", report: Report, x: float, y: float, text: str) -> None:
    """Mark the point of a curve that belongs to the report's threshold; `text` says its coordinates in the legend."""
    label = f"probability > {report.threshold:.3g}: {text}"
    axes.plot([x], [y], "o", color=VERMILION, markersize=8, clip_on=False, zorder=3, label=label)


def new_figure(width: float, height: float, title: str) -> "Figure":
    """A figure of `width` by `height` inches with title and footer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, color=INK)
    figure.supxlabel(DISCLAIMER, fontsize=7, color=GREY)
    return figure


def dress(axes: "Axes", x: str, y: str) -> None:
    """Name the axes, draw a faint grid, and hide the frame above and on the right."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all. Raises OutputError."""
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue())
