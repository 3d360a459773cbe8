"""The loggers of a training, with their packages, and without."""

from __future__ import annotations

import csv
import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cardiocaps import train
from cardiocaps.config import TrainConfig, options
from cardiocaps.errors import CardioCapsError, CheckpointError, ConfigError
from cardiocaps.phantom import write_phantom
from cardiocaps.training import loggers
from cardiocaps.training.loggers import RunLog, logged_settings, require_loggers
from cardiocaps.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("empty_figures")

NAMES = ("tensorboard", "wandb", "mlflow")
SECRET = "Mustermann"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*loggers._ENVIRONMENT, "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The place of the data holds a patient's name."""
    folder = tmp_path_factory.mktemp("data")
    write_phantom(folder / SECRET, 40, 3, processes=1)
    return [
        *("--data", str(folder / SECRET), "--cache-dir", str(folder / "cache"), "--no-progress"),
        *("--frames-per-clip", "2", "--batch-size", "8", "--bootstrap", "0", "--threads", "1"),
    ]


def _tensorboard(run: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: {x.step: x.value for x in events.Scalars(name)} for name in events.Tags()["scalars"]}


def _mlflow(run: Path) -> tuple[Any, dict[str, dict[int, float]]]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((run / "mlflow").as_uri())
    (one,) = client.search_runs([x.experiment_id for x in client.search_experiments()])
    found = {}
    for name in one.data.metrics:
        values = client.get_metric_history(one.info.run_id, name)
        found[name] = {x.step: x.value for x in values}
        assert len(found[name]) == len(values), "an epoch was logged twice"
    return one, found


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: after a head of 7 bytes, a log of LevelDB, in blocks of 32 KiB."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:  # too little for a head: the block's end is filled up
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def _wandb(run: Path) -> tuple[dict[str, Any], dict[str, dict[int, float]]]:
    """The settings and numbers in the files of all sessions of a run."""
    from wandb.proto import wandb_internal_pb2

    settings: dict[str, Any] = {}
    found: dict[str, dict[int, float]] = {}
    files = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len({file.name for file in files}) == 1, "the sessions are of several runs"
    for file in files:
        for data in _records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            assert not record.run.host and not record.run.git.remote_url, "who has trained where is logged"
            for update in (*record.config.update, *record.run.config.update):
                settings[update.key] = json.loads(update.value_json)
            row = {x.key or ".".join(x.nested_key): json.loads(x.value_json) for x in record.history.item}
            for name, value in row.items():
                if not name.startswith(("_", "trainer/")):
                    values = found.setdefault(name, {})
                    assert int(row["trainer/global_step"]) not in values, "an epoch was logged twice"
                    values[int(row["trainer/global_step"])] = value
    return settings, found


