import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cardiocaps.evaluation.predictions import Predictions, write_predictions
from cardiocaps.metrics import evaluate, evaluate_runs
from cardiocaps.training.run_folder import RunFolder


def _clips(*patients: str | None) -> list[Any]:
    return [SimpleNamespace(name=f"video {i}", patient=patient) for i, patient in enumerate(patients)]


def _of(*patients: str | None, kind: str = "") -> Predictions:
    """Two frames of each clip, every other clip abnormal."""
    clip = np.repeat(np.arange(len(patients)), 2)
    out = {"clip": clip, "label": clip % 2, "probability": 0.2 + 0.3 * (clip % 2) + 0.1 * (np.arange(clip.size) % 2)}
    extra = {"frame": np.arange(clip.size) % 2, "target": clip.astype(np.float32), "regression": clip + 0.5}
    return Predictions.of({**out, **extra}, _clips(*patients), kind)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"probability": np.array([0.5, 1.5])}, r"probability is 1\.5; expected a number in \[0, 1\]"),
        ({"probability": np.array([0.5, np.nan])}, "probability is nan"),
        ({"probability": np.zeros((2, 1))}, r"probability has shape \[2, 1\]"),
        ({"label": np.array([0, 3])}, "label .*; expected 0 or 1"),
        ({"clip": np.array([0])}, r"clip has shape \[1\]; expected \[2\]"),
        ({"video": ("a",)}, r"label has shape \[2\]; expected \[1\]"),
    ],
)
def test_predictions_are_checked(changed: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"probability": np.array([0.5, 0.1]), "label": np.array([0, 1]), "clip": np.array([0, 1])}
    assert Predictions(**good, video=("a", "b")).videos == 2
    with pytest.raises(ValueError, match=message):
        Predictions(**{**good, "video": ("a", "b"), **changed})


def test_the_bootstrap_draws_patients_where_they_are_known() -> None:
    by_video, known = _of(None, None, None, None), _of("Ann", "Ann", None, "Bob")
    assert by_video.patient is None and by_video.group_name == "video"
    assert by_video.samples("frame")[2].tolist() == [f"video {i}" for i in range(4) for _ in range(2)]
    assert known.group_name == "patient"
    whose = [f"video {i}" for i in (0, 0, 2, 3)]
    assert known.samples("video")[2].tolist() == whose, "who has no name is a patient alone"
    assert known.samples("frame")[2].tolist() == [name for name in whose for _ in range(2)]
    report = evaluate(*known.samples("video"), bootstrap=20, group_name=known.group_name)
    assert report.groups == 3 and "of 3 patients only" in report.notes[0]
    assert report.as_dict()["drawn"] == "patients"


def test_runs_on_different_patients_are_not_paired() -> None:
    one = _of("Ann", "Ann", "Bob", "Bob")
    other = replace(one, video=tuple(f"other {name}" for name in one.video))
    # The same patients whatever their numbers are, and in whatever order their videos stand.
    order = np.arange(8)[::-1]
    values = {name: getattr(one, name)[order] for name in ("probability", "label", "clip", "patient")}
    again = Predictions(**{**values, "patient": 7 - values["patient"]}, video=tuple(one.video[i] for i in order))
    for runs, paired in (((one, one), True), ((one, again), True), ((one, other), False)):
        probabilities, labels, groups = zip(*(run.samples("video") for run in runs), strict=True)
        assert evaluate_runs(probabilities, labels, groups, bootstrap=10).paired == paired


def test_studies_are_called_so(tmp_path: Path) -> None:
    known = _of("1", "1", "2", kind="study")
    report = evaluate(*known.samples("video"), bootstrap=20, group_name=known.group_name)
    assert report.as_dict()["drawn"] == "studies" and "of 2 studies only" in report.notes[0]
    write_predictions(RunFolder(tmp_path), known, None, 0.5)
    for path in tmp_path.iterdir():
        assert ",study," in path.read_text().splitlines()[0] and "patient" not in path.read_text()


def test_what_is_written_names_no_patient(tmp_path: Path) -> None:
    write_predictions(RunFolder(tmp_path), _of("Ann", "Ann", "Bob", "Ann"), _of("Ann", "Bob"), 0.45)
    assert len(list(tmp_path.iterdir())) == 4
    for path in tmp_path.iterdir():
        assert "Ann" not in path.read_text() and "Bob" not in path.read_text() and "patient" in path.read_text()


def test_the_rows_of_videos_have_their_decisions(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    test = _of(None, None, None)
    write_predictions(run, test, _of(None, None), 0.45)
    rows = list(csv.DictReader(run.predictions_by_video_csv.open()))
    assert list(rows[0]) == [
        *("video", "clip", "frames", "target", "regression", "label", "probability", "threshold"),
        *("decision", "decision_at_0.5"),
    ]
    assert [row["video"] for row in rows] == ["video 0", "video 1", "video 2"]
    assert [float(row["probability"]) for row in rows] == pytest.approx([0.25, 0.55, 0.25])
    assert [row["decision"] for row in rows] == [row["decision_at_0.5"] for row in rows] == ["0", "1", "0"]
    assert rows[1]["threshold"] == "0.45" and (rows[1]["target"], rows[1]["regression"]) == ("1", "1.5")
    write_predictions(run, test, None, 0.2)
    again = list(csv.DictReader(run.predictions_by_video_csv.open()))
    assert [row["decision"] for row in again] == ["1"] * 3 and again[0]["decision_at_0.5"] == "0"
    frames = list(csv.DictReader(run.validation_csv.open()))
    assert len(frames) == 4 and frames[3] == {
        "video": "video 1",
        "clip": "1",
        "frame": "1",
        "target": "1.0",
        "regression": "1.5",
        "label": "1",
        "probability": frames[3]["probability"],
    }


def test_a_regression_of_another_length_is_named() -> None:
    with pytest.raises(ValueError, match=r"regression has shape \[2\]; expected \[1\]"):
        Predictions(np.array([0.5]), np.array([0]), np.array([0]), ("a",), regression=np.zeros(2))
