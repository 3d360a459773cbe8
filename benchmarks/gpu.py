"""Routing measured on a GPU, against PyTorch and against what the GPU can do.

    python -m benchmarks.gpu --out DIR                        everything: build, tests, measuring, compute-sanitizer
    python -m benchmarks.gpu --out DIR --only tests           a part; another command adds others to the same folder
    python -m benchmarks.gpu --out DIR --only paper --only training-step
    python -m benchmarks.gpu --out DIR --device cpu --quick   toy sizes on the CPU, for trying out the program
    python -m benchmarks.gpu_results DIR                      results.md again; python -m benchmarks.plots DIR: figures

Where the extension lacks kernels for this GPU and there is an nvcc, it is built for this GPU alone; without one Triton
is measured alone. Before a case is timed its forms must agree with the float64 reference; of a case in which one does
not, no number is reported. What matters most comes first. Every case is written as soon as it is measured, and a part
that was cut off is continued by the same command. Exit status: 0 done; 1 a gate is red, a test failed or
compute-sanitizer found an error; 2 wrong option; 3 a measurement of capsops failed (the others are there); 4 output not
writable, or there already; 5 no GPU that torch sees; 128 + n stopped by signal n.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiocaps.errors import CardioCapsError
from cardiocaps.program import execute, say

from .device import Device, best, environment, find_tool, rates
from .gpu_results import BEST_COMPILED, CAPSOPS, LEFT_OUT, PARTS, RED, SANITIZER, TESTS, TRAINING_STEP, Results, fastest
from .shapes import CASES, QUICK_CASES, Case, family, for_gpus

if TYPE_CHECKING:
    from .race import Budget, Timing

ROOT = Path(__file__).resolve().parents[1]
TEST_MATRIX = "tests/capsops/test_gpu_backends.py"

# Of the time for measuring: after which nothing more is compiled by torch.compile; and that compiling ahead may take.
_COMPILING, _AHEAD = 0.8, 0.4
# Processes that compile ahead.
_COMPILERS = 6
# The exit status that compute-sanitizer is told to have for an error.
_FOUND = 99


class NoGpu(CardioCapsError):
    """There is nothing to measure on."""

    exit_code = 5


class Red(CardioCapsError):
    """A gate is red, a test failed or compute-sanitizer found an error."""

    exit_code = 1


class Incomplete(CardioCapsError):
    """A measurement of capsops failed."""

    exit_code = 3


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--only", action="append", choices=PARTS, metavar="PART", help=f"only this, repeatable: {', '.join(PARTS)}"
    )
    parser.add_argument("--skip-tests", action="store_true", help=f"do not run {TEST_MATRIX} first")
    parser.add_argument("--no-sanitizer", action="store_true", help="leave out compute-sanitizer")
    parser.add_argument("--no-compile", action="store_true", help="leave out the forms under torch.compile")
    parser.add_argument("--no-build", action="store_true", help="measure with what is built")
    parser.add_argument("--rebuild", action="store_true", help="build the extension even where it has the kernels")
    parser.add_argument("--overwrite", action="store_true", help="replace these parts of an earlier run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    parser.add_argument("--quick", action="store_true", help="toy sizes and few rounds; the numbers mean nothing")
    parser.add_argument("--commit", help="of the sources, where they are no repository")
    for name, seconds, what in (
        ("--budget", 480, "for measuring; what is left over then is named in the report"),
        ("--test-limit", 540, "for the tests"),
        ("--sanitizer-limit", 240, "for each of the two tools of compute-sanitizer"),
    ):
        parser.add_argument(name, type=_seconds, default=seconds, metavar="SECONDS", help=f"{what} (default {seconds})")
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = parse(argv)
    return execute(lambda _: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Everything. Raises NoGpu, Red, Incomplete, OutputError, DataError."""
    # So that processes may still be forked after torch has been asked for a GPU.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    device = Device(arguments.device)
    left_out = [TESTS] * arguments.skip_tests + [SANITIZER] * arguments.no_sanitizer
    chosen = [part for part in PARTS if part in (arguments.only or PARTS) and part not in left_out]
    if device.on_gpu:
        require_gpu()
    with Results.opened(arguments.out, chosen, arguments.overwrite) as results:
        red: list[str] = []
        failed: list[str] = []
        if device.on_gpu and not arguments.no_build:
            results.environment["build"] = build(results, arguments.rebuild)
        if TESTS in chosen:
            red += test(results, arguments.test_limit)
        if set(chosen) - {TESTS, SANITIZER}:
            Measurement(arguments, device, results, red, failed).run(chosen)
        if SANITIZER in chosen:
            red += sanitize(results, device, arguments.sanitizer_limit)
        results.save()
        draw(results)
    say(f"results: {arguments.out}")
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


