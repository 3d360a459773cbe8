"""Scoring: the features that are recorded of a network are those that its output is computed from, and kills."""

from __future__ import annotations

from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cardiocaps.config import TrainConfig
from cardiocaps.errors import ResourceError
from cardiocaps.experiments.exhibits import EXHIBITS
from cardiocaps.experiments.exhibits.robustness import Robustness
from cardiocaps.experiments.plan import FIRST_SEED, SYSTEMS, configure
from cardiocaps.experiments.robustness import scoring
from cardiocaps.experiments.robustness.scoring import _record, file_of, read_scores, score_all
from cardiocaps.experiments.robustness.shifts import UNSHIFTED, ShiftedTest
from cardiocaps.models import build
from tests.cardiocaps.experiments.robustness.invented import config, score_or_die, scored_jobs


def _networks() -> list[str]:
    exhibit = EXHIBITS["robustness"]
    assert isinstance(exhibit, Robustness)
    return [key for key in exhibit.shifted if "classifier" not in SYSTEMS[key].settings]


@pytest.mark.parametrize("key", _networks())
def test_the_output_follows_from_the_features(key: str) -> None:
    torch.manual_seed(FIRST_SEED)
    config = configure(TrainConfig(seed=FIRST_SEED), SYSTEMS[key], FIRST_SEED, Path("folder"))
    model = build(config).eval()
    images = [torch.rand(2, 9, model.size, model.size) for _ in range(2)]  # type: ignore[arg-type, call-overload]
    parts: list[Tensor] = []
    with torch.no_grad():
        hook = _record(model, parts)
        out = [model(image) for image in images]
        hook.remove()
        model(images[0])
    assert len(parts) == 2 and all(len(part) == 2 for part in parts)
    for features, said in zip(parts, out, strict=True):
        if said.capsules is not None:
            torch.testing.assert_close(features.view_as(said.capsules), said.capsules)
            continue
        last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
        with torch.no_grad():
            torch.testing.assert_close(last(features), said.scores)


def test_a_killed_process_is_said_and_the_same_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = "logistic-regression-class-weight"
    jobs, _ = scored_jobs(tmp_path / "out", {key: 1.0}, (), config(10), seeds=3)
    tests = (UNSHIFTED, ShiftedTest("angle", 20))
    monkeypatch.setattr(scoring, "_score", score_or_die)
    monkeypatch.setattr(scoring, "_make", lambda job, test, place, progress: place.mkdir(parents=True, exist_ok=True))
    score = partial(score_all, jobs, tests, tmp_path / "shifted", 2, False)
    with pytest.raises(ResourceError, match="a process that scores was killed"):
        score()
    # The fork server, which the jobs' processes come from too, was asked for the modules of both.
    assert {"cardiocaps.experiments.jobs", scoring.__name__} <= set(forkserver._forkserver._preload_modules)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.npz")}
    assert {file_of(job, UNSHIFTED) for job in jobs} <= before.keys() and len(before) < 6
    capsys.readouterr()
    assert score() == {}
    assert f"2 tests of 3 jobs: {len(before)} done before" in capsys.readouterr().out
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert all(read_scores(job, test).test.videos == 10 for job in jobs for test in tests)
    assert not (tmp_path / "shifted").exists()
