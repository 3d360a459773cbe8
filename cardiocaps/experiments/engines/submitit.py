"""Jobs under SLURM, submitted by submitit; without SLURM, as processes that submitit starts on this machine."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from cardiocaps.config import TrainConfig
from cardiocaps.errors import ConfigError, OutputError, ResourceError, printable
from cardiocaps.experiments.engines.engine import Ended, Share
from cardiocaps.experiments.engines.remote import THREADS, RemoteEngine, Task, gpus, last_line
from cardiocaps.experiments.jobs import Job
from cardiocaps.runtime.files import output_errors
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.processes import cores

_AT_ONCE = 100  # jobs in the queue, unless another number is given
_MINUTES = 24 * 60
_PATIENCE = 70.0  # seconds that stopped tasks get


class SubmititEngine(RemoteEngine):
    """See `Engine`. Each job is a SLURM job with its threads as CPUs, and a GPU if it uses one.

    SLURM is used where `srun` is found. A job that SLURM preempts or whose time is over saves, and is queued again.

    Args:
        at_once: number of jobs that are queued or run at the same time; None: 100, and on this machine one.
        parameters: of submitit, for example {"slurm_partition": "gpu"}. `timeout_min` is a day by default.

    Raises:
        ConfigError: submitit is not installed.
    """

    def __init__(self, at_once: int | None, parameters: Mapping[str, str | int]) -> None:
        super().__init__()
        self._submitit = require_package("submitit", "submitit", "engine: 'submitit'", extra="cluster")
        logging.getLogger("submitit").setLevel(logging.ERROR)
        self._parameters: dict[str, Any] = {"timeout_min": _MINUTES, **parameters}
        self.is_slurm = shutil.which("srun") is not None
        self._at_once = at_once or (_AT_ONCE if self.is_slurm else 1)

    def share(self, config: TrainConfig) -> Share:
        threads = config.threads or (THREADS if self.is_slurm else max(1, cores() // self._at_once))
        return Share(self._at_once, threads)

    def _submit(self, job: Job) -> Any:
        folder = job.experiments.path / "submitit"
        parameters = {
            "name": "cardiocaps",
            "cpus_per_task": job.config.threads,
            # Only an answer of the user says that SLURM's nodes have GPUs.
            "gpus_per_node": gpus(job, there_are_some=bool(self._parameters.get("gpus_per_node"))),
        }
        with output_errors(folder):
            executor = self._submitit.AutoExecutor(folder, cluster="slurm" if self.is_slurm else "local")
        try:
            executor.update_parameters(**{**self._parameters, **parameters})
        except (NameError, TypeError, ValueError) as error:
            raise ConfigError(f"--slurm: {str(error).partition(chr(10))[0]}") from error
        try:
            with nullcontext() if self.is_slurm else _silent():
                return executor.submit(_Restartable(job))
        except OSError as error:
            raise OutputError(f"cannot submit {job.name}: {error.strerror or error}") from error
        except self._submitit.core.utils.FailedSubmissionError as error:
            raise ResourceError(f"SLURM refused a job: {last_line(error)}") from error

    def _ended(self, handles: list[Any], seconds: float) -> list[Any]:
        until = time.monotonic() + seconds
        while not (ended := [handle for handle in handles if handle.done()]) and time.monotonic() < until:
            time.sleep(0.1)
        return ended

    def _outcome(self, handle: Any, job: Job) -> Ended:
        try:
            return Ended(job, handle.result())
        except self._submitit.core.utils.FailedJobError:
            return Ended(job, f"its task failed; see {printable(handle.paths.stderr)}")
        except self._submitit.core.utils.UncompletedJobError:
            return Ended(
                job, f"SLURM's state of it is {handle.state}" if self.is_slurm else "its process is gone", True
            )

    def _cancel(self, handles: list[Any]) -> None:
        for handle in handles:
            handle.cancel(check=False)
        until = time.monotonic() + _PATIENCE
        while not all(handle.done() for handle in handles) and time.monotonic() < until:
            time.sleep(0.2)


class _Restartable(Task):
    """A task that submitit can queue again before its time is over."""

    def checkpoint(self, *_: Any) -> Any:
        from submitit.helpers import DelayedSubmission

        self.stop()
        return DelayedSubmission(_Restartable(self.job, self.gpus))


@contextmanager
def _silent() -> Iterator[None]:
    """Processes that are started inside the block write no errors: what watches over a task shows a traceback when it
    is told to stop. The task's own errors are in submitit's files."""
    errors, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(errors, 2)
        os.close(errors)
        os.close(nowhere)
