"""What `python -m benchmarks.gpu` leaves: results.csv, training_step.csv, kernels.csv, environment.json, checks.log,
results.md.

Every file is written whole under a temporary name and renamed, after every case: a run that is killed loses the case it
was at. A later run adds the parts that are not there yet. results.md is made from the other files, and from nothing
else: `python -m benchmarks.gpu_results DIR` makes it again, `python -m benchmarks.plots DIR` the figures.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .program import (
    OutputError,
    ResultsError,
    lock_folder,
    output_errors,
    print_line,
    run_program,
    write_csv,
    write_json,
    write_text,
)
from .shapes import BOTH, CASES, DIRECTIONS, FORWARD, families

# As `race` has them, which imports torch.
OK, LEFT_OUT = "ok", "left out"
CAPSOPS, OTHER, PUBLISHED = "capsops", "capsops, other backend", "published"
BEST_EAGER, BEST_COMPILED = "best eager", "best compiled"
RED = "gate red"

RESULTS, STEPS, KERNELS, ENVIRONMENT, REPORT, LOG = (
    "results.csv",
    "training_step.csv",
    "kernels.csv",
    "environment.json",
    "results.md",
    "checks.log",
)
TESTS, TRAINING_STEP, PROFILER, COMPILED = "tests", "training-step", "profiler", "compiled"
SANITIZER, NCU, TRITON_TESTS = "sanitizer", "ncu", "tests-triton"
# In the order in which they run.
PARTS = (TESTS, *families(CASES), TRAINING_STEP, PROFILER, COMPILED, SANITIZER, NCU, TRITON_TESTS)

WHERE = ("backend", "copy_GB_per_s", "device", "driver", "cuda", "python", "torch", "triton", "capsops", "commit")
KERNEL_COLUMNS = ("source", "shape", "routing", "direction", "backend", "kernel", "metric", "unit", "value")
_WHOLE = ("B", "N", "K", "rows", "J", "D", "rounds")

Row = Mapping[str, Any]


@dataclass
class Results:
    """The folder, and what is in it."""

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> Results:
        """Raises ResultsError: a file cannot be read. A file that is not there is empty."""
        results = Results(path)
        try:
            for name, rows in ((RESULTS, results.rows), (STEPS, results.steps), (KERNELS, results.kernels)):
                if (path / name).exists():
                    with (path / name).open(newline="", encoding="utf-8") as file:
                        rows += csv.DictReader(file)
            for row in results.rows:
                row |= {name: int(row[name]) for name in _WHOLE}
            if (path / ENVIRONMENT).exists():
                results.environment = json.loads((path / ENVIRONMENT).read_text(encoding="utf-8"))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResultsError(f"{path} holds no results that can be read: {error}") from error
        return results

    @staticmethod
    @contextmanager
    def opened(path: Path, parts: Sequence[str], overwrite: bool) -> Iterator[Results]:
        """The folder, for a run of these parts alone. What another run has measured of them stays.

        Raises OutputError: another program's results are there, or all of the parts, and these are not to be
        overwritten; or another run writes there; or the folder cannot be written. ResultsError: as `read`.
        """
        with output_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        with lock_folder(path):
            files = [name for name in (RESULTS, ENVIRONMENT, REPORT, STEPS, KERNELS) if (path / name).exists()]
            results = Results.read(path) if (path / ENVIRONMENT).exists() else Results(path)
            if files and "finished" not in results.environment:
                raise OutputError(f"{path} holds {files[0]} of another program; name another folder with --out")
            present = [part for part in parts if part in results.finished]
            if len(present) == len(parts) and not overwrite:
                raise OutputError(
                    f"{path} holds results of {', '.join(present)}; --overwrite replaces them, --only chooses others"
                )
            if overwrite:
                results.rows = [
                    row
                    for row in results.rows
                    if (COMPILED if row["form"].startswith("compiled") else row["family"]) not in parts
                ]
                results.kernels = [row for row in results.kernels if row["source"] not in parts]
                results.steps = [] if TRAINING_STEP in parts else results.steps
                for part in parts:
                    results.checks.pop(part, None)
                results.environment["finished"] = [part for part in results.finished if part not in parts]
            results.environment.setdefault("finished", [])
            yield results

    @property
    def finished(self) -> list[str]:
        """The parts that were measured to their end."""
        return list(self.environment.get("finished", []))

    @property
    def checks(self) -> dict[str, Any]:
        """Of the tests and of compute-sanitizer: what came out, by name."""
        return self.environment.setdefault("checks", {})  # type: ignore[no-any-return]

    def finish(self, part: str) -> None:
        self.environment["finished"] = [*self.finished, part]
        self.save()

    def has(self, shape: str, routing: str, direction: str, compiled: bool = False) -> bool:
        """Whether there are rows of a case, those of its compiled forms or the others."""
        return any(
            (r["shape"], r["routing"], r["direction"], r["form"].startswith("compiled"))
            == (shape, routing, direction, compiled)
            for r in self.rows
        )

    def save(self) -> None:
        """Write each file that has content. Raises OutputError."""
        from .tables import MEASURED

        if self.rows:
            write_csv(self.path / RESULTS, self.rows, (*MEASURED, *WHERE))
        if self.steps:
            # The report has the digits that the file has, so that it can be made again from the file.
            self.steps = [
                {name: float(f"{x:.6g}") if isinstance(x, float) else x for name, x in row.items()}
                for row in self.steps
            ]
            write_csv(self.path / STEPS, self.steps)
        if self.kernels:
            write_csv(self.path / KERNELS, self.kernels, KERNEL_COLUMNS)
        write_json(self.path / ENVIRONMENT, self.environment)
        write_text(self.path / REPORT, self.report())

    def report(self) -> str:
        """results.md."""
        return report(self.rows, self.steps, self.environment, self.kernels)

    @property
    def log(self) -> Path:
        """What the programs printed that were run."""
        return self.path / LOG


# ---- goals -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """measured: None where it was not, and `why`. wanted: at least, or at most."""

    what: str
    where: str
    measured: float | None
    wanted: float
    unit: str
    at_most: bool = False
    why: str = ""

    @property
    def reached(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def cells(self) -> list[str]:
        sign = "≤ " if self.at_most else "≥ "
        measured = f"not measured: {self.why}" if self.measured is None else _number(self.measured, self.unit)
        reached = {None: "–", True: "yes", False: "no"}[self.reached]
        return [self.what, self.where, measured, sign + _number(self.wanted, self.unit), reached]


def _number(x: float, unit: str) -> str:
    return f"{x:.1%}" if unit == "%" else f"{x:.3g} ×" if unit == "×" else f"{x:,.1f} {unit}"


def goals(rows: Sequence[Row], steps: Sequence[Row]) -> list[Goal]:
    """What was aimed at, with what was measured; at the paper's shape in float32 unless it says otherwise."""

    def found(shape: str, routing: str, direction: str, contestant: str) -> Row | None:
        key = (shape, routing, direction, contestant)
        names = ("shape", "routing", "direction", "contestant")
        return next((r for r in rows if tuple(r[name] for name in names) == key), None)

    def seconds(row: Row | None) -> float | None:
        return float(row["median_s"]) if row and row["status"] == OK and row["median_s"] else None

    def why(row: Row | None, name: str) -> str:
        return f"{name}: {row['status']}" if row and row["status"] != OK else f"no row of {name}"

    def ratio(what: str, over: str, under: str, wanted: float, slower: tuple[str, str], ours: tuple[str, str]) -> Goal:
        """Of two medians. slower, ours: a routing and a contestant."""
        shape, direction = over, under
        a = found(shape, slower[0], direction, slower[1])
        b = found(shape, ours[0], direction, ours[1])
        x, y = seconds(a), seconds(b)
        missing = why(b, ours[1]) if y is None else why(a, slower[1])
        where = f"{shape}, {ours[0]}, {direction}"
        return Goal(what, where, None if x is None or y is None else x / y, wanted, "×", why=missing)

    def bandwidth(what: str, direction: str, wanted: float) -> Goal:
        row = found("paper", "attention", direction, CAPSOPS)
        share = None if row is None or seconds(row) is None else float(row["GB_per_s"]) / float(row["copy_GB_per_s"])
        return Goal(what, f"paper, attention, {direction}", share, wanted, "%", why=why(row, CAPSOPS))

    def peers(shape: str, routing: str, direction: str, wanted: float, contestant: str = BEST_COMPILED) -> Goal:
        name = "the fastest compiled form" if contestant == BEST_COMPILED else "the published formulation"
        ours = (routing, CAPSOPS)
        return ratio(f"times as fast as {name}", shape, direction, wanted, (routing, contestant), ours)

    out = [
        bandwidth("share of the measured copy bandwidth", FORWARD, 0.7),
        bandwidth("share of the bandwidth floor", BOTH, 0.6),
        *(peers("paper", "attention", direction, 8) for direction in DIRECTIONS),
        *(peers("paper", "attention", direction, 50, PUBLISHED) for direction in DIRECTIONS),
        *(peers("paper", routing, BOTH, 5) for routing in ("dynamic", "dynamic, detached")),
        *(peers("mnist", "dynamic", direction, 3) for direction in DIRECTIONS),
        *(
            ratio(
                "times as fast in bfloat16 as in float32",
                "paper",
                direction,
                1.7,
                ("attention", CAPSOPS),
                ("attention, bfloat16", CAPSOPS),
            )
            for direction in DIRECTIONS
        ),
    ]
    weighed = [r for r in rows if r["shape"] == "paper" and r["contestant"] == CAPSOPS and r.get("extra_MB")]
    most = max(weighed, key=lambda r: float(r["extra_MB"]), default=None)
    at = "paper" if most is None else f"paper, {most['routing']}, {most['direction']}: the most of all"
    extra = None if most is None else float(most["extra_MB"])
    out.append(Goal("memory beyond inputs and results", at, extra, 64, "MB", at_most=True, why="no row of capsops"))
    fused = next((s for s in steps if s["way"] == "fused"), None)
    share = float(fused["routing_share"]) if fused and fused["status"] == OK else None
    reason = fused["status"] if fused else "no row"
    name = f"preset {fused['preset']}" if fused else "preset paper"
    out.append(Goal("share of routing in a training step", name, share, 0.1, "%", at_most=True, why=reason))
    return out


