"""Measurements in processes of their own: one that runs out of memory or time takes nothing else with it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

from .device import Device
from .program import BenchmarkError

# Left to the rest of the machine when a measurement takes all the memory it can.
_SPARE = 1 << 30


class MeasurementError(BenchmarkError):
    """A measurement failed for a reason that has nothing to do with its speed."""

    exit_code = 3


class Broken(MeasurementError):
    """The form that ran last has put the GPU out of action for its process."""


class OutOfMemory(Exception):
    """The process was killed, as the system does where memory runs out."""


class TooSlow(Exception):
    """Nothing was heard from the process for as long as it was given."""


def events(work: Callable[..., Iterator[Any]], *arguments: object, limit: float = 600.0) -> Iterator[Any]:
    """What the generator `work(*arguments)` yields in a new process, which ends with the loop over this.

    limit: seconds between two events. Raises TooSlow, OutOfMemory, whatever BenchmarkError the work raises, and
    MeasurementError for anything else.
    """
    on_gpu = any(isinstance(x, Device) and x.on_gpu for x in arguments)
    context = _context(_method if on_gpu else "forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, work, arguments, not on_gpu), daemon=True)
    process.start()
    sender.close()
    try:
        while True:
            if not receiver.poll(limit):
                raise TooSlow
            try:
                what, event = receiver.recv()
            except EOFError:
                process.join()
                if process.exitcode == -signal.SIGKILL:
                    raise OutOfMemory from None
                raise MeasurementError(f"a measurement ended with exit status {process.exitcode}") from None
            if what == "failure":
                raise event
            if what == "end":
                process.join(10)
                return
            yield event
    finally:
        process.kill()
        process.join()
        receiver.close()


# How processes that use a GPU are started.
_method = "forkserver"


def start_on(device: Device) -> None:
    """Find out how processes that use a device can be started: where CUDA refuses a forked one, each imports everything
    itself. Raises MeasurementError where neither works."""
    global _method
    for _method in ("forkserver", "spawn"):
        try:
            list(events(_touch, device))
        except MeasurementError:
            if _method == "spawn":
                raise
        else:
            return


def _touch(device: Device) -> Iterator[None]:
    import torch

    torch.ones(1, device=device.type).sum().item()
    yield


@cache
def _context(method: str) -> ForkServerContext | SpawnContext:
    """Processes are forked from one that has imported everything but started no thread: quick, and as good as new."""
    if method == "spawn":
        return multiprocessing.get_context("spawn")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # read by what is imported, which would start some
    context = multiprocessing.get_context("forkserver")
    compiler = ["torch._dynamo", "torch._inductor.compile_fx", "torch._inductor.codegen.cuda_combined_scheduling"]
    context.set_forkserver_preload([*compiler, "benchmarks.race"])
    return context


def _serve(sender: Connection, work: Callable[..., Iterator[Any]], arguments: tuple[object, ...], limit: bool) -> None:
    die_with_parent()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if the system has to kill a process, this one
    if limit:
        _limit_memory()
    try:
        for event in work(*arguments):
            sender.send(("event", event))
        sender.send(("end", None))
    except BenchmarkError as error:
        sender.send(("failure", error))
    except Exception as error:
        name = getattr(work, "__name__", "a measurement")
        sender.send(("failure", MeasurementError(f"{name}: {type(error).__name__}: {error}")))
    sender.close()


def die_with_parent() -> None:
    """End this child process with its parent, however that ends, and leave Ctrl-C to the parent."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)

    def wait() -> None:
        # Not os.getppid: the parent of a forked child is the fork server, which outlives the program.
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _limit_memory() -> None:
    """Make an allocation that does not fit fail at once and by name, instead of ending the process."""
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
        limit = max(available - _SPARE, _SPARE)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that an allocation failed; torch has a class for it on a GPU alone."""
    text = str(error)
    words = ("can't allocate memory", "not enough memory", "bad_alloc", "Cannot allocate memory", "CUDA out of memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(part in text for part in words)
    )
