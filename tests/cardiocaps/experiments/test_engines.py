"""Engines: the same bits everywhere, what is lost is done again, and what is wrong is said."""

from __future__ import annotations

import os
import random
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from cardiocaps.config import TrainConfig
from cardiocaps.errors import ConfigError, ResourceError
from cardiocaps.experiments import __main__ as program
from cardiocaps.experiments.display import Display
from cardiocaps.experiments.engines import remote
from cardiocaps.experiments.engines.engine import Ended, Progressed, Share
from cardiocaps.experiments.engines.local import LocalEngine
from cardiocaps.experiments.engines.process import _work
from cardiocaps.experiments.engines.remote import RemoteEngine, Task
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.runner import run_jobs
from cardiocaps.phantom import write_phantom
from cardiocaps.runtime import ray_cluster as cluster
from tests.cardiocaps.experiments.short_jobs import short_jobs
from tests.cardiocaps.kills import (
    Experiments,
    adopting,
    assert_equal_job,
    assert_no_leftovers,
    strike,
    striking,
)
from tests.cardiocaps.programs import descendants, ended, wait_for

if TYPE_CHECKING:
    from cardiocaps.experiments.engines.ray import RayEngine

in_proc = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A phantom, and a cache."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, 20, 10, processes=1)
    return [folder, tmp_path_factory.mktemp("cache")]


@pytest.fixture(scope="module")
def here(data: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Job]:
    """The jobs, run by the local engine."""
    jobs = short_jobs(*data, tmp_path_factory.mktemp("experiments") / "here")
    assert run_jobs(jobs, 2, Display(2, bars=False), LocalEngine(2)) == {}
    return jobs


def _assert_equal(jobs: list[Job], out: Path) -> None:
    for job in jobs:
        assert_equal_job(job.folder, out / job.folder.relative_to(job.experiments.path))
    assert_no_leftovers(out)


class Watching(Display):
    """Remembers what happened."""

    def __init__(self) -> None:
        super().__init__(2, bars=False)
        self.was_lost: list[str] = []
        self.ends: list[tuple[str, str | None]] = []

    def lost(self, job: Job) -> None:
        super().lost(job)
        self.was_lost.append(job.name)

    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        super().ended(job, seconds, error)
        self.ends.append((job.name, error))


@in_proc
def test_ray_gives_the_same_bits_and_does_the_job_of_a_killed_worker_again(
    here: list[Job], data: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="needs the extra cluster")
    from cardiocaps.experiments.engines.ray import RayEngine

    jobs = short_jobs(*data, tmp_path / "out")
    display = Watching()
    with RayEngine.connected(None, 2, 1) as engine:
        assert engine.share(jobs[0].config).threads == 1
        with pytest.raises(ConfigError, match=r"threads is 1000; expected at most \d+"):
            engine.share(replace(jobs[0].config, threads=1000))
        with striking(lambda: descendants("ray::cnn-2 seed 10"), random.uniform(0, 0.5)) as killed:
            assert run_jobs(jobs, 2, display, engine) == {}
    assert len(killed) == 1 and display.was_lost == [jobs[0].name]
    assert sorted(display.ends) == [(job.name, None) for job in jobs]
    _assert_equal(here, tmp_path / "out")


@in_proc
def test_a_killed_driver_takes_its_jobs_along_and_another_engine_goes_on(
    here: list[Job], data: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="needs the extra cluster")
    out = tmp_path / "out"
    subject = Experiments(*data, "ray", worker=False)
    with adopting() as wait_for_end:
        processes = subject.start(out)
        wait_for(lambda: bool(list(out.glob("jobs/*/*/run.json"))), processes[0])
        assert strike(lambda: subject.victims(processes), random.uniform(0, 1.5), lambda: True)
        wait_for_end("")
    finished = subject.done(out)
    assert [status for status, *_ in ended(Experiments(*data, "local", worker=False).start(out))] == [0]
    subject.assert_kept(finished, out)
    _assert_equal(here, out)


