"""The machine code (SASS) of kernels, as cuobjdump prints it.

An instruction of sm_70 and later has 128 bits. The highest 23 hold what the compiler decided about its timing:

    stall      cycles until the next instruction of the warp may issue
    sets       the scoreboard that is set until the result of a slow instruction is there, or None
    reads      the same until its operands have been read
    waits      the scoreboards that must be free before the instruction issues
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from .program import BenchmarkError

# Bytes at the beginning of a block's shared memory that sm_90 keeps for itself. cuobjdump counts them
# where a kernel uses shared memory.
RESERVED_SHARED = 1 << 10


class SassError(BenchmarkError):
    """The machine code cannot be had, read or run."""

    exit_code = 3


@dataclass(frozen=True)
class Instruction:
    """text: as printed, without guard and semicolon. guard: such as "@!P0", or ""."""

    address: int
    text: str
    guard: str = ""
    stall: int = 1
    sets: int | None = None
    reads: int | None = None
    waits: tuple[int, ...] = ()

    @property
    def opcode(self) -> str:
        """Such as "LDG.E.128"."""
        return self.text.split(None, 1)[0]

    @property
    def operands(self) -> list[str]:
        rest = self.text.split(None, 1)[1:]
        return [x.strip().removesuffix(".reuse") for x in rest[0].split(",")] if rest else []


@dataclass
class Kernel:
    """A kernel of one architecture. name: mangled. shared: bytes of static shared memory.

    extension: that it is in, or "" if its listing is there. translated: what `sass_run` makes of the instructions.
    """

    name: str
    architecture: str
    extension: str = ""
    listing: list[str] = field(default_factory=list, repr=False)
    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    translated: dict[tuple[int, bool], Any] = field(default_factory=dict, repr=False)

    @cached_property
    def instructions(self) -> list[Instruction]:
        """Raises SassError."""
        listing = self.listing
        if self.extension:
            # The same kernel may be in several objects.
            text = _cuobjdump(self.extension, self.architecture, "-sass", "-fun", self.name)
            listing = next(parse(text.splitlines())).listing
        found = []
        lines = iter(listing)
        for line in lines:
            if first := _FIRST.match(line):
                second = _SECOND.match(next(lines, ""))
                if second is None:
                    raise SassError(f"sass: the line after {line.strip()!r} is something else; expected 64 bits")
                found.append(_instruction(first, int(second[1], 16)))
        return found


_FIRST = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?(\S.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")


def parse(lines: Iterable[str]) -> Iterator[Kernel]:
    """Yield the kernels in the output of `cuobjdump -sass`."""
    kernel: Kernel | None = None
    architecture = ""
    for line in lines:
        if kernel is not None and "/*" in line:
            kernel.listing.append(line)
        elif match := re.match(r"\s*code for (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function : (\S+)", line):
            if kernel:
                yield kernel
            kernel = Kernel(match[1], architecture)
    if kernel:
        yield kernel


def _instruction(first: re.Match[str], high: int) -> Instruction:
    control = high >> 41
    sets, reads = (None if board == 7 else board for board in (control >> 5 & 7, control >> 8 & 7))
    waits = tuple(board for board in range(6) if control >> 11 >> board & 1)
    return Instruction(int(first[1], 16), first[3], first[2] or "", control & 15, sets, reads, waits)


def cuobjdump() -> str | None:
    """The path of cuobjdump: on the path, beside nvcc, or in Triton, whose nvdisasm it then needs beside it."""
    triton = importlib.util.find_spec("triton")
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(folders))


def read(extension: str, architecture: str = "sm_90") -> dict[str, Kernel]:
    """The kernels in an extension by their demangled names, with listings that are made when they are first needed.

    A name is demangled because nvcc and the host compiler mangle anonymous namespaces differently. Raises SassError.
    """
    kernels: list[Kernel] = []
    for line in _cuobjdump(extension, architecture, "--dump-resource-usage").splitlines():
        if match := re.match(r"\s*Function (\w+):", line):
            kernels.append(Kernel(match[1], architecture, extension=extension))
        elif kernels and "REG:" in line:
            used = {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
            own = kernels[-1]
            own.registers, own.stack, own.local = used["REG"], used["STACK"], used["LOCAL"]
            own.shared = max(used["SHARED"] - RESERVED_SHARED, 0)
    if not kernels:
        raise SassError(f"sass: {extension} has no kernels for {architecture}; expected some")
    return dict(zip(demangled([kernel.name for kernel in kernels]), kernels, strict=True))


def demangled(names: Sequence[str]) -> list[str]:
    """Such as "void f<float>(float*)". Raises SassError."""
    return _output("c++filt", *names).splitlines()


def _cuobjdump(extension: str, architecture: str, *options: str) -> str:
    path = cuobjdump()
    if path is None:
        raise SassError("sass: cuobjdump was not found on the path, beside nvcc or in Triton; expected one of them")
    # It calls nvdisasm.
    environment = os.environ | {"PATH": f"{Path(path).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return _output(path, "-arch", architecture, *options, extension, env=environment)


def _output(*command: str, env: dict[str, str] | None = None) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SassError(f"sass: {command[0]} does not run: {error}") from error
