"""Work in several threads or processes, which a signal may stop at any moment."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import TypeVar

from cardiocaps.errors import ResourceError
from cardiocaps.runtime.program import defer_signals

_LACKING = {
    errno.EAGAIN: "the system starts no more processes or threads (see `ulimit -u`)",
    errno.ENOMEM: "there is not enough memory",
    errno.ENOSPC: "the shared memory, /dev/shm, is full or too small",
    errno.EMFILE: "too many files are open (see `ulimit -n`)",
    errno.ENFILE: "too many files are open in the whole system",
}
"""What a process, a thread or a lock that cannot be made lacks."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def in_parallel(
    make_pool: Callable[[], Executor], function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Each item and its result, in the order in which they are done; what `function` raises is raised in its turn.

    However the block ends, what was begun is waited for, and the rest is dropped with the pool. Raises ResourceError
    where the workers cannot be started.
    """
    done: SimpleQueue[Future[Result]] = SimpleQueue()
    with ExitStack() as at_end:
        with defer_signals(), start_errors("workers"):
            pool = make_pool()
            at_end.callback(_close, pool)
            futures = {pool.submit(function, item): item for item in items}
            for future in futures:
                future.add_done_callback(done.put)
        # Not concurrent.futures.as_completed: it takes the locks of all futures, and a signal among them leaves some.
        finished = (done.get() for _ in futures)
        yield ((futures[future], future.result()) for future in finished)


def cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def start_errors(what: str, advice: str = "") -> Iterator[None]:
    """Raise ResourceError, which says what is lacking, where the system starts no more threads or processes."""
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


def _close(pool: Executor) -> None:
    with defer_signals():
        pool.shutdown(cancel_futures=True)


def die_with_parent() -> None:
    """In a process that this one's program started: leave interrupts to the program, who passes them on, and end with
    it, however it ends."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    # Not what the system says of the parent: for the child of a fork server that is the server, which lives as long as
    # any job.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
