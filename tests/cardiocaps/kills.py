"""Kills parts of a command at random moments; then nothing is lost, nothing is there twice, and nothing is left over.

`python -m tests.cardiocaps.kills rank --times 20` (or worker, driver, submitit, actor, predict) runs a command without
a disturbance, and then again and again, and kills (kill -9) until as many kills have hit. The moments are spread over
the whole run; every fourth waits for a file that is being written. After one to three kills the command goes on to its
end, and what it leaves is compared with what the undisturbed one has left. Tests of the suite use the same functions.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cardiocaps import train
from cardiocaps.phantom import write_phantom
from tests.cardiocaps.experiments import short_jobs
from tests.cardiocaps.programs import (
    descendants,
    ended,
    processes_below,
    start,
    start_program,
    start_ranks,
    wait_for,
)

Processes = list[subprocess.Popen[str]]

WITHOUT_FIGURES = """
import sys
import tests.cardiocaps.empty_figures
from cardiocaps import train
{}
sys.exit(train.main(sys.argv[1:]))
"""
"""A training that draws nothing, with statements of a test."""

PREDICTION = """
import sys
from cardiocaps import predict
from cardiocaps.prediction import on_ray
on_ray._AT_A_TIME = 4
sys.exit(predict.main(sys.argv[1:]))
"""
"""A prediction that divides even few videos."""

ACTOR = "ray::MapWorker(MapBatches(_Actor))"
"""How the command line of an actor begins."""

_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes of Ray's own that notice the end of a killed driver only after a minute. They hold no job and no file."""

_LEFT_WITHIN = 120.0  # seconds within which all processes of a command that was killed, or has ended, are gone


def strike(find: Callable[[], list[int]], seconds: float, go_on: Callable[[], bool]) -> int | None:
    """Wait until `find` finds a process, then for some time, and kill one of those that it finds then.

    Returns:
        The process; None if `go_on` became false before one was hit.
    """
    while not find():
        if not go_on():
            return None
        time.sleep(0.02)
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not go_on():
            return None
        time.sleep(min(0.02, max(0.0, until - time.monotonic())))
    while go_on():
        found = find()
        for number in random.sample(found, len(found)):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:  # it has just ended
                continue
            return number
        time.sleep(0.02)
    return None


@contextmanager
def striking(find: Callable[[], list[int]], seconds: float) -> Iterator[list[int]]:
    """Beside the block, `strike` once. The list that is yielded holds the process that was killed, if one was."""
    killed: list[int] = []
    over = threading.Event()

    def work() -> None:
        number = strike(find, seconds, lambda: not over.is_set())
        killed.extend([] if number is None else [number])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, strict=True))


