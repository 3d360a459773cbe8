"""What engines on other machines share: a task there that watches over a job's process, and what is seen of it here.

The folders of the jobs lie on a file system that all machines share. A task writes the progress of its job beside the
job's folder, and a file system may show that, and the job's result, some time after it was written.
"""

from __future__ import annotations

import json
import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cardiocaps import __version__
from cardiocaps.config import TrainConfig
from cardiocaps.errors import CardioCapsError, ConfigError, OutputError, printable
from cardiocaps.experiments.engines.engine import Ended, Progressed, Share
from cardiocaps.experiments.engines.process import JobProcess, stop_all
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.results import is_finished
from cardiocaps.runtime.files import LAG, appears, output_errors, write_bytes
from cardiocaps.runtime.packages import check_version

THREADS = 4
"""Threads of a job for which no number is set, where a machine has as many cores."""


_LOOK = 0.5
"""Seconds between two looks for the file that stops a job."""


def gpus(job: Job, there_are_some: bool) -> int:
    """The GPUs that a job needs. Classifiers of pixels run on the CPU; they take none unless --device asks for one."""
    device = job.config.device
    uses_one = device == "cuda" or (device == "auto" and there_are_some and "classifier" not in job.system.settings)
    return int(uses_one)


class _Stopped(Exception):
    """The command that gave the job wants it to end."""


class Task:
    """What runs on the other machine: `Task(job)()` runs the job in a process of its own.

    A task can be pickled. Its process ends with it.

    Args:
        gpus: the value of CUDA_VISIBLE_DEVICES for the job; None: that of the task.
    """

    def __init__(self, job: Job, gpus: str | None = None) -> None:
        self.job, self.gpus, self.version = job, gpus, __version__
        self._process: JobProcess | None = None
        self._looked = 0.0  # for the file that stops the job

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": None}

    def __call__(self) -> str | None:
        """Returns why the job is not finished; None if it is."""
        try:
            self._check()
            self._process = JobProcess(self.job, gpus=self.gpus, wait=True)
        except CardioCapsError as error:
            return str(error)
        try:
            last = 0.0
            while (progress := self._next()) is not None:
                if time.monotonic() - last > 1.0:
                    last = time.monotonic()
                    with suppress(OutputError):  # the progress is only shown
                        write_bytes(_progress_file(self.job), json.dumps(progress).encode(), sync=False)
            return self._process.error()
        except _Stopped:
            return "stopped"
        finally:
            self.stop()
            _progress_file(self.job).unlink(missing_ok=True)

    def stop(self) -> None:
        """Stop the job, which saves its progress first."""
        if self._process is not None:
            stop_all([self._process])

    def _next(self) -> tuple[float, str] | None:
        """The next progress of the job; None when it has ended. Raises _Stopped if the command is over."""
        assert self._process is not None
        while True:
            ready = self._process.connection.poll(_LOOK)
            if time.monotonic() - self._looked > _LOOK:
                self._looked = time.monotonic()
                if stop_file(self.job).exists():
                    raise _Stopped
            if ready:
                return self._process.receive()

    def _check(self) -> None:
        """Raise ConfigError unless this machine has the program's version and sees its files."""
        check_version(self.version, "job")
        experiments = self.job.experiments
        marker = experiments.marker
        if not appears(marker.parent, marker.is_file, LAG):
            raise ConfigError(
                f"--out is {printable(experiments.path)}, which {socket.gethostname()} does not see; expected a folder "
                "that all machines share, under the same path"
            )


@dataclass
class _Running:
    job: Job
    progress: bytes = b""
    done: float | None = None  # when its task was


class RemoteEngine(ABC):
    """See `Engine`. A subclass submits tasks, and says which have ended."""

    is_here = False

    def __init__(self) -> None:
        self._running: dict[Any, _Running] = {}

    @abstractmethod
    def share(self, config: TrainConfig) -> Share:
        """See `Engine`."""

    @abstractmethod
    def _submit(self, job: Job) -> Any:
        """Give the job to a machine; returns a handle, which can be a key."""

    @abstractmethod
    def _ended(self, handles: list[Any], seconds: float) -> list[Any]:
        """The tasks that have ended; waits for at most `seconds` if none has."""

    @abstractmethod
    def _outcome(self, handle: Any, job: Job) -> Ended:
        """How the task of this job ended."""

    @abstractmethod
    def _cancel(self, handles: list[Any]) -> None:
        """Stop tasks, and wait until they have ended or their time is over."""

    def start(self, job: Job) -> None:
        job = replace(job, config=_absolute(job.config))
        with output_errors(job.folder):
            job.folder.parent.mkdir(parents=True, exist_ok=True)  # for the file that stops a job that has not begun
        remove_progress(job)
        self._running[self._submit(job)] = _Running(job)

    def events(self, seconds: float) -> Iterator[Progressed | Ended]:
        tasks = [handle for handle, one in self._running.items() if one.done is None]
        if not tasks:
            time.sleep(seconds)
        for handle in self._ended(tasks, seconds) if tasks else ():
            event = self._outcome(handle, self._running[handle].job)
            if event.error is not None:
                del self._running[handle]
                yield event
            else:
                self._running[handle].done = time.monotonic()
        for handle, one in list(self._running.items()):
            if one.done is None:
                yield from self._progress(one)
            elif _is_seen(one.job):
                del self._running[handle]
                yield Ended(one.job)
            elif time.monotonic() - one.done > LAG:
                del self._running[handle]
                yield Ended(
                    one.job,
                    f"its worker finished it, but its result is not in {printable(one.job.folder)} after "
                    f"{LAG:.0f} s; expected a folder that all machines share",
                )

    def stop(self) -> None:
        if self._running:
            self._cancel([handle for handle, one in self._running.items() if one.done is None])
        self._running.clear()

    def _progress(self, one: _Running) -> Iterator[Progressed]:
        try:
            content = _progress_file(one.job).read_bytes()
        except OSError:
            return
        if content != one.progress:
            one.progress = content
            done, doing = json.loads(content)
            yield Progressed(one.job, done, doing)


def remove_progress(job: Job) -> None:
    """Remove what a killed task has left beside the folder of its job. (A task that runs writes its progress anew.)"""
    # Not the temporary files of other seeds, whose tasks may be writing there.
    leftovers = job.folder.parent.glob(f"{job.folder.name}.*.part")
    for file in (_progress_file(job), stop_file(job), *leftovers):
        file.unlink(missing_ok=True)


def last_line(error: BaseException) -> str:
    """What an error of a library says in the end: before it come colours, places and tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[-1]) if lines else type(error).__name__


def stop_file(job: Job) -> Path:
    """A file that tells the task of a job to stop it."""
    return job.folder.with_name(f"{job.folder.name}.stop")


def _progress_file(job: Job) -> Path:
    return job.folder.with_name(f"{job.folder.name}.progress")


def _is_seen(job: Job) -> bool:
    """Whether the result of a job can be seen here. Listing the folder makes a network's file system ask anew."""
    with suppress(OSError):
        list(job.folder.iterdir())
    return is_finished(job.folder)


def _absolute(config: TrainConfig) -> TrainConfig:
    """The settings with paths that do not depend on the working folder."""
    out, data, cache = (path and path.absolute() for path in (config.out, config.data, config.cache_dir))
    return replace(config, out=out, data=data, cache_dir=cache, phantom_dir=config.phantom_dir.absolute())
