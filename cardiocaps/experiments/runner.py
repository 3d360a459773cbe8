"""Runs many jobs, some at a time, each in a process of its own, so that a failure stops only its own job."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from cardiocaps.errors import CardioCapsError
from cardiocaps.experiments.display import Display
from cardiocaps.experiments.jobs import Job, run
from cardiocaps.experiments.results import is_finished
from cardiocaps.runtime.processes import die_with_parent, start_errors
from cardiocaps.runtime.program import Interrupted, Interruption

_PRELOAD = ["cardiocaps.experiments.jobs", "sklearn.ensemble", "sklearn.linear_model", "monai.networks.nets"]
"""Heavy modules that the fork server imports once, if they are installed; then it forks a process for each job quickly.
They must start no threads, which do not survive a fork."""

_PATIENCE = 60.0  # seconds that a stopped job gets to save


@dataclass
class _Running:
    job: Job
    process: BaseProcess
    since: float = field(default_factory=time.monotonic)
    error: str | None = None


def run_jobs(jobs: Sequence[Job], at_once: int, display: Display) -> Mapping[str, str]:
    """Run the jobs, `at_once` of them at a time.

    An exception in this process, for example from a signal, stops the jobs; they save their progress first.

    Returns:
        The name of each failed job -> its error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    waiting, errors = deque(jobs), {}
    running: dict[Connection, _Running] = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.popleft()
                with start_errors("a job"):
                    mine, theirs = context.Pipe(duplex=False)
                    process = context.Process(target=_work, args=(job, theirs))
                    process.start()
                    theirs.close()
                    running[mine] = _Running(job, process)
                display.started(job)
            for connection in wait(list(running), timeout=1.0):
                assert isinstance(connection, Connection)
                one = running[connection]
                try:
                    done, text = connection.recv()
                except EOFError:
                    one.process.join()
                    del running[connection]
                    connection.close()
                    error = _why_it_ended(one)
                    if error is not None:
                        errors[one.job.name] = error
                    display.ended(one.job, time.monotonic() - one.since, error)
                    continue
                if done is None:
                    one.error = text
                else:
                    display.progress(one.job, done, text)
    finally:
        for one in running.values():
            one.process.terminate()
        until = time.monotonic() + _PATIENCE
        for one in running.values():
            one.process.join(max(0.0, until - time.monotonic()))
            one.process.kill()
    return errors


def _why_it_ended(one: _Running) -> str | None:
    """Why a job ended without being finished; None if it is finished."""
    code = one.process.exitcode
    if code == 0 and is_finished(one.job.folder):
        return None
    if one.error is not None:
        return one.error
    if code is not None and code < 0:
        hint = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"
    return f"ended with status {code}; see {one.job.log}"


def _work(job: Job, connection: Connection) -> None:
    """The body of a job's process."""
    die_with_parent()
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    last = 0.0

    def watch(done: float, doing: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (0.0, 1.0) or now - last > 0.25:
            last = now
            connection.send((done, doing))

    try:
        with Interruption().watched() as interruption:
            run(job, watch, interruption)
    except (CardioCapsError, Interrupted) as error:
        connection.send((None, str(error)))
        sys.exit(error.exit_code)
    except BaseException as error:
        traceback.print_exc()
        connection.send((None, f"{type(error).__name__}: {error}".splitlines()[0]))
        sys.exit(1)
