"""The program: everything for one epoch, what is finished and what was cut off, what fails, what is refused."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from cardiocaps.config import TrainConfig
from cardiocaps.data.study import Study
from cardiocaps.errors import DataError
from cardiocaps.experiments import __main__ as program
from cardiocaps.experiments.display import Display
from cardiocaps.experiments.engines import process as job_process
from cardiocaps.experiments.engines.local import LocalEngine
from cardiocaps.experiments.exhibits import EXHIBITS, keys_of
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.plan import FIRST_SEED, SYSTEMS, System, configure
from cardiocaps.experiments.reported import ALWAYS_NORMAL
from cardiocaps.experiments.results import is_finished, read_result
from cardiocaps.experiments.runner import run_jobs
from cardiocaps.phantom import write_phantom
from tests.cardiocaps.programs import ROOT, start, wait_for

pytestmark = pytest.mark.usefixtures("empty_figures")  # the fixtures, which come first, draw theirs

ON_PHANTOMS_ALONE = {"learning-curve", "prevalence", "robustness"}
BY_FRAME = {"cardiocaps-frames", "cardiocaps-paper-protocol"}
FAST = [
    "--epochs",
    "1",
    "--frames-per-clip",
    "4",
    "--seeds",
    "1",
    "--bootstrap",
    "20",
    "--no-progress",
    "--threads",
    "1",
]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, 20, 10, processes=1)
    return folder


@pytest.fixture(scope="module")
def arguments(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return ["--data", str(phantom), "--cache-dir", str(tmp_path_factory.mktemp("cache")), *FAST]


@pytest.fixture(scope="module", autouse=True)
def jobs_draw_nothing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_process, "PRELOAD", [*job_process.PRELOAD, "tests.cardiocaps.empty_figures"])
        yield


@pytest.fixture(scope="module")
def everything(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All exhibits, with their figures."""
    out = tmp_path_factory.mktemp("experiments") / "all"
    assert program.main(["all", *arguments, "--jobs", "2", "--out", str(out)]) == 0
    return out


def _predictions(out: Path, key: str) -> str:
    return (out / "jobs" / key / f"seed{FIRST_SEED}" / "predictions.csv").read_text()


def test_every_row_has_figures(everything: Path) -> None:
    assert not any((everything / "tables" / f"{name}.csv").exists() for name in ON_PHANTOMS_ALONE)
    made = {name: exhibit for name, exhibit in EXHIBITS.items() if name not in ON_PHANTOMS_ALONE}
    for key in keys_of(made.values(), "video"):
        result = read_result(everything / "jobs" / key / f"seed{FIRST_SEED}")
        assert (result.system, result.seed) == (key, FIRST_SEED)
        assert result.unit == ("frame" if key in BY_FRAME else "video")
        if "classifier" not in SYSTEMS[key].settings:
            assert result.parameters and result.epochs == 1 and result.seconds_per_epoch
            assert sys.platform != "linux" or result.peak_memory
    for name, exhibit in made.items():
        assert {f"{name}.md", f"{name}.csv", f"{name}.png"} <= {path.name for path in (everything / "tables").iterdir()}
        rows = list(csv.DictReader((everything / "tables" / f"{name}.csv").open()))
        always = [ALWAYS_NORMAL] if name.startswith("table") else []
        assert [row["system"] for row in rows] == [*exhibit.systems, *always]
        for row in rows:
            assert 0 <= float(row["auroc"]) <= 1
            assert 0 <= float(row["accuracy"]) <= 1
    index = (everything / "tables" / "README.md").read_text()
    assert "Research use only" in index
    assert (
        "python -m cardiocaps.experiments all --seeds 1 --jobs 2 --data FOLDER --frames-per-clip 4 --epochs 1" in index
    )


def test_tables_do_not_say_where_the_data_are(everything: Path, phantom: Path) -> None:
    secrets = [str(phantom), str(everything), f"{Path.home()}/", str(ROOT)]
    for path in (everything / "tables").iterdir():
        assert not [secret for secret in secrets if secret.encode() in path.read_bytes()], path


def test_all_systems_saw_the_same_samples(everything: Path) -> None:
    def samples(key: str) -> set[tuple[str, str]]:
        return {(row["video"], row["label"]) for row in csv.DictReader(io.StringIO(_predictions(everything, key)))}

    keys = {path.name for path in (everything / "jobs").iterdir()} - BY_FRAME
    assert len(keys) > 20 and len({frozenset(samples(key)) for key in keys}) == 1