def by_name(found: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of a prediction, or of its frames, in an order that no engine changes."""
    return sorted(found, key=lambda row: (row["input"], row.get("frame", "")))


def assert_no_leftovers(out: Path) -> None:
    """No unfinished file, and no progress of a job that has ended."""
    assert not [path for path in out.rglob("*") if path.suffix in (".part", ".progress", ".stop")]


def assert_equal_job(one: Path, other: Path) -> None:
    """Both are folders of the same finished job, with the same bits and the same files."""
    for name in ("predictions.csv", "validation.csv", "decision.json"):
        if (one / name).exists():
            assert (other / name).read_bytes() == (one / name).read_bytes(), (other, name)
    assert {path.name for path in other.iterdir()} == {path.name for path in one.iterdir()}
    if (one / "metrics.csv").exists():
        of_one, of_other = ([{**row, "seconds": ""} for row in rows(x / "metrics.csv")] for x in (one, other))
        assert of_one == of_other


class Subject(ABC):
    """A command with what is killed of it.

    Attributes:
        survives: whether the command goes on by itself when its victim is killed.
        leaves: whether processes go on for a while when the command is killed.
    """

    survives = False
    leaves = False

    @abstractmethod
    def start(self, out: Path) -> Processes:
        """Start the command, which goes on with what is in `out`."""

    def victims(self, processes: Processes) -> list[int]:
        """The processes that can be killed now."""
        return [process.pid for process in processes if process.poll() is None]

    @abstractmethod
    def phase(self, out: Path) -> str:
        """What the command is doing, as its folder shows it."""

    def done(self, out: Path) -> Any:
        """What must not be done again; None: nothing is remembered."""
        return None

    def assert_kept(self, done: Any, out: Path) -> None:
        """What was done before a kill is still that."""
        assert done is None

    @abstractmethod
    def assert_equal(self, undisturbed: Path, out: Path) -> None:
        """The folder holds what that of an undisturbed run holds."""


class Training(Subject):
    """A training on two ranks, one of which is killed."""

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    def start(self, out: Path) -> Processes:
        begun = (out / "config.yaml").exists()
        where = ["--resume", str(out)] if begun else [*self.arguments, "--overwrite", "--out", str(out)]
        return start_ranks(2, WITHOUT_FIGURES.format(""), *where)

    def phase(self, out: Path) -> str:
        epochs = len(rows(out / "metrics.csv")) if (out / "metrics.csv").exists() else 0
        if not (out / "config.yaml").exists():
            return "starting"
        if epochs < 2:
            return f"epoch {epochs + 1}"
        return "ending" if (out / "metrics.json").exists() else "evaluating"

    def assert_equal(self, undisturbed: Path, out: Path) -> None:
        import torch

        assert_equal_job(undisturbed, out)
        assert [row["epoch"] for row in rows(out / "metrics.csv")] == ["1", "2"]
        for name in ("last.ckpt", "best.ckpt"):
            one, other = (torch.load(x / name, weights_only=True)["state_dict"] for x in (undisturbed, out))
            assert one.keys() == other.keys() and all(torch.equal(x, other[key]) for key, x in one.items())


class Experiments(Subject):
    """Experiments on Ray or of submitit, whose driver or one of whose workers is killed."""

    def __init__(self, data: Path, cache: Path, engine: str, worker: bool) -> None:
        self.data, self.cache, self.engine, self.survives = data, cache, engine, worker
        self.leaves = engine == "submitit"

    def start(self, out: Path) -> Processes:
        command = short_jobs.command(self.data, self.cache, out)
        return [start("tests.cardiocaps.experiments.short_jobs", *command, "--engine", self.engine)]

    def victims(self, processes: Processes) -> list[int]:
        if not self.survives:
            return super().victims(processes)
        return [number for key in short_jobs.KEYS for number in descendants(f"ray::{key} seed")]

    def phase(self, out: Path) -> str:
        begun, finished = (len(list(out.glob(f"jobs/*/*/{name}"))) for name in ("run.json", "result.json"))
        if finished == len(short_jobs.KEYS):
            return "ending"
        return f"{finished} of {len(short_jobs.KEYS)} jobs finished" if begun else "starting"

    def done(self, out: Path) -> Any:
        return {path: path.stat().st_mtime_ns for path in out.glob("jobs/*/*/result.json")}

    def assert_kept(self, done: Any, out: Path) -> None:
        assert all(path.stat().st_mtime_ns == before for path, before in done.items())

    def assert_equal(self, undisturbed: Path, out: Path) -> None:
        for one in undisturbed.glob("jobs/*/*/"):
            assert_equal_job(one, out / one.relative_to(undisturbed))
        one, other = (rows(x / "tables" / "table5.csv") for x in (undisturbed, out))
        for row in (*one, *other):
            for name in [name for name in row if "second" in name or "memory" in name]:
                del row[name]
        assert one == other
        names = [{path.name for path in (x / "tables").iterdir()} for x in (undisturbed, out)]
        assert names[0] == names[1]


class Prediction(Subject):
    """A prediction on Ray, whose driver or one of whose actors is killed."""

    def __init__(self, run: Path, videos: Path, actor: bool) -> None:
        self.run, self.videos, self.survives = run, videos, actor

    def start(self, out: Path) -> Processes:
        options = ["--by-frame", "--no-progress", "--threads", "1", "--engine", "ray", "--workers", "2"]
        return [start_program(PREDICTION, str(self.run), str(self.videos), "--out", str(out), *options)]

    def victims(self, processes: Processes) -> list[int]:
        return descendants(ACTOR) if self.survives else super().victims(processes)

    def _table(self, out: Path) -> str:
        table = out / "predictions.csv"
        return table.read_text(encoding="utf-8") if table.exists() else ""

    def phase(self, out: Path) -> str:
        written = self._table(out).count("\n") - 1
        if written < 1:
            return "starting" if written < 0 else "no rows"
        return "ending" if written == sum(1 for _ in self.videos.glob("**/*.avi")) else "some rows"

    def done(self, out: Path) -> Any:
        text = self._table(out)
        return text[: text.rfind("\n") + 1]

    def assert_kept(self, done: Any, out: Path) -> None:
        assert self._table(out).startswith(done)

    def assert_equal(self, undisturbed: Path, out: Path) -> None:
        assert {path.name for path in out.iterdir()} == {path.name for path in undisturbed.iterdir()}
        for name in ("predictions.csv", "frames.csv"):
            assert by_name(rows(out / name)) == by_name(rows(undisturbed / name))


@contextmanager
def adopting() -> Iterator[Callable[..., None]]:
    """Yield a function that waits until no process is left that was started in the block and whose command line holds
    a text; also none of Ray's agents, with `agents`.

    Processes that have lost their parent become children of this one, so that none is overlooked.
    """
    ended([start_program("")])  # starts a server, which stays
    before, become_subreaper = set(processes_below()), 36  # PR_SET_CHILD_SUBREAPER of prctl(2)
    ctypes.CDLL(None).prctl(become_subreaper, 1, 0, 0, 0)

    def wait(text: str = "", agents: bool = False) -> None:
        until = time.monotonic() + _LEFT_WITHIN
        spared = () if agents else _AGENTS
        while left := [
            (number, line.strip())
            for number, line in processes_below().items()
            if number not in before and text in line and not line.startswith(spared)
        ]:
            assert time.monotonic() < until, left
            with suppress(ChildProcessError):  # as init does: Ray's processes ask whether others are there
                os.waitpid(-1, os.WNOHANG)
            time.sleep(0.05)

    try:
        yield wait
    finally:
        ctypes.CDLL(None).prctl(become_subreaper, 0, 0, 0, 0)


@dataclass(frozen=True)
class Moment:
    """When to kill: at a share of a run's time, from when it has a victim on; `writing`: then when it writes a file."""

    share: float
    writing: bool = False


def disturb(
    subject: Subject,
    out: Path,
    moments: list[Moment],
    kills: int,
    seconds: float,
    wait_for_end: Callable[..., None],
) -> tuple[list[str], float]:
    """Start the command, kill at up to `kills` moments, which are taken from the list, and let it go on to its end.

    A moment that came too late is put back, for an earlier time.

    Args:
        seconds: that the whole command takes.
        wait_for_end: of `adopting`.

    Returns:
        The phases in which kills have hit; and the seconds, as they were if nothing has hit.
    """
    hits: list[str] = []
    kept: list[Any] = []
    processes = subject.start(out)
    while moments and len(hits) < kills:
        moment = moments.pop()

        def goes_on(running: Processes = processes) -> bool:
            return all(process.poll() is None for process in running)

        begun = time.monotonic()
        late = begun + moment.share * seconds if moment.writing else math.inf

        def find(late: float = late, running: Processes = processes) -> list[int]:
            waits = time.monotonic() >= late and not list(out.rglob("*.part"))
            return [] if waits else subject.victims(running)

        if strike(find, moment.share * seconds, goes_on) is None:
            # A victim that the command survives is there for a part of its time.
            moments.append(Moment(moment.share * (0.5 if subject.survives else 0.9)))
            seconds = seconds if hits or subject.survives else time.monotonic() - begun
            break
        hits.append(subject.phase(out) + (", a file being written" if list(out.rglob("*.part")) else ""))
        kept.append(subject.done(out))
        if not subject.survives:
            ended(processes) if len(processes) > 1 else processes[0].wait()
            wait_for_end("forked_python" if subject.leaves else "")
            processes = subject.start(out)
    said = ended(processes, 300.0)
    assert all(status == 0 and "Traceback" not in errors for status, _, errors in said), said
    wait_for_end("")
    for done in kept:
        subject.assert_kept(done, out)
    assert_no_leftovers(out)
    return hits, seconds


def main() -> None:
    """Kill as often as the command line says, and print how it went."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cardiocaps.kills", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("victim", choices=("rank", "worker", "driver", "submitit", "actor", "predict"))
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    given = parser.parse_args()
    print(f"{given.victim}: seed {given.seed}", flush=True)
    random.seed(given.seed)
    with tempfile.TemporaryDirectory() as name, adopting() as wait_for_end:
        folder = Path(name)
        subject = _subject(given.victim, folder)
        _undisturbed(subject, folder / "first")  # decodes the videos
        seconds = _undisturbed(subject, folder / "undisturbed")
        print(f"undisturbed: {seconds:.1f} s", flush=True)
        moments = [Moment((i + random.random()) / given.times, writing=i % 4 == 3) for i in range(given.times)]
        random.shuffle(moments)
        phases = Counter[str]()
        begun, runs = time.monotonic(), 0
        while moments:
            runs += 1
            since = time.monotonic()
            kills = random.randint(1, 3)
            hits, seconds = disturb(subject, folder / f"run{runs}", moments, kills, seconds, wait_for_end)
            subject.assert_equal(folder / "undisturbed", folder / f"run{runs}")
            phases.update(hits)
            print(f"run {runs}: {time.monotonic() - since:5.1f} s  {'; '.join(hits) or 'no hit'}", flush=True)
    print(
        f"{sum(phases.values())} kills in {runs} runs, {time.monotonic() - begun:.0f} s: all equal to the undisturbed"
    )
    for phase, number in phases.most_common():
        print(f"{number:3d}  {phase}")


def _subject(victim: str, folder: Path) -> Subject:
    """The command of a victim, with data in the folder."""
    data, cache = folder / "data", folder / "cache"
    if victim in ("worker", "driver", "submitit"):
        write_phantom(data, 20, 10, processes=1)
        return Experiments(data, cache, "submitit" if victim == "submitit" else "ray", worker=victim == "worker")
    write_phantom(data, 40, 3, processes=1)
    quick = ["--frames-per-clip", "2", "--batch-size", "11", "--bootstrap", "0", "--threads", "1", "--no-progress"]
    arguments = ["--data", str(data), "--cache-dir", str(cache), *quick]
    if victim == "rank":
        return Training([*arguments, "--epochs", "2"])
    assert train.main([*arguments, "--epochs", "1", "--out", str(folder / "run")]) == 0
    return Prediction(folder / "run", data, actor=victim == "actor")


def _undisturbed(subject: Subject, out: Path) -> float:
    """Run the command once; returns for how many seconds there is something to kill."""
    processes = subject.start(out)
    wait_for(lambda: bool(subject.victims(processes)), processes[0])
    begun = last = time.monotonic()
    while any(process.poll() is None for process in processes):
        last = time.monotonic() if subject.victims(processes) else last
        time.sleep(0.05)
    said = ended(processes)
    assert all(status == 0 for status, *_ in said), said
    return last - begun


if __name__ == "__main__":
    sys.exit(main())
