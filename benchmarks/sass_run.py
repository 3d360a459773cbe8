"""Runs one block of threads of a kernel from its machine code (SASS of sm_90), to count what the block does.

Every register is an array over the threads of the block, so that one step of the interpreter is one instruction of all
warps. Threads that took different branches run one after another, those at the lowest address first, and meet again
where the code says so (BSSY, BSYNC). A block of instructions without a branch becomes one Python function.

Global memory has no contents but those that are given: a load gives a fixed bit pattern, a small positive number in
every floating-point type. So counts hold for kernels whose branches and addresses depend on sizes and not on data.

Time is that of the slowest warp alone on a multiprocessor: the stalls that the compiler wrote into the instructions,
and the latencies of `Latency` for results that the code waits for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy import ndarray

from .sass import RESERVED_SHARED, Instruction, Kernel, SassError
from .sass_translate import CONTROL, FUNCTIONS, PATTERN, is_predicate, translate

WARP = 32
# Where sm_90 keeps the arguments of a kernel in constant bank 0.
ARGUMENTS_AT = 0x210
# A buffer of global memory begins at a multiple of this.
SPACING_BITS = 40
_NEVER = 1 << 30
_MOST = 20_000_000  # instructions of the interpreter in a block


@dataclass(frozen=True)
class Latency:
    """Cycles until a result can be used, about those of an H100 (Luo et al. 2024, arXiv 2402.13499)."""

    shared: int = 29
    l1: int = 41
    l2: int = 263
    dram: int = 479
    other: int = 22  # of special functions, conversions, shuffles and special registers
    read: int = 10  # until an operand of a slow instruction may be overwritten


LATENCY = Latency()


@dataclass
class Buffer:
    """A tensor or a workspace in global memory. data: its bytes, or None."""

    name: str
    base: int
    size: int
    data: ndarray | None = None


def buffer(index: int, name: str, size: int, data: ndarray | None = None) -> Buffer:
    """A buffer at the address of its index."""
    return Buffer(name, (index + 1) << SPACING_BITS, size, data)


@dataclass
class Counts:
    """What a block did. instructions: warp instructions, and the lists below, by instruction of the kernel.

    wavefronts: of shared memory. lines: 128-byte lines that requests to global memory touch, sectors: 32-byte ones.
    read, written: bytes of different sectors, by buffer. cycles: of the slowest warp.
    """

    instructions: list[int]
    wavefronts: list[int]
    lines: list[int]
    sectors: list[int]
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    cycles: float = 0


@dataclass
class _Straight:
    """Instructions begin … end − 1, of which only the last may be a control instruction, `control`.

    events: for the time, of each instruction that waits or sets a scoreboard: its index, the cycles since the event
    before, and its latency (None: of the memory access).
    """

    begin: int
    end: int
    control: Instruction | None
    functions: dict[bool, Callable[[Any, Any], None]] = field(default_factory=dict)
    events: list[tuple[int, int, int | None]] = field(default_factory=list)
    tail: int = 0
    count: int = 0


_RUNS, _WAITS, _AT_BARRIER, _DONE = range(4)


class Run:
    """One run of a block of threads.

    arguments: their bytes. memory: the buffers that the kernel may touch.
    """

    def __init__(
        self,
        kernel: Kernel,
        arguments: bytes,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        memory: Sequence[Buffer],
        most: int = _MOST,
    ) -> None:
        if kernel.architecture != "sm_90":
            raise SassError(f"sass: architecture is {kernel.architecture}; expected sm_90")
        if threads % WARP or not 0 < threads <= 1024:
            raise SassError(f"sass: threads is {threads}; expected whole warps, at most 1024")
        self.kernel, self.threads, self.warps, self.most = kernel, threads, threads // WARP, most
        self.code = kernel.instructions
        self.at = {ins.address: index for index, ins in enumerate(self.code)}
        sizes = [threads, 1, 1, *grid]
        head = b"".join(int(x).to_bytes(4, "little") for x in sizes).ljust(ARGUMENTS_AT, b"\0")
        whole = head + arguments
        self.constant_words = np.frombuffer(whole.ljust(-(-len(whole) // 4) * 4 + 16, b"\0"), np.uint32)
        self.shared = np.zeros((RESERVED_SHARED + kernel.shared + shared_bytes + 19) // 4, np.uint32)
        self.shared_end = RESERVED_SHARED + kernel.shared + shared_bytes
        self.memory = {b.base >> SPACING_BITS: b for b in memory}

        lanes = np.arange(threads, dtype=np.uint32)

        def everywhere(x: int) -> ndarray:
            return np.full(threads, x, np.uint32)

        self.special = {
            "SR_TID.X": lanes,
            "SR_TID.Y": everywhere(0),
            "SR_TID.Z": everywhere(0),
            "SR_LANEID": lanes % np.uint32(WARP),
            "SR_CgaCtaId": everywhere(0),
            "SR_CLOCKLO": everywhere(0),
            **{f"SR_CTAID.{axis}": everywhere(x) for axis, x in zip("XYZ", block, strict=True)},
        }
        n = len(self.code)
        self.counts = Counts([0] * n, [0] * n, [0] * n, [0] * n)
        self.touched: dict[tuple[str, bool], ndarray] = {}
        self.prefetched: dict[str, ndarray] = {}
        self.patterns: dict[bytes, int] = {}
        self.latencies: dict[int, int] = {}  # of the last loads, by instruction
        self.used: set[str] = set()  # names that a translation uses

        self.alive = np.ones(threads, bool)
        self.barriers = np.zeros((16, threads), bool)
        self.namespace: dict[str, Any] = {
            **FUNCTIONS,
            "special": self.special,
            "RZ": np.zeros(threads, np.uint32),
            "barriers": self.barriers,
            "alive": self.alive,
            "constant_words": self.constant_words,
            "zero64": np.zeros(threads, np.uint64),
            "true": np.ones(threads, bool),
            **{f.__name__: f for f in (self.load_global, self.store_global, self.load_shared, self.store_shared)},
            **{f.__name__: f for f in (self.load_matrices, self.prefetch, self.shuffle, self.vote)},
            **{f.__name__: f for f in (self.first_of_warp, self.pack, self.unpack)},
        }
        self.pc = np.zeros(threads, np.int64)
        self.state = np.zeros(threads, np.int8)
        self.clock = np.zeros(self.warps)
        self.scoreboards = np.zeros((self.warps, 6))
        self.straights: dict[int, _Straight] = {}
        targets = {self.at[t] for ins in self.code if (t := _target(ins)) is not None and t in self.at}
        # A control instruction ends a stretch of instructions, and the target of a branch begins one.
        self.leaders = targets | {i + 1 for i, ins in enumerate(self.code) if _name(ins) in CONTROL}

    # Names of the translations

    def name(self, text: str) -> str:
        """The array of a register or a predicate."""
        if not re.fullmatch(r"U?[RP](Z|T|\d+)", text):
            raise SassError(f"sass: operand is {text!r}; expected a register")
        return self._array(text)

    def constant(self, value: int, bits: int = 32) -> str:
        """The array of a number."""
        return self._array(f"k{bits}_{value & (1 << bits) - 1:x}")

    def bank(self, at: int, bits: int = 32) -> str:
        """The array of a number in constant bank 0."""
        return self._array(f"c{bits}_{at:x}")

    def _array(self, name: str) -> str:
        """Make the array with a name, if there is none."""
        self.used.add(name)
        if name not in self.namespace:
            if match := re.fullmatch(r"([kc])(\d+)_([0-9a-f]+)", name):
                value, bits = int(match[3], 16), int(match[2])
                if match[1] == "c":
                    value = self.word(value) | (self.word(value + 4) << 32 if bits == 64 else 0)
                self.namespace[name] = np.full(self.threads, value, np.uint32 if bits == 32 else np.uint64)
            elif "R" in name:
                self.namespace[name] = np.zeros(self.threads, np.uint32)
            else:
                self.namespace[name] = np.full(self.threads, name.endswith("T"))
        return name

    def word(self, at: int) -> int:
        """Of constant bank 0."""
        if at // 4 >= len(self.constant_words):
            raise SassError(f"sass: {self.kernel.name} reads constant 0x{at:x}, which is beyond its arguments")
        return int(self.constant_words[at // 4])

    # Stretches of instructions without a branch

    def straight(self, begin: int) -> _Straight:
        if begin in self.straights:
            return self.straights[begin]
        end = begin
        while end < len(self.code) and _name(self.code[end]) not in CONTROL:
            end += 1
            if end in self.leaders:
                break
        control = None
        if end < len(self.code) and _name(self.code[end]) in CONTROL and not (end > begin and end in self.leaders):
            control, end = self.code[end], end + 1
        found = _Straight(begin, end, control)
        for index in range(begin, end):
            ins = self.code[index]
            name = _name(ins)
            if ins.waits or ins.sets is not None or ins.reads is not None or name in ("LDGDEPBAR", "DEPBAR"):
                latency: int | None = LATENCY.other
                if name in ("LDG", "LD", "LDGSTS"):
                    latency = None
                elif name in ("LDS", "LDSM", "STS", "ATOMS"):
                    latency = LATENCY.shared
                elif name in ("HMMA", "IMMA", "DMMA"):
                    latency = 33
                found.events.append((index, found.tail, latency))
                found.tail = 0
            found.tail += max(ins.stall, 1)
        self.straights[begin] = found
        return found

    def function(self, straight: _Straight, full: bool) -> Callable[[Any, Any], None]:
        """Its instructions but the control one, for all threads or for those of a mask."""
        if full not in straight.functions:
            known = self.kernel.translated
            key = (straight.begin, full)
            if key not in known:
                self.used = set()
                body = []
                for index in range(straight.begin, straight.end - (straight.control is not None)):
                    body += translate(self.code[index], index, full, self)
                source = "def f(m, w):\n" + "".join(f"    {line}\n" for line in body or ["pass"])
                known[key] = compile(source, f"<{self.kernel.name} at {straight.begin}>", "exec"), self.used
            code, names = known[key]
            for name in names:
                self._array(name)
            exec(code, self.namespace)
            straight.functions[full] = self.namespace["f"]
        return straight.functions[full]

    # The whole block

    def run(self) -> Counts:
        with np.errstate(all="ignore"):
            while True:
                runs = self.state == _RUNS
                if not runs.any():
                    if (self.state == _DONE).all():
                        break
                    if not self._release():
                        raise SassError(f"sass: {self.kernel.name}: no thread can go on")
                    continue
                first = int(self.pc[runs].min())
                lanes = runs & (self.pc == first)
                others = self.pc[runs & ~lanes]
                self._run_group(first, lanes, int(others.min()) if others.size else _NEVER)
        self.counts.cycles = float(self.clock.max())
        for straight in self.straights.values():
            for index in range(straight.begin, straight.end):
                self.counts.instructions[index] += straight.count
        return self.counts

    def _run_group(self, at: int, lanes: ndarray, limit: int) -> None:
        """Run threads that are at one instruction, until they part, wait, end or reach `limit`, where others are."""
        by_warp = lanes.reshape(self.warps, WARP).any(1)
        count = int(by_warp.sum())
        full = bool(lanes.all())
        wide = np.repeat(by_warp, WARP)
        mask, warps = (None, None) if full else (lanes, wide)
        time = float(self.clock[by_warp].max())
        boards = self.scoreboards[by_warp].max(0).tolist()
        groups: list[float] = []
        pending = 0.0
        while True:
            straight = self.straight(at)
            straight.count += count
            self.most -= straight.end - at
            if self.most < 0:
                raise SassError(f"sass: {self.kernel.name}: a block runs too long for the interpreter")
            self.latencies.clear()
            self.function(straight, full)(mask, warps)
            for index, before, latency in straight.events:
                ins = self.code[index]
                time += before
                for board in ins.waits:
                    time = max(time, boards[board])
                if latency is None:  # A load that no thread does has none.
                    latency = self.latencies.get(index, 0)
                    if ins.opcode.startswith("LDGSTS"):
                        pending = max(pending, time + latency)
                elif ins.opcode == "LDGDEPBAR":
                    groups.append(pending)
                elif match := re.match(r"DEPBAR\S* SB\d, 0x([0-9a-f]+)", ins.text):
                    # All groups of asynchronous copies but the last ones must have arrived.
                    left = int(match[1], 16)
                    if len(groups) > left:
                        time = max(time, groups[-1 - left])
                if ins.sets is not None:
                    boards[ins.sets] = max(boards[ins.sets], time + latency)
                if ins.reads is not None:
                    boards[ins.reads] = max(boards[ins.reads], time + LATENCY.read)
            time += straight.tail
            self.clock[by_warp] = time
            at, goes_on = self._control(straight, lanes, wide, full)
            if not goes_on or at >= limit:
                break
            if straight.control is not None and _name(straight.control) == "BAR":
                time = float(self.clock[by_warp].max())
        if goes_on:
            self.pc[lanes] = at
        self.scoreboards[by_warp] = boards

    def _control(self, straight: _Straight, lanes: ndarray, warps: ndarray, full: bool) -> tuple[int, bool]:
        """Where the threads go on, and whether all of them do; if not, their state is set."""
        ins, after = straight.control, straight.end
        if ins is None:
            return after, True
        name = _name(ins)
        taken = lanes
        if ins.guard:
            text = ins.guard[1:]
            value = self.namespace[self.name(text.lstrip("!"))]
            taken = lanes & (~value if text[0] == "!" else value)
        if name in ("BRA", "JMP", "CALL"):
            conditions = [o for o in ins.operands if is_predicate(o)]
            if ins.opcode.startswith("BRA.DIV"):  # goes where threads of a warp that are apart do what the rest does
                return after, True
            for condition in conditions:
                value = self.namespace[self.name(condition.lstrip("!"))]
                taken = taken & (~value if condition[0] == "!" else value)
            target = _target(ins)
            assert target is not None
            return self._part(taken, lanes, self.at[target], after)
        if name == "RET":
            register = ins.operands[0].split()[0]
            addresses = self.namespace[self.name(register)]
            for address in np.unique(addresses[taken]).tolist():
                self.pc[taken & (addresses == address)] = self.at[address]
            self.pc[lanes & ~taken] = after
            ends = np.unique(self.pc[lanes])
            return int(ends[0]), len(ends) == 1
        if name == "EXIT":
            if not taken.any():
                return after, True
            self.state[taken] = _DONE
            self.alive &= ~taken
            self.barriers &= self.alive
            self.pc[lanes & ~taken] = after
            return after, False
        if name in ("BSYNC", "WARPSYNC"):
            if not taken.any():
                return after, True
            if full and taken.all() and name == "BSYNC" and self.barriers[int(ins.operands[0][1:])].all():
                return after, True
            here = after - 1
            self.pc[lanes & ~taken] = after
            self.pc[taken] = here
            self.state[taken] = _WAITS
            self._meet(here)
            rest = self.state[lanes] == _RUNS
            return after, bool(rest.all()) and not (self.state[warps & ~lanes] == _RUNS).any()
        if name == "BAR":
            if ins.opcode.split(".")[1] not in ("SYNC", "RED"):
                raise SassError(f"sass: opcode is {ins.opcode}; expected BAR.SYNC")
            if not taken.any():
                return after, True
            if bool((self.alive <= taken).all()):
                self.clock[:] = self.clock.max()
                return after, True
            self.pc[lanes] = after
            self.state[taken] = _AT_BARRIER
            self._release_barrier()
            return after, False
        raise SassError(f"sass: opcode is {ins.opcode}; expected none that ends a kernel or jumps by a table")

    def _part(self, taken: ndarray, lanes: ndarray, target: int, after: int) -> tuple[int, bool]:
        if not taken.any():
            return after, True
        if not (lanes & ~taken).any():
            return target, True
        self.pc[lanes] = np.where(taken[lanes], target, after)
        return after, False

    def _meet(self, at: int) -> bool:
        """Let the threads go on that wait at one instruction and that no thread of their warp is missing from."""
        ins = self.code[at]
        if _name(ins) == "BSYNC":
            needed = self.barriers[int(ins.operands[0][1:])] & self.alive
        else:
            operand = ins.operands[0] if ins.operands else "0xffffffff"
            if operand.startswith("0x"):
                mask = np.full(self.threads, int(operand, 16), np.uint32)
            else:
                mask = self.namespace[self.name(operand)]
            # The mask of the first thread that waits in each warp.
            waiting = (self.state == _WAITS) & (self.pc == at)
            needed = self.unpack(self.first_of_warp(mask, waiting)) & self.alive
        arrived = (self.state == _WAITS) & (self.pc == at)
        complete = ~(needed & ~arrived).reshape(self.warps, WARP).any(1)
        free = arrived & np.repeat(complete, WARP)
        self.state[free] = _RUNS
        self.pc[free] = at + 1
        return bool(free.any())

    def _release_barrier(self) -> bool:
        waiting = self.state == _AT_BARRIER
        if not waiting.any() or (self.alive & ~waiting).any():
            return False
        self.state[waiting] = _RUNS
        self.clock[:] = self.clock.max()
        return True

    def _release(self) -> bool:
        """Once threads have ended, for which others waited."""
        met = [self._meet(int(at)) for at in np.unique(self.pc[self.state == _WAITS])]
        return any(met) or self._release_barrier()

    # Exchange in a warp

    def shuffle(self, how: str, x: ndarray, by: ndarray) -> ndarray:
        lane = np.arange(self.threads) % WARP
        step = by.astype(np.int64)
        source = {"BFLY": lane ^ step, "IDX": step % WARP, "UP": lane - step, "DOWN": lane + step}[how]
        source = np.where((source < 0) | (source >= WARP), lane, source)
        return x[np.arange(self.threads) - lane + source]

    def vote(self, how: str, x: ndarray, mask: ndarray | None) -> tuple[ndarray, ndarray]:
        active = self.alive if mask is None else mask
        voted = (x & active).reshape(self.warps, WARP)
        ballot = self.pack(voted.ravel())
        if how == "ALL":
            result = (x | ~active).reshape(self.warps, WARP).all(1)
        elif how == "ANY":
            result = voted.any(1)
        else:
            result = voted.any(1) ^ ~(x | ~active).reshape(self.warps, WARP).all(1)
        return ballot, np.repeat(result, WARP)

    def first_of_warp(self, x: ndarray, mask: ndarray | None) -> ndarray:
        active = (self.alive if mask is None else mask).reshape(self.warps, WARP)
        first = active.argmax(1)
        return np.repeat(x.reshape(self.warps, WARP)[np.arange(self.warps), first], WARP)

    def pack(self, x: ndarray) -> ndarray:
        bits = x.reshape(self.warps, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)
        return np.repeat(bits.sum(1).astype(np.uint32), WARP)

    def unpack(self, x: ndarray) -> ndarray:
        lane = np.arange(self.threads, dtype=np.uint32) % np.uint32(WARP)
        return (x >> lane & np.uint32(1)) != 0

    # Shared memory

    def _check_shared(self, index: int, address: ndarray, size: int, mask: ndarray | None) -> ndarray:
        own = address if mask is None else address[mask]
        if int(own.min()) < RESERVED_SHARED or int(own.max()) + size > self.shared_end or (own % size).any():
            raise SassError(
                f"sass: {self.kernel.name}: {self.code[index].text!r} has addresses {int(own.min()):#x} to "
                f"{int(own.max()):#x}; expected {RESERVED_SHARED:#x} to {self.shared_end:#x}, multiples of {size}"
            )
        self.counts.wavefronts[index] += self._wavefronts(address, size, mask)
        return own

    def load_shared(self, index: int, address: ndarray, size: int, mask: ndarray | None) -> list[ndarray]:
        own = self._check_shared(index, address, size, mask)
        at = (own >> np.uint64(2)).astype(np.int64)
        found = [self.shared[at + n] for n in range(max(size // 4, 1))]
        if size < 4:
            found[0] = found[0] >> (8 * (own & np.uint64(3))).astype(np.uint32) & np.uint32((1 << 8 * size) - 1)
        return found if mask is None else [self._spread(x, mask) for x in found]

    def store_shared(
        self, index: int, address: ndarray, size: int, values: Sequence[ndarray], mask: ndarray | None
    ) -> None:
        own = self._check_shared(index, address, size, mask)
        if size < 4:
            self.shared.view(np.uint8 if size == 1 else np.uint16)[own // np.uint64(size)] = (
                values[0] if mask is None else values[0][mask]
            )
            return
        at = (own >> np.uint64(2)).astype(np.int64)
        for n, x in enumerate(values):
            self.shared[at + n] = x if mask is None else x[mask]

    def load_matrices(self, index: int, address: ndarray, count: int, mask: ndarray | None) -> list[ndarray]:
        """Matrices of 8 rows of 16 bytes: lane 4 g + t gets word t of row g of each. A warp takes part as a whole."""
        running = np.ones(self.warps, bool) if mask is None else mask.reshape(self.warps, WARP).any(1)
        own = np.where(running[:, None], address.reshape(self.warps, WARP)[:, : 8 * count], np.uint64(RESERVED_SHARED))
        if (own % np.uint64(16)).any() or int(own.max()) + 16 > self.shared_end:
            raise SassError(f"sass: {self.kernel.name}: {self.code[index].text!r} is not aligned, or beyond the memory")
        words = ((own >> np.uint64(2))[:, :, None] + np.arange(4, dtype=np.uint64)).astype(np.int64)
        for matrix in words[running].reshape(int(running.sum()) * count, -1):
            self.counts.wavefronts[index] += int(np.bincount(np.unique(matrix) % 32).max())
        by_matrix = words.reshape(self.warps, count, WARP)
        return [self.shared[by_matrix[:, n].ravel()] for n in range(count)]

    def _spread(self, x: ndarray, mask: ndarray) -> ndarray:
        out = np.zeros(self.threads, np.uint32)
        out[mask] = x
        return out

    def _wavefronts(self, address: ndarray, size: int, mask: ndarray | None) -> int:
        """Passes that shared memory needs: see `wavefronts`."""
        offsets = (address - address.min()) if mask is None else np.where(mask, address - address[mask].min(), _NOWHERE)
        key = offsets.tobytes() + bytes([size])
        if key not in self.patterns:
            own = np.where(offsets == _NOWHERE, -1, offsets.astype(np.int64))
            self.patterns[key] = sum(wavefronts(warp, size) for warp in own.reshape(self.warps, WARP))
        return self.patterns[key]

    # Global memory

    def _touch(self, index: int, address: ndarray, size: int, mask: ndarray | None, write: bool) -> list[Buffer]:
        """Count an access; the buffers that it goes to."""
        own = address if mask is None else address[mask]
        ids = np.unique(own >> np.uint64(SPACING_BITS)).tolist()
        buffers = []
        new = fetched = False
        sectors = (address >> np.uint64(5)).astype(np.int64)
        by_warp = np.sort((sectors if mask is None else np.where(mask, sectors, -1)).reshape(self.warps, WARP), axis=1)
        first = by_warp[:, :1] >= 0
        change = (by_warp[:, 1:] != by_warp[:, :-1]) & (by_warp[:, 1:] >= 0)
        lines = by_warp >> 2
        line_change = (lines[:, 1:] != lines[:, :-1]) & (by_warp[:, 1:] >= 0)
        self.counts.sectors[index] += int(first.sum() + change.sum())
        self.counts.lines[index] += int(first.sum() + line_change.sum())
        for number in ids:
            b = self.memory.get(number)
            part = own[own >> np.uint64(SPACING_BITS) == number] if len(ids) > 1 else own
            if b is None or int(part.max()) + size > b.base + b.size or (part % np.uint64(size)).any():
                where = f"buffer {b.name!r} of {b.size} bytes" if b else "no buffer"
                low, high = (int(x) - (b.base if b else 0) for x in (part.min(), part.max()))
                raise SassError(
                    f"sass: {self.kernel.name}: {self.code[index].text!r} touches {low:#x} to {high:#x} of {where}"
                )
            buffers.append(b)
            wanted = np.unique(part - np.uint64(b.base) >> np.uint64(5)).astype(np.int64)
            touched = self._bitmap(b, write)
            fresh = wanted[~touched[wanted]]
            if fresh.size:
                touched[fresh] = True
                counted = self.counts.written if write else self.counts.read
                counted[b.name] = counted.get(b.name, 0) + 32 * fresh.size
                new = True
                # Prefetched, or written by this block.
                known = [self.prefetched.get(b.name), self.touched.get((b.name, True))]
                fetched = any(marks is not None and bool(marks[fresh].all()) for marks in known)
        if not write:
            self.latencies[index] = LATENCY.l1 if not new else LATENCY.l2 if fetched else LATENCY.dram
        return buffers

    def _bitmap(self, b: Buffer, write: bool) -> ndarray:
        key = (b.name, write)
        if key not in self.touched:
            self.touched[key] = np.zeros(b.size // 32 + 2, bool)
        return self.touched[key]

    def load_global(self, index: int, address: ndarray, size: int, mask: ndarray | None) -> list[ndarray]:
        buffers = self._touch(index, address, size, mask, False)
        words = max(size // 4, 1)
        pattern = PATTERN & (1 << 8 * min(size, 4)) - 1
        found = [np.full(self.threads, pattern, np.uint32) for _ in range(words)]
        for b in buffers:
            if b.data is None:
                continue
            own, at = _within(b, address, mask)
            if size < 4:
                found[0][own] = b.data.view(np.uint8 if size == 1 else np.uint16)[at // size]
            else:
                for n in range(words):
                    found[n][own] = b.data.view(np.uint32)[at // 4 + n]
        return found

    def store_global(
        self, index: int, address: ndarray, size: int, values: Sequence[ndarray], mask: ndarray | None
    ) -> None:
        for b in self._touch(index, address, size, mask, True):
            if b.data is None:
                continue
            own, at = _within(b, address, mask)
            if size < 4:
                b.data.view(np.uint8 if size == 1 else np.uint16)[at // size] = values[0][own]
            else:
                for n, x in enumerate(values):
                    b.data.view(np.uint32)[at // 4 + n] = x[own]

    def prefetch(self, index: int, address: ndarray, mask: ndarray | None) -> None:
        """Assumes that a prefetch brings the whole line of 128 bytes to the L2 cache."""
        own = address if mask is None else address[mask]
        for number in np.unique(own >> np.uint64(SPACING_BITS)).tolist():
            b = self.memory.get(number)
            if b is None:
                continue
            at = own[own >> np.uint64(SPACING_BITS) == number] - np.uint64(b.base)
            lines = (at[at < b.size] >> np.uint64(7)).astype(np.int64)
            marks = self.prefetched.setdefault(b.name, np.zeros(b.size // 32 + 8, bool))
            for n in range(4):
                marks[4 * lines + n] = True


_NOWHERE = np.uint64(2**64 - 1)


def _within(b: Buffer, address: ndarray, mask: ndarray | None) -> tuple[ndarray, ndarray]:
    """The threads that access a buffer, and the offsets of theirs in it."""
    own = address >> np.uint64(SPACING_BITS) == b.base >> SPACING_BITS
    own = own if mask is None else own & mask
    return own, (address[own] - np.uint64(b.base)).astype(np.int64)


def wavefronts(addresses: ndarray, size: int) -> int:
    """Passes of shared memory for a warp, of which each serves a word of 4 bytes in each of 32 banks.

    An access of 8 bytes is two of half a warp each. One pass is enough for both if all pairs of neighbouring threads,
    or all threads that are two apart, have the same address. An access of 16 bytes is two of that kind.

    Args:
        addresses: of the 32 threads; negative: the thread takes no part.
        size: bytes of a thread.
    """
    active = addresses >= 0
    if not active.any():
        return 0
    if size <= 4:
        return _conflicts(addresses[active] >> 2)
    words = addresses[:, None] // 4 + np.arange(size // 4)
    total = 0
    span = 32 if size == 8 else 16
    for begin in range(0, 32, span):
        own, there = addresses[begin : begin + span], active[begin : begin + span]
        merge = any(
            bool(((own == own[np.arange(span) ^ step]) | ~there | ~there[np.arange(span) ^ step]).all())
            for step in (1, 2)
        )
        for first in range(begin, begin + span, span if merge else span // 2):
            last = first + (span if merge else span // 2)
            if active[first:last].any():
                total += _conflicts(words[first:last][active[first:last]].ravel())
    return total


def _conflicts(words: ndarray) -> int:
    """The most different words in a bank."""
    return int(np.bincount(np.unique(words) % 32).max())


def _name(ins: Instruction) -> str:
    return ins.opcode.split(".")[0]


def _target(ins: Instruction) -> int | None:
    """Where a branch goes, or where the threads of a BSSY meet."""
    if _name(ins) not in ("BRA", "BSSY", "CALL", "JMP"):
        return None
    match = re.search(r"0x([0-9a-f]+)$", ins.text)
    return int(match[1], 16) if match else None


def run_block(kernel: Kernel, **options: Any) -> Counts:
    """As `Run(kernel, **options).run()`."""
    return partial(Run, kernel)(**options).run()