def tell(text: str) -> None:
    """A line of progress."""
    say(text, sys.stderr)


# ---- build, tests, compute-sanitizer ---------------------------------------------------------------------------------

_PROBE = """
import json, torch
from capsops.backends import cuda
why = cuda.why_not("dynamic_routing", torch.device("cuda"), torch.float32)
print(json.dumps([*torch.cuda.get_device_capability(0), why]))
"""


def build(results: Results, rebuild: bool) -> str:
    """Build the extension for this GPU where it has no kernels for it; what was done, in words."""
    probe = _run([sys.executable, "-c", _PROBE], 120)
    try:
        major, minor, why = json.loads(probe.output.splitlines()[-1])
    except (ValueError, IndexError):
        results.log("probe", probe.output)
        return f"not known what there is to build: {_last_line(probe.output)}"
    buildable = ("does not load", "without CUDA kernels", "the kernels were built for")
    if why is None and not rebuild:
        return f"the extension was there, with kernels for {major}.{minor}"
    if why is not None and not any(part in why for part in buildable):
        return f"nothing, for it would not help: {why}"
    nvcc = find_tool("nvcc")
    if nvcc is None:
        tell(f"no nvcc was found (PATH, CUDA_HOME): Triton is measured alone ({why})")
        return f"nothing, for no nvcc was found; Triton is measured alone (cuda: {why})"
    tell(f"building the extension for compute capability {major}.{minor} by {nvcc}")
    start = time.perf_counter()
    settings = {"CAPSOPS_CUDA": "1", "CAPSOPS_CUDA_ARCHS": f"{major}{minor}", "CUDACXX": nvcc}
    done = _run([sys.executable, "setup.py", "build_ext", "--inplace"], 900, settings)
    seconds = time.perf_counter() - start
    if done.status != 0:
        results.log("build", done.output)
        tell(f"the build failed ({_last_line(done.output)}); checks.log has all of it. Triton is measured alone")
        return f"failed after {seconds:.0f} s; Triton is measured alone ({_last_line(done.output)})"
    tell(f"built in {seconds:.0f} s")
    return f"the extension, for compute capability {major}.{minor} alone, in {seconds:.0f} s"


