"""What the CUDA kernels do at the shapes of the benchmarks, counted from their machine code without a GPU.

    python -m benchmarks.gpu_counts                                    every shape, as tables on the terminal
    python -m benchmarks.gpu_counts --only paper --csv after.csv       one, with every count in a file
    python -m benchmarks.gpu_counts --baseline before.csv              beside the counts of another build
    python -m benchmarks.gpu_counts --markdown benchmarks/results/gpu_counts.md

Everything here is a model. Nothing is measured.

An operator of the built extension lists the kernels that it would launch (`capsops._C.LaunchQuery`). Of each launch,
the block in the middle of the grid runs on an interpreter of its machine code (`sass_run`), with the launch's own
arguments: so trips of loops, branches, bank conflicts and addresses are those of the shape, and the other blocks are
taken to do the same. `gpu_model` makes a time from the counts. Launches that differ only in the capsules that they
begin with are counted once. Masked input is as the benchmarks make it, half of the capsules.

Where the blocks of a launch read the same bytes, the launch moves a buffer at most once, so `bytes` is the least; a
buffer that stays in the L2 cache between launches is counted again. Sizes that are not a multiple of 32 bytes are
rounded up.

Exit status: 0 done; 2 wrong option; 3 the extension has no kernels for sm_90, or an instruction is not known; 4 output
not writable.
"""

from __future__ import annotations

import argparse
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from . import sass, sass_run
from .gpu_model import CLASSES, H100, WARP, Work, forecast, instruction_class
from .machine import floor
from .program import BenchmarkError, ResultsError, print_line, read_csv, run_program, write_csv, write_text
from .shapes import BOTH, CASES, FORWARD, Case, families, family, for_gpus

BACKWARD = "backward"
MODEL = "A model of an H100, counted from machine code. Nothing here was measured."
# Launches of one kernel that are alike have at most so many values of a number in their arguments; a number with more
# is where a launch begins.
_MOST_SIZES = 4


class NoKernels(BenchmarkError):
    """The extension was built without kernels for sm_90."""

    exit_code = 3


# ---- launches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A launch that an operator would do. kernel: its demangled name. times: how many of them are alike."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: bytes
    memory: tuple[sass_run.Buffer, ...]
    times: int = 1

    @property
    def blocks(self) -> int:
        x, y, z = self.grid
        return x * y * z


def _extension() -> Any:
    from capsops.backends.extension import _C

    if _C is None or _C.cuda_architectures is None or "90" not in _C.cuda_architectures.split():
        raise NoKernels("gpu_counts: the extension has no kernels for sm_90; CAPSOPS_CUDA=1 builds them")
    return _C


# The arguments of the operators behind the capsules. A name is a tensor; the operator gets its address.
_ARGUMENTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("attention", FORWARD): ("attn_weight", "attn_bias", "0", "squash", "v", "s"),
    ("attention", BACKWARD): (
        "attn_weight",
        "attn_bias",
        "0",
        "squash",
        "s",
        "g_v",
        "g_u",
        "g_weight",
        "g_attn_weight",
        "g_attn_bias",
        "0",
    ),
    ("dynamic", FORWARD): ("0", "iterations", "leaky", "squash", "v", "s"),
    ("dynamic", BACKWARD): ("iterations", "leaky", "detach", "squash", "s", "g_v", "g_u", "g_weight", "0"),
    ("self-attention", FORWARD): ("prior", "0", "scale", "v", "total", "s"),
    ("self-attention", BACKWARD): ("prior", "0", "scale", "total", "s", "g_v", "g_u", "g_weight", "g_prior", "0"),
}
_OPERATORS = {
    "uniform": "dynamic",
    "attention": "attention",
    "dynamic": "dynamic",
    "dynamic, detached": "dynamic",
    "self-attention": "self-attention",
}


def cases() -> list[Case]:
    """The cases of the benchmarks that have CUDA kernels, and those off the ladder in bfloat16 too."""
    found = [c for c in for_gpus(CASES) if c.routing.name in _OPERATORS and c.dtype == "float32"]
    return found + [replace(c, dtype="bfloat16") for c in found if not c.ladder]


