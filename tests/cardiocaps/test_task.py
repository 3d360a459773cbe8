"""The setting `task`: a regression alone, from the table to the report, and a classification alone."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cardiocaps import evaluate, explain, predict, train
from cardiocaps.config import TrainConfig, read_run
from cardiocaps.errors import ConfigError
from cardiocaps.metrics import regression_report
from cardiocaps.models import MODELS, build
from cardiocaps.models.losses import CardioCapsLoss, TargetLoss
from cardiocaps.training.checkpoints import read_checkpoint
from tests.cardiocaps.data.sample_videos import write_dynamic, write_rows, write_videos

FAST = ["--frames-per-clip", "2", "--batch-size", "4", "--bootstrap", "20", "--threads", "1", "--no-progress"]
ALONE = ["--task", "regression", "--target-column", "mass:g"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def table(root: Path, *left_out: str, **changed: Any) -> Path:
    """A table of 16 videos with the target `mass`, without the columns `left_out`."""
    found = [{name: x for name, x in row.items() if name not in left_out} | changed for row in write_videos(root, 16)]
    return write_rows(root / "study.csv", found)


def trained(data: Path, out: Path, *options: str) -> int:
    cache = ["--cache-dir", str(out.parent / "cache")]
    return train.main([*FAST, *cache, "--data", str(data), "--out", str(out), *options])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return table(tmp_path_factory.mktemp("study"), "label", "dx")


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of other seeds."""
    folder = tmp_path_factory.mktemp("runs")
    paths = [folder / "one", folder / "two"]
    for seed, path in enumerate(paths):
        assert trained(data, path, *ALONE, "--epochs", "4", "--patience", "2", "--seed", str(seed)) == 0
    return paths