def test(results: Results, limit: float) -> list[str]:
    """The test matrix of the GPU backends. What failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", TEST_MATRIX]
    workers = min(8, (os.cpu_count() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    tell(f"tests: {' '.join(command[1:])}")
    done = _run(command, limit)
    summary = _last_line(done.output).strip("= ")
    if done.status is None:
        outcome = f"not at their end after {limit:.0f} s, and stopped: {summary}"
    else:
        outcome = f"{'passed' if done.status == 0 else f'FAILED (exit status {done.status})'}: {summary}"
    tell(f"tests: {outcome}")
    results.log("tests", done.output)
    results.checks[TESTS] = {TEST_MATRIX: outcome}
    results.finish(TESTS)
    return [] if done.status == 0 else [f"tests: {outcome}"]


def sanitize(results: Results, device: Device, limit: float) -> list[str]:
    """Every operator of the CUDA backend under memcheck and racecheck. What was found."""
    results.checks[SANITIZER] = outcomes = {}
    red = []
    path = find_tool("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        name = f"compute-sanitizer {tool}"
        if not device.on_gpu:
            outcomes[name] = "not run: it is for GPUs"
            continue
        if path is None:
            outcomes[name] = "not run: it was not found (PATH, CUDA_HOME)"
            continue
        tell(name)
        program = [sys.executable, "-m", "tests.capsops.every_operator", "--backend", "cuda"]
        options = ["--tool", tool, "--error-exitcode", str(_FOUND), "--report-api-errors", "no", "--print-limit", "20"]
        # An allocation of its own for every tensor, so that a step beyond one is seen.
        done = _run([path, *options, *program], limit, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        results.log(name, done.output)
        outcomes[name] = sanitized(done.status, done.output, limit)
        if outcomes[name].startswith("ERRORS"):
            red.append(f"{name}: {outcomes[name]}")
        tell(f"{name}: {outcomes[name]}")
    results.finish(SANITIZER)
    return red


def sanitized(status: int | None, output: str, limit: float) -> str:
    """What came out of a tool, from its exit status (None: stopped) and what it printed."""
    ran = re.findall(r"^every operator ran: (.+)$", output, re.MULTILINE)
    summary = [line.strip("= ") for line in output.splitlines() if re.search(r"(ERROR|RACECHECK) SUMMARY", line)]
    if status == _FOUND:
        return f"ERRORS: {(summary or ['see checks.log'])[-1]}"
    if status is None:
        return f"not at its end after {limit:.0f} s, and stopped; nothing is known"
    if status == 0 and ran and summary:
        return f"no errors ({summary[-1]}; {ran[-1]})"
    return f"did not run to its end (exit status {status}): {_last_line(output)}"


class _Done:
    """What a program printed, and its exit status; None where it was stopped."""

    def __init__(self, status: int | None, output: str) -> None:
        self.status, self.output = status, output


def _run(command: Sequence[str], limit: float, settings: Mapping[str, str] | None = None) -> _Done:
    """Run a program in the repository, with this Python's programs on its path, for so many seconds."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    full = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **(settings or {})}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=full, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        status: int | None = None
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        return _Done(status, log.read().decode(errors="replace"))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]


def draw(results: Results) -> None:
    """The figures, if matplotlib is there."""
    if not results.rows:
        return
    if importlib.util.find_spec("matplotlib") is None:
        tell(f"no figures, for matplotlib is missing; later: python -m benchmarks.plots {results.path}")
        return
    from . import plots

    plots.draw(results.path)


# ---- measuring -------------------------------------------------------------------------------------------------------


