"""Routing checked and measured on a GPU that is at hand for some minutes only.

    python -m benchmarks.gpu --out DIR --minutes 9            everything that fits, what matters most first
    python -m benchmarks.gpu --out DIR --only tests           a part; another command adds others to the same folder
    python -m benchmarks.gpu --out DIR --without ncu          everything but a part
    python -m benchmarks.gpu --out DIR --device cpu --quick   toy sizes on the CPU, to rehearse the program
    python -m benchmarks.gpu_results DIR                      results.md again; python -m benchmarks.plots DIR: figures

The order: build the extension if it has no kernels for this GPU; the tests of the CUDA kernels; every case against
the eager PyTorch forms, with a training step; microseconds a kernel; the compiled PyTorch forms; compute-sanitizer on
the kernels of capsops; Nsight Compute (ncu); the tests of the Triton kernels. Each stage has a share of the minutes,
and the stages after it share what it leaves. The report names what did not fit, and the same command goes on with it.

Before a case is timed its forms must agree with the float64 reference; of a case in which one does not, no number is
reported. A case is written as soon as it is measured, and the output of a program while it runs. The folder gets at
most eight files. Exit status: 0 done; 1 a gate is red, a test failed or compute-sanitizer found an error; 2 wrong
option; 3 a measurement of capsops failed (the others are there); 4 output not writable, or there already; 5 no GPU
that torch sees; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import gpu_checks
from .device import Device, best, environment, rates
from .gpu_checks import tell
from .gpu_results import (
    BEST_COMPILED,
    CAPSOPS,
    COMPILED,
    LEFT_OUT,
    NCU,
    OTHER,
    PARTS,
    PROFILER,
    RED,
    SANITIZER,
    TESTS,
    TRAINING_STEP,
    TRITON_TESTS,
    Results,
    fastest,
)
from .program import BenchmarkError, print_line, run_program
from .shapes import CASES, QUICK_CASES, Case, family, for_gpus

if TYPE_CHECKING:
    from .race import Budget, Timing

# The stages in their order, and how much of the time each is worth.
_BUILD, _EAGER = "build", "eager"
STAGES = {
    _BUILD: 16,
    TESTS: 12,
    _EAGER: 36,
    PROFILER: 5,
    COMPILED: 10,
    SANITIZER: 9,
    NCU: 6,
    TRITON_TESTS: 6,
}
# Of the time for compiled forms, the share that compiling ahead may take; and the processes that compile.
_AHEAD, _COMPILERS = 0.6, 6


class NoGpu(BenchmarkError):
    """There is nothing to measure on."""

    exit_code = 5


class Red(BenchmarkError):
    """A gate is red, a test failed or compute-sanitizer found an error."""

    exit_code = 1


class Incomplete(BenchmarkError):
    """A measurement of capsops failed."""

    exit_code = 3


class Clock:
    """Deals out the time that is left among the stages that are still to come."""

    def __init__(self, seconds: float, stages: Sequence[str]) -> None:
        self.end = time.perf_counter() + seconds
        self.weights = {stage: weight for stage, weight in STAGES.items() if stage in stages}
        self.stage_end = self.end

    def begin(self, stage: str) -> float:
        """The seconds of a stage, which begins now; those before it are over."""
        first = list(self.weights).index(stage)
        share = self.weights[stage] / sum(list(self.weights.values())[first:])
        now = time.perf_counter()
        self.stage_end = now + share * max(self.end - now, 0.0)
        return self.left()

    def left(self) -> float:
        """Seconds that the stage has left."""
        return self.stage_end - time.perf_counter()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--minutes", type=_minutes, default=9, help="for all of it, building included (default 9)")
    names = ", ".join(PARTS)
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="PART", help=f"only this, repeatable: {names}"
    )
    parser.add_argument("--without", action="append", choices=PARTS, metavar="PART", help="not this, repeatable")
    parser.add_argument("--no-build", action="store_true", help="measure with what is built")
    parser.add_argument("--rebuild", action="store_true", help="build the extension even where it has the kernels")
    parser.add_argument("--overwrite", action="store_true", help="replace these parts of an earlier run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="toy sizes and few rounds; the numbers mean nothing")
    parser.add_argument("--commit", help="of the sources, where they are no repository")
    return parser.parse_args(argv)


def _minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e5:
        raise argparse.ArgumentTypeError(f"--minutes is {text}; it must be a number above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = parse(argv)
    return run_program(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Everything. Raises NoGpu, Red, Incomplete, OutputError, ResultsError."""
    # So that processes may still be forked after torch has been asked for a GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    device = Device(arguments.device)
    left_out = arguments.without or ()
    chosen = [part for part in PARTS if part in (arguments.only or PARTS) and part not in left_out]
    if device.on_gpu:
        require_gpu()
    with Results.opened(arguments.out, chosen, arguments.overwrite) as results:
        chosen = [part for part in chosen if part not in results.finished]
        builds = device.on_gpu and not arguments.no_build
        measured = [part for part in chosen if part not in STAGES]
        stages = [*chosen, *[_BUILD] * builds, *[_EAGER] * bool(measured)]
        clock = Clock(60 * arguments.minutes, stages)
        red: list[str] = []
        failed: list[str] = []
        if builds:
            results.environment["build"] = gpu_checks.build(results, clock.begin(_BUILD), arguments.rebuild)
        if TESTS in chosen and device.on_gpu:
            red += gpu_checks.test(results, TESTS, clock.begin(TESTS))
        if measured or PROFILER in chosen or COMPILED in chosen:
            Measurement(arguments, device, results, clock, red, failed).run(chosen)
        if SANITIZER in chosen:
            red += gpu_checks.sanitize(results, device, clock.begin(SANITIZER))
        if NCU in chosen:
            from . import gpu_kernels

            gpu_kernels.look_inside(results, device, clock.begin(NCU))
        if TRITON_TESTS in chosen and device.on_gpu:
            red += gpu_checks.test(results, TRITON_TESTS, clock.begin(TRITON_TESTS))
        results.save()
        draw(results)
    print_line(f"results: {arguments.out}")
    if red:
        raise Red("; ".join(red))
    if failed:
        raise Incomplete(f"{len(failed)} measured nothing: {'; '.join(failed)}")


