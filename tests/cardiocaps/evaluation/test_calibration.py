"""The calibration of probabilities, and how well a video fits the training data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, logit

from cardiocaps.errors import CheckpointError
from cardiocaps.evaluation.calibration import Calibration, read_calibration, write_calibration
from cardiocaps.evaluation.familiarity import FALSE_ALARMS, Familiarity, read_familiarity, write_familiarity
from cardiocaps.evaluation.predictions import Predictions
from cardiocaps.metrics import Floats, Integers, expected_calibration_error


def _predictions(p: Floats, y: Integers, error: Floats | None = None) -> Predictions:
    names = tuple(f"video {i}" for i in range(p.size))
    return Predictions(p, y, np.arange(p.size), names, reconstruction_error=error)


def _drawn(n: int, temperature: float, seed: int) -> tuple[Floats, Integers]:
    """Labels of known chances, and probabilities that are too near to one half by a temperature."""
    rng = np.random.default_rng(seed)
    chance = rng.beta(0.5, 0.8, n).clip(1e-4, 1 - 1e-4)
    return expit(logit(chance) / temperature), (rng.random(n) < chance).astype(np.int64)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_it_mends_probabilities_of_new_samples(method: str) -> None:
    calibration = Calibration.fit(method, _predictions(*_drawn(4000, 3.0, seed=1)), "video")
    p, y = _drawn(4000, 3.0, seed=2)
    assert expected_calibration_error(p, y) > 0.1
    assert expected_calibration_error(calibration(p), y) < 0.03
    if method == "temperature":
        assert calibration.scale == pytest.approx(3.0, rel=0.1)
    # It changes no ranking.
    assert (np.diff(calibration(np.sort(p))) >= 0).all()
    assert calibration(np.array([[0.0, 1.0]])).shape == (1, 2)
    assert ((calibration([0.0, 1.0]) >= 0) & (calibration([0.0, 1.0]) <= 1)).all()


def test_a_validation_split_that_is_separated_gives_a_finite_scale() -> None:
    p = np.array([0.4, 0.45, 0.55, 0.6])
    calibration = Calibration.fit("temperature", _predictions(p, np.array([0, 0, 1, 1])), "video")
    assert 1 < calibration.scale < 10


def test_one_class_gives_no_calibration_and_the_reason() -> None:
    calibration = Calibration.fit("isotonic", _predictions(np.array([0.2, 0.4]), np.array([1, 1])), "video")
    assert calibration.method == "none" and calibration.reason == "every validation label is 1"
    assert calibration([0.3]).tolist() == [0.3]


@pytest.mark.parametrize("method", ["temperature", "isotonic", "none"])
def test_it_is_kept(method: str, tmp_path: Path) -> None:
    calibration = Calibration.fit(method, _predictions(*_drawn(50, 2.0, seed=3)), "video", weights="abc")
    write_calibration(tmp_path / "file", calibration)
    assert read_calibration(tmp_path / "file", "abc") == calibration
    assert read_calibration(tmp_path / "file", "other") is None
    assert read_calibration(tmp_path / "missing", "abc") is None


@pytest.mark.parametrize(
    "change",
    [
        {"method": "magic"},
        {"unit": "patient"},
        {"scale": -1.0},
        {"scale": None},
        {"corners": [[0.1, 0.5], [0.2, 0.4]]},
        {"method": "isotonic", "corners": []},
        {"more": 1},
    ],
    ids=str,
)
def test_a_damaged_file_is_an_error(change: dict[str, object], tmp_path: Path) -> None:
    from cardiocaps.runtime.files import write_json

    content = asdict(Calibration.fit("temperature", _predictions(*_drawn(50, 2.0, seed=3)), "video"))
    write_json(tmp_path / "file", {"kind": "cardiocaps calibration", **content, **change})
    with pytest.raises(CheckpointError, match="is damaged"):
        read_calibration(tmp_path / "file", "")


def test_the_false_alarms_of_the_flag() -> None:
    """At most FALSE_ALARMS of the videos that come from where the validation videos came from, for any number."""
    rng = np.random.default_rng(4)
    for n in (19, 45, 60):
        alarms = []
        for _ in range(4000):
            errors = rng.gamma(2.0, size=n + 1)
            known = _predictions(np.full(n, 0.5), np.zeros(n, np.int64), errors[:n])
            familiarity = Familiarity.of(known, "")
            assert familiarity is not None
            alarms.append(familiarity.p_value(errors[n]) <= FALSE_ALARMS)
        deviation = (FALSE_ALARMS * (1 - FALSE_ALARMS) / len(alarms)) ** 0.5
        assert np.mean(alarms) < FALSE_ALARMS + 4 * deviation
        assert np.mean(alarms) > FALSE_ALARMS / 2  # it does raise alarms
        assert familiarity.p_value(1e9) == 1 / (n + 1)
        assert familiarity.p_value(-1.0) == 1


def test_familiarity_is_kept(tmp_path: Path) -> None:
    familiarity = Familiarity("abc", (0.1, 0.2, 0.2))
    assert familiarity.p_value(0.2) == 3 / 4
    write_familiarity(tmp_path / "file", familiarity)
    assert read_familiarity(tmp_path / "file", "abc") == familiarity
    assert read_familiarity(tmp_path / "file", "other") is None
    for errors in ("[]", "[0.2, 0.1]", '["a"]'):
        (tmp_path / "bad").write_text(f'{{"kind": "cardiocaps familiarity", "weights": "abc", "errors": {errors}}}')
        with pytest.raises(CheckpointError, match="is damaged"):
            read_familiarity(tmp_path / "bad", "abc")
    assert Familiarity.of(_predictions(np.array([0.5]), np.array([1])), "") is None