def test_a_job_is_a_run(everything: Path) -> None:
    from cardiocaps import evaluate

    folder = everything / "jobs" / "unet" / f"seed{FIRST_SEED}"
    # Decided as the tables are.
    assert json.loads((folder / "decision.json").read_text())["threshold"] == read_result(folder).threshold[0]
    assert evaluate.main([str(folder)]) == 0


def test_what_is_finished_is_not_done_again(
    everything: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(everything.glob("jobs/*/*/*"))
    before = [path.stat().st_mtime_ns for path in files]
    table = (everything / "tables" / "table5.csv").read_text()
    leftovers = [everything / "experiments.json.0123abcd.part", everything / "tables" / "x.csv.0123abcd.part"]
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    assert program.main(["table5", "fig3", *arguments, "--out", str(everything)]) == 0
    assert "9 jobs, 9 of them finished" in capsys.readouterr().out
    assert sorted(everything.glob("jobs/*/*/*")) == files
    assert [path.stat().st_mtime_ns for path in files] == before
    assert not any(leftover.exists() for leftover in leftovers)
    assert (everything / "tables" / "table5.csv").read_text() == table


def test_killed_and_begun_again(everything: Path, arguments: list[str], tmp_path: Path) -> None:
    """kill -9 loses no finished job, leaves no process behind, and changes no number."""
    out = tmp_path / "out"
    process = start("cardiocaps.experiments", "table2", *arguments, "--out", str(out))
    first, second = (out / "jobs" / key / f"seed{FIRST_SEED}" for key in ("cardiocaps", "dr"))
    wait_for((second / "run.json").exists, process)
    process.kill()
    process.communicate()
    assert is_finished(first) and not is_finished(second)
    finished = (first / "result.json").stat().st_mtime_ns
    assert program.main(["table2", *arguments, "--out", str(out)]) == 0
    assert (first / "result.json").stat().st_mtime_ns == finished
    for key in EXHIBITS["table2"].systems:
        assert _predictions(out, key) == _predictions(everything, key), key


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for a process in /proc")
def test_a_job_that_says_nothing_ends_with_the_program() -> None:
    command = [sys.executable, "-m", "tests.cardiocaps.experiments.waiting_job"]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    job = Path("/proc", process.stdout.readline().strip())
    assert job.is_dir() and job.name.isdigit()
    process.kill()
    process.communicate()
    wait_for(lambda: not job.is_dir(), process=None)


def test_stopped_by_a_signal(
    everything: Path,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The signal comes while the first job trains."""
    out = tmp_path / "out"

    def stop(self: Display, job: Job, done: float, doing: str) -> None:
        if doing != "reading":
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as stopping:
        stopping.setattr(Display, "progress", stop)
        assert program.main(["table2", *arguments, "--out", str(out)]) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; what was done is saved, and the same command goes on" in capsys.readouterr().err
    assert not list(out.glob("jobs/*/*/result.json"))
    assert program.main(["table2", *arguments, "--out", str(out)]) == 0
    for key in EXHIBITS["table2"].systems:
        assert _predictions(out, key) == _predictions(everything, key), key


def _job(key: str, arguments: list[str], out: Path) -> Job:
    values = dict(pairwise(arguments))
    config = TrainConfig(
        data=Path(values["--data"]),
        cache_dir=Path(values["--cache-dir"]),
        epochs=1,
        frames_per_clip=4,
        seed=FIRST_SEED,
        threads=1,
        progress=False,
    )
    folder = out / "jobs" / key / f"seed{FIRST_SEED}"
    return Job(SYSTEMS[key], FIRST_SEED, configure(config, SYSTEMS[key], FIRST_SEED, folder))


class _Killing(Display):
    """A display that kills the process of the first job that gets somewhere."""

    def __init__(self) -> None:
        super().__init__(2, bars=False)
        self.victim: str | None = None
        self.ends: dict[str, str | None] = {}

    def progress(self, job: Job, done: float, doing: str) -> None:
        if self.victim is None:
            self.victim = job.name
            (process,) = multiprocessing.active_children()
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)

    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        self.ends[job.name] = error


def test_a_killed_job_takes_no_other_along(everything: Path, arguments: list[str], tmp_path: Path) -> None:
    jobs = [_job(key, arguments, tmp_path) for key in ("cnn-2", "vit")]
    display = _Killing()
    errors = run_jobs(jobs, 1, display, LocalEngine())
    killed = "killed by SIGKILL (out of memory?)"
    assert display.victim == "cnn-2 seed 10"
    assert errors == {"cnn-2 seed 10": killed}
    assert display.ends == {"cnn-2 seed 10": killed, "vit seed 10": None}
    assert run_jobs(jobs[:1], 1, display, LocalEngine()) == {}
    for key in ("cnn-2", "vit"):
        assert _predictions(tmp_path, key) == _predictions(everything, key)


def test_a_failed_row_is_reported_and_the_others_are_done(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert program.main(["table2", *arguments, "--out", str(out)]) == 0
    taken = out / "jobs" / "em-capsnet" / f"seed{FIRST_SEED}"
    taken.mkdir(parents=True)
    (taken / "somebody's file").touch()
    assert program.main(["table6", *arguments, "--out", str(out)]) == 1
    errors = capsys.readouterr().err
    assert "error: 1 of 3 jobs failed" in errors and "em-capsnet seed 10: --overwrite does not delete" in errors
    rows = {row["system"]: row for row in csv.DictReader((out / "tables" / "table6.csv").open())}
    assert rows["efficient-capsnet"]["auroc"] and not rows["em-capsnet"]["auroc"]
    table = (out / "tables" / "table6.md").read_text()
    assert "failed: seed 10: --overwrite does not delete OUT/jobs/em-capsnet/seed10:" in table
    index = (out / "tables" / "README.md").read_text()
    assert "Figure 6" not in index
    assert all(f"({name}.md)" in index and f"experiments {name} " in index for name in ("table2", "table6"))
    assert (taken / "somebody's file").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--epochs", "2"], "epochs is 2, was 1"),
        (["--preset", "small"], "preset is 'small', was 'tiny'"),
        (["--learning-rate", "0.1"], "learning_rate is 0.1, was 0.001"),
    ],
)
def test_other_settings_are_refused(
    changed: list[str], message: str, everything: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["table6", *arguments, *changed, "--out", str(everything)]) == 2
    assert message in capsys.readouterr().err


def test_mistyped_settings_bind_nobody_before_a_job_has_begun(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cardiocaps.experiments import run

    out = ["--out", str(tmp_path / "out")]
    assert program.main(["fig3", *arguments, "--data", str(tmp_path / "phantmo"), *out]) == 3
    (tmp_path / "empty").mkdir()
    assert program.main(["fig3", *arguments, "--data", str(tmp_path / "empty"), *out]) == 3
    capsys.readouterr()
    monkeypatch.setattr(run, "run_jobs", lambda jobs, *_: {job.name: "not run" for job in jobs})
    assert program.main(["table2", *arguments, *out]) == 1
    assert "3 of 3 jobs failed" in capsys.readouterr().err


def test_only_the_rows_whose_data_cannot_be_used_fail(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cardiocaps.experiments import run

    read = run.read_study

    def read_study(config: TrainConfig) -> Study:
        if config.protocol == "paper":
            raise DataError(f"{config.data} has no such rows")
        return read(config)

    monkeypatch.setattr(run, "read_study", read_study)
    out = tmp_path / "out"
    assert program.main(["leakage", *arguments, "--out", str(out)]) == 1
    errors = capsys.readouterr().err
    assert "1 of 3 jobs failed" in errors and f"paper-protocol seed 10: {arguments[1]} has no such rows" in errors
    table = (out / "tables" / "leakage.md").read_text()
    assert "failed: seed 10: DATA has no such rows" in table and "## Results" in table


def test_systems_of_other_phantoms_need_the_phantom(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for name in sorted(ON_PHANTOMS_ALONE):
        assert program.main([name, *arguments, "--out", str(out)]) == 2
        assert re.search(
            f"error: {name}: data is '.*; expected null: (its systems|the shifts)", capsys.readouterr().err
        )
    assert not out.exists()


def test_a_system_is_trained_on_a_phantom_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are tested on the same videos, and the same command does nothing again."""
    key, pixels = "logistic-regression-class-weight", {"classifier": "logistic-regression", "sampling": "class-weight"}
    monkeypatch.setitem(SYSTEMS, "half", System("half", "Half abnormal", {**pixels, "phantom_abnormal": 0.5}))  # type: ignore[arg-type]
    monkeypatch.setitem(EXHIBITS, "shares", Exhibit("shares", "Shares", (key, "half")))  # type: ignore[arg-type]
    places = ["--phantom-dir", str(tmp_path / "phantom"), "--cache-dir", str(tmp_path / "cache")]
    out, command = tmp_path / "out", ["shares", "--phantom-videos", "40", "--phantom-test", "12", *places, *FAST]
    assert program.main([*command, "--out", str(out)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"phantom", "phantom-abnormal0.5", "cache", "out"}
    ours, its = (read_result(out / "jobs" / name / f"seed{FIRST_SEED}").test for name in (key, "half"))
    assert ours.video == its.video and ours.label is not None and ours.label.tolist() == its.label.tolist()  # type: ignore[union-attr]
    table = (out / "tables" / "shares.md").read_text()
    assert table.count("\n* The synthetic phantom (40 videos") == 2
    assert "training 22 videos, 5 abnormal" in table and "training 22 videos, 11 abnormal" in table
    records = [out / "data" / f"video-auto{ending}.json" for ending in ("", "-phantom_abnormal-0.5")]
    assert all(record.is_file() for record in records)
    capsys.readouterr()
    assert program.main([*command, "--out", str(out)]) == 0
    assert "2 jobs, 2 of them finished" in capsys.readouterr().out


def test_a_split_that_leakage_compares(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["leakage", *arguments, "--split", "frames", "--out", str(tmp_path / "out")]) == 2
    assert "split is 'frames', which is a row of leakage itself; expected auto" in capsys.readouterr().err


def test_other_data_are_refused(
    everything: Path, phantom: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(everything, out)
    other = tmp_path / "other"
    shutil.copytree(phantom, other)
    table = other / "MeasurementsList.csv"
    turned = {"train": "test", "test": "train"}
    lines = [line.rpartition(",") for line in table.read_text().splitlines()]
    table.write_text("".join(f"{start},{turned.get(split, split)}\n" for start, _, split in lines))
    assert program.main(["table6", *arguments, "--data", str(other), "--out", str(out)]) == 3
    error = capsys.readouterr().err
    assert re.search(r"not what the experiments in .* are about: \d+ videos changed their split; choose another", error)


def test_data_may_move(
    everything: Path, phantom: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(phantom, moved)
    assert program.main(["table6", *arguments, "--data", str(moved), "--out", str(everything)]) == 0
    assert "3 jobs, 3 of them finished" in capsys.readouterr().out


def test_a_folder_of_something_else_is_refused(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").touch()
    assert program.main(["table6", *arguments, "--out", str(tmp_path)]) == 4
    assert "not empty and no folder of experiments" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_data_without_abnormal_videos(
    phantom: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    normal = tmp_path / "normal"
    shutil.copytree(phantom, normal)
    table = normal / "MeasurementsList.csv"
    rows = list(csv.DictReader(table.open()))
    for row in rows:
        row["CalcValue"] = "0.5"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    assert program.main(["table6", *arguments, "--data", str(normal), "--out", str(tmp_path / "out")]) == 3
    assert "each split needs clips of both classes" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert program.main(["table6", *arguments, "--device", "cuda", "--out", str(out)]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table7"], "table7"),
        (["table1", "--preset", "huge"], "huge"),
        (["table1", "--seeds", "0"], "an integer from 1 to 100"),
        (["table1", "--model", "vit"], "unknown option --model"),
        ([], "EXHIBIT"),
    ],
)
def test_mistakes_in_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_bars(arguments: list[str], tmp_path: Path) -> None:
    from rich.console import Console

    shown = io.StringIO()
    display = Display(2, bars=True, console=Console(file=shown, width=120, force_terminal=True))
    with display.bars:
        job = _job("vit", arguments, tmp_path)
        display.started(job)
        display.progress(job, 0.5, "epoch 1/2")
        assert [task.completed for task in display.bars.tasks] == [0, 0.5]
        display.ended(job, 3.0, "it broke")
        assert [(task.description, task.completed) for task in display.bars.tasks] == [("jobs", 1)]
    assert "vit seed 10" in shown.getvalue()
