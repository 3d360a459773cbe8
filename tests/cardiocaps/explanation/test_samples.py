"""`python -m cardiocaps.preview` on a phantom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from cardiocaps import preview
from cardiocaps.data.echonet_lvh.measurements import read_measurements
from cardiocaps.data.echonet_lvh.reader import read_folder


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are saved."""
    found: list[Any] = []
    saved = Figure.savefig

    def savefig(figure: Any, *arguments: Any, **options: Any) -> None:
        found.append(figure)
        saved(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return found


def test_samples_with_calipers_and_views(phantom: Path, tmp_path: Path, figures: list[Any]) -> None:
    out = tmp_path / "samples.png"
    assert preview.main([str(phantom), "--out", str(out), "--videos", "4"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    grid = np.array(figure.axes).reshape(4, 4)
    titles = [axes.get_title().partition(",")[0] for axes in grid[:, 0]]
    assert titles == ["normal", "normal", "abnormal", "abnormal"]
    assert [axes.get_title() for axes in grid[0, 1:]] == ["full frame", "upper view", "lower view"]
    clip = next(clip for clip in read_folder(phantom).clips if clip.label == 0)
    rows = [row for row in read_measurements(phantom / "MeasurementsList.csv").rows if row.name == clip.name]
    shown = [row for row in rows if row.frame == rows[0].frame]
    assert [text.get_text() for text in grid[0, 0].texts] == [f"{row.calc} {row.cm:.1f} cm" for row in shown]
    # The ends of the first caliper, at their place in the video.
    x1, x2, y1, y2 = map(float, shown[0].points.split("\0"))
    height = read_measurements(phantom / "MeasurementsList.csv").claims[clip.name].height
    drawn = np.array(grid[0, 0].lines[0].get_data()).T * height
    np.testing.assert_allclose(drawn, np.array([(x1, y1), (x2, y2)]) + 0.5, atol=1e-6)


def test_reconstructions_of_a_run(runs: list[Path], phantom: Path, tmp_path: Path, figures: list[Any]) -> None:
    assert preview.main([str(phantom), "--out", str(tmp_path / "a.png"), "--videos", "2", "--run", str(runs[0])]) == 0
    grid = np.array(figures[0].axes).reshape(2, 5)
    assert grid[0, 4].get_title() == "reconstruction of the full frame"
    images = [axes.images[0].get_array() for axes in grid[:, 4]]
    assert images[0].std() > 0 and not np.array_equal(images[0], grid[0, 1].images[0].get_array())


def test_bad_arguments(phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        preview.main([str(phantom), "--out", "samples.jpg"])
    assert "expected a name that ends in .png" in capsys.readouterr().err
    assert preview.main([str(tmp_path / "none"), "--out", str(tmp_path / "a.png")]) == 3
    assert not (tmp_path / "a.png").exists()
