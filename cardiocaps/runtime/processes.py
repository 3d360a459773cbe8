"""Work in several threads or processes, which a signal can stop."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, as_completed
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from cardiocaps.errors import ResourceError

_LACKING = {
    errno.EAGAIN: "the system starts no more processes or threads (see `ulimit -u`)",
    errno.ENOMEM: "there is not enough memory",
    errno.ENOSPC: "the shared memory, /dev/shm, is full or too small",
    errno.EMFILE: "too many files are open (see `ulimit -n`)",
    errno.ENFILE: "too many files are open in the whole system",
}
"""Why the system refuses to make a process, a thread or a lock."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def in_parallel(
    make_pool: Callable[[], Executor], function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Pairs of item and result, in the order in which they are finished. An exception of `function` is raised there.

    When the block ends, also by an exception, items that have begun are finished and the others are dropped.

    Raises:
        ResourceError: the workers cannot be started.
    """
    with ExitStack() as at_end:
        with start_errors("workers"):
            pool = make_pool()
            at_end.callback(pool.shutdown, cancel_futures=True)
            futures = {pool.submit(function, item): item for item in items}
        yield ((futures[future], future.result()) for future in as_completed(futures))


@contextmanager
def in_order(
    make_pool: Callable[[], Executor], function: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """As `in_parallel`, but in the order of the items, of which at most `ahead` are taken before their turn.

    So memory does not grow with the number of items.
    """
    with ExitStack() as at_end:
        with start_errors("workers"):
            pool = make_pool()
        at_end.callback(pool.shutdown, cancel_futures=True)

        def results() -> Iterator[tuple[Item, Result]]:
            waiting: deque[tuple[Item, Future[Result]]] = deque()
            for item in items:
                with start_errors("workers"):
                    waiting.append((item, pool.submit(function, item)))
                if len(waiting) > ahead:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()

        yield results()


def cores() -> int:
    """The number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def start_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn the system's refusal to start a thread or process inside the block into a ResourceError with the reason."""
    try:
        yield
    except OSError as error:
        if error.errno not in _LACKING:
            raise
        raise ResourceError(f"cannot start {what}: {_LACKING[error.errno]}{advice}") from error
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        raise ResourceError(f"cannot start {what}: {_LACKING[errno.EAGAIN]}{advice}") from error


def killed_by(signum: int) -> str:
    """The name of the signal that killed a process, and for SIGKILL the usual reason."""
    if signum == signal.SIGKILL:
        return "SIGKILL (out of memory?)"
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"


def stop_with_parent() -> None:
    """Have the system send SIGTERM to this process when the one that started it ends in any way. Only Linux can."""
    if sys.platform == "linux":
        set_signal_of_parents_end = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_signal_of_parents_end, int(signal.SIGTERM))


def die_with_parent() -> None:
    """Make this child process end when its parent ends, in any way. Call it first in the child.

    The child ignores Ctrl-C, which the terminal sends to all processes: the parent decides and stops its children.
    """
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # os.getppid() would give the fork server, which lives as long as any of its children.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