@in_proc
def test_submitit_gives_the_same_bits_and_does_a_lost_job_again(
    here: list[Job], data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    submitit = pytest.importorskip("submitit", reason="needs the extra cluster")
    from cardiocaps.experiments.engines.submitit import SubmititEngine

    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0.5)
    jobs = short_jobs(*data, tmp_path / "out")[:1]
    display = Watching()
    engine = SubmititEngine(1, {})
    engine.is_slurm = False

    def lose() -> list[int]:
        """Kill the task and what watches over it, as the loss of a node does."""
        wait_for((jobs[0].folder / "run.json").exists, None)
        numbers = descendants(str(tmp_path))
        for number in numbers:
            os.kill(number, signal.SIGKILL)
        return numbers

    with ThreadPoolExecutor(1) as beside:
        loss = beside.submit(lose)
        assert run_jobs(jobs, 1, display, engine) == {}
    assert loss.result() and display.was_lost == [jobs[0].name]
    assert display.ends == [(jobs[0].name, None)]
    _assert_equal(here[:1], tmp_path / "out")


@in_proc
@pytest.mark.parametrize(("engine", "signum"), [("ray", signal.SIGINT), ("submitit", signal.SIGTERM)])
def test_a_signal_ends_the_command_and_its_jobs(
    engine: str, signum: signal.Signals, here: list[Job], data: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip(engine, reason="needs the extra cluster")
    out = tmp_path / "out"
    subject = Experiments(*data, engine, worker=False)
    with adopting() as wait_for_end:
        (process,) = subject.start(out)
        wait_for(lambda: bool(list(out.glob("jobs/*/*/run.json"))), process)
        process.send_signal(signum)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 128 + signum, errors
        assert errors == f"error: stopped by {signum.name}; what was done is saved, and the same command goes on\n"
        wait_for_end()
        assert [status for status, *_ in ended(subject.start(out))] == [0]
        wait_for_end()
    _assert_equal(here, out)


def test_a_mistyped_parameter_of_slurm(here: list[Job]) -> None:
    pytest.importorskip("submitit", reason="needs the extra cluster")
    from cardiocaps.experiments.engines.submitit import SubmititEngine

    engine = SubmititEngine(1, {"slurm_partitoin": "gpu"})
    engine.is_slurm = False
    with pytest.raises(ConfigError, match="partitoin"):
        engine.start(here[0])


class Scripted:
    """An engine whose jobs end as they are told."""

    is_here = True

    def __init__(self, ends: dict[str, list[Ended]]) -> None:
        self.ends, self.running, self.most, self.stopped = ends, list[Job](), 0, False

    def start(self, job: Job) -> None:
        self.running.append(job)
        self.most = max(self.most, len(self.running))

    def events(self, seconds: float) -> Iterator[Progressed | Ended]:
        job = self.running.pop(0)
        yield Progressed(job, 0.5, "half")
        yield self.ends[job.name].pop(0)

    def stop(self) -> None:
        self.stopped = True


def test_a_job_is_lost_four_times_at_most(here: list[Job]) -> None:
    one, two = here
    gone = Ended(one, "node died", lost=True)
    engine = Scripted({one.name: [gone] * 3 + [Ended(one)], two.name: [Ended(two, "bad data")]})
    display = Watching()
    assert run_jobs(here, 2, display, engine) == {two.name: "bad data"}  # type: ignore[arg-type]
    assert display.was_lost == [one.name] * 3 and engine.most == 2 and engine.stopped
    engine = Scripted({one.name: [gone] * 9})
    assert run_jobs([one], 2, Watching(), engine) == {one.name: "node died"}  # type: ignore[arg-type]
    assert len(engine.ends[one.name]) == 5


class Instant(RemoteEngine):
    """Its tasks end at once and say that they finished their jobs."""

    def share(self, config: Any) -> Share:
        return Share(1, 1)

    def _submit(self, job: Job) -> Any:
        return job.name

    def _ended(self, handles: list[Any], seconds: float) -> list[Any]:
        return handles

    def _outcome(self, handle: Any, job: Job) -> Ended:
        return Ended(job)

    def _cancel(self, handles: list[Any]) -> None:
        pass


def test_a_job_that_cannot_open_its_log_says_so(
    data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = short_jobs(*data, tmp_path / "out")
    job.log.mkdir(parents=True)
    monkeypatch.setattr("cardiocaps.experiments.engines.process.die_with_parent", lambda: None)  # it runs here
    sent: list[tuple[float | None, str]] = []
    connection: Any = SimpleNamespace(send=sent.append)
    with pytest.raises(SystemExit) as end:
        _work(job, connection, None, False)
    assert end.value.code == 4
    assert sent == [(None, f"cannot write {job.log}: Is a directory")]


class FakeRay:
    """Stands for the module: nodes with these resources, and tasks that end when their jobs are told to stop."""

    def __init__(self, *nodes: dict[str, float]) -> None:
        self._nodes, self.jobs, self.stopped = nodes, list[Job](), list[str]()

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": node} for node in self._nodes]

    def cluster_resources(self) -> dict[str, float]:
        return {name: sum(node.get(name, 0) for node in self._nodes) for name in ("CPU", "GPU")}

    def remote(self, **_: Any) -> Any:
        return lambda work: SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._take))

    def _take(self, job: Job) -> str:
        self.jobs.append(job)
        return job.name

    def wait(self, handles: list[str], **_: Any) -> tuple[list[str], list[str]]:
        self.stopped += [job.name for job in self.jobs if remote.stop_file(job).exists()]
        return handles, []


