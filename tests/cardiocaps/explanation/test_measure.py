"""`python -m cardiocaps.explain RUN --measure`, and what it measures."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import binary_dilation

from cardiocaps.explanation.measure import area_under, mass_on, points_at, summary, table
from cardiocaps.phantom.masks import sector_and_ventricle
from cardiocaps.phantom.patients import plan

from .test_explain import run, videos_of

_CALIPERS = ("IVSd", "LVIDd", "LVPWd", "IVSs", "LVIDs", "LVPWs")


@pytest.mark.parametrize("size", [256, 301])
def test_the_mask_lies_between_the_calipers_of_the_walls(size: int) -> None:
    """The table's calipers, in pixels of the video, begin and end the mask along their line."""
    checked = 0
    for patient in plan(12, 5):
        scan = patient.scan
        of = {row.calc: row for row in patient.measurements(_CALIPERS)}
        for when in "ds":
            septum, wall = of[f"IVS{when}"], of[f"LVPW{when}"]
            sector, ventricle = sector_and_ventricle(patient, septum.frame, size)
            assert not (ventricle & ~sector).any()
            start, end = np.array([septum.x1, septum.y1]), np.array([wall.x2, wall.y2])
            along = (end - start) / np.linalg.norm(end - start)
            pixels = 2.5  # more than a pixel of the mask
            for point, expected in (
                (start + pixels * along, True),
                (start - pixels * along, False),
                ((start + end) / 2, True),
                (end - pixels * along, True),
                (end + pixels * along, False),
            ):
                column, row = (point + 0.5) / (scan.width, scan.height) * size
                if sector[int(row), int(column)]:
                    assert ventricle[int(row), int(column)] == expected
                    checked += 1
    assert checked > 100


def test_the_sector_is_where_the_video_is_not_black() -> None:
    from cardiocaps.phantom.ultrasound import render

    patient = plan(12, 5)[3]
    image = render(patient)[0].astype(float)
    size = 64
    sector, _ = sector_and_ventricle(patient, 0, size)
    rows = ((np.arange(size) + 0.5) / size * image.shape[0]).astype(int)
    columns = ((np.arange(size) + 0.5) / size * image.shape[1]).astype(int)
    seen = image[np.ix_(rows, columns)]
    seen[:, -4:], sector[:, -4:] = 0, False  # the ticks
    around = binary_dilation(sector)  # the nearest pixel of the video is up to half of one away
    assert not seen[~around].any() and (seen[sector] > 0).mean() > 0.6


def test_mass_and_pointing() -> None:
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    values = np.zeros((4, 4), np.float32)
    assert mass_on(values, mask) == points_at(values, mask) == 0
    values[0, 0], values[3, 3], values[3, 0] = 1, 3, -50
    assert mass_on(values, mask) == pytest.approx(0.25) and points_at(values, mask) == 0
    values[1, 1] = 3
    assert points_at(values, mask) == 0.5
    assert mass_on(np.ones((4, 4)), mask) == points_at(np.ones((4, 4)), mask) == 0.5


def test_deletion_and_insertion_of_a_network_that_looks_at_one_pixel() -> None:
    image = torch.rand(9, 16, 16) + 0.5
    truth = np.zeros((16, 16))
    truth[5, 7] = 1

    def probability(x: torch.Tensor) -> torch.Tensor:
        return (x[:, 4, 5, 7] > 0).float()

    best = area_under(probability, image, truth)
    worst = area_under(probability, image, -truth)
    assert best == pytest.approx((1 / 32, 31 / 32)) and worst == pytest.approx((31 / 32, 1 / 32))


def _rows(gain: float, measure: str) -> list[dict[str, object]]:
    noise = np.random.default_rng().normal(0, 0.01, 50)
    return [{"method": "m", "measure": measure, "value": 0.5 + gain + x, "chance": 0.5} for x in noise]


def test_the_verdict_is_that_of_the_interval() -> None:
    for measure, sign in (("mass", 1), ("deletion", -1)):
        (good,) = summary(_rows(0.1 * sign, measure))
        (bad,) = summary(_rows(-0.1 * sign, measure))
        assert good["verdict"] == "better than chance" and bad["verdict"] == "worse than chance"
        assert good["gain_low"] < 0.1 < good["gain_high"] and good["n"] == 50
    symmetric = [{"method": "m", "measure": "mass", "value": 0.5 + x, "chance": 0.5} for x in (-0.1, 0.1) * 20]
    (row,) = summary(symmetric)
    assert row["verdict"] == "no better than chance" and "no better than chance" in table([row])


def test_a_run_is_measured(runs_of_phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(runs_of_phantom, "--measure", "--out", tmp_path / "out") == 0
    with (tmp_path / "out" / "measures.csv").open() as file:
        means = list(csv.DictReader(file))
    with (tmp_path / "out" / "measures_by_video.csv").open() as file:
        by_video = list(csv.DictReader(file))
    methods = ("capsules", "gradcam", "brightness")
    assert [(row["method"], row["measure"]) for row in means] == [
        (method, measure) for method in methods for measure in ("mass", "pointing", "deletion", "insertion")
    ]
    for row in means:
        same = [x for x in by_video if (x["method"], x["measure"]) == (row["method"], row["measure"])]
        values = [float(x["value"]) for x in same]
        assert len(same) == int(row["n"]) > 8 and all(0 <= x <= 1 for x in values)
        assert float(row["value"]) == pytest.approx(np.mean(values), rel=1e-3)
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
    assert "| capsules | mass |" in capsys.readouterr().out


def test_what_cannot_be_measured(
    runs: list[Path], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(runs[0], "--measure", "--out", tmp_path / "out") == 2
    assert "needs a run on the phantom" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit, match="2"):
        run(runs[0], *videos_of(phantom, 1), "--measure", "--out", tmp_path / "out")
    assert "expected none" in capsys.readouterr().err
