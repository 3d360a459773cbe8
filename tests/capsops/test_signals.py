"""Ctrl-C ends a running kernel within a second, forward and backward, unless the signal handler does not raise."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import capsops
from tests.forked_python import forked_python

OPS = torch.ops.capsops
SECONDS = 0.25  # of CPU time, after which the signal arrives
# Shapes with many short passes; and with one long pass, which is not interrupted between parts of a large sum.
PASSES, LONG = (32, 1500, 8, 10, 16), (8, 20_000, 16, 512, 64)


def _backward_arguments(iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, K, J, D = PASSES
    return torch.randn(B, J, D), torch.randn(iterations, B, J, D), torch.randn(B, N, K), torch.randn(N, K, J, D)


def dynamic(iterations: int) -> Callable[[], object]:
    _, _, u, weight = _backward_arguments(1)
    return lambda: OPS.dynamic_routing(u, weight, None, None, iterations, False, False, "sabour")


def dynamic_backward(iterations: int) -> Callable[[], object]:
    g, s, u, weight = _backward_arguments(iterations)
    wanted = [True, True, False]
    return lambda: OPS.dynamic_routing_backward(g, s, u, weight, None, None, iterations, False, False, "sabour", wanted)


def em(iterations: int) -> Callable[[], object]:
    _, _, u, weight = _backward_arguments(1)
    activation, beta = torch.rand(u.shape[:2]), torch.zeros(weight.shape[2])
    return lambda: OPS.em_routing(u, activation, weight, beta, beta, None, [0.01] * iterations)


def em_backward(iterations: int) -> Callable[[], object]:
    g, _, u, weight = _backward_arguments(1)
    B, _, _, J, D = PASSES
    activation, beta = torch.rand(u.shape[:2]), torch.zeros(J)
    state = torch.rand(iterations, B, J, 3 * D + 2) + 0.5
    lambdas, wanted = [0.01] * iterations, [True] * 5
    return lambda: OPS.em_routing_backward(
        g, torch.randn(B, J), state, u, activation, weight, beta, beta, None, lambdas, wanted
    )


def attention(_: int) -> Callable[[], object]:
    B, N, K, J, D = LONG
    u, weight, mix = torch.randn(B, N, K), torch.randn(K, J, D), torch.randn(J, J)
    return lambda: OPS.attention_routing(u, weight, mix, None, None, None, "sabour")


def attention_backward(_: int) -> Callable[[], object]:
    B, N, K, J, D = LONG
    u, weight, mix, s = torch.randn(B, N, K), torch.randn(K, J, D), torch.randn(J, J), torch.randn(B, J, D)
    wanted = [True, True, True, False, False]
    return lambda: OPS.attention_routing_backward(s, s, u, weight, mix, None, None, None, "sabour", wanted)


CASES = [dynamic, dynamic_backward, em, em_backward, attention, attention_backward]


class Raised(Exception):
    pass


@contextmanager
def timer(handler: Callable[[int, object], object], every: float = 0) -> Iterator[None]:
    """Call handler after SECONDS of CPU time, and then after every `every` seconds of it.

    CPU time and not wall time, because other processes may take most of the machine.
    """
    before = signal.signal(signal.SIGPROF, handler)
    try:
        signal.setitimer(signal.ITIMER_PROF, SECONDS, every)
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def raise_(*_: object) -> None:
    raise Raised


@pytest.mark.parametrize("case", CASES)
def test_a_handler_that_raises_ends_a_kernel(case: Callable[[int], Callable[[], object]]) -> None:
    call = case(2000)
    start = time.process_time()
    with pytest.raises(Raised), timer(raise_):
        call()
    # This is the CPU time of all threads together.
    assert time.process_time() - start - SECONDS < 1


def test_handlers_that_do_not_raise_run_meanwhile_and_change_nothing() -> None:
    u, weight = torch.randn(8, 1000, 8), torch.randn(1000, 8, 10, 16)
    seen: list[int] = []
    results: list[Tensor] = []

    def handler(*_: object) -> None:
        # Empty, because the call has not returned yet.
        seen.append(len(results))
        if len(seen) == 3:
            signal.setitimer(signal.ITIMER_PROF, 0)

    # A fast machine needs many iterations until three signals arrive; a slow one would take minutes for as many.
    for iterations in (250, 500, 1000, 2000, 4000, 8000):
        seen.clear()
        results.clear()
        with timer(handler, SECONDS):
            results.extend(OPS.dynamic_routing(u, weight, None, None, iterations, False, False, "sabour"))
        if len(seen) == 3:
            break
    assert seen == [0, 0, 0], "three signals while one kernel ran"
    again = OPS.dynamic_routing(u, weight, None, None, iterations, False, False, "sabour")
    assert all(torch.equal(x, y) for x, y in zip(results, again, strict=True))


def test_kernels_of_other_threads_end_by_themselves() -> None:
    """Python runs signal handlers only in its main thread."""
    u, weight, got, seen = torch.randn(8, 1000, 8), torch.randn(1000, 8, 10, 16), [], []
    expected = OPS.dynamic_routing(u, weight, None, None, 50, False, False, "sabour")
    thread = threading.Thread(
        target=lambda: got.extend(OPS.dynamic_routing(u, weight, None, None, 50, False, False, "sabour"))
    )
    with timer(lambda *_: seen.append(1), 0.01):
        thread.start()
        thread.join()
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


SCRIPT = """
import sys, torch, capsops
ops, iterations = torch.ops.capsops, 500_000
u, weight = torch.randn(1, 50_000, 8), torch.randn(50_000, 8, 2, 4)

class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, g):
        s = torch.ones(iterations, 1, 2, 4)
        return ops.dynamic_routing_backward(
            s[0], s, u, weight, None, None, iterations, False, False, "sabour", [True, False, False]
        )[0]

capsops.dynamic_routing(u, weight)
print("ready", flush=True)
if sys.argv[1] == "forward":
    ops.dynamic_routing(u, weight, None, None, iterations, False, False, "sabour")
else:
    Backward.apply(u.requires_grad_()).sum().backward()
print("done", flush=True)
"""


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_control_c(direction: str) -> None:
    """As in a terminal, KeyboardInterrupt ends the program, also inside autograd. Without it the run takes minutes."""
    with subprocess.Popen(
        [*forked_python(), "-c", SCRIPT, direction], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        try:
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            time.sleep(1)
            program.send_signal(signal.SIGINT)
            out, errors = program.communicate(timeout=60)
        finally:
            program.kill()
    assert program.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert not out


def test_an_interrupted_kernel_does_not_affect_the_next() -> None:
    u, weight = torch.randn(3, 20, 8), torch.randn(20, 8, 4, 5)
    expected, call = capsops.dynamic_routing(u, weight), dynamic(2000)
    with pytest.raises(Raised), timer(raise_):
        call()
    assert torch.equal(capsops.dynamic_routing(u, weight), expected)
