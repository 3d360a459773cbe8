"""What the runner asks of an engine, and what an engine tells the runner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from cardiocaps.config import TrainConfig
from cardiocaps.experiments.jobs import Job


@dataclass(frozen=True)
class Progressed:
    """A job has done the share `done`, 0 to 1, of its work; `doing` is the step it is at."""

    job: Job
    done: float
    doing: str


@dataclass(frozen=True)
class Ended:
    """A job has ended: finished, or by an error.

    Attributes:
        error: why it is not finished.
        lost: the fault is not the job's: its node or its worker is gone, so another may go on with it.
    """

    job: Job
    error: str | None = None
    lost: bool = False


@dataclass(frozen=True)
class Share:
    """How many jobs run at a time, and the threads of each."""

    at_once: int
    threads: int


class Engine(Protocol):
    """Starts jobs and reports on them. Use it from one thread."""

    is_here: bool
    """Whether jobs run on this machine, with its GPU and its view of the files."""

    def share(self, config: TrainConfig) -> Share:
        """Raises ConfigError if no machine has enough for a job."""

    def start(self, job: Job) -> None:
        """Start a job, or go on with it."""

    def events(self, seconds: float) -> Iterator[Progressed | Ended]:
        """What has happened since the last call; waits for at most `seconds`, if nothing has."""

    def stop(self) -> None:
        """Stop the jobs that have not ended. They save their progress first, where the engine gives them the time."""
