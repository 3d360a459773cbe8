"""Runs many jobs, some at a time, on an engine; a job whose worker was lost is given to another."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence

from cardiocaps.experiments.display import Display
from cardiocaps.experiments.engines.engine import Engine, Progressed
from cardiocaps.experiments.jobs import Job
from cardiocaps.runtime.program import print_line

_ATTEMPTS = 4
"""How often a job is begun before its workers' losses count as its own failure: it may be what brings them down."""


def run_jobs(jobs: Sequence[Job], at_once: int, display: Display, engine: Engine) -> Mapping[str, str]:
    """Run the jobs, `at_once` of them at a time.

    An exception in this process, for example from a signal, stops the jobs; they save their progress first.

    Returns:
        The name of each failed job -> its error.
    """
    waiting, errors, attempts = deque(jobs), {}, Counter[str]()
    since: dict[str, float] = {}  # of the running jobs
    try:
        while waiting or since:
            while waiting and len(since) < at_once:
                job = waiting.popleft()
                engine.start(job)
                attempts[job.name] += 1
                since[job.name] = time.monotonic()
                display.started(job)
            for event in engine.events(1.0):
                if isinstance(event, Progressed):
                    display.progress(event.job, event.done, event.doing)
                    continue
                job, seconds = event.job, time.monotonic() - since.pop(event.job.name)
                if event.lost and attempts[job.name] < _ATTEMPTS:
                    display.lost(job)
                    print_line(f"{job.name}  its worker was lost ({event.error}); another goes on with it")
                    waiting.appendleft(job)
                    continue
                if event.error is not None:
                    errors[job.name] = event.error
                display.ended(job, seconds, event.error)
    finally:
        engine.stop()
    return errors
