"""What the machine could do at best, and the floor that this sets for a routing.

Measured with all of torch's threads: read bandwidth (bytes read), copy bandwidth (bytes read plus bytes written) and
float32 multiply-adds (2 operations each), the best repeat of the best way. A probe in the extension is one of the ways
where there is one: `capsops._C.measure_read(bytes, threads)`, `.measure_copy(bytes, threads)`, both in bytes a second,
and `.measure_fma(threads)` in operations a second.

The floor of a routing at a shape, with u the input capsules, W the weight (their bytes), P passes over the input
capsules (`shapes.ROUTINGS`) and V = 2·B·N·K·J·D operations for all votes once (times the rows of a matrix capsule):

    forward, P passes       read P (u + W)                      operations P V
    backward, P passes      read (P − 1) (u + W)                operations (P − 1) V
        the last of them    read u + W, write g_u + g_W         operations 3 V (the votes, g_u, g_W)
    attention besides       2·B·N·J²·D operations forward for its J × J mixing, three times that backward

seconds = max(bytes read / read bandwidth + bytes of the last backward pass / copy bandwidth, operations / peak).

A shared weight is counted once a pass, and where the couplings are equal or not yet known one product a batch item is
enough: Σ_i u_i W = (Σ_i u_i) W. Of what a mask leaves out nothing is counted. Couplings, squashes and sums are not
counted: the floor is a bound, not a forecast.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .shapes import FORWARD, Case

# Where the size of the last-level cache cannot be read.
_CACHE = 32 << 20


@dataclass(frozen=True)
class Machine:
    """Best rates: bytes a second read; read and written; operations a second. And the ways that reached them."""

    read: float
    copy: float
    fma: float
    read_by: str = ""
    copy_by: str = ""
    fma_by: str = ""


@dataclass(frozen=True)
class Floor:
    """What a routing cannot do without: bytes that only are read, bytes of the emitting pass, operations."""

    read_bytes: int
    emit_bytes: int
    operations: int

    @property
    def bytes(self) -> int:
        return self.read_bytes + self.emit_bytes

    def seconds(self, machine: Machine) -> float:
        return max(self.read_bytes / machine.read + self.emit_bytes / machine.copy, self.operations / machine.fma)


def floor(case: Case, direction: str) -> Floor:
    """See the module's docstring."""
    s, (forward, backward) = case.shape, case.routing.passes
    there = (s.N + 1) / (2 * s.N) if s.masked else 1  # from one to N, on average
    operands = case.itemsize * (round(there * s.u_numbers) + s.weight_numbers)
    votes = round(there * 2 * s.vote_numbers * s.K)
    mixing = round(there * 2 * s.B * s.N * s.J * s.J * s.D) if case.routing.name == "attention" else 0
    saved = votes - votes // s.N if s.shared and case.routing.name not in ("attention", "em") else 0
    if direction == FORWARD:
        return Floor(forward * operands, 0, forward * votes + mixing - saved)
    passes = forward + backward - 1
    return Floor(passes * operands, 2 * operands, (passes + 3) * votes + 4 * mixing - saved)


@cache
def last_level_cache() -> int:
    """Bytes."""
    sizes = [_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if match := re.fullmatch(r"(\d+)([KM]?)", text):
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20}[match[2]])
    return max(sizes)


def measure(quick: bool = False) -> Iterator[Machine]:
    """Yields the machine once: a generator, for `worker.events`."""
    import numpy as np
    import torch
    from torch import Tensor

    from capsops.backends.extension import _C

    threads = torch.get_num_threads()
    size = 16 << 20 if quick else 1 << 30  # bytes, far beyond any cache
    repeats = 2 if quick else 7
    side = 256 if quick else 4096
    x, y = torch.rand(size // 4), torch.empty(size // 4)
    rows = x.view(-1, 4096)
    row = torch.rand(4096)
    a, b, c = torch.rand(side, side), torch.rand(side, side), torch.empty(side, side)

    def own(name: str, *arguments: int) -> dict[str, Callable[[], float]]:
        probe = getattr(_C, name, None)
        return {} if probe is None else {f"capsops._C.{name}": lambda: float(probe(*arguments))}

    def by(amount: float, **ways: Callable[[], Any]) -> dict[str, Callable[[], float]]:
        def rate(way: Callable[[], Any]) -> float:
            start = time.perf_counter()
            way()
            return amount / (time.perf_counter() - start)

        return {name: lambda way=way: rate(way) for name, way in ways.items()}

    def add_to(out: Tensor) -> Tensor:
        return torch.mul(x, 1.0, out=out)

    probes = {
        "read": own("measure_read", size, threads)
        | by(
            size,
            sum=lambda: x.sum(),
            dot=lambda: torch.dot(x, x),
            max=lambda: x.max(),
            mv=lambda: torch.mv(rows, row),
            numpy_max=lambda: np.max(x.numpy()),
        ),
        "copy": own("measure_copy", size, threads)
        | by(
            2 * size,
            copy_=lambda: y.copy_(x),
            mul=lambda: add_to(y),
            numpy_copyto=lambda: np.copyto(y.numpy(), x.numpy()),
        ),
        "fma": own("measure_fma", threads) | by(2 * side**3, mm=lambda: torch.mm(a, b, out=c)),
    }
    best: dict[str, tuple[float, str]] = {}
    for what, ways in probes.items():
        for way in ways.values():
            way()  # the first touches the pages
        best[what] = max((max(way() for _ in range(repeats)), name) for name, way in ways.items())
    yield Machine(**{k: v for k, (v, _) in best.items()}, **{f"{k}_by": name for k, (_, name) in best.items()})


def environment(machine: Machine) -> dict[str, Any]:
    """Machine, versions and commit."""
    import numpy
    import torch

    import capsops

    info = capsops.info()
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "instruction_set": getattr(info, "instruction_set", None) or torch.backends.cpu.get_cpu_capability(),
            "last_level_cache_bytes": last_level_cache(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            **asdict(machine),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
            "capsops": capsops.__version__,
            "capsops_built_by": info.extension,
            "capsops_backend_forced": info.forced,
            "compiler": first_line(["c++", "--version"]),  # torch.compile's
            "system": f"{platform.system()} {platform.machine()}",
        },
        "commit": commit(),
    }


def commit() -> str | None:
    """Of the repository that the benchmarks are in; with a plus where files differ from it."""
    root = Path(__file__).resolve().parent
    name = first_line(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = first_line(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"])
    return f"{name}+" if name and changed else name


def first_line(command: list[str]) -> str | None:
    """Of what a program prints; None where it fails."""
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(out.splitlines()), None)


def cpu_model() -> str:
    """By its name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
