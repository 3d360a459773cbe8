"""One function over many items: every result, no item more than needed, and a signal at any moment."""

from __future__ import annotations

import concurrent.futures.thread
import errno
import linecache
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context, util
from types import FrameType

import pytest

from cardiocaps.errors import ResourceError
from cardiocaps.runtime import processes, program
from cardiocaps.runtime.processes import in_parallel
from cardiocaps.runtime.program import Interrupted, Interruption

THREADS = partial(ThreadPoolExecutor, 2)
PROCESSES = partial(ProcessPoolExecutor, 2, get_context("spawn"))


@pytest.mark.parametrize("pool", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_every_item_with_its_result(pool: partial[Executor]) -> None:
    with in_parallel(pool, abs, range(-20, 0)) as results:
        assert sorted(results) == [(item, -item) for item in range(-20, 0)]
    with in_parallel(pool, abs, []) as results:
        assert not list(results)


def test_what_the_function_raises() -> None:
    with in_parallel(THREADS, lambda item: 1 // item, [0]) as results, pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("pool", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_a_machine_without_another_process_is_named(pool: partial[Executor], monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def no_thread(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    before = set(threading.enumerate())
    with monkeypatch.context() as full:
        full.setattr(util, "spawnv_passfds", refused)
        if pool is THREADS:
            full.setattr(threading, "_start_new_thread", no_thread)
        refusal = pytest.raises(ResourceError, match=r"^cannot start workers: the system starts no more processes")
        with refusal, in_parallel(pool, abs, range(5)) as results:
            list(results)
    assert set(threading.enumerate()) <= before


def test_other_errors_of_a_start_pass_through() -> None:
    for error in (OSError(errno.ENOENT, "x"), RuntimeError("x"), ResourceError("x")):
        with pytest.raises(type(error), match="x"), processes.start_errors("a job"):
            raise error


def test_the_rest_is_dropped() -> None:
    begun, before = [], set(threading.enumerate())

    def slow(item: int) -> None:
        begun.append(item)
        time.sleep(0.05)

    with pytest.raises(KeyError), in_parallel(THREADS, slow, range(100)) as results:
        next(results)
        raise KeyError
    assert len(begun) < 100
    assert set(threading.enumerate()) <= before


def test_a_signal_at_any_line() -> None:
    process = get_context("spawn").Process(target=_interrupted_at_every_line)
    process.start()
    process.join(120)
    hangs = process.is_alive()
    process.kill()
    assert not hangs
    assert process.exitcode == 0


def _interrupted_at_every_line() -> None:
    lines = sum(1 for _ in _interruptions())
    assert lines > 200, lines
    until = time.monotonic() + 10
    while threading.active_count() > 1:
        assert time.monotonic() < until, threading.enumerate()
        time.sleep(0.01)


def _interruptions() -> Iterator[int]:
    """Interrupts at the first line, at the second, ..., up to the last."""
    line = 1
    while _interrupted(line):
        yield line
        line += 1


def _interrupted(line: int) -> bool:
    """Whether there was a line of that number, where a signal came."""
    files = {module.__file__ for module in (processes, program, concurrent.futures._base, concurrent.futures.thread)}
    files |= {queue.__file__, threading.__file__}
    seen = 0

    def trace(frame: FrameType, event: str, _: object) -> object:
        nonlocal seen
        if frame.f_code.co_filename not in files:
            return None
        # The line of a `with` is met again at its end, before it gives back what it took, where no real signal comes.
        text = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        seen += event == "line" and not text.lstrip().startswith("with ")
        if seen == line:
            sys.settrace(None)
            signal.raise_signal(signal.SIGTERM)
        return trace

    try:
        with Interruption().watched():
            try:
                sys.settrace(trace)  # type: ignore[arg-type]
                with in_parallel(THREADS, abs, range(5)) as results:
                    assert sum(1 for _ in results) == 5
            finally:
                sys.settrace(None)
    except Interrupted:
        return True
    return False
