"""The training and evaluation programs, as a user runs them, on a small phantom."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from cardiocaps import evaluate, train
from cardiocaps.config import read_run
from cardiocaps.errors import CheckpointError, OutputError
from cardiocaps.phantom import __main__ as phantom_program
from cardiocaps.phantom import write_phantom
from cardiocaps.runtime.files import lock_folder
from cardiocaps.training.checkpoints import check_digest, load_weights, read_checkpoint
from cardiocaps.training.module import Classifier
from tests.cardiocaps.programs import ROOT, python, start, wait_for

pytestmark = pytest.mark.usefixtures("empty_figures")  # the fixtures, which come first, draw theirs

FAST = [
    "--frames-per-clip",
    "2",
    "--epochs",
    "3",
    "--batch-size",
    "8",
    "--bootstrap",
    "50",
    "--threads",
    "1",
    "--no-progress",
]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, 40, 3, processes=1)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def arguments(phantom: Path, cache: Path) -> list[str]:
    return ["--data", str(phantom), "--cache-dir", str(cache), *FAST]


@pytest.fixture(scope="module")
def finished(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not disturbed."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train.main([*arguments, "--out", str(run)]) == 0
    return run


def _history(run: Path) -> list[dict[str, str]]:
    """metrics.csv without its times."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]


