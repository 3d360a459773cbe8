"""`python -m cardiocaps.predict --engine ray`: the rows of the local engine, whatever is killed."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cardiocaps import __version__, predict
from cardiocaps.errors import CardioCapsError
from cardiocaps.prediction import on_ray
from cardiocaps.runtime import ray_data

from ..kills import ACTOR, Prediction, adopting, by_name, rows, striking
from ..programs import descendants, ended, start, wait_for

ray = pytest.importorskip("ray", reason="needs the extra cluster")


@pytest.fixture(scope="module")
def videos(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom's videos and one that cannot be read."""
    folder = tmp_path_factory.mktemp("videos") / "all"
    shutil.copytree(phantom, folder)
    (folder / "bad.avi").write_text("no video")
    return folder


@pytest.fixture(scope="module")
def here(runs: list[Path], videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of the local engine."""
    out = tmp_path_factory.mktemp("here") / "out"
    assert predict.main([*_arguments(runs, videos, out)]) == 0
    return out


def _arguments(runs: list[Path], videos: Path, out: Path) -> list[str]:
    return [str(runs[0]), str(videos), "--out", str(out), "--by-frame", "--no-progress", "--threads", "1"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_a_killed_actor_loses_nothing_and_repeats_nothing(
    here: Path, runs: list[Path], videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyarrow import parquet

    monkeypatch.setattr(on_ray, "_AT_A_TIME", 4)
    out = tmp_path / "out"
    with striking(lambda: descendants(ACTOR), random.uniform(0, 0.5)) as killed:
        assert predict.main([*_arguments(runs, videos, out), "--engine", "ray", "--workers", "2", "--parquet"]) == 0
    assert killed
    here_rows = rows(here / "predictions.csv")
    assert len(here_rows) == 41 and sum(row["status"] == "failed" for row in here_rows) == 1
    for name in ("predictions.csv", "frames.csv"):
        assert by_name(rows(out / name)) == by_name(rows(here / name))
    table = parquet.read_table(out / "predictions.parquet").to_pylist()
    assert [row["input"] for row in table] == [row["input"] for row in rows(out / "predictions.csv")]
    for row, text in zip(table, rows(out / "predictions.csv"), strict=True):
        assert {
            name: "" if x is None else f"{x:.6g}" if isinstance(x, float) else str(x) for name, x in row.items()
        } == {name: f"{float(x):.6g}" if x and isinstance(row[name], float) else x for name, x in text.items()}


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_videos_that_bring_down_every_actor_cost_only_their_own_rows(
    here: Path,
    runs: list[Path],
    videos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(on_ray, "_AT_A_TIME", 4)
    monkeypatch.setattr(ray_data, "_RETRIES", 0)  # the first blow is the last
    out = tmp_path / "out"
    with striking(lambda: descendants(ACTOR + ".submit"), random.uniform(0, 0.5)):
        assert predict.main([*_arguments(runs, videos, out), "--engine", "ray", "--workers", "2"]) == 1
    found = rows(out / "predictions.csv")
    assert 0 < len(found) < 41
    assert f"Ray returned the results of {len(found)} of 41 videos" in capsys.readouterr().err
    assert predict.main(_arguments(runs, videos, out)) == 0
    assert by_name(rows(out / "predictions.csv")) == by_name(rows(here / "predictions.csv"))


def test_a_killed_driver_loses_nothing_and_repeats_nothing(
    here: Path, runs: list[Path], videos: Path, tmp_path: Path
) -> None:
    """Another engine goes on in its folder."""
    out = tmp_path / "out"
    arguments = _arguments(runs, videos, out)
    driver = start("cardiocaps.predict", *arguments, "--engine", "ray", "--workers", "2")
    table = out / "predictions.csv"
    wait_for(lambda: table.exists() and table.read_text().count("\n") > 4, driver)
    time.sleep(random.uniform(0, 0.3))
    driver.kill()
    driver.communicate()
    before = table.read_text()
    assert predict.main(arguments) == 0
    assert table.read_text().startswith(before[: before.rfind("\n") + 1])
    for name in ("predictions.csv", "frames.csv"):
        assert by_name(rows(out / name)) == by_name(rows(here / name))


def test_an_actor_of_another_version(here: Path, runs: list[Path], videos: Path) -> None:
    import pyarrow

    changed = {"threads": 1, "decode_workers": 1, "progress": False, "device": "cpu"}
    item = {"name": "one", "path": str(videos / "bad.avi"), "root": str(videos), "url": None}
    batch = pyarrow.table({"number": [0], "text": [json.dumps(item)]})

    def said(version: str) -> dict[str, Any]:
        actor = ray_data._Actor(on_ray._Scorer, (runs[:1], changed), version)
        found: dict[str, Any] = json.loads(actor(batch)["text"][0].as_py())
        return found

    assert said(__version__)["result"]["row"]["status"] == "failed"
    found = said("0.0")
    assert found["kind"] == "ConfigError" and found["error"].endswith(
        f" has cardiocaps {__version__}; expected 0.0, which gave it the work"
    )


def _fails() -> ray_data.Work:
    raise MemoryError("\nno room\x1b[31m\nfor more")


def test_an_actor_that_fails_says_why_and_drops_nothing() -> None:
    import pyarrow

    batch = pyarrow.table({"number": [3, 4], "text": ["{}", "{}"]})
    table = ray_data._Actor(_fails, (), __version__)(batch)
    assert table["number"].to_pylist() == [3, 4]
    batches = SimpleNamespace(iter_batches=lambda **_: iter([table]))
    with pytest.raises(CardioCapsError, match=r"^an actor failed: MemoryError: no room\\x1b\[31m$"):
        list(ray_data._results(batches))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_a_signal_ends_the_command_and_its_actors(here: Path, runs: list[Path], videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    subject = Prediction(runs[0], videos, actor=False)
    with adopting() as wait_for_end:
        (process,) = subject.start(out)
        wait_for((out / "predictions.csv").exists, process)
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM
        assert errors == "error: stopped by SIGTERM; nothing is half-written\n"
        wait_for_end()
        assert [status for status, *_ in ended(subject.start(out))] == [0]
        wait_for_end()
    subject.assert_equal(here, out)


def test_mistakes_in_the_command_line(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(runs[0]), str(tmp_path), "--out", str(tmp_path / "out")]
    for wrong, message in {
        ("--engine", "ray", "--report"): "--report: pictures are drawn by the local engine",
        ("--workers", "2"): "--address and --workers: are of --engine ray",
        ("--engine", "ray", "--workers", "0"): "--workers",
    }.items():
        with pytest.raises(SystemExit) as stop:
            predict.main([*arguments, *wrong])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
