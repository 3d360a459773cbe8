"""Peak memory of routing forward and backward, beyond the tensors that the caller holds.

    python -m benchmarks.memory                 the paper's shape, compiled kernels
    python -m benchmarks.memory --shape mnist --naive

Each case runs in a process of its own. The caller's tensors are the inputs and their gradients; whatever the peak of
the resident set shows above them is counted. Linux only (/proc).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .shapes import BOTH, CASES, Case, family

_CLEAR = Path("/proc/self/clear_refs")


def peaks(case: Case, name: str, directions: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """For each direction, peak bytes beyond the inputs and the results; for `worker.events`. name: of a form.

    Raises MemoryError, or torch's RuntimeError, where there is too little memory.
    """
    import ctypes

    from . import forms, gate, race

    race.prepare()

    def of(case: Case) -> tuple[forms.Form, dict, list]:  # type: ignore[type-arg]
        candidates = [*forms.contestants(case), forms.reference(case)]
        form = next(candidate for candidate in candidates if candidate.name == name)
        inputs = form.arranged(case.inputs())
        return form, inputs, case.output_gradients()

    form, inputs, gradients = of(case)
    for direction in directions:
        # A call first, so that start-up (threads, the autograd engine, the compiler) is not counted: a small one, but
        # what is compiled is compiled for a shape.
        if form.kind == "compiled":
            gate.call(form, inputs, direction, gradients)
        else:
            small, small_inputs, small_gradients = of(case.at(min(case.shape.N, 16)))
            gate.call(small, small_inputs, direction, small_gradients)
            del small_inputs
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # resets the peak
        before = _resident("VmRSS")
        results = gate.call(form, inputs, direction, gradients)
        yield direction, max(0, _resident("VmHWM") - before - sum(x.nbytes for x in results))
        del results


def extra_bytes(case: Case, name: str, limit: float) -> dict[str, int | None]:
    """Peak bytes by direction; None where it could not be measured. In a process of its own."""
    from . import worker

    found: dict[str, int | None] = dict.fromkeys(case.directions)
    if can_measure():
        with suppress(worker.OutOfMemory, worker.TooSlow, worker.MeasurementError):  # the timing says why
            found.update(worker.events(peaks, case, name, case.directions, limit=limit))
    return found


def can_measure() -> bool:
    return _CLEAR.exists()


def _resident(field: str) -> int:
    """A line of /proc/self/status, in bytes: VmRSS, or VmHWM for the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main() -> None:
    cases: dict[str, list[Case]] = {}
    for case in CASES:
        cases.setdefault(case.shape.name if case.ladder else family(case), []).append(case)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--shape", choices=cases, default="paper", help=f"one of {', '.join(cases)}", metavar="NAME")
    parser.add_argument("--naive", action="store_true", help="also the reference, which holds the votes")
    parser.add_argument("--published", action="store_true", help="also the published formulation")
    arguments = parser.parse_args()
    if not can_measure():
        sys.exit("error: peak memory is read from /proc, which this system does not have")

    names = ["capsops"] + ["reference"] * arguments.naive + ["published"] * arguments.published
    shape = cases[arguments.shape][0].shape
    held = 2 * 4 * (shape.u_numbers + shape.weight_numbers)
    print(f"{shape}, float32; the inputs and their gradients: {held / 1e6:,.0f} MB")
    for name in names:
        for case in cases[arguments.shape]:
            extra = extra_bytes(case, name, limit=600)[BOTH]
            more = "could not be measured" if extra is None else f"{extra / 1e6:10,.1f} MB more"
            print(f"{name:<10} {case.routing.name:<18} forward + backward: {more}", flush=True)


if __name__ == "__main__":
    main()
