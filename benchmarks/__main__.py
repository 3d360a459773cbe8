"""Capsule routing measured against PyTorch, side by side.

    python -m benchmarks                            everything, into benchmarks/results
    python -m benchmarks --quick --out /tmp/try     toy sizes, for trying out
    python -m benchmarks --only paper --only ladder
    python -m benchmarks.plots benchmarks/results   figures from results.csv

First every form must agree with the float64 reference; otherwise no number is reported. Results appear whole, at the
end, or not at all. Exit status: 0 done; 1 a form is wrong; 2 wrong option; 3 a measurement failed (of a PyTorch form:
the results of the others are there); 4 output not writable; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .program import print_line, run_program
from .shapes import CASES, QUICK_CASES, families, family

OVERHEAD, TRAINING_STEP = "overhead", "training-step"
NAMES = (*families(CASES), OVERHEAD, TRAINING_STEP)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="toy sizes and few rounds; the numbers mean nothing")
    parser.add_argument(
        "--only",
        action="append",
        choices=NAMES,
        metavar="NAME",
        help=f"measure only this, repeatable: {', '.join(NAMES)}",
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the forms under torch.compile")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the results of an earlier run")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = parse(argv)
    return run_program(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Everything. Raises GateError, MeasurementError, OutputError."""
    from . import tables

    chosen = arguments.only or NAMES
    cases = [case for case in (QUICK_CASES if arguments.quick else CASES) if family(case) in chosen]
    with tables.replacing(arguments.out, arguments.overwrite) as folder:
        failed = _measure(arguments, cases, chosen, folder)
    print_line(f"results: {arguments.out}")
    if failed:
        from .worker import MeasurementError

        raise MeasurementError(f"{len(failed)} measured nothing: {'; '.join(failed)}")


def _measure(arguments: argparse.Namespace, cases: Sequence[Any], chosen: Sequence[str], folder: Path) -> list[str]:
    """Write the results into a folder; the forms that failed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import gate, machine, memory, overhead, race, tables, training_step, worker

    quick = arguments.quick
    budget = race.Budget(race=0.02, final=0.05) if quick else race.Budget()
    if arguments.no_compile:
        budget = race.Budget(budget.race, budget.final, budget.limit, compile=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=False) as progress:
        checks = gate.distinct(cases)
        extras = [name for name in (OVERHEAD, TRAINING_STEP) if name in chosen]
        total = 1 + len(checks) + sum(1 + len(case.directions) for case in cases) + len(extras)
        task = progress.add_task("the machine", total=total)

        def now(what: str) -> None:
            progress.update(task, description=what)

        for name in worker.events(gate.check_all, checks):
            now(f"gate: {name}")
            progress.advance(task)
        now("the machine")
        best = next(worker.events(machine.measure, quick))
        environment = machine.environment(best)
        progress.advance(task)

        results, failed = [], []
        for case in cases:
            timings = {}
            for direction in case.directions:
                now(f"{case}, {direction}")
                timings[direction] = race.run(case, direction, budget)
                progress.advance(task)
            now(f"{case}, memory")
            reported = {t.form for ts in timings.values() for t in ts if t.role != race.RACED and t.status == race.OK}
            extra = {form: memory.extra_bytes(case, form, budget.limit) for form in sorted(reported)}
            progress.advance(task)
            for direction, measured in timings.items():
                peaks = {form: found[direction] for form, found in extra.items()}
                results += tables.rows(case, direction, measured, peaks, best, environment)
                failed += [f"{case}, {direction}: {t.form}: {t.reason}" for t in measured if t.status == race.FAILED]

        calls, steps = [], []
        if OVERHEAD in extras:
            now("overhead of a call")
            calls = list(worker.events(overhead.measure, *((3, 5) if quick else ())))
            progress.advance(task)
        if TRAINING_STEP in extras:
            now("a training step of CardioCaps")
            steps = list(worker.events(training_step.measure, *(("tiny", 1) if quick else ()), limit=1800))
            progress.advance(task)
        now("done")
    tables.write(folder, results, calls, steps, environment)
    return failed


if __name__ == "__main__":
    sys.exit(main())
