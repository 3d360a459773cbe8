"""The whole exhibit on a tiny phantom: jobs, shifted tests, page; what is finished and what was cut off."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cardiocaps.config import TrainConfig
from cardiocaps.errors import CardioCapsError, ConfigError
from cardiocaps.experiments.engines.local import LocalEngine
from cardiocaps.experiments.exhibits import EXHIBITS
from cardiocaps.experiments.exhibits.robustness import Robustness
from cardiocaps.experiments.plan import FIRST_SEED
from cardiocaps.experiments.results import read_result
from cardiocaps.experiments.robustness.shifts import ShiftedTest
from cardiocaps.experiments.run import run

NETWORK, CLASSIFIER = "cardiocaps", "logistic-regression-class-weight"
TESTS = (ShiftedTest("angle", 20), ShiftedTest("gain", -10))


def _exhibit() -> Robustness:
    exhibit = EXHIBITS["robustness"]
    assert isinstance(exhibit, Robustness)
    return replace(exhibit, systems=(NETWORK, CLASSIFIER), shifted=(NETWORK, CLASSIFIER), tests=TESTS)


def _scores(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("jobs/*/*/shifted/*.npz")}


@pytest.mark.usefixtures("empty_figures")
def test_trained_once_and_tested_under_shifts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "experiments"
    config = TrainConfig(
        phantom_videos=30,
        phantom_test=10,
        phantom_dir=tmp_path / "phantom",
        cache_dir=tmp_path / "cache",
        epochs=1,
        frames_per_clip=2,
        seed=FIRST_SEED,
        threads=1,
        bootstrap=20,
        progress=False,
    )

    def again(at_once: int = 1) -> str:
        run([_exhibit()], config, 1, LocalEngine(at_once), out, "python -m cardiocaps.experiments robustness")
        return capsys.readouterr().out

    assert "3 tests of 2 jobs: 0 done before" in again()
    scores = _scores(out)
    assert len(scores) == 6 and not (out / "shifted").exists()  # the videos are gone
    rows = {(r["system"], r["test"]): r for r in csv.DictReader((out / "tables" / "robustness-shifts.csv").open())}
    assert len(rows) == 6
    for key in (NETWORK, CLASSIFIER):
        # The unshifted test is the test of the job, to the last digit: made, decoded and scored anew.
        folder = out / "jobs" / key / f"seed{FIRST_SEED}"
        said, test = np.load(folder / "shifted" / "unshifted.npz"), read_result(folder).test
        order, own = np.lexsort((said["clip"], said["video"])), np.lexsort((test.clip, test.video))
        np.testing.assert_array_equal(said["video"][order], np.array(test.video)[own])
        np.testing.assert_array_equal(said["probability"][order], test.probability[own])  # type: ignore[index]
        # The shifted test is not.
        turned = np.load(folder / "shifted" / "angle=20.npz")
        assert (turned["label"] == said["label"]).all() and (turned["probability"] != said["probability"]).any()
        assert key == CLASSIFIER or turned["features"].shape == (10, 32)  # two class capsules of 16 numbers
    page = (out / "tables" / "robustness.md").read_text()
    assert "## Verdicts" in page and str(tmp_path) not in page

    assert "3 tests of 2 jobs: 6 done before" in again()
    assert _scores(out) == scores
    # A file that a power cut has shortened, and one that was never written, are made again, two at a time; the others
    # are not.
    short, missing = sorted(path for path in scores if path.name == "gain=-10.npz")
    kept = set(scores) - {short, missing}
    before = {path: path.read_bytes() for path in (short, missing)}
    short.write_bytes(before[short][:50])
    missing.unlink()
    assert "3 tests of 2 jobs: 4 done before" in again(at_once=2)
    now = _scores(out)
    assert all(now[path] == scores[path] for path in kept)
    for path, content in before.items():
        made, expected = np.load(path), np.load(io.BytesIO(content))
        assert set(made.files) == set(expected.files)
        for name in made.files:
            np.testing.assert_array_equal(made[name], expected[name])

    # A classifier of an older version was not kept: its tests fail with advice, those of the network do not.
    (out / "jobs" / CLASSIFIER / f"seed{FIRST_SEED}" / "pixel_baseline.json").unlink()
    for path in scores:
        if path.name == "gain=-10.npz":
            path.unlink()
    with pytest.raises(CardioCapsError, match=r"1 of 2 jobs failed.*\n.*gain=-10: .*remove this folder"):
        again()
    assert {path.parts[-4] for path in _scores(out) if path.name == "gain=-10.npz"} == {NETWORK}
    assert CLASSIFIER not in {r["system"] for r in csv.DictReader((out / "tables" / "robustness-shifts.csv").open())}


def test_other_data_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = TrainConfig(data=tmp_path / "study", seed=FIRST_SEED)
    with pytest.raises(ConfigError, match=r"robustness: data is .*; expected null: the shifts need the phantom"):
        run([_exhibit()], config, 1, LocalEngine(), tmp_path / "out", "command")
    assert not (tmp_path / "out").exists()
