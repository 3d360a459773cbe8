"""Every data set but the phantom's: trained for a few steps on an invented folder, and evaluated."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest

from cardiocaps import evaluate, train
from cardiocaps.config import TrainConfig, read_run
from cardiocaps.experiments.engines.local import LocalEngine
from cardiocaps.experiments.folder import ExperimentFolder
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.plan import SYSTEMS, configure
from cardiocaps.experiments.run import _prepare
from tests.cardiocaps.data.sample_videos import folder_of, write_dynamic, write_folder, write_rows

pytestmark = pytest.mark.usefixtures("empty_figures")

FAST = ["--frames-per-clip", "2", "--epochs", "1", "--batch-size", "4", "--bootstrap", "20", "--threads", "1"]


def _train(data: Path, tmp_path: Path, *options: str) -> int:
    where = ["--data", str(data), "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "run")]
    return train.main([*where, *FAST, "--no-progress", *options])


@pytest.mark.parametrize(
    ("dataset", "options", "target", "unit"),
    [
        ("echonet-dynamic", [], "ef", "percentage points"),
        ("echonet-dynamic", ["--regression-target", "edv", "--threshold", "ef=40"], "edv", "mL"),
        ("echonet-pediatric", ["--view", "both", "--limit", "30"], "ef", "percentage points"),
        ("table", ["--target-column", "mass:g", "--label-column", "dx", "--positive", "stenosis"], "mass", "g"),
        ("table", ["--target-column", "mass", "--threshold", "mass=120", "--abnormal", "above"], "mass", ""),
    ],
)
def test_a_data_set_is_trained_and_evaluated(
    dataset: str, options: list[str], target: str, unit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = folder_of(dataset, tmp_path), tmp_path / "run"
    assert _train(data, tmp_path, *options) == 0
    out = capsys.readouterr().out
    assert f"is read as {dataset}\n" in out
    assert re.search(rf"{target}: mean absolute error, \d videos +\S +\d+\.\d\d {unit}".rstrip() + " ", out)
    config = read_run(run)
    assert (config.dataset, config.regression_target) == (dataset, target)
    regression = json.loads((run / "metrics.json").read_text())["network"]["regression"]
    assert (regression["target"], regression["unit"], regression["video"]["n"] > 1) == (target, unit, True)
    # Training goes on and is judged with the settings of the run, without being told the layout again.
    assert train.main(["--resume", str(run), "--epochs", "2"]) == 0
    assert "is read as" not in capsys.readouterr().out
    before = (run / "metrics.json").read_text()
    assert evaluate.main([str(run), "--out", str(tmp_path / "again")]) == 0
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["network"]["regression"] == json.loads(before)["network"]["regression"]
    with (run / "predictions_by_video.csv").open() as file:
        assert all(row["target"] for row in csv.DictReader(file))


def test_a_table_without_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is regressed, and no report says otherwise."""
    data, run = folder_of("table", tmp_path), tmp_path / "run"
    assert _train(data, tmp_path) == 0
    assert "mean absolute error" not in capsys.readouterr().out
    assert "regression" not in json.loads((run / "metrics.json").read_text())["network"]
    assert read_run(run).regression_target is None
    before = (run / "predictions.csv").read_text()
    assert before.splitlines()[0] == "video,clip,frame,reconstruction_error,label,probability"
    # The folder and the name of the table are the same data.
    same = ["--data", str(data.parent), "--dataset", "table", "--table", data.name, "--out", str(tmp_path / "again")]
    assert evaluate.main([str(run), *same]) == 0
    assert (tmp_path / "again" / "predictions.csv").read_text() == before
    assert evaluate.main([str(run), "--data", str(data.parent)]) == 2
    assert "table is None; expected the name of a table in " in capsys.readouterr().err
    assert evaluate.main([str(run), "--label-column", "dx", "--positive", "none"]) == 3
    assert "is not what the run was trained on: 8 videos changed their label; " in capsys.readouterr().err


def test_a_run_notices_that_its_table_has_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_dynamic(tmp_path / "data")
    assert _train(tmp_path / "data", tmp_path) == 0
    rows[0]["EF"] = 61
    write_rows(tmp_path / "data" / "FileList.csv", rows)
    assert evaluate.main([str(tmp_path / "run")]) == 3
    assert "is not what the run was trained on: 1 video changed its measurements; " in capsys.readouterr().err
    assert evaluate.main([str(tmp_path / "run"), "--threshold", "ef=30"]) == 3
    assert "each split needs clips of both classes" in capsys.readouterr().err


def test_a_run_is_judged_on_another_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its settings of its own data set do not apply there, and its regression only where the target is the same."""
    write_folder(tmp_path / "lvh")
    assert _train(tmp_path / "lvh", tmp_path, "--threshold", "IVSd=1.3") == 0
    capsys.readouterr()
    other = tmp_path / "dynamic"
    rows = write_dynamic(other)
    for row in rows:  # the run has seen videos of these names and contents
        path = other / "Videos" / f"{row['FileName']}.avi"
        path.write_bytes(path.read_bytes() + b"\0\0")
        path.rename(path.with_stem(f"other-{path.stem}"))
        row["FileName"] = f"other-{path.stem}"
    write_rows(other / "FileList.csv", rows)
    arguments = [str(tmp_path / "run"), "--data", str(other), "--allow-changed-data"]
    assert evaluate.main(arguments) == 3
    said = capsys.readouterr().err
    assert "dataset is 'echonet-lvh', but " in said and "has the files of echonet-dynamic" in said
    assert evaluate.main([*arguments, "--dataset", "auto", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "note: the data have no width: no regression is judged" in said and "mean absolute error" not in said
    network = json.loads((tmp_path / "out" / "metrics.json").read_text())["network"]
    assert "regression" not in network and network["video"]["n"] == 2


def test_experiments_on_a_data_set_without_the_papers_protocol(tmp_path: Path) -> None:
    """The one system that needs it is refused, and the others are trained."""
    write_dynamic(tmp_path / "data")
    config = TrainConfig(
        data=tmp_path / "data",
        dataset="echonet-dynamic",
        frames_per_clip=2,
        cache_dir=tmp_path / "cache",
        device="cpu",
        progress=False,
    )
    folder = ExperimentFolder(tmp_path / "out")
    folder.make()
    keys = ("cardiocaps", "cardiocaps-paper-protocol")
    jobs = [Job(SYSTEMS[key], 10, configure(config, SYSTEMS[key], 10, folder.job(key, 10))) for key in keys]
    said, refused = _prepare(jobs, config, folder, LocalEngine(1))
    assert [text.partition(";")[0] for text in said.values()] == ["A folder in the layout of EchoNet-Dynamic"]
    assert refused == {
        jobs[1].name: "protocol is 'paper'; expected video, because data set echonet-dynamic has no such setting"
    }