def _ray_engine(
    *nodes: dict[str, float], at_once: int | None = None, is_own: bool = False
) -> tuple[FakeRay, RayEngine]:
    pytest.importorskip("ray", reason="needs the extra cluster")
    from cardiocaps.experiments.engines.ray import RayEngine

    ray = FakeRay(*nodes)
    return ray, RayEngine(ray, at_once, is_own=is_own)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("nodes", "at_once", "is_own", "settings", "share"),
    [
        ([(4, 0)], 4, True, {}, (4, 1)),
        ([(4, 0)], None, True, {}, (1, 4)),
        ([(4, 0)], 8, True, {"threads": 2}, (2, 2)),
        ([(4, 0), (16, 0)], 3, False, {}, (3, 4)),
        ([(64, 8)], None, False, {"threads": 4}, (8, 4)),
        ([(64, 8)], 12, False, {"threads": 4}, (8, 4)),
        ([(64, 8)], None, False, {"threads": 4, "device": "cpu"}, (16, 4)),
        ([(4, 8), (64, 0)], None, False, {"threads": 4}, (1, 4)),
        ([(2, 1), (64, 0)], None, False, {}, (1, 2)),
    ],
)
def test_ray_says_how_many_jobs_run_at_a_time(
    nodes: list[tuple[int, int]], at_once: int | None, is_own: bool, settings: dict[str, Any], share: tuple[int, int]
) -> None:
    _, engine = _ray_engine(*({"CPU": cpus, "GPU": gpus} for cpus, gpus in nodes), at_once=at_once, is_own=is_own)
    assert engine.share(TrainConfig(**settings)) == Share(*share)