# ---- the report ------------------------------------------------------------------------------------------------------


def report(
    rows: Sequence[Row], steps: Sequence[Row], environment: Mapping[str, Any], kernels: Sequence[Row] = ()
) -> str:
    """results.md."""
    from .tables import memory, table, times

    lines = ["# Routing, measured on a device", "", *_head(environment)]
    if rows or steps:
        header = ("goal", "where", "measured", "wanted", "reached")
        lines += ["", "## Goals", "", *table(header, [goal.cells() for goal in goals(rows, steps)])]
        lines += [
            "",
            "float32 unless it says otherwise, TF32 off. Medians of rounds in which capsops and its peers take turns, "
            "on random inputs that no cache holds; in brackets the quartiles, behind a peer's time that time over "
            "capsops'. Calls from Python, one behind the other. The floor is the least time that the compulsory bytes "
            "and operations take at the rates above, and its share the floor over capsops' time. Memory is the peak "
            "beyond the inputs and the results.",
        ]
    lines += _backends(rows)
    by_family: dict[str, list[Row]] = {}
    for row in rows:
        by_family.setdefault(row["family"], []).append(row)
    peers = (OTHER, PUBLISHED, BEST_EAGER, BEST_COMPILED)
    for name, group in by_family.items():
        size = f"{group[0]['size']} to {group[-1]['size']}" if len({r["N"] for r in group}) > 1 else group[0]["size"]
        lines += ["", f"## {name}: {size}", "", *times(group, peers)]
        if any(row["extra_MB"] for row in group):
            lines += ["", *memory(group, peers)]
    if steps:
        lines += ["", "## A training step of CardioCaps", "", *_steps(steps)]
    lines += [*_profiles(kernels), *_counts(kernels), *_checks(environment.get("checks", {}))]
    missing = [row for row in rows if row["status"] != OK]
    if missing:
        header = ("shape", "routing", "direction", "form", "status", "reason")
        cells = [[str(row[name]).replace("|", "/").replace("\n", " ") for name in header] for row in missing]
        lines += ["", "## Without a number", "", *table(header, cells)]
    left = [part for part in PARTS if part not in environment.get("finished", [])]
    if left:
        lines += ["", f"Not measured to their end: {', '.join(left)}."]
    return "\n".join(lines) + "\n"


