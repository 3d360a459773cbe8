"""What a call costs besides the kernel: `python -m benchmarks.overhead`.

At a shape so small that the kernels have next to nothing to do, microseconds of one call of a public function, without
gradient and with one (forward and backward), the part of them spent inside `capsops._C`, and what is left: checks, the
choice of a backend, autograd, allocation. And the same call of the best eager form, for scale.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from .shapes import BOTH, DIRECTIONS, ROUTINGS, Case, Shape

_TINY = Shape("tiny", B=1, N=4, K=8, J=2, D=16)


class _Timed:
    """The extension, with the time spent in its functions added up."""

    def __init__(self, extension: Any) -> None:
        self._extension, self.seconds = extension, 0.0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._extension, name)
        if isinstance(found, type) or not callable(found):
            return found

        def call(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return found(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - start

        setattr(self, name, call)
        return call


def measure(rounds: int = 200, calls: int = 50) -> Iterator[dict[str, Any]]:
    """For each routing and direction, the medians over rounds: routing, direction, form, microseconds a call, in the
    kernel (None for PyTorch), and besides."""
    import torch

    from . import forms, gate, race

    race.prepare()
    for name in ("attention", "dynamic"):
        case = Case(_TINY, ROUTINGS[name])
        inputs, gradients = case.inputs(), case.output_gradients()
        contestants = [f for f in forms.contestants(case) if f.name in ("capsops", "einsum, einsum")]
        for direction in DIRECTIONS:
            for form in contestants:
                call: Callable[[], object] = partial(form.function, **inputs)
                if direction == BOTH:
                    call = partial(gate.call, form, inputs, direction, gradients)
                ours = form.kind == "capsops"
                with torch.set_grad_enabled(direction == BOTH):
                    whole = _microseconds(call, rounds, calls)
                    kernel = _in_extension(call, rounds, calls) if ours else None
                yield {
                    "routing": name,
                    "direction": direction,
                    "form": form.name,
                    "us_per_call": whole,
                    "us_in_kernel": kernel,
                    "us_besides": None if kernel is None else whole - kernel,
                }


def _microseconds(call: Callable[[], object], rounds: int, calls: int) -> float:
    times = []
    for _ in range(rounds + 1):  # the first warms up
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(times[1:])


def _in_extension(call: Callable[[], object], rounds: int, calls: int) -> float:
    from capsops.backends import extension

    kernels = extension._C
    extension._C = timed = _Timed(kernels)  # type: ignore[assignment]
    times = []
    try:
        for _ in range(rounds + 1):
            timed.seconds = 0.0
            for _ in range(calls):
                call()
            times.append(timed.seconds / calls * 1e6)
    finally:
        extension._C = kernels
    return statistics.median(times[1:])


def main() -> None:
    from . import worker

    for row in worker.events(measure):
        parts = "" if row["us_in_kernel"] is None else f", {row['us_in_kernel']:.1f} of them in the kernel"
        direction = row["direction"] if row["direction"] == BOTH else "forward, no gradient"
        print(f"{row['routing']:<10} {direction:<20} {row['form']:<15} {row['us_per_call']:8.1f} µs a call{parts}")


if __name__ == "__main__":
    main()