def require_gpu() -> None:
    """Raises NoGpu."""
    import torch

    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        raise NoGpu(
            f"there is no GPU that torch sees (torch {torch.__version__}, built for {built}); "
            "`--device cpu --quick` tries the program out without one"
        )


def draw(results: Results) -> None:
    """The figures, if matplotlib is there."""
    if not results.rows:
        return
    if importlib.util.find_spec("matplotlib") is None:
        tell(f"no figures, for matplotlib is missing; later: python -m benchmarks.plots {results.path}")
        return
    from . import plots

    plots.draw(results.path)


class Measurement:
    """The cases and the training step. red, failed: get what went wrong, in words."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        device: Device,
        results: Results,
        clock: Clock,
        red: list[str],
        failed: list[str],
    ) -> None:
        self.device, self.results, self.clock, self.red, self.failed = device, results, clock, red, failed
        self.quick, self.commit = arguments.quick, arguments.commit
        self.gates: dict[tuple[object, ...], str] = {}  # what is wrong with the forms of a kind of case
        self.where: dict[str, Any] = {}

    def run(self, chosen: Sequence[str]) -> None:
        """Raises NoGpu, MeasurementError."""
        from . import worker

        self.start = time.perf_counter()
        worker.start_on(self.device)
        found = next(worker.events(rates, self.device, self.quick))
        self.best = best(found)
        self._record(next(worker.events(environment, self.device, found)), found)
        cases = for_gpus(QUICK_CASES if self.quick else CASES)
        if _EAGER in self.clock.weights:
            self.clock.begin(_EAGER)
            self._eager(chosen, [c for c in cases if family(c) in chosen])
        if PROFILER in chosen:
            self.clock.begin(PROFILER)
            self._profile(cases)
        if COMPILED in chosen:
            self.clock.begin(COMPILED)
            self._compiled(cases)
        self.tell("measured")

    def _eager(self, chosen: Sequence[str], cases: Sequence[Case]) -> None:
        """capsops against the forms that are not compiled, and the training step after the first cases."""
        # A case that was cut short by the time is measured now.
        self.results.rows = [
            r for r in self.results.rows if not (r["status"] == LEFT_OUT and r["contestant"] == CAPSOPS)
        ]
        finished = set(self.results.finished)
        step_after = 4  # cases
        for number, case in enumerate(cases):
            if number == step_after and TRAINING_STEP in chosen:
                self._training_step()
                finished.add(TRAINING_STEP)
            for direction in case.directions:
                if not self.results.has(case.shape.name, case.label, direction):
                    self._case(case, direction)
            part = family(case)
            if part not in finished and all(family(c) != part for c in cases[number + 1 :]):
                ours = (row for row in self.results.rows if row["contestant"] == CAPSOPS)
                if not any(r["family"] == part and r["status"] == LEFT_OUT for r in ours):
                    self.results.finish(part)
        if TRAINING_STEP in chosen and TRAINING_STEP not in finished:
            self._training_step()

    def _profile(self, cases: Sequence[Case]) -> None:
        """Microseconds of each kernel."""
        from . import gpu_kernels, worker

        done = {(r["shape"], r["routing"], r["direction"]) for r in self.results.kernels if r["source"] == PROFILER}
        missing = []
        for case in cases:
            for direction in case.directions:
                what = f"{case}, {direction}"
                if (case.shape.name, case.label, direction) in done:
                    continue
                if self.clock.left() <= 0:
                    missing.append(what)
                    continue
                try:
                    limit = max(self.clock.left(), 1.0)
                    rows = list(worker.events(gpu_kernels.profile, case, direction, self.device, limit=limit))
                except (worker.MeasurementError, worker.OutOfMemory, worker.TooSlow) as error:
                    missing.append(what)
                    self.tell(f"profile of {what}: {error or type(error).__name__}")
                    continue
                self.results.kernels += rows
                self.results.save()
        self.tell("profiled")
        if missing:
            self.results.checks[PROFILER] = {"profile": f"nothing of {'; '.join(missing)}"}
            self.results.save()
        else:
            self.results.checks.pop(PROFILER, None)
            self.results.finish(PROFILER)

    def _compiled(self, cases: Sequence[Case]) -> None:
        """The compiled forms beside capsops, where they matter most first; of the rows those of the compiled forms."""
        if self.quick:
            # At toy sizes compiling takes longer than everything else, and says as little.
            cases = [case for case in cases if case.shape.name == "recommender"]
        todo = [
            (case, direction)
            for case in cases
            for direction in case.directions
            if case.dtype == "float32" and not self.results.has(case.shape.name, case.label, direction, compiled=True)
        ]
        if self.device.on_gpu:
            self._compile_ahead(todo)
        left_out = []
        for case, direction in todo:
            if self.clock.left() <= 0:
                left_out.append(f"{case}, {direction}")
            else:
                self._case(case, direction, compiled=True)
        if left_out:
            self.tell(f"compiled forms: no time for {len(left_out)} comparisons")
            self.results.checks[COMPILED] = {"compiled forms": f"no time for {'; '.join(left_out)}"}
            self.results.save()
        else:
            self.results.checks.pop(COMPILED, None)
            self.results.finish(COMPILED)

    def tell(self, text: str) -> None:
        tell(f"[{time.perf_counter() - self.start:5.0f} s] {text}")

    def _record(self, environment: dict[str, Any], found: dict[str, float]) -> None:
        """Where this run measures; and if another did elsewhere, that too."""
        old = self.results.environment
        environment["commit"] = self.commit or environment["commit"]
        for name in ("machine", "commit"):
            before = old.get(name, environment[name])
            before = before["device"] if name == "machine" else before
            now = environment[name]["device"] if name == "machine" else environment[name]
            if before != now and self.results.rows:
                old["earlier"] = f"{old['machine']['device']}, commit {old['commit']}"
        old |= environment
        old["quick"] = self.quick
        here, versions = environment["machine"], environment["versions"]
        self.where = {name: here[name] for name in ("device", "driver", "cuda")}
        self.where |= {name: versions[name] for name in ("python", "torch", "triton", "capsops")}
        self.where |= {"commit": environment["commit"] or "", "copy_GB_per_s": f"{found['copy'] / 1e9:.6g}"}
        states = environment["backends"]
        if states and "yes" not in states.values():
            reasons = "; ".join(f"{name}: {why}" for name, why in states.items())
            raise NoGpu(f"capsops has no backend that runs on {here['device']} ({reasons})")
        self.results.save()
        self.tell(f"{here['device']}: " + ", ".join(f"{name} {rate / 1e12:.3g} T/s" for name, rate in found.items()))

    def _budget(self, compile: bool) -> Budget:
        from .race import Budget

        if self.quick:
            return Budget(race=0.02, final=0.05, compile=compile)
        if not self.device.on_gpu:
            return Budget(compile=compile)
        # A form that hangs may not take the time of what comes after.
        return Budget(race=0.05, final=0.3, limit=60, until=self.clock.stage_end + 10, compile=compile)

    def _limit(self) -> float:
        """Seconds that this stage may use, so that later stages keep their share."""
        return min(120.0, max(self.clock.left(), 10.0)) if self.device.on_gpu else 120.0

    def _compile_ahead(self, todo: Sequence[tuple[Case, str]]) -> None:
        """Compile the forms of all cases, some at a time, into torch's cache on the disk: one after the other they
        would take most of the time. Only until the measuring begins."""
        from concurrent.futures import ThreadPoolExecutor, wait

        from . import forms, race, worker

        end = time.perf_counter() + _AHEAD * self.clock.left()

        def compile(case: Case, direction: str) -> None:
            names = [form.name for form in forms.contestants(case) if form.kind == "compiled"]
            # What does not compile says so when it is timed.
            with suppress(worker.MeasurementError, worker.OutOfMemory, worker.TooSlow):
                left = max(end - time.perf_counter(), 1.0)
                for _ in worker.events(race.warm, case, direction, names, self.device, limit=min(90.0, left)):
                    if time.perf_counter() > end:
                        return

        self.tell(f"compiling the PyTorch forms of {len(todo)} comparisons, {_COMPILERS} at a time")
        compilers = max(1, min(_COMPILERS, (os.cpu_count() or 2) // 2))
        pool = ThreadPoolExecutor(compilers)
        try:
            wait([pool.submit(compile, *what) for what in todo], timeout=max(end - time.perf_counter(), 0))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self.tell("compiled")

    def _case(self, case: Case, direction: str, compiled: bool = False) -> None:
        """A case against the forms that are compiled, or against those that are not."""
        from . import forms, gate, race, worker

        what = f"{case}, {direction}"

        def nothing(status: str, reason: str) -> list[Timing]:
            form, role = ("compiled forms", BEST_COMPILED) if compiled else (CAPSOPS, CAPSOPS)
            return [race.Timing(form, role, case.shape.N, status=status, reason=reason[:500])]

        if self.clock.left() <= 0:
            self._add(case, direction, nothing(LEFT_OUT, "the time was spent"))
            self.tell(f"{what}: left out, the time is spent")
            return
        try:
            self._gate(case)
            others = ("published", "eager") if compiled else ()
            without = [form.name for form in forms.contestants(case) if form.kind in others]
            timings = race.run(case, direction, self._budget(compiled), self.device, without)
            if compiled:
                timings = [timing for timing in timings if timing.form not in without]
        except gate.GateError as error:
            timings = nothing(RED, str(error))
            self.red.append(f"{what}: {error}")
        except (worker.MeasurementError, worker.OutOfMemory, worker.TooSlow) as error:
            timings = nothing(race.FAILED, str(error) or type(error).__name__)
        self.failed += [
            f"{what}: {t.form}: {t.reason}"
            for t in timings
            if t.role in (CAPSOPS, OTHER) and t.status not in (race.OK, RED)
        ]
        self._add(case, direction, timings, compiled)

    def _gate(self, case: Case) -> None:
        """Raises GateError if the forms of this kind of case do not agree with the reference; once for all rungs of the
        ladder."""
        from . import gate, worker

        (kind,) = gate.distinct([case])
        key = (kind.ladder or kind.shape.name, kind.routing.name, kind.dtype)
        if key not in self.gates:
            self.gates[key] = ""
            try:
                list(worker.events(gate.check_all, [case], self.device, limit=self._limit()))
            except gate.GateError as error:
                self.gates[key] = str(error)
            except BaseException:
                del self.gates[key]
                raise
        if self.gates[key]:
            raise gate.GateError(self.gates[key])

    def _add(self, case: Case, direction: str, timings: Sequence[Timing], compiled: bool = False) -> None:
        """Add rows. compiled: capsops, which was timed beside the compiled forms, has its rows already."""
        from . import tables

        extra = {timing.form: timing.extra for timing in timings}
        rows = tables.measured(case, direction, timings, extra, self.best, self.where)
        for row in rows:
            name = row["form"].removeprefix("capsops").strip()
            row["backend"] = (name or self.device.type) if row["form"].startswith("capsops") else ""
            row |= {column: row.get(column, "") for column in ("median_s", "ratio_to_capsops", "extra_MB")}
        self.results.rows += [row for row in rows if not (compiled and row["contestant"] in (CAPSOPS, OTHER))]
        self.results.save()
        self.tell(f"{case}, {direction}: {fastest(rows)}")

    def _training_step(self) -> None:
        from . import training_step, worker
        from .training_step import FUSED, FUSED_TF32, NAIVE

        preset, steps = ("tiny", 1) if self.quick else ("paper", 5)
        ways = (FUSED, NAIVE, FUSED_TF32) if self.device.on_gpu else (FUSED, NAIVE)
        self.results.steps = []
        try:
            measured = worker.events(
                training_step.measure, preset, steps, training_step.ROUTINGS, ways, self.device, limit=self._limit()
            )
            for row in measured:
                self.results.steps.append(row)
                self.results.save()
                took = (
                    f"{row['step'] * 1e3:.4g} ms, routing {row['routing_share']:.2%}"
                    if "step" in row
                    else row["status"]
                )
                self.tell(f"training step, preset {preset}, {row['way']}: {took}")
        except (worker.MeasurementError, worker.OutOfMemory, worker.TooSlow) as error:
            reason = f"{type(error).__name__}: {error}"[:500]
            way = ways[min(len(self.results.steps), len(ways) - 1)]
            self.results.steps.append(
                {"preset": preset, "routing": "attention", "way": way, "status": "failed", "reason": reason}
            )
            self.tell(f"training step: {reason}")
        fused = next((s for s in self.results.steps if s["way"] == FUSED), None)
        if fused is None or fused["status"] != "ok":
            self.failed.append(f"training step: {fused['reason'] if fused else 'no row'}")
        self.results.finish(TRAINING_STEP)


if __name__ == "__main__":
    sys.exit(main())