def _head(environment: Mapping[str, Any]) -> list[str]:
    if "machine" not in environment:
        return ["Nothing was measured."]
    here, versions, rates = environment["machine"], environment["versions"], environment["machine"]["rates"]
    on_gpu = "compute_capability" in here
    gpu = f", driver {here['driver'] or 'unknown'}, CUDA {here['cuda'] or 'unknown'}" if on_gpu else ""
    lines = [
        f"{here['device']}{gpu}; torch {versions['torch']}, Triton {versions['triton'] or 'none'}, Python "
        f"{versions['python']}, nvcc {versions['nvcc'] or 'none'}; capsops {versions['capsops']} "
        f"({versions['capsops_built_by']}); commit {environment['commit'] or 'unknown'}; {environment['date']}.",
        "",
        f"Measured there: copying {rates['copy'] / 1e9:,.0f} GB/s, read and written bytes together; products of large "
        "matrices, in TFLOP/s: "
        + ", ".join(f"{name} {rate / 1e12:,.1f}" for name, rate in rates.items() if name != "copy")
        + ".",
    ]
    for name, state in environment.get("backends", {}).items():
        lines += ["", f"Backend {name}: {state}."]
    if environment.get("build"):
        lines += ["", f"Build: {environment['build']}."]
    if environment.get("quick"):
        lines += ["", "**Toy sizes, for trying out the program: the numbers mean nothing.**"]
    if "earlier" in environment:
        lines += ["", f"Some parts were measured at another commit or on another device: {environment['earlier']}."]
    return lines