class Measurement:
    """The cases and the training step. red, failed: get what went wrong, in words."""

    def __init__(
        self, arguments: argparse.Namespace, device: Device, results: Results, red: list[str], failed: list[str]
    ) -> None:
        self.device, self.results, self.red, self.failed = device, results, red, failed
        self.quick, self.compile, self.seconds = arguments.quick, not arguments.no_compile, arguments.budget
        self.commit = arguments.commit
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
        cases = [c for c in for_gpus(QUICK_CASES if self.quick else CASES) if family(c) in chosen]
        # A case that was cut short by the time is measured now.
        self.results.rows = [
            r for r in self.results.rows if not (r["status"] == LEFT_OUT and r["contestant"] == CAPSOPS)
        ]
        todo = [(c, d) for c in cases for d in c.directions if not self._there(c, d)]
        if self.compile and self.device.on_gpu:
            self._compile_ahead(todo)
        finished = set(self.results.finished)
        step_after = 4  # cases
        for number, case in enumerate(cases):
            if number == step_after and TRAINING_STEP in chosen:
                self._training_step()
                finished.add(TRAINING_STEP)
            for direction in case.directions:
                if (case, direction) in todo:
                    self._case(case, direction)
            part = family(case)
            if part not in finished and all(family(c) != part for c in cases[number + 1 :]):
                cut = any(r["family"] == part and r["status"] == LEFT_OUT for r in self._ours())
                if not cut:
                    self.results.finish(part)
        if TRAINING_STEP in chosen and TRAINING_STEP not in finished:
            self._training_step()
        self.tell("measured")

    def tell(self, text: str) -> None:
        tell(f"[{time.perf_counter() - self.start:5.0f} s] {text}")

    def _ours(self) -> list[dict[str, Any]]:
        return [row for row in self.results.rows if row["contestant"] == CAPSOPS]

    def _there(self, case: Case, direction: str) -> bool:
        return self.results.has(family(case), case.shape.name, case.label, direction)

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

    def _spent(self, share: float) -> bool:
        return time.perf_counter() - self.start > share * self.seconds

    def _budget(self, compile: bool) -> Budget:
        from .race import Budget

        if self.quick:
            return Budget(race=0.02, final=0.05, compile=compile)
        return (
            Budget(race=0.05, final=0.3, limit=60, compile=compile) if self.device.on_gpu else Budget(compile=compile)
        )

    def _compile_ahead(self, todo: Sequence[tuple[Case, str]]) -> None:
        """Compile the PyTorch forms of all cases, some at a time, into torch's cache on the disk: one after the other
        they would take most of the time. Only until the measuring begins."""
        from concurrent.futures import ThreadPoolExecutor, wait

        from . import forms, race, worker

        def compile(case: Case, direction: str) -> None:
            names = [form.name for form in forms.contestants(case) if form.kind == "compiled"]
            # What does not compile says so when it is timed.
            with suppress(worker.MeasurementError, worker.OutOfMemory, worker.TooSlow):
                for _ in worker.events(race.warm, case, direction, names, self.device, limit=90):
                    if self._spent(_AHEAD):
                        return

        wanted = [(case, direction) for case, direction in todo if case.dtype == "float32"]
        self.tell(f"compiling the PyTorch forms of {len(wanted)} comparisons, {_COMPILERS} at a time")
        compilers = max(1, min(_COMPILERS, (os.cpu_count() or 2) // 2))
        pool = ThreadPoolExecutor(compilers)
        try:
            left = _AHEAD * self.seconds - (time.perf_counter() - self.start)
            wait([pool.submit(compile, *what) for what in wanted], timeout=max(left, 0))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        self.tell("compiled")

    def _case(self, case: Case, direction: str) -> None:
        from . import gate, race, worker

        what = f"{case}, {direction}"

        def nothing(status: str, reason: str) -> list[Timing]:
            return [race.Timing(CAPSOPS, CAPSOPS, case.shape.N, status=status, reason=reason[:500])]

        if self._spent(1):
            self._add(case, direction, nothing(LEFT_OUT, f"{self.seconds:.0f} s were spent"))
            self.tell(f"{what}: left out, the time is spent")
            return
        try:
            self._gate(case)
            compiling = self.compile and not self._spent(_COMPILING)
            timings = race.run(case, direction, self._budget(compiling), self.device)
            if self.compile and not compiling and case.dtype == "float32":
                reason = f"nothing is compiled after {_COMPILING * self.seconds:.0f} s"
                timings.append(
                    race.Timing("compiled forms", BEST_COMPILED, case.shape.N, status=LEFT_OUT, reason=reason)
                )
        except gate.GateError as error:
            timings = nothing(RED, str(error))
            self.red.append(f"{what}: {error}")
        except (worker.MeasurementError, worker.OutOfMemory, worker.TooSlow) as error:
            timings = nothing(race.FAILED, str(error) or type(error).__name__)
        self.failed += [
            f"{what}: {t.form}: {t.reason}"
            for t in timings
            if t.role in (race.CAPSOPS, race.OTHER) and t.status not in (race.OK, RED)
        ]
        self._add(case, direction, timings)

    def _gate(self, case: Case) -> None:
        """Raises GateError if the forms of this kind of case do not agree with the reference; once for all rungs of the
        ladder."""
        from . import gate, worker

        (kind,) = gate.distinct([case])
        key = (kind.ladder or kind.shape.name, kind.routing.name, kind.dtype)
        if key not in self.gates:
            self.gates[key] = ""
            try:
                list(worker.events(gate.check_all, [case], self.device, limit=120))
            except gate.GateError as error:
                self.gates[key] = str(error)
            except BaseException:
                del self.gates[key]
                raise
        if self.gates[key]:
            raise gate.GateError(self.gates[key])

    def _add(self, case: Case, direction: str, timings: Sequence[Timing]) -> None:
        from . import tables

        extra = {timing.form: timing.extra for timing in timings}
        rows = tables.measured(case, direction, timings, extra, self.best, self.where)
        for row in rows:
            name = row["form"].removeprefix("capsops").strip()
            row["backend"] = (name or self.device.type) if row["form"].startswith("capsops") else ""
            row |= {column: row.get(column, "") for column in ("median_s", "ratio_to_capsops", "extra_MB")}
        self.results.rows += rows
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
                training_step.measure, preset, steps, training_step.ROUTINGS, ways, self.device, limit=120
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
