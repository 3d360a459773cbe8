"""How long a launch takes on an H100: a model of what its warps, its memory and its latencies allow. Not a measurement.

A launch takes as long as the slowest of these, which is what binds it:

    dram       the bytes that it must move, at the bandwidth of copying
    l2         the bytes that its blocks load and store, each once a block, at the bandwidth of the L2 cache
    issue      warp instructions, 4 a cycle on a multiprocessor
    latency    the same, where the warps wait longer than they issue; see `_wave`
    integer    integer arithmetic, comparisons and selections, 2 a cycle
    special    special functions and conversions, 1 in two cycles
    float64    arithmetic in double, 2 a cycle
    memory     passes of shared memory (bank conflicts count), shuffles, transposes of matrices in registers, and
               128-byte lines of global memory, 1 a cycle
    tensor     products of tensor cores, 1 (m16n8k16) in two cycles
    launch     to start a kernel and to end it

Blocks run in waves. The busiest multiprocessor counts: 133 blocks take as long as 264.

Corrected by a measurement: on an H200, whose multiprocessors are those of the H100, the kernels of 17 operators took
1.1 to 1.3 times as long as the cycles above say, and `stalls` is the mean (benchmarks/results/h200). The bandwidths are
an H100's, on which the kernels then took 0.93 to 1.05 times as long as forecast (benchmarks/results/h100).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .program import BenchmarkError


class ModelError(BenchmarkError):
    """A launch that the GPU would refuse."""

    exit_code = 3


@dataclass(frozen=True)
class Gpu:
    """What limits a kernel. Memory in bytes, bandwidths in bytes a second."""

    name: str = "H100 SXM"
    multiprocessors: int = 132
    clock: float = 1.755e9  # Hz
    stalls: float = 1.2  # cycles, for each that is counted
    dram: float = 3.0e12  # of copying, read and written together
    l2: float = 5.5e12
    launch: float = 2e-6  # seconds
    registers: int = 64 << 10  # of a multiprocessor; the same below
    shared: int = 228 << 10
    warps: int = 64
    blocks: int = 32
    schedulers: int = 4
    register_unit: int = 256  # registers are given to a warp by this number
    shared_unit: int = 128
    reserved_shared: int = 1 << 10  # of a block
    most_shared: int = 227 << 10  # of a block


H100 = Gpu()
WARP = 32


def resident_blocks(threads: int, registers: int, shared: int, gpu: Gpu = H100) -> int:
    """Blocks that run on a multiprocessor at the same time, by NVIDIA's rules of occupancy for sm_90.

    Args:
        threads: of a block.
        registers: of a thread.
        shared: bytes of a block, static and dynamic.
    """
    warps = -(-threads // WARP)
    if not 0 < warps <= 32 or not 0 <= registers <= 255 or not 0 <= shared <= gpu.most_shared:
        raise ModelError(
            f"occupancy: threads is {threads}, registers is {registers}, shared is {shared}; expected at most 1024, "
            f"255 and {gpu.most_shared}"
        )
    limits = [gpu.blocks, gpu.warps // warps]
    if registers:
        # Each scheduler has a quarter of the registers, and its warps take theirs from it.
        unit = gpu.register_unit
        of_warp = -(-registers * WARP // unit) * unit
        limits.append(gpu.registers // gpu.schedulers // of_warp * gpu.schedulers // warps)
    of_block = -(-(shared + gpu.reserved_shared) // gpu.shared_unit) * gpu.shared_unit
    limits.append(gpu.shared // of_block)
    return min(limits)


# The classes of instructions, by the beginning of their opcodes; the first that fits.
CLASSES = {
    "FFMA": r"F(FMA|MUL|ADD)|H(FMA|ADD|MUL)2",
    "DFMA": r"D(FMA|MUL|ADD|SETP)",
    "MUFU": r"MUFU|I2F(?!P)|F2I|F2F(?!P)|FRND|POPC|FLO|FCHK",
    "MMA": r"[HID]MMA",
    "LDS": r"LDS",
    "STS": r"STS",
    "LDG": r"LDG|LD\.",
    "STG": r"STG|ST\.|CCTL",
    "SHFL": r"SHFL|MOVM",
    "BAR": r"BAR|BSSY|BSYNC|WARPSYNC|BREAK|DEPBAR",
    "uniform": r"U[A-Z0-9]+|R2UR|S2UR|VOTEU",
    "branch": r"BRA|EXIT|CALL|RET|NOP",
    "INT": r"",
}


def instruction_class(opcode: str) -> str:
    """The class of an instruction: a key of CLASSES."""
    return next(name for name, pattern in CLASSES.items() if re.match(pattern, opcode))


@dataclass(frozen=True)
class Work:
    """What a launch does. The counts are those of one block, `bytes` of all.

    bytes: what must be moved to and from memory at least. l2_bytes: what a block loads and stores, each byte once.
    lines: 128-byte lines of requests to global memory.
    """

    blocks: int
    threads: int
    registers: int
    shared: int
    instructions: dict[str, int]  # by class
    wavefronts: int
    lines: int
    l2_bytes: int
    bytes: int
    cycles: float


@dataclass(frozen=True)
class Forecast:
    """seconds: of the launch. bound: what binds it. limits: the seconds of all that may bind."""

    resident: int
    waves: float
    limits: dict[str, float]

    @property
    def bound(self) -> str:
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def seconds(self) -> float:
        return self.limits[self.bound]


def forecast(work: Work, gpu: Gpu = H100) -> Forecast:
    """See the module's docstring."""
    resident = resident_blocks(work.threads, work.registers, work.shared, gpu)
    if not resident:
        raise ModelError(f"occupancy: a block of {work.threads} threads with {work.registers} registers does not fit")
    busiest = -(-work.blocks // gpu.multiprocessors)  # blocks of a multiprocessor
    count = work.instructions
    issue = busiest * sum(count.values()) / gpu.schedulers
    alone = -(-busiest // resident) * work.cycles
    whole, rest = divmod(busiest, resident)
    warps = whole * _wave(work, resident, gpu) + (_wave(work, rest, gpu) if rest else 0)
    cycles = {
        "issue" if issue >= alone else "latency": warps,
        "integer": busiest * count.get("INT", 0) / 2,
        "special": busiest * count.get("MUFU", 0) * 2,
        "float64": busiest * count.get("DFMA", 0) / 2,
        "memory": busiest * (work.wavefronts + work.lines + count.get("SHFL", 0)),
        "tensor": busiest * count.get("MMA", 0) * 2,
    }
    limits = {name: x * gpu.stalls / gpu.clock for name, x in cycles.items()}
    limits |= {"dram": work.bytes / gpu.dram, "l2": work.blocks * work.l2_bytes / gpu.l2, "launch": gpu.launch}
    return Forecast(resident, work.blocks / (gpu.multiprocessors * resident), limits)


def _wave(work: Work, blocks: int, gpu: Gpu) -> float:
    """Cycles of some blocks that run at the same time on a multiprocessor.

    The warps of a scheduler take turns: each issues an instruction, for which it may have to queue, and then waits as
    long as it would alone. This is a closed network of queues, solved by mean value analysis (Reiser and Lavenberg
    1980). It gives the time of a warp alone for one warp, and the time of issuing all instructions for very many.
    """
    of_block = sum(work.instructions.values())
    if not of_block:
        return work.cycles
    of_warp = of_block / -(-work.threads // WARP)
    wait = max(work.cycles / of_warp - 1, 0)
    warps = max(round(blocks * -(-work.threads // WARP) / gpu.schedulers), 1)
    queue = rate = 0.0
    for number in range(1, warps + 1):
        response = 1 + queue
        rate = number / (response + wait)
        queue = rate * response
    return max(blocks * of_block / gpu.schedulers / rate, work.cycles)
