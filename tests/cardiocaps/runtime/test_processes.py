"""One function over many items in parallel."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context, util

import pytest

from cardiocaps.errors import ResourceError
from cardiocaps.runtime.processes import in_order, in_parallel, killed_by, start_errors
from cardiocaps.runtime.program import Interruption, run_program

THREADS = partial(ThreadPoolExecutor, 2)
PROCESSES = partial(ProcessPoolExecutor, 2, get_context("spawn"))


@pytest.mark.parametrize("pool", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_every_item_with_its_result(pool: partial[Executor]) -> None:
    with in_parallel(pool, abs, range(-20, 0)) as results:
        assert sorted(results) == [(item, -item) for item in range(-20, 0)]
    with in_parallel(pool, abs, []) as results:
        assert not list(results)


@pytest.mark.parametrize(
    ("signum", "said"), [(signal.SIGKILL, "SIGKILL (out of memory?)"), (signal.SIGSEGV, "SIGSEGV"), (35, "signal 35")]
)
def test_what_killed_a_process(signum: int, said: str) -> None:
    assert killed_by(signum) == said


@pytest.mark.parametrize("pool", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_in_the_order_of_the_items(pool: partial[Executor]) -> None:
    with in_order(pool, abs, range(-20, 0), 3) as results:
        assert list(results) == [(item, -item) for item in range(-20, 0)]
    with in_order(pool, abs, [], 3) as results:
        assert not list(results)


def test_few_items_are_taken_before_their_turn() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    with in_order(THREADS, abs, items(), 3) as results:
        for item, _ in results:
            assert len(taken) <= item + 4
            if item == 50:
                break
    with in_order(THREADS, lambda item: 1 // item, items(), 3) as results, pytest.raises(ZeroDivisionError):
        next(results)


def test_an_exception_of_the_function() -> None:
    with in_parallel(THREADS, lambda item: 1 // item, [0]) as results, pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("pool", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_a_machine_that_starts_no_process_is_named(pool: partial[Executor], monkeypatch: pytest.MonkeyPatch) -> None:
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
        with pytest.raises(type(error), match="x"), start_errors("a job"):
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


def test_a_signal_ends_the_work() -> None:
    before = set(threading.enumerate())

    def slow(item: int) -> int:
        time.sleep(0.05)
        return item

    def body(_: Interruption) -> None:
        with in_parallel(THREADS, slow, range(1000)) as results:
            for item, _result in results:
                if item == 3:
                    signal.raise_signal(signal.SIGTERM)

    assert run_program(body) == 128 + signal.SIGTERM
    assert set(threading.enumerate()) <= before
