"""A job in a process of its own, so that a failure stops only this job."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import Connection

from cardiocaps.errors import CardioCapsError
from cardiocaps.experiments.jobs import Job, run
from cardiocaps.experiments.results import is_finished
from cardiocaps.runtime.files import lock_folder, output_errors
from cardiocaps.runtime.processes import die_with_parent, killed_by, start_errors
from cardiocaps.runtime.program import Interrupted, Interruption

PRELOAD = [
    "cardiocaps.experiments.jobs",
    "cardiocaps.experiments.robustness.scoring",
    "sklearn.ensemble",
    "sklearn.linear_model",
    "monai.networks.nets",
]
"""Heavy modules that the fork server imports once, if they are installed; then it forks a process for each job quickly.
There is one fork server, and who starts it first decides: so this list is also that of the processes that score. The
modules must start no threads, which do not survive a fork."""

_PATIENCE = 60.0  # seconds that a stopped job gets to save


class JobProcess:
    """A running job.

    Args:
        gpus: the value of CUDA_VISIBLE_DEVICES for the job; None: this process's own.
        wait: for an earlier attempt at the same job that may still run.

    Attributes:
        connection: readable when `receive` has something to return.

    Raises:
        ResourceError: the system starts no more processes.
    """

    def __init__(self, job: Job, *, gpus: str | None = None, wait: bool = False) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.job, self._error = job, None
        with start_errors("a job"):
            self.connection, theirs = context.Pipe(duplex=False)
            self._process = context.Process(target=_work, args=(job, theirs, gpus, wait))
            self._process.start()
            theirs.close()

    def receive(self) -> tuple[float, str] | None:
        """The progress that the job reports next; None when it has ended. Waits for it."""
        while True:
            try:
                done, text = self.connection.recv()
            except EOFError:
                self._process.join()
                self.connection.close()
                return None
            if done is not None:
                return done, text
            self._error = text

    def error(self) -> str | None:
        """Of a job that has ended: why it is not finished; None if it is."""
        code = self._process.exitcode
        if code == 0 and is_finished(self.job.folder):
            return None
        if self._error is not None:
            return self._error
        if code is not None and code < 0:
            return f"killed by {killed_by(-code)}"
        return f"ended with status {code}; see {self.job.log}"

    def terminate(self) -> None:
        """Tell the job to save and end."""
        self._process.terminate()

    def join(self, until: float | None = None) -> None:
        """Wait for the end of the job until `time.monotonic()` is `until`, and then kill it."""
        until = time.monotonic() + _PATIENCE if until is None else until
        self._process.join(max(0.0, until - time.monotonic()))
        self._process.kill()


def stop_all(processes: list[JobProcess]) -> None:
    """Stop jobs, which save their progress first."""
    for one in processes:
        one.terminate()
    until = time.monotonic() + _PATIENCE
    for one in processes:
        one.join(until)


def _work(job: Job, connection: Connection, gpus: str | None, wait: bool) -> None:
    """The body of a job's process."""
    die_with_parent()
    if gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus
    last = 0.0

    def watch(done: float, doing: str) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (0.0, 1.0) or now - last > 0.25:
            last = now
            connection.send((done, doing))

    try:
        with output_errors(job.log):
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with job.log.open("a", encoding="utf-8") as log:
                for stream in (1, 2):
                    os.dup2(log.fileno(), stream)
        with Interruption().watched() as interruption:
            if wait and job.folder.is_dir():
                with lock_folder(job.folder, wait=True):
                    pass
            run(job, watch, interruption)
    except (CardioCapsError, Interrupted) as error:
        connection.send((None, str(error)))
        sys.exit(error.exit_code)
    except BaseException as error:
        traceback.print_exc()
        connection.send((None, f"{type(error).__name__}: {error}".splitlines()[0]))
        sys.exit(1)
