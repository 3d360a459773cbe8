"""Where the time of a call goes on a GPU: microseconds of each kernel, and what Nsight Compute (ncu) counts of it.

python -m benchmarks.gpu_kernels --case "mnist, dynamic" --direction forward     one call, for a profiler to watch
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .device import CPU, Device, find_tool
from .gpu_checks import last_line, run_program, tell
from .gpu_results import CAPSOPS, NCU, PROFILER, Results
from .shapes import BOTH, CASES, DIRECTIONS, QUICK_CASES, Case, for_gpus

# Calls in a profile.
_CALLS = 5
# What ncu looks at: these cases, these sections of its report.
NCU_CASES = ("paper, attention", "mnist, dynamic", "paper, dynamic", "recommender, dynamic, detached")
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
    "SchedulerStats",
    "WarpStateStats",
)
# Seconds under which nothing more is begun.
_LEAST = 10.0


def profile(case: Case, direction: str, device: Device = CPU) -> Iterator[dict[str, Any]]:
    """Yields rows of kernels.csv, for `worker.events`: microseconds and launches of each kernel in a call."""
    from .race import prepare

    prepare(device)
    for form, call in _calls(case, direction, device):
        call()
        call()
        backend = form.name.removeprefix(CAPSOPS).strip() or device.type
        where = {"source": PROFILER, **_case(case, direction), "backend": backend}
        for kernel, launches, microseconds in device.profiled(call, _CALLS):
            yield {**where, "kernel": kernel, "metric": "time a call", "unit": "us", "value": f"{microseconds:.4g}"}
            yield {**where, "kernel": kernel, "metric": "launches a call", "unit": "", "value": f"{launches:.4g}"}


def _calls(case: Case, direction: str, device: Device) -> Iterator[tuple[Any, Any]]:
    """Each form of capsops that runs there, and a call of it."""
    from functools import partial

    from . import forms, gate

    inputs, gradients = case.inputs(device=device.type), case.output_gradients(device=device.type)
    for form in forms.contestants(case, device.backends(case)):
        if form.kind == CAPSOPS:
            yield form, partial(gate.call, form, inputs, direction, gradients)


def _case(case: Case, direction: str) -> dict[str, str]:
    return {"shape": case.shape.name, "routing": case.label, "direction": direction}


def look_inside(results: Results, device: Device, limit: float) -> None:
    """Run ncu on a call of each of NCU_CASES: its counts become rows of kernels.csv, a kernel once a case."""
    name = "ncu"
    outcomes = results.checks.setdefault(NCU, {})
    path = find_tool("ncu")
    if not device.on_gpu or path is None:
        outcomes[name] = "not run: it is for GPUs" if path or not device.on_gpu else "not run: it was not found"
        results.finish(NCU)
        return
    start, missing = time.perf_counter(), []
    there = {(row["shape"], row["routing"]) for row in results.kernels if row["source"] == NCU}
    for case in (c for c in for_gpus(CASES) if str(c) in NCU_CASES and (c.shape.name, c.label) not in there):
        left = limit - (time.perf_counter() - start)
        if left < _LEAST:
            missing.append(str(case))
            continue
        tell(f"ncu: {case}")
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "ncu.csv"
            command = ncu_command(path, case, report)
            done = run_program(command, left, results.log, f"ncu: {case}")
            text = report.read_text(errors="replace") if report.exists() else ""
        rows = read_ncu(text, case)
        if not rows:
            with results.log.open("a", encoding="utf-8") as log:
                log.write(text)
            outcomes[f"{name}, {case}"] = f"nothing (exit status {done.status}): {last_line(done.output + text)}"
        results.kernels = [*results.kernels, *rows]
        results.save()
    if missing:
        outcomes[name] = f"no time for {'; '.join(missing)}"
        results.save()
    else:
        outcomes.pop(name, None)
        results.finish(NCU)


def ncu_command(path: str, case: Case, report: Path) -> list[str]:
    """One call of the case, forward and backward, under ncu, which watches the kernels of capsops alone and leaves the
    clocks of the GPU as they are."""
    options = ["--clock-control", "none", "--target-processes", "all", "--profile-from-start", "off"]
    options += ["--kernel-name-base", "demangled", "--kernel-name", "regex:capsops"]
    options += [x for section in SECTIONS for x in ("--section", section)]
    options += ["--csv", "--page", "details", "--log-file", str(report)]
    return [path, *options, sys.executable, "-m", "benchmarks.gpu_kernels", "--case", str(case), "--direction", BOTH]


def read_ncu(text: str, case: Case) -> list[dict[str, Any]]:
    """Rows of kernels.csv from ncu's CSV: every metric of the first launch of each kernel."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launch: dict[str, str] = {}  # kernel -> the launch that is kept
    rows = []
    for row in csv.DictReader(io.StringIO("\n".join(lines[begin:]))):
        kernel = row.get("Kernel Name") or ""
        if not row.get("Metric Name") or launch.setdefault(kernel, row["ID"]) != row["ID"]:
            continue
        rows.append(
            {
                "source": NCU,
                **_case(case, BOTH),
                "backend": "cuda",
                "kernel": kernel,
                "metric": f"{row['Section Name']}: {row['Metric Name']}",
                "unit": row.get("Metric Unit") or "",
                "value": (row.get("Metric Value") or "").replace(",", ""),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """One call of a case, between the marks that a profiler which waits for them begins and ends at."""
    cases = {str(case): case for case in for_gpus(CASES)}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--case", choices=tuple(cases), required=True)
    parser.add_argument("--direction", choices=DIRECTIONS, default=BOTH)
    parser.add_argument("--quick", action="store_true", help="at a toy size")
    arguments = parser.parse_args(argv)
    import torch

    device = Device("cuda" if torch.cuda.is_available() else "cpu")
    device.prepare()
    if arguments.quick:
        cases = {str(case): case for case in for_gpus(QUICK_CASES)}
    _, call = next(_calls(cases[arguments.case], arguments.direction, device))
    call()
    device.synchronize()
    with device.watched():
        call()
        device.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(main())