def _backends(rows: Sequence[Row]) -> list[str]:
    """Where one backend overtakes the other: both times of every case, from the fewest votes to the most."""
    from .tables import table

    cases: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row["contestant"] in (CAPSOPS, OTHER) and row["status"] == OK:
            key = (row["shape"], row["routing"], row["direction"])
            cases.setdefault(key, {})[str(row["backend"])] = row
    both = {key: by for key, by in cases.items() if {"cuda", "triton"} <= by.keys()}
    if not both:
        return []

    def votes(by: Mapping[str, Row]) -> int:
        row = by["cuda"]
        return int(row["B"] * row["N"] * row["J"] * row["D"] * max(row["rows"], 1))

    cells = []
    for key, by in sorted(both.items(), key=lambda item: (DIRECTIONS.index(item[0][2]), votes(item[1]))):
        cuda, triton = float(by["cuda"]["median_s"]), float(by["triton"]["median_s"])
        faster = "cuda" if cuda <= triton else "triton"
        cells.append(
            [*key, f"{votes(by):,}", f"{cuda * 1e3:.3g}", f"{triton * 1e3:.3g}", f"{triton / cuda:.3g}", faster]
        )
    header = (
        "shape",
        "routing",
        "direction",
        "numbers in the votes",
        "cuda, ms",
        "triton, ms",
        "triton / cuda",
        "faster",
    )
    return ["", "## Which backend is the faster", "", *table(header, cells)]


def _steps(steps: Sequence[Row]) -> list[str]:
    from .tables import table

    parts = ("step", "forward", "backward", "optimiser", "routing_forward", "routing_backward")
    header = (
        "preset",
        "batch",
        "routing",
        "by",
        *(f"{p.replace('_', ' ')}, ms" for p in parts),
        "routing's share",
        "peak MB",
    )
    cells = []
    for s in steps:
        name = [s["preset"], str(s.get("batch") or "–"), s["routing"], s["way"]]
        if s["status"] != OK:
            cells.append([*name, f"{s['status']}: {s['reason']}".replace("|", "/"), *["–"] * (len(parts) + 1)])
            continue
        peak = f"{float(s['peak_MB']):,.0f}" if s.get("peak_MB") else "–"
        cells.append([*name, *(f"{1e3 * float(s[p]):.4g}" for p in parts), f"{float(s['routing_share']):.2%}", peak])
    return table(header, cells)


