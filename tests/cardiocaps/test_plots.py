import io
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cardiocaps import DISCLAIMER, plots
from cardiocaps.errors import OutputError
from cardiocaps.metrics import confusion, evaluate, expected_calibration_error, reliability

HISTORY = [
    {
        "epoch": i,
        "train_loss": 1 / (i + 1),
        "val_loss": 1 / (i + 1) + 0.02 * i,
        "val_auroc": math.nan if i == 0 else 0.5 + 0.03 * i,
        "seconds": 3.0,
    }
    for i in range(10)
]


def _scores() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    y = (np.arange(400) % 5 == 0).astype(int)
    return 1 / (1 + np.exp(1 - 1.5 * y - rng.normal(size=400))), y


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, caught on their way to the disk."""
    caught: list[Any] = []
    save = plots.save

    def catch(figure: Any, path: Path) -> None:
        caught.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "save", catch)
    return caught


def _texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


P, Y = _scores()
REPORT, LOW, NOTHING_FOUND = (evaluate(P, Y, bootstrap=0), P / 2, evaluate(P / 2, Y, bootstrap=0))
DRAWINGS: dict[str, Callable[[Path], None]] = {
    "learning curves": lambda path: plots.learning_curves(HISTORY, path),
    "one epoch": lambda path: plots.learning_curves(HISTORY[:1], path),
    "confusion": lambda path: plots.confusion_matrices({"all": confusion(P, Y)}, path),
    "confusion of one class": lambda path: plots.confusion_matrices({"all": [[5, 0], [0, 0]]}, path),
    "roc": lambda path: plots.roc_curve(P, Y, path, report=REPORT),
    "reliability": lambda path: plots.reliability_diagram(P, P**2, Y, "isotonic", path),
    "precision": lambda path: plots.precision_recall_curve(P, Y, path, report=REPORT),
    "precision without a detection": lambda path: plots.precision_recall_curve(LOW, Y, path, report=NOTHING_FOUND),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_each_figure_is_a_png_with_the_footer_and_something_on_it(
    name: str, figures: list[Any], tmp_path: Path
) -> None:
    path = tmp_path / "figure.png"
    DRAWINGS[name](path)
    image = Image.open(io.BytesIO(path.read_bytes()))
    assert image.format == "PNG" and min(image.size) > 400
    pixels = np.asarray(image.convert("L"))
    assert 0.001 < (pixels < 128).mean() < 0.5
    assert DISCLAIMER in _texts(figures[0])
    assert [item.name for item in tmp_path.iterdir()] == ["figure.png"]


def test_every_axis_of_data_has_a_name(figures: list[Any], tmp_path: Path) -> None:
    for name in ("learning curves", "confusion", "roc", "precision"):
        DRAWINGS[name](tmp_path / "figure.png")
    for figure in figures:
        for axes in figure.axes:
            assert axes.get_ylabel() and (axes.get_xlabel() or axes.get_label() == "<colorbar>")


def test_learning_curves_pair_training_and_validation(figures: list[Any], tmp_path: Path) -> None:
    plots.learning_curves(HISTORY, tmp_path / "a.png")
    loss, auroc = figures[0].axes
    assert [axes.get_ylabel() for axes in (loss, auroc)] == ["Loss", "AUROC"]
    training, validation, best = loss.lines
    assert list(training.get_ydata()) == [row["train_loss"] for row in HISTORY]
    assert list(validation.get_ydata()) == [row["val_loss"] for row in HISTORY]
    assert best.get_xdata()[0] == int(np.argmin(validation.get_ydata()))
    assert math.isnan(auroc.lines[0].get_ydata()[0])
    assert [axes.get_yscale() for axes in (loss, auroc)] == ["log", "linear"]


def _parts(epochs: int = 20, **changed: Any) -> list[dict[str, Any]]:
    """A history with every part of the loss."""
    names = ("loss", "margin", "reconstruction", "regression")
    losses = {f"{stage}_{name}": 4.2 for stage in ("train", "val") for name in names}
    return [
        {"epoch": i, **{name: x / (i + 1) for name, x in losses.items()}, "val_auroc": 0.5 + 0.02 * i, **changed}
        for i in range(epochs)
    ]


def test_losses_have_plain_ticks_and_the_place_of_a_missing_panel_has_the_legend(
    figures: list[Any], tmp_path: Path
) -> None:
    plots.learning_curves(_parts(), tmp_path / "a.png")
    *panels, spare = figures[0].axes
    assert len(panels) == 5 and not spare.axison and not any(axes.get_legend() for axes in panels)
    assert [text.get_text() for text in spare.get_legend().get_texts()] == [
        *("training", "validation", "least validation loss")
    ]
    figures[0].canvas.draw()
    loss = panels[0]
    assert loss.get_yscale() == "log"
    low, high = loss.get_ylim()
    ticks = [text.get_text() for text in loss.get_yticklabels() if low <= text.get_position()[1] <= high]
    assert ticks == ["0.2", "0.5", "1", "2"] and not loss.get_yticklabels(minor=True)


def test_an_auroc_that_is_never_defined_has_no_panel(figures: list[Any], tmp_path: Path) -> None:
    plots.learning_curves(_parts(val_auroc=math.nan), tmp_path / "a.png")
    assert "AUROC" not in _texts(figures[0])
    assert [axes.axison for axes in figures[0].axes] == [True] * 4 + [False]


def test_roc_curve_is_scikit_learns_with_the_operating_point(figures: list[Any], tmp_path: Path) -> None:
    from sklearn.metrics import roc_curve

    report = evaluate(P, Y, bootstrap=50)
    plots.roc_curve(P, Y, tmp_path / "a.png", report=report)
    _, curve, point = figures[0].axes[0].lines
    fpr, tpr, _ = roc_curve(Y, P, drop_intermediate=False)
    assert curve.get_xdata() == pytest.approx(fpr) and curve.get_ydata() == pytest.approx(tpr)
    auroc = report.metrics["auroc"]
    assert f"AUROC {auroc.value:.3f} ({auroc.low:.3f} to {auroc.high:.3f}, bootstrap)" in _texts(figures[0])
    assert point.get_ydata()[0] == ((P > 0.5) & (Y == 1)).sum() / Y.sum()
    assert point.get_xdata()[0] == pytest.approx(((P > 0.5) & (Y == 0)).sum() / (Y == 0).sum())


def test_reliability_diagram_has_the_bins_it_names(figures: list[Any], tmp_path: Path) -> None:
    for method in ("none", "temperature"):
        plots.reliability_diagram(P, P**2, Y, method, tmp_path / "a.png")
        lines = figures[-1].axes[0].get_lines()[1:]
        assert len(lines) == (1 if method == "none" else 2)
        for line, values in zip(lines, (P, P**2), strict=False):
            predicted, observed, _ = reliability(values, Y)
            assert np.array_equal(line.get_xdata(), predicted) and np.array_equal(line.get_ydata(), observed)
            assert f"{expected_calibration_error(values, Y):.3f}" in line.get_label()


def test_precision_recall_curve_has_the_area_it_names(figures: list[Any], tmp_path: Path) -> None:
    plots.precision_recall_curve(P, Y, tmp_path / "a.png", report=REPORT)
    prevalence, curve, point = figures[0].axes[0].lines
    assert prevalence.get_ydata()[0] == 0.2
    area = (np.diff(curve.get_xdata()) * curve.get_ydata()[1:]).sum()
    assert area == pytest.approx(REPORT.metrics["average_precision"].value)
    assert curve.get_drawstyle() == "steps-pre"
    assert point.get_ydata()[0] == pytest.approx(REPORT.paper["pr_auc"])


def test_confusion_matrix_shows_counts_and_shares(figures: list[Any], tmp_path: Path) -> None:
    counts = {"probability > 0.31": [[1500, 500], [0, 0]], "probability > 0.5": [[1999, 1], [0, 0]]}
    plots.confusion_matrices(counts, tmp_path / "a.png")
    text = _texts(figures[0])
    assert "normal\nn = 2,000" in text and "abnormal\nn = 0" in text
    assert "1,500\n75.0%" in text and "500\n25.0%" in text and "0\nno sample" in text and "1,999" in text
    assert [axes.get_title() for axes in figures[0].axes[:2]] == list(counts)


def test_a_figure_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plots.roc_curve(P, Y, tmp_path / name, report=REPORT)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"cannot write .*a\.png"):
        plots.learning_curves(HISTORY, tmp_path / "missing" / "a.png")


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from cardiocaps import plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        "def state(): return str(list(dict.items(matplotlib.rcParams)))  # asking by key would load pyplot\n"
        "before = state()\n"
        "plots.learning_curves([{'epoch': 1, 'val_loss': 1.0}], Path(sys.argv[1]))\n"
        "assert 'matplotlib.pyplot' not in sys.modules and before == state()\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
