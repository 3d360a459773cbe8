"""The programs that `python -m benchmarks.gpu` starts: the build, the tests, compute-sanitizer.

What a program prints goes to checks.log as it comes, so that a run that is cut off keeps it. A program ends, with all
that it has started, when its time is over and when this process ends, however it ends.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .device import Device, find_tool
from .gpu_results import SANITIZER, TESTS, TRITON_TESTS, Results
from .program import print_line

ROOT = Path(__file__).resolve().parents[1]
TEST_MATRIX = "tests/capsops/test_gpu_backends.py"
SANITIZERS = ("memcheck", "racecheck", "synccheck")

# The exit status that compute-sanitizer is told to have for an error, and the first line of what it says of one.
_FOUND = 99
_ERROR = re.compile(r"^========= ((?:Invalid|Error: Race|Error: Potential|Barrier error|Program hit).*)$", re.MULTILINE)


def tell(text: str) -> None:
    """A line of progress."""
    print_line(text, sys.stderr)


@dataclass(frozen=True)
class Done:
    """What a program printed, and its exit status; None where it was stopped."""

    status: int | None
    output: str


def run_program(
    command: Sequence[str], limit: float, log: Path, title: str, settings: Mapping[str, str] | None = None
) -> Done:
    """Run a program in the repository for at most `limit` seconds, with this Python's programs on its path.

    Its output is appended to `log`, under the title, while it runs.
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **(settings or {})}
    with log.open("ab") as file:
        file.write(f"== {title}\n".encode())
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        # Reads until this process ends, even by SIGKILL, and then ends the program with all that it has started.
        guard = subprocess.Popen(
            ["/bin/sh", "-c", f"cat >/dev/null; kill -9 -{process.pid}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        status: int | None = None
        try:
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(max(limit, 0))
        finally:
            guard.kill()
            guard.wait()
            assert guard.stdin is not None
            guard.stdin.close()
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    with log.open("rb") as file:
        file.seek(start)
        return Done(status, file.read().decode(errors="replace"))


def last_line(text: str) -> str:
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]


_PROBE = """
import json, torch
from capsops.backends import cuda
why = cuda.why_not("dynamic_routing", torch.device("cuda"), torch.float32)
capability = torch.cuda.get_device_capability(0)
print(json.dumps([*capability, why, cuda.form_for(*capability) if why is None else None]))
"""


def build(results: Results, limit: float, rebuild: bool) -> str:
    """Build the extension for this GPU where it has no machine code for it; what was done, in words.

    The driver would compile PTX too, but perhaps PTX of an older GPU.
    """
    start = time.perf_counter()
    probe = run_program([sys.executable, "-c", _PROBE], limit, results.log, "probe")
    try:
        major, minor, why, form = json.loads(probe.output.splitlines()[-1])
    except (ValueError, IndexError):
        return f"not known what there is to build: {last_line(probe.output)}"
    buildable = ("does not load", "no extension", "without CUDA kernels", "were built for")
    there = f"the extension was there, with {form} for {major}.{minor}"
    if form == "machine code" and not rebuild:
        return there
    if why is not None and not any(part in why for part in buildable):
        return f"nothing, for it would not help: {why}"
    nvcc = find_tool("nvcc")
    if nvcc is None and why is None:
        tell(f"no nvcc was found (PATH, CUDA_HOME): {there}")
        return there
    if nvcc is None:
        tell(f"no nvcc was found (PATH, CUDA_HOME): Triton is measured alone ({why})")
        return f"nothing, for no nvcc was found; Triton is measured alone (cuda: {why})"
    tell(f"building the extension for compute capability {major}.{minor} by {nvcc}")
    settings = {"CAPSOPS_CUDA": "1", "CAPSOPS_CUDA_ARCHS": f"{major}{minor}", "CUDACXX": nvcc}
    left = limit - (time.perf_counter() - start)
    done = run_program([sys.executable, "setup.py", "build_ext", "--inplace"], left, results.log, "build", settings)
    seconds = time.perf_counter() - start
    if done.status != 0:
        how = "was stopped" if done.status is None else "failed"
        tell(f"the build {how} ({last_line(done.output)}); checks.log has all of it. Triton is measured alone")
        return f"{how} after {seconds:.0f} s; Triton is measured alone ({last_line(done.output)})"
    tell(f"built in {seconds:.0f} s")
    return f"the extension, for compute capability {major}.{minor} alone, in {seconds:.0f} s"


# Of the test matrix, by the names of its cases. Triton compiles more than a thousand kernels for it.
_TESTS = {TESTS: "not triton", TRITON_TESTS: "triton"}
# In pytest's line of a letter a test.
_FAILURE = re.compile(r"^[.sxXFE]*[FE][.sxXFE]*(\s+\[\s*\d+%\])?$", re.MULTILINE)


def test(results: Results, part: str, limit: float) -> list[str]:
    """The test matrix of the GPU backends: that of Triton, or all the rest. What failed."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--maxfail=25", TEST_MATRIX]
    command += ["-k", _TESTS[part]]
    workers = min(8, (os.cpu_count() or 1) // 2)
    if workers > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(workers)]
    tell(f"{part}: {' '.join(command[1:])}")
    done = run_program(command, limit, results.log, part)
    summary = last_line(done.output).strip("= ")
    if done.status is None:
        outcome = f"not at their end after {limit:.0f} s, and stopped: {summary}"
        # The CUDA tests take a minute, so that one of them hangs; Triton's may just be too many to compile.
        failed = part == TESTS or _FAILURE.search(done.output) is not None
    else:
        outcome = f"{'passed' if done.status == 0 else f'FAILED (exit status {done.status})'}: {summary}"
        failed = done.status != 0
    tell(f"{part}: {outcome}")
    results.checks[part] = {f"{TEST_MATRIX} -k '{_TESTS[part]}'": outcome}
    if done.status is None:
        results.save()
    else:
        results.finish(part)
    return [f"{part}: {outcome}"] if failed else []


def sanitize(results: Results, device: Device, limit: float) -> list[str]:
    """Every operator of the CUDA backend under compute-sanitizer's tools, which watch our kernels alone. What was
    found."""
    results.checks[SANITIZER] = outcomes = dict[str, str]()
    red = []
    start = time.perf_counter()
    path = find_tool("compute-sanitizer")
    for number, tool in enumerate(SANITIZERS):
        name = f"compute-sanitizer {tool}"
        if not device.on_gpu:
            outcomes[name] = "not run: it is for GPUs"
            continue
        if path is None:
            outcomes[name] = "not run: it was not found (PATH, CUDA_HOME)"
            continue
        share = (limit - (time.perf_counter() - start)) / (len(SANITIZERS) - number)
        tell(f"{name}, for at most {share:.0f} s")
        program = [sys.executable, "-m", "tests.capsops.every_operator", "--backend", "cuda"]
        options = ["--tool", tool, "--error-exitcode", str(_FOUND), "--report-api-errors", "no", "--print-limit", "20"]
        options += ["--kernel-name", "kns=capsops"]
        # An allocation of its own for every tensor, so that a step beyond one is seen.
        settings = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = run_program([path, *options, *program], share, results.log, name, settings)
        outcomes[name] = sanitized(done.status, done.output, share)
        if outcomes[name].startswith("ERRORS"):
            red.append(f"{name}: {outcomes[name]}")
        tell(f"{name}: {outcomes[name]}")
        results.save()
    if all("stopped" not in outcome for outcome in outcomes.values()):
        results.finish(SANITIZER)
    return red


def sanitized(status: int | None, output: str, limit: float) -> str:
    """What came out of a tool, from its exit status (None: stopped) and what it printed."""
    ran = re.findall(r"^every operator ran: (.+)$", output, re.MULTILINE)
    summary = [line.strip("= ") for line in output.splitlines() if re.search(r"(ERROR|RACECHECK) SUMMARY", line)]
    if status == _FOUND:
        return f"ERRORS: {(summary or ['see checks.log'])[-1]}"
    if status is None:
        found = _ERROR.search(output)
        until = f"ERRORS: {found[1].strip()}; " if found else ""
        return f"{until}not at its end after {limit:.0f} s, and stopped"
    if status == 0 and ran and summary:
        return f"no errors ({summary[-1]}; {ran[-1]})"
    return f"did not run to its end (exit status {status}): {last_line(output)}"