def _profiles(kernels: Sequence[Row]) -> list[str]:
    """Microseconds of each kernel, by torch's profiler."""
    from .tables import table

    names = ("shape", "routing", "direction", "backend", "kernel")
    calls: dict[tuple[str, ...], dict[str, float]] = {}
    for row in kernels:
        if row["source"] == PROFILER:
            calls.setdefault(tuple(row[name] for name in names), {})[row["metric"]] = float(row["value"])
    if not calls:
        return []
    total: dict[tuple[str, ...], float] = {}
    for key, found in calls.items():
        total[key[:4]] = total.get(key[:4], 0.0) + found["time a call"]
    cells = [
        [
            *key[:4],
            _short(key[4]),
            f"{found['launches a call']:g}",
            f"{found['time a call']:.4g}",
            f"{found['time a call'] / total[key[:4]]:.0%}",
        ]
        for key, found in calls.items()
        if found["time a call"] >= 0.01 * total[key[:4]]
    ]
    header = (*names, "launches a call", "µs a call", "share")
    return ["", "## Microseconds a kernel", "", *table(header, cells)]


# Of ncu's report: section and metric, and what it is called here.
_COUNTS = {
    "GPU Speed Of Light Throughput: Duration": "time",
    "GPU Speed Of Light Throughput: Compute (SM) Throughput": "arithmetic, %",
    "GPU Speed Of Light Throughput: DRAM Throughput": "memory, %",
    "GPU Speed Of Light Throughput: L1/TEX Cache Throughput": "L1, %",
    "GPU Speed Of Light Throughput: L2 Cache Throughput": "L2, %",
    "Launch Statistics: Registers Per Thread": "registers",
    "Occupancy: Achieved Occupancy": "occupancy, %",
    "Scheduler Statistics: Eligible Warps Per Scheduler": "eligible warps",
    "Scheduler Statistics: No Eligible": "no eligible warp, %",
    "Warp State Statistics: Warp Cycles Per Issued Instruction": "cycles an instruction",
}


def _counts(kernels: Sequence[Row]) -> list[str]:
    """What limits each kernel, by ncu."""
    from .tables import table

    names = ("shape", "routing", "direction", "kernel")
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in kernels:
        if row["source"] == NCU and row["metric"] in _COUNTS:
            value = f"{row['value']} {row['unit']}" if _COUNTS[row["metric"]] == "time" else row["value"]
            found.setdefault(tuple(row[name] for name in names), {})[_COUNTS[row["metric"]]] = value
    if not found:
        return []
    header = (*names, *_COUNTS.values())
    cells = [[*key[:3], _short(key[3]), *(of.get(name, "–") for name in _COUNTS.values())] for key, of in found.items()]
    return ["", "## What limits the kernels, by Nsight Compute", "", *table(header, cells)]


def _short(kernel: str) -> str:
    """A kernel's name, shortened for the table: without the parts that all names share."""
    name = kernel.replace("capsops::", "").replace("void ", "").replace("|", "/")
    return name if len(name) <= 90 else f"{name[:87]}…"


def _checks(checks: Mapping[str, Any]) -> list[str]:
    if not checks:
        return []
    return [
        "",
        "## Checks",
        "",
        *(f"* {name}: {outcome}" for found in checks.values() for name, outcome in found.items()),
    ]


def fastest(rows: Sequence[Row]) -> str:
    """A comparison in a few words, for the progress line."""
    words = []
    for row in rows:
        if row["contestant"] not in (CAPSOPS, OTHER, PUBLISHED, BEST_COMPILED):
            continue
        name = row["form"] if row["contestant"] in (CAPSOPS, OTHER) else row["contestant"]
        time = f"{float(row['median_s']) * 1e3:.3g} ms" if row.get("median_s") else row["status"]
        words.append(f"{name} {time}")
    return ", ".join(words) or "nothing"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 written, 2 wrong option, 3 no usable results, 4 output not writable."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_results", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="holds results.csv and environment.json, and gets results.md")
    folder: Any = parser.parse_args(argv).folder

    def body() -> None:
        results = Results.read(folder)
        if not results.environment:
            raise ResultsError(f"{folder} holds no {ENVIRONMENT}; `python -m benchmarks.gpu` writes one")
        write_text(folder / REPORT, results.report())
        print_line(f"written: {folder / REPORT}")

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
