"""Work in several threads or processes, which a signal may stop at any moment."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from typing import TypeVar

from cardiocaps.program import held

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def in_parallel(
    make_pool: Callable[[], Executor], function: Callable[[Item], Result], items: Iterable[Item]
) -> Iterator[Iterator[tuple[Item, Result]]]:
    """Each item and its result, in the order in which they are done; what `function` raises is raised in its turn.

    However the block ends, what was begun is waited for, and the rest is dropped with the pool.
    """
    done: SimpleQueue[Future[Result]] = SimpleQueue()
    with ExitStack() as at_end:
        with held():
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


def _close(pool: Executor) -> None:
    with held():
        pool.shutdown(cancel_futures=True)


def obey_the_parent() -> None:
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
