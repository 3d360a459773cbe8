"""Ray: a cluster of this process alone, or the connection to a running one. Ray sends no usage statistics."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType

from cardiocaps.errors import ConfigError, ResourceError, printable
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.processes import cores
from cardiocaps.runtime.program import Interrupted

ADDRESS_HELP = "of a running Ray cluster, HOST:PORT or auto (default: Ray is started on this machine)"

_MODE = "RAY_AUTH_MODE"
_PATIENCE = 20.0  # seconds that a cluster gets to answer
_OBJECTS = 256 * 2**20  # bytes of shared memory of a local cluster: jobs and rows are small


@contextmanager
def ray_cluster(address: str | None = None, cpus: int | None = None) -> Iterator[ModuleType]:
    """The module `ray`, connected inside the block.

    Args:
        address: HOST:PORT of a running cluster, or "auto" for the one that this machine belongs to (or that RAY_ADDRESS
            names). None: Ray is started on this machine and ends with the block.
        cpus: that a cluster on this machine has at least; None: those of this process.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
        ResourceError: Ray cannot be started on this machine.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before the import
    if address is not None and find_spec("ray") is not None:
        _check(address)
    ray = require_package("ray", "ray", "engine: 'ray'", extra="cluster")
    own = {"num_cpus": max(cores(), cpus or 1), "include_dashboard": False, "object_store_memory": _OBJECTS}
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level="ERROR",
            **({} if address is not None else own),
        )
    except Exception as error:  # a ConnectionError, a RuntimeError or one of Ray's own
        reason = printable(error).partition("\\n")[0]
        if address is not None:
            raise ConfigError(
                f"--address is {printable(address)}: cannot connect to this Ray cluster: {reason}"
            ) from error
        raise ResourceError(f"cannot start Ray on this machine: {reason}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            for signum, handler in before.items():  # Ray takes SIGTERM for itself
                signal.signal(signum, handler)
    try:
        with signals_passed_on():
            yield ray
    finally:
        ray.shutdown()


def nodes_for(ray: ModuleType, uses_gpu: bool, needs_gpu: bool = False) -> tuple[int, list[tuple[int, int]]]:
    """The GPUs that a worker takes, 0 or 1, and the CPUs and GPUs of each node that it can run on.

    Args:
        uses_gpu: whether it takes a GPU, if the cluster has some.
        needs_gpu: whether a cluster without one is an error.

    Raises:
        ConfigError: the cluster has no GPU.
    """
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = [(int(each.get("CPU", 0)), int(each.get("GPU", 0))) for each in resources]
    with_gpus = [(cpus, gpus) for cpus, gpus in nodes if gpus]
    if needs_gpu and not with_gpus:
        raise ConfigError("device is 'cuda'; expected auto or cpu, because no node of Ray has a GPU")
    return (1, with_gpus) if uses_gpu and with_gpus else (0, nodes)


def room(nodes: Sequence[tuple[int, int]], cpus: int, gpus: int) -> int:
    """For how many workers that take `cpus` CPUs and `gpus` GPUs the `nodes_for` them have room.

    Raises:
        ConfigError: none has as many CPUs.
    """
    most = max((there for there, _ in nodes), default=0)
    if most < cpus:
        kind = " with a GPU" if gpus else ""
        raise ConfigError(f"threads is {cpus}; expected at most {most}, the CPUs of Ray's largest node{kind}")
    return sum(min(there // cpus, its_gpus // gpus if gpus else there) for there, its_gpus in nodes)


@contextmanager
def signals_passed_on() -> Iterator[None]:
    """Let what a signal's handler raises in a call of Ray leave the block; `ray.wait` makes a SystemError of it."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, Interrupted):
            raise error.__cause__ from None
        raise


def _check(address: str) -> None:
    """Raise ConfigError unless a Ray cluster answers.

    A cluster may want its token (`~/.ray/auth_token`). Ray sends it to an address only if RAY_AUTH_MODE is "token"
    before the import. If it is not set, both ways are tried, and the one that the cluster answers is kept.
    """
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdecimal() and "/" not in host):
        raise ConfigError(f"--address is {printable(address)}; expected HOST:PORT of a Ray cluster, or auto")
    until = time.monotonic() + _PATIENCE
    for mode in [os.environ[_MODE]] if _MODE in os.environ else ["disabled", "token"]:
        if _answers(address, {**os.environ, _MODE: mode}, until - time.monotonic()):
            os.environ[_MODE] = mode
            return
    raise ConfigError(
        f"--address is {printable(address)}: no Ray cluster answers there within {_PATIENCE:.0f} s; expected HOST:PORT "
        "of its head (port 6379 by default), the version of Ray that is installed here, and its token in "
        "~/.ray/auth_token if it wants one"
    )


def _answers(address: str, environment: Mapping[str, str], seconds: float) -> bool:
    """Whether a cluster answers in time.

    Ray's own question runs in a process of its own, because it waits longer than a user does, and because Ray ends a
    whole process that cannot reach its cluster.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check"]
    if address != "auto":
        command += ["--address", address]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=max(seconds, 0.0),
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
