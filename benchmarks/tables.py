"""The results as files: results.csv (a row for every shape, routing, direction and form), overhead.csv and
training_step.csv, environment.json, and results.md for reading.

They take the place of an earlier run's together, by renaming a folder that is complete.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import machine as machine_
from .machine import Machine
from .program import OutputError, output_errors, write_csv, write_json, write_text
from .race import BEST_COMPILED, BEST_EAGER, CAPSOPS, OK, OTHER, PUBLISHED, Timing
from .shapes import DIRECTIONS, Case, family

RESULTS = "results.csv"
# What `benchmarks.gpu_counts` writes beside them. It stays.
COUNTS = ("gpu_counts.csv", "gpu_counts.md")
FILES = (RESULTS, "results.md", "environment.json", "overhead.csv", "training_step.csv", "speed.png", "scaling.png")

MEASURED = (
    *("family", "shape", "size", "B", "N", "K", "rows", "J", "D"),
    *("routing", "direction", "form", "contestant", "status"),
    *("median_s", "quartile1_s", "quartile3_s", "rounds", "timed_at_N", "ratio_to_capsops"),
    *("GB_per_s", "GFLOP_per_s", "floor_s", "share_of_floor", "extra_MB", "reason"),
)
COLUMNS = (
    *MEASURED,
    *("cpu", "cores", "threads", "instruction_set", "python", "torch", "capsops", "compiler", "commit"),
)


def rows(
    case: Case,
    direction: str,
    timings: Sequence[Timing],
    extra: Mapping[str, int | None],
    machine: Machine,
    environment: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """A comparison as rows. extra: peak bytes by form. Rates and the share of the floor are of the compulsory bytes and
    operations, whatever a form really moves."""
    hardware, versions = environment["machine"], environment["versions"]
    where = {name: hardware[name] for name in ("cpu", "cores", "threads", "instruction_set")}
    where |= {name: versions[name] for name in ("python", "torch", "capsops", "compiler")}
    return measured(case, direction, timings, extra, machine, {**where, "commit": environment["commit"]})


def measured(
    case: Case,
    direction: str,
    timings: Sequence[Timing],
    extra: Mapping[str, int | None],
    machine: Machine,
    where: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """As `rows`, with the columns of `where` at the end. A comparison in which capsops failed has no ratios."""
    shape, floor = case.shape, machine_.floor(case, direction)
    ours = next((timing.median for timing in timings if timing.role == CAPSOPS and timing.seconds), None)
    out = []
    order = (CAPSOPS, OTHER, PUBLISHED, BEST_EAGER, BEST_COMPILED)
    for timing in sorted(timings, key=lambda t: order.index(t.role) if t.role in order else len(order)):
        row: dict[str, Any] = {
            "family": family(case),
            "shape": shape.name,
            "size": str(shape),
            **{name: getattr(shape, name) for name in ("B", "N", "K", "rows", "J", "D")},
            "routing": case.label,
            "direction": direction,
            "form": timing.form,
            "contestant": timing.role,
            "status": timing.status,
            "rounds": len(timing.seconds) if timing.status == OK else 0,
            "timed_at_N": timing.N,
            "floor_s": f"{floor.seconds(machine):.6g}",
            "reason": timing.reason,
            **where,
        }
        if timing.seconds:
            median = timing.median
            low, high = timing.quartiles
            row |= {
                "median_s": f"{median:.6g}",
                "quartile1_s": f"{low:.6g}",
                "quartile3_s": f"{high:.6g}",
                "ratio_to_capsops": "" if ours is None else f"{median / ours:.4g}",
                "GB_per_s": f"{floor.bytes / median / 1e9:.4g}",
                "GFLOP_per_s": f"{floor.operations / median / 1e9:.4g}",
                "share_of_floor": f"{floor.seconds(machine) / median:.4g}",
            }
        if (peak := extra.get(timing.form)) is not None:
            row["extra_MB"] = f"{peak / 1e6:.4g}"
        out.append(row)
    return out


PEERS = (PUBLISHED, BEST_EAGER, BEST_COMPILED)


@contextmanager
def replacing(folder: Path, overwrite: bool) -> Iterator[Path]:
    """A new folder for the block to fill, which then takes the place of `folder`; if the block fails, nothing changes.

    COUNTS stay, and folders in it that hold results of their own (`benchmarks.gpu`). Raises OutputError: `folder` holds
    results and is not to be overwritten, or anything that is no result of a run, or it cannot be written.
    """
    with output_errors(folder):
        kept = {path.parent.name for path in folder.glob("*/environment.json")}
        kept |= {name for name in COUNTS if (folder / name).exists()}
        present = sorted({path.name for path in folder.iterdir()} - kept) if folder.exists() else []
        strange = [name for name in present if name not in FILES]
        if strange:
            raise OutputError(f"{folder} holds {strange[0]}, which no run has written; name another folder with --out")
        if present and not overwrite:
            raise OutputError(f"{folder} holds the results of an earlier run; --overwrite replaces them")
        tag = secrets.token_hex(4)
        new, old = (folder.with_name(f".{folder.name}.{tag}.{part}") for part in ("new", "old"))
        new.mkdir(parents=True)
        try:
            yield new
            if folder.exists():
                folder.rename(old)
            try:
                new.rename(folder)
            except BaseException:
                if old.exists():
                    old.rename(folder)
                raise
            for name in kept:
                (old / name).rename(folder / name)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            if not any((old / name).exists() for name in kept):
                shutil.rmtree(old, ignore_errors=True)


def write(
    folder: Path,
    results: Sequence[Mapping[str, Any]],
    overhead: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> None:
    """All files into a folder. Raises OutputError."""
    write_csv(folder / RESULTS, results, COLUMNS)
    write_json(folder / "environment.json", environment)
    if overhead:
        write_csv(folder / "overhead.csv", overhead)
    if steps:
        write_csv(folder / "training_step.csv", steps)
    write_text(folder / "results.md", markdown(results, overhead, steps, environment))


def markdown(
    results: Sequence[Mapping[str, Any]],
    overhead: Sequence[Mapping[str, Any]],
    steps: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> str:
    """The figures for reading."""
    hardware, versions = environment["machine"], environment["versions"]
    lines = [
        "# Results",
        "",
        f"{hardware['cpu']}, threads: {hardware['threads']}, {hardware['instruction_set']}; "
        f"Python {versions['python']}, torch {versions['torch']}, capsops {versions['capsops']} "
        f"({versions['capsops_built_by']}), {versions['compiler']}; commit {environment['commit']}.",
        "",
        f"Measured on this machine: reading {hardware['read'] / 1e9:.1f} GB/s ({hardware['read_by']}), copying "
        f"{hardware['copy'] / 1e9:.1f} GB/s, read and written bytes together ({hardware['copy_by']}), float32 "
        f"multiply-adds {hardware['fma'] / 1e9:.0f} GFLOP/s ({hardware['fma_by']}).",
        "",
        "float32. Medians of rounds in which capsops and its peers take turns, on inputs that no cache holds, with the "
        "quartiles in brackets; behind a peer's time, that time over capsops'. The floor is the least time that the "
        "compulsory bytes and operations take at the rates above, and its share the floor over capsops' time. Memory "
        "is the peak beyond the inputs and the results.",
    ]
    by_shape: dict[str, list[Mapping[str, Any]]] = {}
    for row in results:
        by_shape.setdefault(row["family"], []).append(row)
    for name, group in by_shape.items():
        size = f"{group[0]['size']} to {group[-1]['size']}" if len({r["N"] for r in group}) > 1 else group[0]["size"]
        lines += ["", f"## {name}: {size}", "", *times(group), "", *memory(group)]
    if overhead:
        lines += ["", "## A call at a tiny shape, in microseconds", ""]
        header = ("routing", "direction", "form", "a call", "in the kernel", "besides")
        keys = ("us_per_call", "us_in_kernel", "us_besides")
        cells = [
            [r["routing"], r["direction"], r["form"], *("–" if r[k] is None else f"{r[k]:.1f}" for k in keys)]
            for r in overhead
        ]
        lines += table(header, cells)
    if steps:
        lines += ["", "## A training step of CardioCaps, in seconds", ""]
        parts = ("step", "forward", "backward", "optimiser", "routing_forward", "routing_backward")
        header = ("preset", "batch", "routing", *(part.replace("_", " ") for part in parts), "routing's share")
        cells = [
            [r["preset"], str(r["batch"]), r["routing"], *(f"{r[p]:.4g}" for p in parts), f"{r['routing_share']:.2%}"]
            for r in steps
        ]
        lines += table(header, cells)
    return "\n".join(lines) + "\n"


def comparisons(group: Sequence[Mapping[str, Any]]) -> Iterator[tuple[list[str], dict[str, Mapping[str, Any]]]]:
    """For each routing and direction (on the ladder also N): what names it, and the rows by contestant."""
    keys = dict.fromkeys((row["routing"], row["N"], row["direction"]) for row in group)
    ladder = group[0]["family"] == "ladder"
    for routing, N, direction in sorted(keys, key=lambda k: (k[0], k[1], DIRECTIONS.index(k[2]))) if ladder else keys:
        chosen = {
            r["contestant"]: r for r in group if (r["routing"], r["N"], r["direction"]) == (routing, N, direction)
        }
        yield [routing, f"{N:,}" if ladder else direction], chosen


def times(group: Sequence[Mapping[str, Any]], peers: Sequence[str] = PEERS) -> list[str]:
    """The times of a family, a line for each routing and direction."""

    def cell(row: Mapping[str, Any] | None, *, peer: bool = True) -> str:
        if row is None:
            return "–"
        if row["status"] != OK or not row["median_s"]:
            return str(row["status"])
        low, high = _milliseconds(row["quartile1_s"]), _milliseconds(row["quartile3_s"])
        spread = f" ({low}–{high})" if row["rounds"] > 2 else ""
        ratio = f", ×{float(row['ratio_to_capsops']):.3g}" if peer and row["ratio_to_capsops"] else ""
        short = row["form"].removeprefix("compiled ").removeprefix("capsops").strip()
        name = f": {short}" if short not in ("", PUBLISHED) else ""
        return f"{_milliseconds(row['median_s'])}{spread}{ratio}{name}"

    second = "N" if group[0]["family"] == "ladder" else "direction"
    header = ("routing", second, "capsops, ms", "share of floor", *(f"{peer}, ms" for peer in peers))
    cells = [
        [
            *names,
            cell(by.get(CAPSOPS), peer=False),
            f"{float(by[CAPSOPS]['share_of_floor']):.0%}" if by.get(CAPSOPS, {}).get("share_of_floor") else "–",
            *(cell(by.get(peer)) for peer in peers),
        ]
        for names, by in comparisons(group)
    ]
    return table(header, cells)


def memory(group: Sequence[Mapping[str, Any]], peers: Sequence[str] = PEERS) -> list[str]:
    """The memory of a family, likewise."""
    second = "N" if group[0]["family"] == "ladder" else "direction"
    header = ("routing", second, "capsops, extra MB", *(f"{peer}, extra MB" for peer in peers))
    cells = [
        [*names, *(f"{float(x):,.1f}" if (x := by.get(who, {}).get("extra_MB")) else "–" for who in (CAPSOPS, *peers))]
        for names, by in comparisons(group)
    ]
    return table(header, cells)


def _milliseconds(seconds: str) -> str:
    x = 1e3 * float(seconds)
    return f"{x:,.0f}" if x >= 1000 else f"{x:.3g}"


def table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *cells]
    return [f"| {' | '.join(line)} |" for line in lines]