def _same(run: Path, other: Path) -> None:
    assert _history(run) == _history(other)
    for name in ("metrics.json", "decision.json", "pixel_baseline.json", "predictions.csv", "validation_by_video.csv"):
        assert (run / name).read_text() == (other / name).read_text(), name
    one, two = (torch.load(r / "best.ckpt", weights_only=True)["state_dict"] for r in (run, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_run_folder_is_complete(finished: Path) -> None:
    names = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    assert names == {
        "best.ckpt",
        "calibration.json",
        "config.yaml",
        "data.json",
        "decision.json",
        "environment.json",
        "familiarity.json",
        "last.ckpt",
        "metrics.csv",
        "metrics.json",
        "paths.json",
        "pixel_baseline.json",
        "predictions.csv",
        "predictions_by_video.csv",
        "report.html",
        "run.json",
        "validation.csv",
        "validation_by_video.csv",
        "plots/confusion_matrix.png",
        "plots/learning_curves.png",
        "plots/precision_recall_curve.png",
        "plots/reliability.png",
        "plots/roc_curve.png",
    }
    history = _history(finished)
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    assert float(history[-1]["train_loss"]) < float(history[0]["train_loss"])
    results = json.loads((finished / "metrics.json").read_text())
    assert 0 <= results["network"]["video"]["metrics"]["auroc"]["value"] <= 1
    assert results["pixel_logistic_regression"]["video"]["n"] == results["network"]["video"]["n"]
    calibration = results["network"]["calibration"]
    assert calibration["method"] == "temperature"
    assert calibration["expected_calibration_error"]["before"] != calibration["expected_calibration_error"]["after"]
    assert "not a medical device" in results["use"].lower()
    assert json.loads((finished / "environment.json").read_text())["device"] in ("cpu", "cuda")
    predictions = list(csv.DictReader((finished / "predictions.csv").open()))
    assert len(predictions) == results["network"]["frame"]["n"]
    assert len({row["video"] for row in predictions}) == results["network"]["video"]["n"]


def test_the_page_of_a_run_is_one_file_without_paths_and_frames(finished: Path, phantom: Path) -> None:
    text = (finished / "report.html").read_text()
    wrong = [row for row in _rows(finished / "predictions_by_video.csv") if row["label"] != row["decision"]]
    assert text.count("<tr><td>") == len(wrong)
    for row in wrong:
        kind = ("normal", "abnormal")
        cells = row["video"], kind[int(row["label"])], kind[int(row["decision"])]
        assert f"<tr><td>{'</td><td>'.join(cells)}</td>" in text
    assert len(re.findall(r'<img src="data:image/png;base64,', text)) == text.count("<img ") == 5
    assert "not a medical device" in text.lower() and "<td>2</td>" in text  # --frames-per-clip
    for place in (phantom, finished):
        assert str(place) not in text and str(place.resolve()) not in text


def test_frames_of_wrong_decisions_on_request(finished: Path, arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main([*arguments, "--report-frames", "--epochs", "1", "--out", str(run)]) == 0
    wrong = [row for row in _rows(run / "predictions_by_video.csv") if row["label"] != row["decision"]]
    assert wrong
    assert (run / "report.html").read_text().count('src="data:image/jpeg;base64,') == len(wrong)


def _rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_one_threshold_chosen_on_validation_decides_everywhere(finished: Path) -> None:
    from cardiocaps.metrics import decision_threshold

    validation, test = (_rows(finished / f"{name}_by_video.csv") for name in ("validation", "predictions"))
    probability, label = ([float(row[name]) for row in validation] for name in ("probability", "label"))
    chosen, _ = decision_threshold(probability, label)
    decision = json.loads((finished / "decision.json").read_text())
    threshold = decision["threshold"]
    assert chosen == pytest.approx(threshold, rel=1e-5)  # the probabilities of the tables have six digits
    assert threshold != 0.5 and "Youden" in decision["rule"] and decision["unit"] == "video"
    assert {row["threshold"] for row in (*validation, *test)} == {f"{threshold:.6g}"}
    network = json.loads((finished / "metrics.json").read_text())["network"]
    assert {network[name]["threshold"] for name in ("decision", "video", "frame")} == {threshold}
    for report, column in ((network["video"], "decision"), (network["video_at_0.5"], "decision_at_0.5")):
        counts = [[0, 0], [0, 0]]
        for row in test:
            counts[int(row["label"])][int(row[column])] += 1
        assert report["confusion"] == counts, column
    assert set(network["video_at_0.5"]["metrics"]) == {"sensitivity", "specificity", "f1", "f1_weighted", "accuracy"}
    methods = {m["method"] for m in network["video"]["metrics"].values()}
    assert methods <= {"bootstrap", "exact", "no interval"} and "exact" in methods


def test_the_error_of_the_regression_is_by_video_in_its_unit(finished: Path) -> None:
    regression = json.loads((finished / "metrics.json").read_text())["network"]["regression"]
    mean = json.loads((finished / "decision.json").read_text())["target_mean"]
    rows = [row for row in _rows(finished / "predictions_by_video.csv") if row["target"]]
    truth = [float(row["target"]) for row in rows]
    errors = [abs(float(row["regression"]) - float(row["target"])) for row in rows]
    video = regression["video"]
    assert (regression["target"], regression["unit"], video["n"]) == ("width", "cm", len(rows))
    assert video["mae"] == pytest.approx(sum(errors) / len(rows), rel=1e-3)
    assert video["constant"] == mean and 3 < mean < 7
    assert video["constant_mae"] == pytest.approx(sum(abs(x - mean) for x in truth) / len(rows), rel=1e-3)
    assert video["r2"] < 1 and regression["frame"]["n"] == 2 * video["n"]


def test_the_table_names_thresholds_and_units(
    finished: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lines = (run / "config.yaml").read_text().splitlines()
    # The head's numbers are then in percent, whatever they are.
    changed = ["regression_target: ef" if line.startswith("regression_target") else line for line in lines]
    (run / "config.yaml").write_text("\n".join(changed) + "\n")
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    checkpoint["cardiocaps"]["regression_target"] = "ef"
    torch.save(checkpoint, run / "best.ckpt")
    assert evaluate.main([str(run)]) == 0
    out = capsys.readouterr().out
    threshold = json.loads((finished / "decision.json").read_text())["threshold"]
    assert re.search(rf"at the threshold of validation +\S +{threshold:.3f} ", out)
    assert re.search(r"at a threshold of +\S +0\.500 +\S +0\.500", out)
    assert "percentage points" in out and "error of the training mean" in out and "ef: R²" in out
    assert re.search(r"sensitivity .*\(\d\.\d{3} to \d\.\d{3}, exact\)", out) and "exact: Clopper" in out


def test_patients_that_the_table_names_are_drawn_and_not_written(
    phantom: Path, arguments: list[str], tmp_path: Path
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(phantom, data)
    rows = _rows(data / "MeasurementsList.csv")
    splits: dict[str, list[str]] = {}
    for row in rows:
        videos = splits.setdefault(row["split"], [])
        if row["HashedFileName"] not in videos:
            videos.append(row["HashedFileName"])
        # Two videos each.
        row["PatientID"] = f"Doe-{row['split']}-{videos.index(row['HashedFileName']) // 2}"
    with (data / "MeasurementsList.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert train.main([*arguments, "--data", str(data), "--epochs", "1", "--out", str(run)]) == 0
    video = json.loads((run / "metrics.json").read_text())["network"]["video"]
    assert (video["n"], video["groups"], video["drawn"]) == (11, 6, "patients")
    assert {row["patient"] for row in _rows(run / "predictions_by_video.csv")} == {str(i) for i in range(6)}
    assert not [path for path in run.rglob("*") if path.is_file() and b"Doe-" in path.read_bytes()]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of another seed whose videos are all in the test split, as of another hospital."""
    folder = tmp_path_factory.mktemp("data") / "hospital"
    write_phantom(folder, 12, 8, processes=1)
    table = folder / "MeasurementsList.csv"
    rows = _rows(table)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, "split": "test"} for row in rows)
    return folder


def test_other_data_are_judged_by_what_the_run_keeps(
    finished: Path, hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's threshold, classifier of pixels and mean are used on a table that has only a test split."""
    from cardiocaps.evaluation.decision import Decision
    from cardiocaps.evaluation.pixel_baseline import PixelBaseline

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("made anew on other data")

    monkeypatch.setattr(PixelBaseline, "fit", refuse)
    monkeypatch.setattr(Decision, "choose", refuse)
    out = tmp_path / "out"
    assert evaluate.main([str(finished), "--data", str(hospital), "--allow-changed-data", "--out", str(out)]) == 0
    decision = json.loads((finished / "decision.json").read_text())
    assert json.loads((out / "decision.json").read_text()) == decision
    results = json.loads((out / "metrics.json").read_text())
    assert results["network"]["video"]["n"] == 12 and results["network"]["video"]["threshold"] == decision["threshold"]
    assert results["network"]["regression"]["video"]["constant"] == decision["target_mean"]
    kept = json.loads((finished / "pixel_baseline.json").read_text())["decision"]["threshold"]
    assert results["pixel_logistic_regression"]["video"]["threshold"] == kept
    assert not (out / "validation.csv").exists()
    named = json.loads((out / "evaluation.json").read_text())
    assert (named["run"], named["data"], named["weights"]) == ("undisturbed", "hospital", decision["weights"])
    title = " ".join(capsys.readouterr().out.split())
    for part in (str(finished), decision["weights"][:12], str(hospital), named["fingerprint"], "test split, 12 videos"):
        assert part in title, part


def test_a_shifted_phantom_tests_the_same_patients(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the phantom's page has it: a phantom of the test videos alone, in shifted examinations."""
    turned, out = tmp_path / "turned", tmp_path / "out"
    made = ["--videos", "40", "--seed", "3", "--test-only", "--angle", "20", "--processes", "1"]
    assert phantom_program.main([str(turned), *made]) == 0
    assert evaluate.main([str(finished), "--data", str(turned), "--allow-changed-data", "--out", str(out)]) == 0
    assert "11 videos changed their content, 29 videos were removed" in capsys.readouterr().out
    own, its = (_rows(folder / "predictions_by_video.csv") for folder in (finished, out))
    assert [(row["video"], row["label"]) for row in own] == [(row["video"], row["label"]) for row in its]
    assert len(its) == 11 and all(a["probability"] != b["probability"] for a, b in zip(own, its, strict=True))
    threshold = json.loads((finished / "decision.json").read_text())["threshold"]
    assert json.loads((out / "metrics.json").read_text())["network"]["video"]["threshold"] == threshold


def test_a_run_that_keeps_nothing_to_judge_by(
    finished: Path, hospital: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the run's own data, the threshold and the classifier are made again, and the results are the same.

    On other data they cannot be made, and notes say so.
    """
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("decision.json", "pixel_baseline.json"):
        (run / name).unlink()
    assert evaluate.main([str(run), "--out", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own" / "metrics.json").read_text() == (finished / "metrics.json").read_text()
    capsys.readouterr()
    assert evaluate.main([str(run), "--data", str(hospital), "--allow-changed-data"]) == 0
    out = capsys.readouterr().out
    assert "note: the threshold is 0.5, for the run's folder has no threshold for this network" in out
    assert "keeps no classifier of pixels" in out and "logistic regression" not in out


def test_a_threshold_of_other_weights_is_not_used(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    for weights in checkpoint["state_dict"].values():
        weights.mul_(1.1)
    torch.save(checkpoint, run / "best.ckpt")
    assert evaluate.main([str(run), "--out", str(tmp_path / "out")]) == 0
    old, new = (json.loads((folder / "decision.json").read_text()) for folder in (finished, tmp_path / "out"))
    assert old["weights"] != new["weights"] and old["threshold"] != new["threshold"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("decision.json", "{", "is damaged: Expecting property name"),
        ("decision.json", {"kind": "another"}, "is damaged: it is not a file of this program"),
        ("decision.json", {"threshold": 2}, "are 2 and 'video'; expected a number from 0 to 1"),
        ("decision.json", {"unit": "patient"}, "one of video, frame"),
        ("pixel_baseline.json", {"side": 16}, "frames of another size than 32x32"),
        ("pixel_baseline.json", {"logistic_regression": {"mean": [1]}}, "is damaged"),
        ("pixel_baseline.json", {"decision": None}, "is damaged"),
    ],
)
def test_damage_of_what_the_run_keeps(
    name: str, content: object, message: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((run / name).read_text()), **content})
    (run / name).write_text(str(content))
    assert evaluate.main([str(run)]) == 5
    error = capsys.readouterr().err
    assert name in error and message in error and "Traceback" not in error


def test_checkpoints_hold_no_paths(finished: Path, phantom: Path) -> None:
    for name in ("best.ckpt", "last.ckpt"):
        content = (finished / name).read_bytes()
        assert str(phantom).encode() not in content
        assert str(finished).encode() not in content


def test_other_seed_other_numbers(finished: Path, arguments: list[str], tmp_path: Path) -> None:
    assert train.main([*arguments, "--out", str(tmp_path / "other"), "--seed", "11", "--epochs", "1"]) == 0
    assert _history(tmp_path / "other")[0] != _history(finished)[0]


STOPPED_IN_THE_SECOND_EPOCH = """
import os, sys
from cardiocaps import train
from cardiocaps.training.module import Classifier

steps, training_step = 0, Classifier.training_step

def stopping(self, *batch):
    global steps
    steps += 1
    if steps == 8:
        os.kill(os.getpid(), int(sys.argv[1]))
    return training_step(self, *batch)

Classifier.training_step = stopping
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_program_resumes_as_if_nothing_had_happened(
    signum: signal.Signals, finished: Path, arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "stopped"
    command = [*python(), "-c", STOPPED_IN_THE_SECOND_EPOCH, str(int(signum)), *arguments, "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    killed = signum == signal.SIGKILL
    assert done.returncode == (-signum if killed else 128 + signum)
    assert killed or done.stderr == f"error: stopped by SIGTERM; saved; go on with --resume {run}\n"
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == (6 if killed else 8)
    assert not (run / "metrics.json").exists()
    assert train.main(["--resume", str(run), "--no-progress"]) == 0
    _same(finished, run)


@pytest.mark.parametrize(
    ("signum", "step"),
    [
        (signal.SIGTERM, 2),  # in the first epoch
        (signal.SIGTERM, 6),  # its last batch
        (signal.SIGHUP, 8),  # in the second epoch
        (signal.SIGINT, 18),  # the last batch of all
    ],
)
def test_stopped_at_any_step_resumes_as_if_nothing_had_happened(
    signum: signal.Signals,
    step: int,
    finished: Path,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps, training_step = 0, Classifier.training_step

    def stopping(self: Classifier, *batch: object) -> object:
        nonlocal steps
        steps += 1
        if steps == step:
            signal.raise_signal(signum)
        return training_step(self, *batch)

    run = tmp_path / "stopped"
    monkeypatch.setattr(Classifier, "training_step", stopping)
    assert train.main([*arguments, "--out", str(run)]) == 128 + signum
    assert f"error: stopped by {signum.name}; saved; go on with --resume {run}" in capsys.readouterr().err
    assert steps == step, "it stops after the batch"
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == step
    monkeypatch.undo()
    assert train.main(["--resume", str(run)]) == 0
    _same(finished, run)


def test_terminated_before_training(tmp_path: Path) -> None:
    run = tmp_path / "early"
    process = start(
        "cardiocaps.train", "--phantom-dir", str(tmp_path / "phantom"), "--phantom-videos", "2000", "--out", str(run)
    )
    wait_for((tmp_path / "phantom").exists, process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in errors
    assert not list(tmp_path.rglob("*.part"))


def test_workers_change_nothing(finished: Path, arguments: list[str], tmp_path: Path) -> None:
    assert train.main([*arguments, "--out", str(tmp_path / "workers"), "--workers", "2"]) == 0
    assert _history(tmp_path / "workers") == _history(finished)


def test_training_draws_nothing_from_torch(
    finished: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint therefore need not hold the state of any device's random number generator."""
    training_step = Classifier.training_step

    def reseeding(self: Classifier, *batch: object) -> object:
        torch.seed()
        return training_step(self, *batch)

    monkeypatch.setattr(Classifier, "training_step", reseeding)
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 0
    _same(finished, tmp_path / "run")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The networks that are compiled: by torch.compile, but without the C++ compiler, which would take half a minute.

    `test_compile_a_network_with_inductor` in tests/capsops runs the C++ compiler.
    """
    networks: list[torch.nn.Module] = []

    def compile_without_a_compiler(network: torch.nn.Module) -> None:
        networks.append(network)
        network._compiled_call_impl = torch.compile(network._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_a_compiler)
    torch.compiler.reset()
    return networks


def test_compiled_run_goes_on_and_is_evaluated_without(
    finished: Path,
    arguments: list[str],
    compiled: list[torch.nn.Module],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert train.main([*arguments, "--compile", "--epochs", "1", "--out", str(run)]) == 0
    assert "device: cpu, float32, channels_last, compiled" in capsys.readouterr().out
    weights = [torch.load(r / "best.ckpt", weights_only=True)["state_dict"] for r in (run, finished)]
    assert list(weights[0]) == list(weights[1])
    assert evaluate.main([str(run)]) == 0
    assert train.main(["--resume", str(run), "--no-compile", "--epochs", "3"]) == 0
    assert len(compiled) == 1
    for row, expected in zip(_history(run), _history(finished), strict=True):
        # Rounding differs with and without compilation, and Adam amplifies it.
        assert float(row["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=0.02)


def test_plain_run_goes_on_compiled(finished: Path, compiled: list[torch.nn.Module], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert train.main(["--resume", str(run), "--compile", "--epochs", "4"]) == 0
    assert [row["epoch"] for row in _history(run)] == ["1", "2", "3", "4"]
    assert len(compiled) == 1, "training alone is compiled"
    assert evaluate.main([str(run)]) == 0


def test_run_of_a_version_that_knew_less(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("tf32:", "channels_last:", "compile:"))]
    assert len(kept) == len(lines) - 3
    (run / "config.yaml").write_text("".join(kept))
    assert evaluate.main([str(run)]) == 0
    assert train.main(["--resume", str(run), "--epochs", "4"]) == 0
    assert len(_history(run)) == 4


def test_finished_run_resumed_with_more_epochs(finished: Path, arguments: list[str], tmp_path: Path) -> None:
    longer, run = tmp_path / "longer", tmp_path / "run"
    assert train.main([*arguments, "--epochs", "4", "--out", str(longer)]) == 0
    shutil.copytree(finished, run)  # a run folder may move
    leftovers = [run / "last.ckpt.0123abcd.part", run / "plots" / "roc_curve.png.0123abcd.part"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    assert train.main(["--resume", str(run), "--epochs", "4"]) == 0
    _same(longer, run)
    assert not any(leftover.exists() for leftover in leftovers)


def test_finished_run_resumed_is_evaluated_again(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "metrics.json").unlink()
    (run / "plots" / "learning_curves.png").unlink()
    assert train.main(["--resume", str(run)]) == 0
    assert "training has ended" in capsys.readouterr().out
    assert (run / "plots" / "learning_curves.png").exists()
    _same(finished, run)


def test_a_run_that_patience_ended_says_so_and_goes_on_with_more(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    restless = [*arguments, "--learning-rate", "0.03"]  # so that it gets worse after the first epoch
    patient, run = tmp_path / "patient", tmp_path / "run"
    assert train.main([*restless, "--patience", "9", "--out", str(patient)]) == 0
    assert train.main([*restless, "--patience", "1", "--out", str(run)]) == 0
    epochs = len(_history(run))
    assert epochs < len(_history(patient)) == 3
    capsys.readouterr()
    assert train.main(["--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert "training has ended: the validation loss has not become smaller for 1 epochs, and --patience is 1" in out
    assert len(_history(run)) == epochs
    assert train.main(["--resume", str(run), "--patience", "9"]) == 0
    _same(patient, run)
    assert train.main(["--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert "training has ended: 3 epochs are done, and --epochs is 3; to continue, give a larger value" in out


def test_evaluate_several_runs_gives_their_mean(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = json.loads((finished / "metrics.json").read_text())["network"]["video"]["metrics"]["auroc"]["value"]
    assert evaluate.main([str(finished), str(finished)]) == 0
    out = capsys.readouterr().out
    assert "Mean over 2 runs" in out and "resamples of the videos and the runs" in out
    assert re.search(rf"{value:.3f} ± 0\.000 \(\d\.\d{{3}} to \d\.\d{{3}}, (bootstrap|exact)\)", out)
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(finished), str(finished), "--out", str(tmp_path / "out")])


def test_evaluate_repeats_the_evaluation(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    assert evaluate.main([str(finished), "--out", str(tmp_path / "evaluation")]) == 0
    assert "AUROC" in capsys.readouterr().out
    for name in ("metrics.json", "decision.json", "predictions.csv", "predictions_by_video.csv", "validation.csv"):
        assert (tmp_path / "evaluation" / name).read_text() == (finished / name).read_text()
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


def test_yaml_holds_the_whole_run(finished: Path, tmp_path: Path) -> None:
    """The same settings and the same seed give the same numbers."""
    out = str(tmp_path / "yaml")
    assert train.main(["--config", str(finished / "config.yaml"), "--out", out]) == 0
    _same(finished, Path(out))


@pytest.mark.parametrize(
    "options",
    [
        ["--routing", "dynamic", "--iterations", "2"],
        ["--routing", "uniform", "--class-weight", "proportion"],
        ["--primary-layout", "legacy", "--decoder-mask", "predicted", "--regression-target", "ef"],
        ["--precision", "bf16", "--reconstruction-weight", "0", "--regression-weight", "0", "--class-weight", "none"],
    ],
    ids=lambda x: x[1],
)
def test_options(options: list[str], arguments: list[str], tmp_path: Path) -> None:
    assert train.main([*arguments, "--epochs", "1", *options, "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize("option", [("--protocol", "paper"), ("--split", "frames")])
def test_a_split_over_frames_warns_and_runs(
    option: tuple[str, str], arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enough = ["--frames-per-clip", "4"]  # for frames of both classes in each split
    with pytest.warns(UserWarning, match="leak"):
        assert train.main([*arguments, *enough, "--epochs", "1", *option, "--out", str(tmp_path / "run")]) == 0
    assert re.search(r"test split, \d+ frames", capsys.readouterr().out)


def _turned(phantom: Path, to: Path) -> Path:
    """A copy of the phantom whose training and test videos have changed places."""
    shutil.copytree(phantom, to)
    table = to / "MeasurementsList.csv"
    other = {"train": "test", "test": "train"}
    table.write_text(re.sub(r"(?m)(train|test)$", lambda match: other[match[1]], table.read_text()))
    return to


def test_a_changed_table_is_noticed(
    finished: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", _turned(phantom, tmp_path / "other")
    shutil.copytree(finished, run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    changed = "is not what the run was trained on: 34 videos changed their split"
    assert train.main(["--resume", str(run), "--data", str(other), "--epochs", "4"]) == 3
    assert f"{changed}; give --data" in capsys.readouterr().err
    out = ["--out", str(tmp_path / "out")]
    assert evaluate.main([str(run), "--data", str(other), *out]) == 3
    assert f"{changed}; --allow-changed-data" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert evaluate.main([str(run), "--data", str(other), "--allow-changed-data", *out]) == 3
    said = capsys.readouterr()
    assert "are not what the run was trained on: 34 videos changed their split" in said.out
    assert "has no test video that is new to the run" in said.err and not (tmp_path / "out").exists()


def test_videos_that_the_run_was_trained_on_are_not_tested_on(
    finished: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(phantom, other)
    rows = _rows(other / "MeasurementsList.csv")
    name = next(row["HashedFileName"] for row in rows if row["split"] == "train")
    with (other / "MeasurementsList.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({**row, **({"split": "test"} if row["HashedFileName"] == name else {})} for row in rows)
    assert evaluate.main([str(finished), "--data", str(other), "--allow-changed-data", "--out", str(out)]) == 0
    assert "note: 1 test video is left out" in capsys.readouterr().out
    for file in ("metrics.json", "evaluation.json"):
        assert json.loads((out / file).read_text())["test_videos_left_out"] == 1, file
    assert (out / "predictions.csv").read_text() == (finished / "predictions.csv").read_text()
    assert json.loads((finished / "metrics.json").read_text())["test_videos_left_out"] == 0


def test_a_changed_video_is_noticed(
    finished: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(phantom, other)
    video = sorted(other.glob("Batch1/*.avi"))[0]
    video.write_bytes(video.read_bytes() + b"\0\0")  # still plays
    assert evaluate.main([str(finished), "--data", str(other)]) == 3
    assert "is not what the run was trained on: 1 video changed its content;" in capsys.readouterr().err


def test_other_bytes_of_the_table_alone_are_a_note(
    finished: Path, phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(phantom, other)
    table = other / "MeasurementsList.csv"
    table.write_bytes(table.read_bytes().replace(b"\n", b"\r\n"))
    assert evaluate.main([str(finished), "--data", str(other)]) == 0
    assert "note: the table's file has changed since the run began" in capsys.readouterr().out


def test_run_without_a_fingerprint(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("data.json", "paths.json"):
        (run / name).unlink()
    assert evaluate.main([str(run)]) == 0
    assert "note: this run kept no fingerprint of its data" in capsys.readouterr().out
    assert not (run / "data.json").exists()
    assert train.main(["--resume", str(run)]) == 0
    assert "note: this run kept no fingerprint of its data" in capsys.readouterr().out
    assert (run / "data.json").read_text() == (finished / "data.json").read_text()
    (run / "data.json").write_text("{")
    assert evaluate.main([str(run)]) == 2
    assert "data.json is damaged" in capsys.readouterr().err


def test_data_are_found_from_another_folder_and_may_move(
    finished: Path,
    arguments: list[str],
    phantom: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, first, second = tmp_path / "run", tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    shutil.copytree(phantom, first / "d")
    monkeypatch.chdir(first)
    assert train.main([*arguments, "--data", "d", "--epochs", "1", "--out", str(run)]) == 0
    assert "data: d\n" in (run / "config.yaml").read_text()
    monkeypatch.chdir(second)
    assert evaluate.main([str(run)]) == 0
    (first / "d").rename(second / "moved")
    capsys.readouterr()
    for program in (evaluate.main, train.main):
        assert program([str(run)] if program is evaluate.main else ["--resume", str(run)]) == 3
        assert f"{first / 'd'}, which the run used, is not there; give --data" in capsys.readouterr().err
    assert train.main(["--resume", str(run), "--data", "moved", "--epochs", "3"]) == 0
    _same(finished, run)
    assert "\nepochs: 3\n" in (run / "config.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    assert evaluate.main([str(run)]) == 0  # it remembers where they are now


def test_a_phantom_run_finds_its_phantom_and_makes_no_other(
    phantom: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    second.mkdir()
    shutil.copytree(phantom, first / "phantom")
    monkeypatch.chdir(first)
    settings = ["--phantom-videos", "40", "--phantom-seed", "3", "--cache-dir", str(cache), *FAST, "--epochs", "1"]
    assert train.main([*settings, "--out", "run"]) == 0
    monkeypatch.chdir(second)
    assert evaluate.main([str(first / "run")]) == 0
    (first / "phantom").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    for program in (evaluate.main, train.main):
        assert program([str(first / "run")] if program is evaluate.main else ["--resume", str(first / "run")]) == 3
        error = capsys.readouterr().err
        assert f"phantom_dir: {first / 'phantom'} does not hold the phantom that the run used" in error
        assert f"python -m cardiocaps.phantom {first / 'phantom'} --videos 40 --seed 3" in error
    assert not list(second.iterdir())
    assert evaluate.main([str(first / "run"), "--data", str(tmp_path / "elsewhere")]) == 0


def test_the_data_are_described_before_they_are_decoded(
    finished: Path, phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cardiocaps.data import cache as decoding

    def stopped(*_: object, **__: object) -> None:
        assert "40 clips, protocol video" in capsys.readouterr().out
        raise OutputError("stopped")

    monkeypatch.setattr(decoding, "build", stopped)
    assert train.main(["--data", str(phantom), "--out", str(tmp_path / "run")]) == 4


def test_existing_run_is_not_overwritten(
    finished: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "metrics.json").stat().st_mtime_ns
    assert train.main([*arguments, "--out", str(finished)]) == 4
    assert "--overwrite" in capsys.readouterr().err
    assert (finished / "metrics.json").stat().st_mtime_ns == before


def test_resume_with_other_settings_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--resume", str(finished), "--routing", "dynamic"]) == 2
    assert "routing is 'dynamic', was 'attention'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "text", "foreign", "tensor", "configuration", "weights", "complex", "loops"]
)
def test_bad_checkpoint(finished: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("best.ckpt", "last.ckpt"):
        path = run / name
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "text":
            path.write_text("this is no checkpoint")
        elif damage == "foreign":
            torch.save({"state_dict": {}}, path)
        elif damage == "tensor":
            torch.save(torch.zeros(3), path)
        else:
            checkpoint = torch.load(path, weights_only=True)
            if damage == "configuration":
                checkpoint["cardiocaps"]["routing"] = "dynamic"
            elif damage == "weights":
                checkpoint["state_dict"]["model.conv.0.weight"] = torch.zeros(3)
            elif damage == "complex":
                checkpoint["state_dict"]["model.conv.0.weight"] = torch.zeros(3, dtype=torch.complex64)
            else:
                del checkpoint["loops"]
            torch.save(checkpoint, path)
    expected = {
        "foreign": "was not written by cardiocaps.train",
        "configuration": "of another configuration: routing is 'dynamic', the run's is 'attention'",
        "weights": "does not fit the network: size mismatch for model.conv.0.weight",
        "complex": "does not fit the network: model.conv.0.weight is of torch.complex64; expected torch.float32",
        "loops": "last.ckpt is damaged: its content is not what was saved",
    }.get(damage, "is damaged, or not a checkpoint of this program")
    assert train.main(["--resume", str(run)]) == 5
    errors = capsys.readouterr().err
    assert expected in errors and errors.count("\n") == 1
    if damage != "loops":  # of no concern to an evaluation
        assert evaluate.main([str(run)]) == 5
        assert expected in capsys.readouterr().err


def _set(*place: Any, to: Any) -> Callable[[Any], None]:
    """Puts another value into a checkpoint; `to` may be a function of the old one."""

    def damage(checkpoint: Any) -> None:
        for name in place[:-1]:
            checkpoint = checkpoint[name]
        checkpoint[place[-1]] = to(checkpoint[place[-1]]) if isinstance(to, FunctionType) else to

    return damage


_PATIENCE = "callbacks", "Patience{'monitor': 'val_loss', 'mode': 'min'}"
_BATCHES = "loops", "fit_loop", "epoch_loop.batch_progress"
_MOMENTS = "optimizer_states", 0, "state"


@pytest.mark.parametrize(
    "damage",
    [
        _set("epoch", to="two"),
        _set("global_step", to=-36),
        _set("loops", to=[]),
        _set("loops", "fit_loop", to={}),
        _set(*_BATCHES, to=3),
        _set(*_BATCHES, "current", "ready", to=99),
        _set(*_BATCHES, "is_last_batch", to=1),
        _set("callbacks", to={}),
        _set("callbacks", "History", "rows", to=lambda rows: rows[1:]),
        _set("callbacks", "History", "rows", 1, "val_loss", to=lambda x: -x),
        _set("callbacks", "History", "sums", to=[1.0]),
        _set(*_PATIENCE, "wait_count", to="0"),
        _set(*_PATIENCE, "best_score", to=None),
        _set("optimizer_states", to=[]),
        _set(*_MOMENTS, to={}),
        _set(*_MOMENTS, 0, "exp_avg", to=torch.zeros(3)),
        _set(*_MOMENTS, 0, "exp_avg", to=lambda x: x.flatten()),
        _set(*_MOMENTS, 1, "exp_avg", to=lambda x: x.cfloat()),
        _set(*_MOMENTS, 1, "exp_avg", to=lambda x: x.to_sparse()),
        _set(*_MOMENTS, 1, "step", to=torch.tensor(float("nan"))),
        _set(*_MOMENTS, to=lambda x: {**x, 999: x[0]}),
        _set("optimizer_states", 0, "param_groups", 0, "lr", to=1e3),
        _set("pytorch-lightning_version", to="none"),
        _set("state_dict", to={}),
        _set("state_dict", to=None),
        _set("state_dict", 5, to=None),
        _set("state_dict", "model.conv.0.weight", to=torch.zeros(0)),
        _set("state_dict", "model.conv.0.weight", to=lambda x: x.long()),
        _set("state_dict", "model.conv.0.weight", to=lambda x: x.to_sparse()),
        _set("state_dict", "model.conv.0.weight", to=None),
        _set("cardiocaps", to=7),
        _set("cardiocaps", "preset.size", to=torch.zeros(3)),
    ],
)
def test_damage_within_a_checkpoint_is_noticed(damage: Callable[[Any], None], finished: Path, tmp_path: Path) -> None:
    """What torch and Lightning would take, or end on with a traceback or in a kernel that reads past a tensor's end."""
    network = Classifier(read_run(finished), torch.ones(2), 0.0)
    path = tmp_path / "last.ckpt"

    def check() -> None:
        content = read_checkpoint(path)
        load_weights(network, content, path)
        check_digest(content, path)

    checkpoint = read_checkpoint(finished / "last.ckpt")
    torch.save(checkpoint, path)
    check()
    damage(checkpoint)
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError):
        check()


def test_checkpoint_of_a_version_that_wrote_no_digest(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    checkpoint = torch.load(run / "last.ckpt", weights_only=True)
    del checkpoint["digest"]
    torch.save(checkpoint, run / "last.ckpt")
    assert train.main(["--resume", str(run)]) == 0
    _same(finished, run)


def test_weights_alone_cannot_be_resumed(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.copy(run / "best.ckpt", run / "last.ckpt")
    assert train.main(["--resume", str(run), "--epochs", "4"]) == 5
    errors = capsys.readouterr().err
    assert "last.ckpt is damaged: training cannot go on from it (KeyError('optimizer_states'))" in errors
    assert errors.count("\n") == 1


def test_checkpoint_that_is_no_file_does_not_hang(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "best.ckpt").unlink()
    os.mkfifo(run / "best.ckpt")
    assert evaluate.main([str(run)]) == 5
    assert "best.ckpt is not a file" in capsys.readouterr().err


def test_network_that_diverged(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    checkpoint["state_dict"]["model.conv.0.bias"].fill_(float("nan"))
    torch.save(checkpoint, run / "best.ckpt")
    assert evaluate.main([str(run)]) == 5
    assert "not finite" in capsys.readouterr().err


def test_training_that_diverges_says_so(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        Classifier,
        "configure_optimizers",
        lambda self: torch.optim.SGD(self.parameters(), lr=1e30),
    )
    assert train.main([*arguments, "--out", str(tmp_path / "run")]) == 1
    assert "the loss is not finite in epoch 1" in capsys.readouterr().err


def test_missing_best_checkpoint_is_noticed_before_training(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "best.ckpt").unlink()
    assert train.main(["--resume", str(run), "--epochs", "9"]) == 5
    captured = capsys.readouterr()
    assert "best.ckpt does not exist, though 3 epochs have ended" in captured.err
    assert "epoch   4" not in captured.out


@pytest.mark.parametrize("keep", [0, 5])
def test_configuration_that_was_cut_off(
    keep: int, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    (run / "config.yaml").write_text("".join(lines[:keep]))
    for program, arguments in ((train.main, ["--resume", str(run)]), (evaluate.main, [str(run)])):
        assert program(arguments) == 2
        assert "config.yaml is not whole" in capsys.readouterr().err


def test_run_in_use_is_left_alone(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with lock_folder(run):
        assert train.main(["--resume", str(run), "--epochs", "9"]) == 4
    assert "being used by another process" in capsys.readouterr().err


def test_failed_start_leaves_no_folder_in_the_way(tmp_path: Path, arguments: list[str]) -> None:
    run = tmp_path / "run"
    assert train.main(["--data", str(tmp_path / "nothing"), "--out", str(run)]) == 3
    assert not run.exists()
    (tmp_path / "nothing").mkdir()
    assert train.main(["--data", str(tmp_path / "nothing"), "--out", str(run)]) == 3
    assert train.main([*arguments, "--epochs", "1", "--out", str(run)]) == 0


def test_overwrite_replaces_a_run_only_if_the_new_one_can_start(
    finished: Path, phantom: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    assert train.main(["--data", str(tmp_path / "typo"), "--out", str(run), "--overwrite"]) == 3
    other = ["--phantom-dir", str(phantom), "--phantom-difficulty", "hard", "--out", str(run), "--overwrite"]
    assert train.main(other) == 4
    error = capsys.readouterr().err
    assert "(of a run: --phantom-dir)" in error and f"python -m cardiocaps.phantom {phantom} … --overwrite" in error
    _same(finished, run)
    assert train.main([*arguments, "--epochs", "1", "--out", str(run), "--overwrite"]) == 0
    assert len(_history(run)) == 1


def test_terminal_of_seven_bits(finished: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    command = [*python(), "-m", "cardiocaps.evaluate", str(finished)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"AUROC" in done.stdout
    done.stdout.decode("ascii")


@pytest.mark.parametrize("closed", ["| head -n 1", "> /dev/full", ">&-"])
def test_nobody_reads(closed: str, arguments: list[str], tmp_path: Path) -> None:
    """The run finishes even if its output cannot be written."""
    run = tmp_path / "run"
    program = [*python(), "-m", "cardiocaps.train", *arguments, "--epochs", "1", "--out", str(run)]
    command = f"{shlex.join(program)} {closed}"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (run / "metrics.json").exists()


def test_checkpoint_that_would_execute_code_is_refused(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[object, tuple[str, ...]]:
            return os.mkdir, (str(tmp_path / "executed"),)

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    torch.save({"state_dict": Malicious()}, run / "best.ckpt")
    assert evaluate.main([str(run)]) == 5
    assert not (tmp_path / "executed").exists()


def test_full_disk(arguments: list[str], tmp_path: Path) -> None:
    """A file-size limit stands in for a full disk: what was whole stays whole, and the program says why it stopped."""
    run = tmp_path / "run"
    script = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, 3_000_000));"
        "from cardiocaps.train import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [*python(), "-c", script, *arguments, "--out", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert "error: cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(run.glob("*.ckpt"))
    assert not list(run.glob(".*tmp"))


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--rooting", "dynamic"], 2, "unknown option --rooting; did you mean --routing?"),
        (["--rout", "dynamic"], 2, "unknown option --rout; did you mean --routing?"),
        (["--epochs", "0"], 2, "epochs"),
        (["--data", "x" * 300], 3, "File name too long"),
        (["--data", "https://example.org/echo"], 3, "addresses are not read"),
        (["--data", "/nonexistent/folder"], 3, "/nonexistent/folder"),
        (["--out", "/proc/run"], 4, "/proc/run"),
        (["--resume", "/nonexistent/run"], 2, "/nonexistent/run"),
    ],
)
def test_bad_command_line(
    options: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = [] if "--out" in options or "--resume" in options else ["--out", str(tmp_path / "run")]
    try:
        code = train.main([*options, *out])
    except SystemExit as exit_:
        code = exit_.code
    assert code == status
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(finished: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*arguments, "--device", "cuda", "--out", str(tmp_path / "run")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert evaluate.main([str(finished), "--device", "cuda"]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--threads", "0"], ["--device", "gpu"], ["--data", ""], ["--thread", "1"]])
def test_bad_options_of_evaluate(options: list[str], finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([str(finished), *options])
    assert options[0] in capsys.readouterr().err


def test_help_answers_at_once() -> None:
    """The programs import nothing for it that takes long."""
    for module in ("train", "evaluate", "phantom"):
        command = [sys.executable, "-X", "importtime", "-m", f"cardiocaps.{module}", "--help"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "usage" in done.stdout
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
        assert "argparse" in imported and not imported & {"torch", "av", "sklearn", "matplotlib"}, module


@pytest.mark.parametrize("name", ["CAPSOPS_BACKEND", "CAPSOPS_ISA"])
def test_a_wrong_environment_variable(name: str) -> None:
    command = [*python(), "-m", "cardiocaps.train"]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, name: "gpu\x1b"}, capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert re.fullmatch(rf"error: {name} is 'gpu\\x1b'; expected one of .*\n", run.stderr)