def test_a_table_without_labels_is_trained_and_evaluated(
    runs: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = runs[0]
    names = {path.name for path in run.rglob("*")}
    assert {"target.json", "familiarity.json", "regression.png", "learning_curves.png", "report.html"} <= names
    of_labels = {"decision.json", "calibration.json", "pixel_baseline.json", "roc_curve.png", "confusion_matrix.png"}
    assert not names & of_labels
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["network"].keys() == {"name", "regression"} and "pixel_logistic_regression" not in metrics
    # What is reported follows from the table by itself.
    by_video = rows(run / "predictions_by_video.csv")
    assert by_video[0].keys() == {"video", "clip", "frames", "target", "regression", "reconstruction_error"}
    with data.open() as file:
        masses = {row["path"]: float(row["mass"]) for row in csv.DictReader(file) if row["split"] == "train"}
    mean = sum(masses.values()) / len(masses)
    said, truth = ([float(row[name]) for row in by_video] for name in ("regression", "target"))
    report, found = regression_report(said, truth, mean), metrics["network"]["regression"]
    assert (found["target"], found["unit"], found["video"]["n"]) == ("mass", "g", 4)
    assert found["video"]["mae"] == pytest.approx(report.mae, rel=1e-5)
    assert found["video"]["constant_mae"] == pytest.approx(report.constant_mae, rel=1e-6) and report.constant_mae > 1
    page = (run / "report.html").read_text()
    assert f"{report.mae:.2f} g" in page and f"{report.constant_mae:.2f} g" in page
    assert (
        "Research use only" in page and "abnormal" not in page.partition("<main>")[2] and "Wrong decisions" not in page
    )
    capsys.readouterr()
    assert evaluate.main([str(run), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "predictions.csv").read_bytes() == (run / "predictions.csv").read_bytes()
    said_again = capsys.readouterr().out
    assert f"{report.mae:.2f} g" in said_again and "AUROC" not in said_again and "threshold" not in said_again
    assert evaluate.main(list(map(str, runs))) == 0
    assert "Mean over 2 runs" in capsys.readouterr().out


def test_the_error_of_the_target_chooses_the_epoch_and_stops(runs: list[Path]) -> None:
    for run in runs:
        history = [float(row["val_mae"]) for row in rows(run / "metrics.csv")]
        best = history.index(min(history))
        assert len(history) == min(4, best + 1 + 2)
        assert read_checkpoint(run / "best.ckpt")["epoch"] == best
        validation = rows(run / "validation_by_video.csv")
        error = sum(abs(float(row["regression"]) - float(row["target"])) for row in validation) / len(validation)
        assert history[best] == pytest.approx(error, rel=1e-4)


def test_a_resumed_training_ends_as_one_that_was_not(data: Path, tmp_path: Path) -> None:
    assert trained(data, tmp_path / "whole", *ALONE, "--epochs", "2") == 0
    assert trained(data, tmp_path / "cut", *ALONE, "--epochs", "1") == 0
    assert train.main(["--resume", str(tmp_path / "cut"), "--epochs", "2"]) == 0
    whole, cut = ((tmp_path / name / "predictions.csv").read_bytes() for name in ("whole", "cut"))
    assert whole == cut


def test_predictions_have_no_decision(runs: list[Path], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--threads", "1", "--no-progress", "--report"]
    assert predict.main([str(runs[0]), str(data), "--out", str(out), *arguments]) == 0
    found = {row["input"]: row for row in rows(out / "predictions.csv")}
    columns = ["input", "status", "reason", "frames", "frames_used", "mass_g", "p_like_training_data", "flags"]
    assert list(next(iter(found.values()))) == columns and len(found) == 16
    for row in rows(runs[0] / "predictions_by_video.csv"):
        assert found[row["video"]]["mass_g"] == row["regression"]
    assert rows(out / "frames.csv")[0].keys() == {"input", "frame", "mass_g"}
    page = (out / "report.html").read_text()
    assert page.count("<polyline") == 16 and "mass, g of each frame" in page and "Research use only" in page
    assert "abnormal at" not in page and 'id="abnormal"' not in page and "stroke-dasharray" not in page
    assert predict.main([*map(str, runs), str(data), "--out", str(tmp_path / "both"), *arguments]) == 0
    for row in rows(tmp_path / "both" / "predictions.csv"):
        alone = float(found[row["input"]]["mass_g"])
        assert abs(float(row["mass_g"]) - alone) == pytest.approx(float(row["regression_sd"]), rel=1e-2, abs=1e-3)


def test_all_videos_may_be_of_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A rule of labels that the data set has is not applied."""
    write_dynamic(tmp_path / "data", EF=60.0)
    assert trained(tmp_path / "data", tmp_path / "run", "--epochs", "1") == 3
    assert "each split needs clips of both classes" in capsys.readouterr().err
    options = ["--task", "regression", "--regression-target", "edv", "--epochs", "1"]
    assert trained(tmp_path / "data", tmp_path / "run", *options) == 0
    out = capsys.readouterr().out
    assert "no labels: regression of edv alone" in out and "abnormal" not in out and "ejection fraction" not in out
    assert read_run(tmp_path / "run").regression_target == "edv"


def test_videos_without_the_target_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    found = [{"path": row["path"], "mass": row["mass"], "split": row["split"]} for row in write_videos(root, 16)]
    found[0]["mass"] = found[4]["mass"] = ""
    data = write_rows(root / "study.csv", found)
    assert trained(data, tmp_path / "run", *ALONE, "--epochs", "1") == 0
    assert "mass not measured (left out)" in capsys.readouterr().out
    with (tmp_path / "run" / "validation_by_video.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    for row in found:
        row["mass"] = row["mass"] if row["split"] != "val" else ""
    assert trained(write_rows(root / "study.csv", found), tmp_path / "other", *ALONE) == 3
    assert "each split needs clips with a target, this data has none in val" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (["--task", "regression"], 2, "target_column is None; expected a column of study.csv"),
        ([*ALONE, "--model", "cnn-1"], 2, "because model 'cnn-1' regresses nothing"),
        ([*ALONE, "--label-column", "dx"], 2, "label_column is 'dx'; expected null, because task is 'regression'"),
        ([*ALONE, "--threshold", "mass=100"], 2, "expected null, because task is 'regression'"),
        (["--task", "regression", "--target-column", "dx"], 3, "dx is not a number"),
        (["--task", "classification", "--target-column", "mass"], 2, "target_column is 'mass'; expected null"),
        (["--task", "both", "--label-column", "dx"], 3, "label is not 0 or 1"),
    ],
)
def test_bad_input(
    options: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert trained(table(tmp_path / "data"), tmp_path / "run", *options) == status
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("empty_figures")
def test_a_classification_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The target that the data set has is not regressed, and no column is filled by a head that was not trained."""
    write_dynamic(tmp_path / "data")
    run, options = tmp_path / "run", ["--task", "classification", "--epochs", "1"]
    assert trained(tmp_path / "data", run, *options) == 0
    assert "mean absolute error" not in capsys.readouterr().out
    assert "regression" not in json.loads((run / "metrics.json").read_text())["network"]
    videos = str(tmp_path / "data" / "Videos")
    assert predict.main([str(run), videos, "--out", str(tmp_path / "out"), "--threads", "1", "--no-progress"]) == 0
    found = rows(tmp_path / "out" / "predictions.csv")
    assert len(found) == 8 and all(row["regression"] == "" and row["probability"] for row in found)


def test_what_needs_classes_is_refused(
    runs: list[Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain.main([str(runs[0]), str(data), "--out", str(tmp_path / "out")]) == 2
    assert "RUN: its task is 'regression'; expected both or classification" in capsys.readouterr().err
    assert train.main(["--resume", str(runs[0]), "--task", "both"]) == 2
    assert "task is 'both', was 'regression'" in capsys.readouterr().err
    labelled = tmp_path / "labelled"
    assert trained(table(tmp_path / "data"), labelled, "--target-column", "mass:g", "--epochs", "1") == 0
    capsys.readouterr()
    assert predict.main([str(runs[0]), str(labelled), str(data), "--out", str(tmp_path / "both")]) == 2
    assert "some runs regress alone and others know classes" in capsys.readouterr().err


def test_the_networks_that_regress_are_those_that_the_settings_allow() -> None:
    for name in MODELS:
        network = build(TrainConfig(model=name)).eval()  # type: ignore[arg-type]
        with torch.inference_mode():
            regresses = network(torch.rand(2, 9, 64, 64)).regression is not None
        if regresses:
            assert TrainConfig(model=name, task="regression").task == "regression"  # type: ignore[arg-type]
        else:
            with pytest.raises(ConfigError, match="regresses nothing"):
                TrainConfig(model=name, task="regression")  # type: ignore[arg-type]


def test_the_loss_is_that_of_cardiocaps_without_its_margin() -> None:
    scores, labels = torch.rand(5, 2), torch.randint(2, (5,))
    drawn, image = torch.rand(2, 5, 3, 8, 8)
    said, target = torch.rand(2, 5) * 100
    target[1] = math.nan
    weights = {"reconstruction_weight": 0.3, "regression_weight": 0.7}
    whole = CardioCapsLoss(**weights)(scores, labels, drawn, image, said, target)
    alone = TargetLoss(**weights)(scores, labels, drawn, image, said, target)
    assert alone.keys() == set(TargetLoss.parts)
    assert float(alone["loss"] + whole["margin"]) == pytest.approx(float(whole["loss"]), rel=1e-6)