@pytest.mark.parametrize(
    ("nodes", "settings", "message"),
    [
        (
            [{"CPU": 4.0}, {"CPU": 8.0}],
            {"threads": 9},
            "threads is 9; expected at most 8, the CPUs of Ray's largest node",
        ),
        ([{"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0}], {"threads": 8}, "expected at most 4, .* largest node with a GPU"),
        ([{"CPU": 4.0}], {"device": "cuda"}, "no node of Ray has a GPU"),
    ],
)
def test_a_cluster_without_what_a_job_needs(
    nodes: list[dict[str, float]], settings: dict[str, Any], message: str
) -> None:
    _, engine = _ray_engine(*nodes)
    with pytest.raises(ConfigError, match=message):
        engine.share(TrainConfig(**settings))


def test_jobs_of_ray_that_have_not_begun_are_told_to_stop(data: list[Path], tmp_path: Path) -> None:
    jobs = short_jobs(*data, tmp_path / "out")
    ray, engine = _ray_engine({"CPU": 1})
    for job in jobs:
        engine.start(job)
    engine.stop()
    assert ray.stopped == [job.name for job in jobs]
    assert not any(remote.stop_file(job).exists() for job in jobs)


def test_a_worker_elsewhere_gets_paths_that_need_no_working_folder(
    data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    job, _ = short_jobs(Path("data"), Path("cache"), Path("out"))
    ray, engine = _ray_engine({"CPU": 1})
    engine.start(job)
    (given,) = ray.jobs
    paths = {name: path for name, path in vars(given.config).items() if isinstance(path, Path)}
    assert paths.keys() == {"out", "data", "cache_dir", "phantom_dir"}
    assert all(path.is_absolute() for path in paths.values())


def test_a_result_may_come_to_be_seen_late_but_must_come(
    data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (late, never) = short_jobs(*data, tmp_path / "out")
    engine = Instant()
    engine.start(late)
    assert list(engine.events(0.01)) == []
    late.folder.mkdir(parents=True)
    (late.folder / "result.json").touch()
    (event,) = engine.events(0.01)
    assert isinstance(event, Ended) and event.error is None and event.job.name == late.name
    monkeypatch.setattr(remote, "LAG", 0.05)
    errors = run_jobs([never], 1, Watching(), engine)
    assert "its worker finished it, but its result is not in" in errors[never.name]


def test_a_task_that_does_not_see_the_folder_or_has_another_version(
    data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = short_jobs(*data, tmp_path / "out")
    monkeypatch.setattr(remote, "LAG", 0.6)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    said = Task(job)()
    assert said is not None and f"{tmp_path / 'out'}, which {socket.gethostname()} does not see" in said
    other = Task(job)
    other.version = "0.0"
    said = other()
    assert said is not None and "expected 0.0, which gave it the job" in said


def test_a_machine_that_starts_no_more_processes(
    data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise ResourceError("cannot start a job")

    monkeypatch.setattr(remote, "JobProcess", refused)
    job, _ = short_jobs(*data, tmp_path / "out")
    assert Task(job)() == "cannot start a job"


def test_a_bug_in_a_task_of_ray_is_one_line(data: list[Path], tmp_path: Path) -> None:
    exceptions = pytest.importorskip("ray.exceptions", reason="needs the extra cluster")
    error = exceptions.RayTaskError("work", "\x1b[36mray::work()\x1b[39m\n  File\nKeyError: 'a\x1b'\n", KeyError("a"))

    def get(_: object) -> None:
        raise error

    ray, engine = _ray_engine({"CPU": 1})
    vars(ray).update(get=get, exceptions=exceptions)
    job, _ = short_jobs(*data, tmp_path / "out")
    assert engine._outcome("handle", job) == Ended(job, "KeyError: 'a\\x1b'")


def test_a_task_that_is_told_to_stop_saves(data: list[Path], tmp_path: Path) -> None:
    """Also while the job reports its progress more often than the task looks for the file."""
    job, _ = short_jobs(*data, tmp_path / "out")
    job = replace(job, config=replace(job.config, epochs=1000, patience=1000))
    with ThreadPoolExecutor() as pool:
        said = pool.submit(Task(job))
        wait_for((job.folder / "metrics.csv").exists, None)
        assert not said.done()
        remote.stop_file(job).touch()
        assert said.result(timeout=60) == "stopped"
    assert (job.folder / "last.ckpt").exists() and not (job.folder / "result.json").exists()
    remote.remove_progress(job)
    assert_no_leftovers(tmp_path)


def test_a_job_that_starts_leaves_the_files_of_other_seeds(data: list[Path], tmp_path: Path) -> None:
    job, _ = short_jobs(*data, tmp_path / "out")
    parent = job.folder.parent
    parent.mkdir(parents=True)
    own = {f"{job.folder.name}.{name}" for name in ("progress", "stop", "progress.0123abcd.part", "log")}
    others = {f"{job.folder.name}0.progress.0123abcd.part", "seed1.progress.0123abcd.part"}
    for name in own | others:
        (parent / name).touch()
    Instant().start(job)
    assert {path.name for path in parent.iterdir()} == {f"{job.folder.name}.log", *others}


@pytest.mark.parametrize("address", ["nowhere", "host:port", "http://host:6379", ":6379"])
def test_an_address_that_is_none(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray", reason="needs the extra cluster")
    assert program.main(["table2", "--engine", "ray", "--address", address]) == 2
    assert f"--address is {address}; expected HOST:PORT" in capsys.readouterr().err


def test_an_address_where_no_ray_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Something takes the connection and says nothing."""
    pytest.importorskip("ray", reason="needs the extra cluster")
    monkeypatch.setattr(cluster, "_PATIENCE", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"
        out = tmp_path / "out"
        assert program.main(["table2", "--engine", "ray", "--address", address, "--out", str(out)]) == 2
    assert f"--address is {address}: no Ray cluster answers there within 2 s" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("engine", ["ray", "submitit"])
def test_an_engine_that_is_not_installed(
    engine: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    assert program.main(["table2", "--engine", engine]) == 2
    error = capsys.readouterr().err
    assert f"engine: '{engine}' needs the package {engine}" in error and "pip install 'cardiocaps[cluster]'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "h:1"], "--address is of --engine ray"),
        (["--slurm", "a=1"], "--slurm is of --engine submitit"),
        (["--engine", "submitit", "--slurm", "partition"], "expected KEY=VALUE"),
        (["--engine", "spark"], "spark"),
    ],
)
def test_mistakes_in_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(["table2", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
