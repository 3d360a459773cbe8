"""Jobs as tasks of a Ray cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from cardiocaps.config import TrainConfig
from cardiocaps.errors import OutputError
from cardiocaps.experiments.engines.engine import Ended, Share
from cardiocaps.experiments.engines.remote import THREADS, RemoteEngine, Task, gpus, last_line, stop_file
from cardiocaps.experiments.jobs import Job
from cardiocaps.runtime.files import write_bytes
from cardiocaps.runtime.ray_cluster import nodes_for, ray_cluster, room, signals_passed_on

_PATIENCE = 70.0  # seconds that a stopped task gets: a little more than its job


class RayEngine(RemoteEngine):
    """See `Engine`. Each job is a task that takes its threads as CPUs, and a GPU if it uses one.

    Args:
        ray: the module, connected to a cluster.
        at_once: number of jobs that run at the same time at most; None: as many as fit.
        is_own: whether the cluster is on this machine and for these jobs alone, so that they share its CPUs.
    """

    def __init__(self, ray: ModuleType, at_once: int | None, *, is_own: bool = False) -> None:
        super().__init__()
        self._ray, self._at_once, self._is_own = ray, at_once, is_own
        # No retries of Ray's own: the runner begins a lost job again, and says so.
        self._work = ray.remote(max_retries=0)(_work)

    @classmethod
    @contextmanager
    def connected(cls, address: str | None, at_once: int | None, threads: int | None) -> Iterator[RayEngine]:
        """Raises ConfigError or ResourceError, see `ray_cluster`."""
        with ray_cluster(address, (at_once or 1) * (threads or 1)) as ray:
            yield cls(ray, at_once, is_own=address is None)

    def share(self, config: TrainConfig) -> Share:
        # Jobs that take no GPU, of classifiers of pixels, are no more at a time than the others.
        each, nodes = nodes_for(self._ray, config.device != "cpu", needs_gpu=config.device == "cuda")
        most = max((cpus for cpus, _ in nodes), default=0)
        threads = config.threads or max(1, min(THREADS, most // (self._at_once or 1) if self._is_own else most))
        fitting = room(nodes, threads, each)
        return Share(min(self._at_once or fitting, fitting), threads)

    def _has_gpus(self) -> bool:
        return self._ray.cluster_resources().get("GPU", 0) >= 1

    def _submit(self, job: Job) -> Any:
        options = {"num_cpus": job.config.threads, "num_gpus": gpus(job, self._has_gpus()), "name": job.name}
        return self._work.options(**options).remote(job)

    def _ended(self, handles: list[Any], seconds: float) -> list[Any]:
        with signals_passed_on():
            ended, _ = self._ray.wait(handles, num_returns=1, timeout=seconds)
        return list(ended)

    def _outcome(self, handle: Any, job: Job) -> Ended:
        lost = self._ray.exceptions
        try:
            return Ended(job, self._ray.get(handle))
        except (lost.WorkerCrashedError, lost.NodeDiedError, lost.LocalRayletDiedError, lost.OutOfMemoryError) as error:
            return Ended(job, _first_line(error), lost=True)
        except lost.RayError as error:
            return Ended(job, last_line(error))

    def _cancel(self, handles: list[Any]) -> None:
        # Not by `ray.cancel`: if a task ends at the same moment, Ray aborts this process.
        files = [stop_file(self._running[handle].job) for handle in handles]
        for file in files:
            with suppress(OutputError):  # then the job ends without a save, when this process leaves the cluster
                write_bytes(file, b"", sync=False)
        until = time.monotonic() + _PATIENCE
        while handles and time.monotonic() < until:
            _, handles = self._ray.wait(handles, timeout=1.0)
        for file in files:
            file.unlink(missing_ok=True)


def _work(job: Job) -> str | None:
    """The body of a task."""
    import ray

    assigned = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return Task(job, gpus=",".join(assigned))()


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
