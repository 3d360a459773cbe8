"""Jobs as processes of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Connection, wait

import torch

from cardiocaps.config import TrainConfig
from cardiocaps.experiments.engines.engine import Ended, Progressed, Share
from cardiocaps.experiments.engines.process import JobProcess, stop_all
from cardiocaps.experiments.jobs import Job


class LocalEngine:
    """See `Engine`.

    Args:
        at_once: number of jobs that run at the same time, each with its share of the CPU.
    """

    is_here = True

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = at_once
        self._running: dict[Connection, JobProcess] = {}

    def share(self, config: TrainConfig) -> Share:
        return Share(self.at_once, config.threads or max(1, torch.get_num_threads() // self.at_once))

    def start(self, job: Job) -> None:
        process = JobProcess(job)
        self._running[process.connection] = process

    def events(self, seconds: float) -> Iterator[Progressed | Ended]:
        for connection in wait(list(self._running), timeout=seconds):
            assert isinstance(connection, Connection)
            one = self._running[connection]
            progress = one.receive()
            if progress is None:
                del self._running[connection]
                yield Ended(one.job, one.error())
            else:
                yield Progressed(one.job, *progress)

    def stop(self) -> None:
        stop_all(list(self._running.values()))
        self._running.clear()