def launches(case: Case, direction: str) -> list[Launch]:
    """The launches of an operator at a shape, those that are alike once.

    Args:
        case: what is routed.
        direction: FORWARD or BACKWARD.
    """
    _C, s, routing = _extension(), case.shape, case.routing
    kind = _OPERATORS[routing.name]
    small = 8 if case.dtype == "float64" else 4  # bytes of an accumulation number
    state = small * s.B * s.J * s.D
    sizes = {
        "u": case.itemsize * s.u_numbers,
        "weight": case.itemsize * s.weight_numbers,
        "mask": s.B * s.N * s.masked,
        "attn_weight": small * s.J * s.J,
        "attn_bias": small * s.J,
        "prior": small * s.N * s.J,
        **dict.fromkeys(("v", "total"), state),
        "s": state * (routing.iterations if kind == "dynamic" else 1),
    }
    sizes |= {f"g_{name}": size for name, size in sizes.items()}
    buffers = {name: sass_run.buffer(at, name, size) for at, (name, size) in enumerate(sizes.items())}
    if s.masked:
        lengths = 1 + np.arange(s.B) * 29 % s.N  # from one to N
        buffers["mask"].data = (np.arange(s.N) < lengths[:, None]).astype(np.uint8).ravel()
    capsules = _C.Capsules(
        buffers["u"].base,
        buffers["weight"].base,
        buffers["mask"].base if s.masked else 0,
        *(s.B, s.N, s.K, s.J, s.D, max(s.rows, 1)),
        0 if s.shared else s.K * s.J * s.D,
        getattr(_C.Dtype, case.dtype),
    )
    values: dict[str, Any] = {
        "0": 0,
        "iterations": routing.iterations,
        "leaky": False,
        "detach": routing.detach,
        "squash": _C.SquashKind.sabour,
        "scale": s.D**-0.5,
    }
    arguments = [values[n] if n in values else buffers[n].base for n in _ARGUMENTS[kind, direction]]
    operator = getattr(_C, f"{kind.replace('-', '_')}_routing{'_backward' * (direction == BACKWARD)}")
    size_query = _C.WorkspaceQuery(0)
    statuses = [operator(size_query, capsules, *arguments)]
    workspace = sass_run.buffer(len(buffers), "workspace", size_query.bytes)
    query = _C.LaunchQuery(0, workspace.base)
    statuses.append(operator(query, capsules, *arguments))
    if any(status != _C.Status.ok for status in statuses):
        raise NoKernels(f"gpu_counts: {case}, {direction}: the operator says {statuses[-1]}; expected ok")
    memory = (*buffers.values(), workspace)
    names = _symbols(_C.__file__)
    return _alike(
        [Launch(names[x.kernel_offset], x.grid, x.threads, x.shared_bytes, x.arguments, memory) for x in query.launches]
    )


@cache
def _symbols(extension: str) -> dict[int, str]:
    """The functions of the extension by address."""
    nm = shutil.which("nm")
    if nm is None:
        raise NoKernels("gpu_counts: nm was not found on the path; expected that of binutils")
    text = subprocess.run([nm, "-C", extension], capture_output=True, text=True, check=True).stdout
    symbols = (line.split(None, 2) for line in text.splitlines())
    return {int(parts[0], 16): parts[2] for parts in symbols if len(parts) == 3 and parts[1] in "tTwW"}