def test_every_logger_gets_the_numbers_of_a_run_and_of_its_resumption(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        pytest.importorskip(name, reason=f"{name} is not installed")
    import socket

    def connect(connection: socket.socket, address: Any) -> None:
        assert connection.family == socket.AF_UNIX or str(address[0]) in ("127.0.0.1", "::1"), f"asked for {address}"
        return real(connection, address)

    real = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", connect)
    run = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["train", *arguments])  # packages like to log the command
    assert train.main([*arguments, "--epochs", "1", "--logger", ",".join(NAMES), "--out", str(run)]) == 0
    first = json.loads((run / "metrics.json").read_text())["network"]["video"]["metrics"]["auroc"]["value"]
    assert train.main(["--resume", str(run), "--epochs", "2", "--no-progress"]) == 0

    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    results = json.loads((run / "metrics.json").read_text())["network"]
    mlflow_run, of_mlflow = _mlflow(run)
    wandb_settings, of_wandb = _wandb(run)
    for found in (_tensorboard(run), of_mlflow, of_wandb):
        for row in rows:
            for name in ("train_loss", "val_loss", "val_auroc"):
                assert found[name][int(row["epoch"])] == pytest.approx(float(row[name]), rel=1e-5)
        auroc = {1: first, 2: results["video"]["metrics"]["auroc"]["value"]}
        assert found["test_auroc"] == pytest.approx(auroc, rel=1e-6)
        assert found["test_mae"][2] == pytest.approx(results["regression"]["video"]["mae"], rel=1e-6)
        assert "epoch" not in found or set(found["epoch"]) == {1, 2}
    assert mlflow_run.info.status == "FINISHED"
    expected = logged_settings(
        TrainConfig(dataset="echonet-lvh", frames_per_clip=2, batch_size=8, bootstrap=0, epochs=1).resolved()
    )
    expected["regression_target"] = "width"
    assert mlflow_run.data.params == {name: str(value) for name, value in expected.items()}
    assert {name: x for name, x in wandb_settings.items() if name != "_wandb"} == expected
    assert json.loads((run / "loggers.json").read_text())["mlflow"] == {"id": mlflow_run.info.run_id, "epochs": 2}

    # No file of a logger holds a path of the data.
    files = [file for folder in NAMES for file in (run / folder).rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        assert SECRET.encode() not in content and b"cache-dir" not in content, file


def test_a_logger_that_comes_later_gets_all_epochs(arguments: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    run = tmp_path / "run"
    assert train.main([*arguments, "--epochs", "1", "--out", str(run)]) == 0
    assert not (run / "tensorboard").exists() and not (run / "loggers.json").exists()
    assert train.main(["--resume", str(run), "--logger", "csv,tensorboard", "--no-progress"]) == 0
    found = _tensorboard(run)
    assert set(found["val_loss"]) == set(found["test_auroc"]) == {1}


def test_a_logger_that_fails_stops_no_training(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from lightning.pytorch.loggers import TensorBoardLogger

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("the server is gone\nfor ever")

    monkeypatch.setattr(TensorBoardLogger, "log_metrics", fails)
    run = tmp_path / "run"
    assert train.main([*arguments, "--epochs", "1", "--logger", "tensorboard", "--out", str(run)]) == 0
    said = capsys.readouterr().out
    assert said.count("note: logger tensorboard has failed (the server is gone); the run goes on without it") == 1
    assert json.loads((run / "loggers.json").read_text())["tensorboard"]["epochs"] == 0


def test_a_logger_that_cannot_begin_is_an_error_before_the_training(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    run = tmp_path / "run"
    assert train.main([*arguments, "--epochs", "1", "--logger", "mlflow", "--out", str(run)]) == 2
    assert "logger: 'mlflow' cannot be used: " in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_an_error_before_anything_else(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text(json.dumps({"kind": "cardiocaps run"}))
    assert train.main(["--logger", f"csv,{name}", "--out", str(out), "--overwrite"]) == 2
    error = capsys.readouterr().err
    package = {"mlflow": "mlflow-skinny"}.get(name, name)
    assert f"logger: '{name}' needs the package {package}" in error and "pip install 'cardiocaps[loggers]'" in error
    assert [path.name for path in out.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["csv,neptune", "wandb, mlflow", "csv,csv", ",", "CSV"])
def test_wrong_names(text: str) -> None:
    with pytest.raises(
        ConfigError, match=r"^logger is .*; expected some of csv, tensorboard, wandb, mlflow, each once"
    ):
        TrainConfig(logger=text)


def test_csv_is_always_written() -> None:
    assert TrainConfig().loggers == TrainConfig(logger="csv").loggers == ()
    assert TrainConfig(logger="mlflow,csv,wandb").loggers == ("mlflow", "wandb")


def test_no_path_and_no_name_of_a_file_is_logged() -> None:
    config = TrainConfig(data=Path(SECRET), init=Path(SECRET), dataset="table", table=SECRET, cache_dir=Path(SECRET))
    assert SECRET not in str(logged_settings(config.resolved()))
    assert all(options()[name].kind is not Path for name in logged_settings(config.resolved()))


def test_packages_are_asked_not_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")  # the user's own choice stays
    require_loggers(TrainConfig())
    assert os.environ["WANDB_ERROR_REPORTING"] == "false" and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "false"


@pytest.mark.parametrize("content", ["{}", '{"kind": "cardiocaps loggers", "wandb": {"id": 3, "epochs": 1}}', "x"])
def test_a_damaged_file_is_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "loggers.json").write_text(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        RunLog(RunFolder(tmp_path), TrainConfig(logger="wandb"))


def test_an_error_of_the_run_ends_its_loggers_as_failed(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    require_loggers(TrainConfig())
    with pytest.raises(CardioCapsError, match="diverged"), RunLog(RunFolder(tmp_path), TrainConfig(logger="mlflow")):
        raise CardioCapsError("diverged")
    assert _mlflow(tmp_path)[0].info.status == "FAILED"