def _words(launch: Launch) -> tuple[int, ...]:
    """The arguments as 64-bit numbers, of which an address says only which buffer it is in."""
    padded = launch.arguments.ljust(-(-len(launch.arguments) // 8) * 8, b"\0")
    words = struct.unpack(f"<{len(padded) // 8}Q", padded)
    last = launch.memory[-1].base + (1 << sass_run.SPACING_BITS)
    return tuple(-(x >> sass_run.SPACING_BITS) if 1 << sass_run.SPACING_BITS <= x < last else x for x in words)


def _alike(found: Sequence[Launch]) -> list[Launch]:
    """One of all launches that are alike, the one in their middle, in the order of the first of each."""
    shapes: dict[tuple[Any, ...], list[Launch]] = {}
    for launch in found:
        shapes.setdefault((launch.kernel, launch.grid, launch.threads, launch.shared), []).append(launch)
    groups: dict[tuple[Any, ...], list[Launch]] = {}
    first: dict[tuple[Any, ...], int] = {}
    for shape, group in shapes.items():
        words = [_words(launch) for launch in group]
        sizes = [len(set(column)) <= _MOST_SIZES for column in zip(*words, strict=True)]
        for launch, own in zip(group, words, strict=True):
            key = (*shape, *(x for x, is_size in zip(own, sizes, strict=True) if is_size))
            groups.setdefault(key, []).append(launch)
            first.setdefault(key, found.index(launch))
    ordered = sorted(groups, key=first.__getitem__)
    return [replace(groups[key][len(groups[key]) // 2], times=len(groups[key])) for key in ordered]


# ---- counts ----------------------------------------------------------------------------------------------------------

_CLASS_COLUMNS = {name: f"{name}_a_capsule" for name in CLASSES}
COLUMNS = (
    *("shape", "routing", "operator", "launch", "times", "kernel", "blocks", "threads", "shared_bytes"),
    *("registers", "spilled_bytes", "resident_blocks", "resident_warps", "waves"),
    *("instructions_a_block", "instructions_a_capsule", "loop_instructions_a_capsule"),
    *_CLASS_COLUMNS.values(),
    *("wavefronts_a_capsule", "lines_a_capsule", "bytes", "l2_bytes", "cycles_a_block", "forecast_us", "bound"),
    *("floor_us",),
)
Row = dict[str, Any]


class Counter:
    """Counts launches. Keeps what it has counted, for cases that launch the same."""

    def __init__(self, kernels: dict[str, sass.Kernel]) -> None:
        self.kernels = kernels
        self.known: dict[tuple[Any, ...], sass_run.Counts] = {}

    def rows(self, case: Case, direction: str) -> list[Row]:
        """A row for each launch of an operator."""
        floors = {d: floor(case, d).bytes / H100.dram for d in (FORWARD, BOTH)}
        least = floors[FORWARD] if direction == FORWARD else floors[BOTH] - floors[FORWARD]
        out = []
        for number, launch in enumerate(launches(case, direction)):
            kernel, counts = self.counts(launch)
            row = {
                "shape": case.shape.name,
                "routing": case.label,
                "operator": direction,
                "launch": number,
                **_row(launch, kernel, counts, case.shape.N),
                "floor_us": f"{1e6 * least:.4g}",
            }
            out.append(row)
        return out

    def counts(self, launch: Launch) -> tuple[sass.Kernel, sass_run.Counts]:
        kernel = self.kernels.get(launch.kernel)
        if kernel is None:
            raise NoKernels(f"gpu_counts: {launch.kernel} has no machine code in the extension; expected some")
        sizes = tuple((b.size, b.data is None) for b in launch.memory)
        key = (launch.kernel, launch.grid, launch.threads, launch.shared, _words(launch), sizes)
        if key not in self.known:
            x, y, z = launch.grid
            run = sass_run.Run(
                kernel,
                launch.arguments,
                launch.grid,
                (x // 2, y // 2, z // 2),
                launch.threads,
                launch.shared,
                launch.memory,
            )
            self.known[key] = run.run()
        return kernel, self.known[key]


def _row(launch: Launch, kernel: sass.Kernel, counts: sass_run.Counts, N: int) -> Row:
    """What the model says of a launch. Numbers a capsule are those of all blocks and all launches that are alike."""
    by_class = dict.fromkeys(CLASSES, 0)
    for ins, count in zip(kernel.instructions, counts.instructions, strict=True):
        by_class[instruction_class(ins.opcode)] += count
    sizes = {b.name: b.size for b in launch.memory}
    moved = sum(min(sizes[n], launch.blocks * x) for part in (counts.read, counts.written) for n, x in part.items())
    shared = kernel.shared + launch.shared
    work = Work(
        blocks=launch.blocks,
        threads=launch.threads,
        registers=kernel.registers,
        shared=shared,
        instructions=by_class,
        wavefronts=sum(counts.wavefronts),
        lines=sum(counts.lines),
        l2_bytes=sum(counts.read.values()) + sum(counts.written.values()),
        bytes=moved,
        cycles=counts.cycles,
    )
    expected = forecast(work)

    def a_capsule(of_block: int) -> str:
        return f"{of_block * launch.blocks * launch.times / N:.4g}"

    begin, end = kernel_loop(kernel, counts.instructions)
    return {
        "times": launch.times,
        "kernel": short_name(launch.kernel),
        "blocks": launch.blocks,
        "threads": launch.threads,
        "shared_bytes": shared,
        "registers": kernel.registers,
        "spilled_bytes": kernel.stack + kernel.local,
        "resident_blocks": expected.resident,
        "resident_warps": expected.resident * launch.threads // WARP,
        "waves": f"{expected.waves:.3g}",
        "instructions_a_block": sum(counts.instructions),
        "instructions_a_capsule": a_capsule(sum(counts.instructions)),
        "loop_instructions_a_capsule": a_capsule(sum(counts.instructions[begin:end])),
        **{column: a_capsule(by_class[name]) for name, column in _CLASS_COLUMNS.items()},
        "wavefronts_a_capsule": a_capsule(work.wavefronts),
        "lines_a_capsule": a_capsule(work.lines),
        "bytes": work.bytes,
        "l2_bytes": work.l2_bytes * work.blocks,
        "cycles_a_block": round(counts.cycles),
        "forecast_us": f"{1e6 * expected.seconds:.4g}",
        "bound": expected.bound,
    }


def kernel_loop(kernel: sass.Kernel, executed: Sequence[int]) -> tuple[int, int]:
    """The loop that a block spends the most instructions in, as indices begin, end. A loop is what a branch backward
    spans, and of loops within each other the outermost one counts; (0, 0) if there is none."""
    at = {ins.address: index for index, ins in enumerate(kernel.instructions)}
    spans: list[tuple[int, int]] = []
    for index, ins in enumerate(kernel.instructions):
        match = re.fullmatch(r"BRA\S* .*?0x([0-9a-f]+)", ins.text)
        # The code ends with a branch to itself, which no thread reaches.
        if match and executed[index] and (target := at.get(int(match[1], 16), index)) < index:
            spans.append((target, index + 1))
    outermost: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if outermost and begin < outermost[-1][1]:
            outermost[-1] = (outermost[-1][0], max(end, outermost[-1][1]))
        else:
            outermost.append((begin, end))
    return max(outermost, key=lambda span: sum(executed[span[0] : span[1]]), default=(0, 0))


def short_name(demangled: str) -> str:
    """Such as "reduce_kernel<16, float, Attention<float, 16>>"."""
    name = re.sub(r"^void |capsops::|cuda::|\(anonymous namespace\)::", "", demangled)
    depth = 0
    for at, letter in enumerate(name):  # without the parameters
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            name = name[:at]
            break
    return name.replace("> >", ">>")


# ---- tables ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """An operator, or forward and backward together. Times in microseconds. bound: what binds most of the time."""

    launches: int
    fewest_blocks: int
    instructions: float
    forecast: float
    floor: float
    bound: str

    @property
    def share(self) -> float:
        """The floor's share of the forecast."""
        return self.floor / self.forecast


def totals(rows: Iterable[Row]) -> dict[tuple[str, str, str], Total]:
    """By shape, routing and direction. fewest_blocks: of launches that take a tenth of the longest or more."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        for direction in (FORWARD, BOTH) if row["operator"] == FORWARD else (BOTH,):
            groups.setdefault((row["shape"], row["routing"], direction), []).append(row)
    out = {}
    for key, group in groups.items():
        if key[2] == BOTH and all(row["operator"] == FORWARD for row in group):
            continue
        time = {id(row): float(row["forecast_us"]) * int(row["times"]) for row in group}
        whole, longest = sum(time.values()), max(time.values())
        bounds: dict[str, float] = {}
        for row in group:
            bounds[row["bound"]] = bounds.get(row["bound"], 0) + time[id(row)]
        floors = {row["operator"]: float(row["floor_us"]) for row in group}
        out[key] = Total(
            launches=sum(int(row["times"]) for row in group),
            fewest_blocks=min(int(row["blocks"]) for row in group if time[id(row)] >= longest / 10),
            instructions=sum(float(row["instructions_a_capsule"]) for row in group),
            forecast=whole,
            floor=sum(floors.values()),
            bound=max(bounds, key=bounds.__getitem__),
        )
    return out


_Table = tuple[str, tuple[str, ...], list[list[str]]]


def tables(rows: Sequence[Row], baseline: Sequence[Row] = ()) -> list[_Table]:
    """The operators, and then their launches: titles, headers and cells."""
    before, operators = totals(baseline), []
    for key, now in totals(rows).items():
        cells = [*key, str(now.launches), f"{now.fewest_blocks:,}", _number(now.instructions)]
        cells += [_number(now.forecast), _number(now.floor), f"{now.share:.0%}", now.bound]
        if baseline:
            old = before.get(key)
            cells += [_number(old.forecast), f"{old.forecast / now.forecast:.2f} ×"] if old else ["–", "–"]
        operators.append(cells)
    header = ("shape", "routing", "direction", "launches", "fewest blocks", "instructions a capsule")
    header += ("forecast, µs", "floor, µs", "share", "bound by")
    found: list[_Table] = [("Operators", header + ("before, µs", "gain") * bool(baseline), operators)]
    header = ("shape", "routing", "operator", "kernel", "times", "blocks", "threads", "registers", "warps", "waves")
    header += ("instructions", "in the loop", "wavefronts", "lines", "MB", "µs", "bound by")
    cells_of = [
        [
            *(str(row[name]) for name in ("shape", "routing", "operator", "kernel", "times")),
            *(f"{int(row[name]):,}" for name in ("blocks", "threads")),
            f"{row['registers']}" + f" + {row['spilled_bytes']} B spilled" * (int(row["spilled_bytes"]) > 0),
            *(str(row[name]) for name in ("resident_warps", "waves")),
            *(
                _number(float(row[f"{name}_a_capsule"]))
                for name in ("instructions", "loop_instructions", "wavefronts", "lines")
            ),
            f"{int(row['bytes']) / 1e6:,.3g}",
            _number(float(row["forecast_us"])),
            row["bound"],
        ]
        for row in rows
    ]
    found.append(("Launches", header, cells_of))
    return found


_NOTES = (
    "Launches that are alike are one row; its time is that of one of them. Warps: resident on a multiprocessor. Waves: "
    "blocks over those that run at the same time. Instructions, wavefronts (passes of shared memory) and lines (of 128 "
    "bytes, of global memory): of all warps, for each input capsule (with its whole batch). In the loop: in the "
    "kernel's longest loop. MB: what the launch must move at least.",
    "Forecast: the sum over the launches, each as long as what binds it (benchmarks/gpu_model.py). Floor: the fewest "
    "bytes of the operator at 3.0 TB/s; share: floor over forecast. Fewest blocks: of the launches that take a tenth "
    "of the longest one's time or more.",
)


def _number(x: float) -> str:
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def markdown(rows: Sequence[Row], baseline: Sequence[Row]) -> str:
    """The tables as a document."""
    from .tables import table

    lines = ["# CUDA kernels, counted without a GPU", "", f"**{MODEL}** How: `python -m benchmarks.gpu_counts --help`."]
    for title, header, cells in tables(rows, baseline):
        lines += ["", f"## {title}", "", f"{MODEL}", "", *table(header, cells)]
    return "\n".join([*lines, "", *(line for note in _NOTES for line in (note, ""))]).rstrip() + "\n"


def show(rows: Sequence[Row], baseline: Sequence[Row]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 240)
    for title, header, cells in tables(rows, baseline):
        shown = Table(title=f"{title}. {MODEL}", caption_justify="left")
        numbers_from = 3 if title == "Operators" else 4
        for number, name in enumerate(header):
            is_number = number >= numbers_from and name != "bound by"
            shown.add_column(name, justify="right" if is_number else "left", overflow="fold")
        for row in cells:
            shown.add_row(*row)
        console.print(shown)
    for note in _NOTES:
        console.print(note)


# ---- the program -----------------------------------------------------------------------------------------------------


def read(path: Path) -> list[Row]:
    """Rows that `--csv` has written. Raises ResultsError."""
    rows = read_csv(path)
    missing = set(COLUMNS) - set(rows[0] if rows else ())
    if missing:
        raise ResultsError(f"{path} has no column {', '.join(sorted(missing))}; expected a file by --csv")
    return rows


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_counts", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = families(cases())
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help=f"only this, repeatable: {', '.join(names)}"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every count")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="a file by --csv to compare with")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    arguments = parse(argv)
    return run_program(lambda: run(arguments))


def run(arguments: argparse.Namespace) -> None:
    """Everything. Raises NoKernels, SassError, ModelError, ResultsError, OutputError."""
    baseline = read(arguments.baseline) if arguments.baseline else []
    chosen = [c for c in cases() if not arguments.only or family(c) in arguments.only]
    counter = Counter(sass.read(_extension().__file__))
    rows: list[Row] = []
    for case in chosen:
        for direction in (FORWARD, BACKWARD):
            print_line(f"{case}, {direction}", sys.stderr)
            rows += counter.rows(case, direction)
    show(rows, baseline)
    if arguments.csv:
        write_csv(arguments.csv, rows, COLUMNS)
    if arguments.markdown:
        write_text(arguments.markdown, markdown(rows, baseline))


if __name__ == "__main__":
    sys.exit(main())
