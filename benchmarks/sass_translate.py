"""Translates instructions of the machine code (SASS of sm_90) to lines of Python, for `sass_run`.

In Python every register and predicate is an array over the threads of a block, and so is every constant. A line does an
instruction for all threads, or for those of the mask `g`; uniform registers, which the threads of a warp have in
common, are written for the mask `u`. 64-bit numbers are pairs of registers.

To add an opcode, write a function with `_translates`. It gets the operands as text and the parts of the opcode behind
its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy import ndarray

from .sass import Instruction, SassError

# What memory without contents holds: 0.0078 as float32 and bfloat16, 1 as float16; not 0 as a byte.
PATTERN = 0x3C003C00


class Arrays(Protocol):
    """Gives arrays their names in Python."""

    special: dict[str, ndarray]  # special registers

    def name(self, text: str) -> str:
        """Of a register or a predicate."""

    def constant(self, value: int, bits: int = 32) -> str:
        """Of a number."""

    def bank(self, at: int, bits: int = 32) -> str:
        """Of a number in constant bank 0."""


def translate(ins: Instruction, index: int, full: bool, arrays: Arrays) -> list[str]:
    """The lines of an instruction. Raises SassError.

    Args:
        ins: the instruction.
        index: its number in the kernel.
        full: whether all threads do it, or those of the masks `m` (of threads) and `w` (of whole warps).
        arrays: the names of the operands.
    """
    name, *parts = ins.opcode.split(".")
    if name not in _TRANSLATIONS:
        raise SassError(f"sass: opcode is {ins.opcode}; expected one of {', '.join(sorted(_TRANSLATIONS))}")
    code = _Code(arrays, ins, index, full)
    _TRANSLATIONS[name](code, ins.operands, parts)
    if not code.lines:
        return []
    if not ins.guard:
        return [*([] if full else ["g, u = m, w"]), *code.lines]
    guard = code.predicate(ins.guard[1:])
    masks = f"g = u = {guard}" if full else f"g, u = m & {guard}, w & {guard}"
    return [masks, "if g.any():", *(f"    {x}" for x in code.lines)]


@dataclass
class _Code:
    """Python lines that do one instruction for the threads `g`, or for all if g is None."""

    arrays: Arrays
    ins: Instruction
    index: int
    full: bool
    lines: list[str] = field(default_factory=list)
    uniform: bool = False

    # Operands

    def name(self, text: str) -> str:
        """The array of a register or predicate."""
        return self.arrays.name(text)

    def u32(self, text: str) -> str:
        """An integer operand."""
        if text[0] == "-" and text[1] in "RUc|":
            return f"(0 - {self.u32(text[1:])})"
        if text[0] == "~":
            return f"(~{self.u32(text[1:])})"
        if text[0] == "|":
            return f"absolute({self.u32(text[1:-1])}.view(int32)).view(uint32)"
        base, _, part = text.partition(".")
        if part in ("H0_H0", "H1_H1", "H0", "H1"):
            return f"({self.u32(base)} >> {16 * (part[1] == '1')} & 0xffff)"
        if part in ("B0", "B1", "B2", "B3"):
            return f"({self.u32(base)} >> {8 * int(part[1])} & 0xff)"
        if re.fullmatch(r"U?R(Z|\d+)", base):
            return self.name(base)
        if match := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text):
            return self.arrays.bank(int(match[1], 16))
        if re.fullmatch(r"-?0x[0-9a-f]+", text):
            return self.arrays.constant(int(text, 16))
        if re.fullmatch(r"[-+]?(\d.*|INF|QNAN)", text):
            return self.arrays.constant(int(np.float32(_number(text)).view(np.uint32)))
        raise SassError(f"sass: operand is {text!r} in {self.ins.text!r}; expected a register, constant or number")

    def s32(self, text: str) -> str:
        return f"{self.u32(text)}.view(int32)"

    def pair(self, text: str) -> str:
        """A 64-bit integer operand."""
        if text[0] == "-":
            return f"(0 - {self.pair(text[1:])})"
        if text[0] == "~":
            return f"(~{self.pair(text[1:])})"
        base = text.removesuffix(".64")
        if match := re.fullmatch(r"(U?R)(Z|\d+)", base):
            high = "Z" if match[2] == "Z" else str(int(match[2]) + 1)
            if match[2] == "Z":
                return "zero64"
            return f"join({self.name(base)}, {self.name(match[1] + high)})"
        if match := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", base):
            return self.arrays.bank(int(match[1], 16), 64)
        return self.arrays.constant(int(base, 16), 64)

    def f32(self, text: str) -> str:
        if text[0] == "-" and text[1] in "RUc|":
            return f"(-{self.f32(text[1:])})"
        if text[0] == "|":
            return f"absolute({self.f32(text[1:-1])})"
        return f"{self.u32(text)}.view(float32)"

    def f64(self, text: str) -> str:
        if text[0] == "-" and text[1] in "RUc|":
            return f"(-{self.f64(text[1:])})"
        if text[0] == "|":
            return f"absolute({self.f64(text[1:-1])})"
        if re.fullmatch(r"[-+]?(\d.*|INF|QNAN)", text):
            return self.arrays.constant(int(np.float64(_number(text)).view(np.uint64)), 64) + ".view(float64)"
        return f"{self.pair(text)}.view(float64)"

    def predicate(self, text: str) -> str:
        return f"(~{self.name(text[1:])})" if text[0] == "!" else self.name(text)

    # Results

    def do(self, line: str) -> None:
        self.lines.append(line)

    def write(self, to: str, value: str) -> None:
        """Write an array to a register or predicate."""
        if to in ("RZ", "URZ", "PT", "UPT"):
            return
        mask = "u" if to[0] == "U" else "g"
        if self.full and not self.ins.guard:
            self.do(f"{self.name(to)}[:] = {value}")
        else:
            self.do(f"copyto({self.name(to)}, {value}, where={mask})")

    def write_f32(self, to: str, value: str) -> None:
        self.do(f"v = {value}")
        self.write(to, "v.view(uint32)")

    def write_pair(self, to: str, value: str) -> None:
        """Write an array of 64-bit numbers to a pair of registers."""
        if to in ("RZ", "URZ"):
            return
        self.do(f"x = ({value}).view(uint64)")
        kind, number = re.fullmatch(r"(U?R)(\d+)", to).groups()  # type: ignore[union-attr]
        self.write(to, "x.astype(uint32)")
        self.write(f"{kind}{int(number) + 1}", "(x >> 32).astype(uint32)")


def _number(text: str) -> float:
    return float(text.replace("QNAN", "nan").replace("INF", "inf"))


_Translate = Callable[[_Code, list[str], list[str]], None]
_TRANSLATIONS: dict[str, _Translate] = {}


def _translates(*names: str) -> Callable[[_Translate], _Translate]:
    """Marks the translation of some opcodes. It gets the operands and the parts of the opcode behind its name."""

    def mark(function: _Translate) -> _Translate:
        _TRANSLATIONS.update(dict.fromkeys(names, function))
        return function

    return mark


def is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(T|\d)", text) is not None


def _split(operands: list[str]) -> tuple[str, list[str], list[str], list[str]]:
    """Of an arithmetic instruction: the result, the predicates that it sets, its operands, the predicates it reads."""
    rest = operands[1:]
    sets = []
    while rest and is_predicate(rest[0]):
        sets.append(rest.pop(0))
    reads: list[str] = []
    while rest and is_predicate(rest[-1]):
        reads.insert(0, rest.pop())
    return operands[0], sets, rest, reads


@_translates("MOV", "UMOV")
def _mov(c: _Code, o: list[str], _: list[str]) -> None:
    c.write(o[0], c.u32(o[1]))


@_translates("IADD3", "UIADD3", "VIADD", "IADD")
def _iadd3(c: _Code, o: list[str], parts: list[str]) -> None:
    to, sets, terms, reads = _split(o)
    carries = [p for p in reads if p not in ("!PT", "!UPT")] if "X" in parts else []
    if not any(p not in ("PT", "UPT") for p in sets):
        value = " + ".join([*(c.u32(t) for t in terms if t not in ("RZ", "URZ"))] or [c.u32("RZ")])
        c.write(to, value + "".join(f" + {c.predicate(p)}" for p in carries))
        return

    def wide(text: str) -> str:
        # −x is ~x + 1, whose carry counts.
        negative = text[0] == "-" and text[1] in "RU"
        return f"(0x100000000 - wide({c.u32(text[1:])}))" if negative else f"wide({c.u32(text)})"

    value = " + ".join(wide(t) for t in terms if t not in ("RZ", "URZ"))
    c.do(f"s = {value or 'zero64'}" + "".join(f" + {c.predicate(p)}" for p in carries))
    c.do("carry = s >> 32")
    c.write(to, "s.astype(uint32)")
    for number, p in enumerate(sets):
        c.write(p, f"carry > {number}")


@_translates("IMAD", "UIMAD")
def _imad(c: _Code, o: list[str], parts: list[str]) -> None:
    to, sets, (a, b, addend), reads = _split(o)
    carry = "".join(f" + {c.predicate(p)}" for p in reads if p not in ("!PT", "!UPT")) if "X" in parts else ""
    zero = ("RZ", "URZ")
    if "WIDE" in parts or "HI" in parts:
        kind = "wide" if "U32" in parts else "wide_signed"
        product = f"{kind}({c.u32(a)}) * {kind}({c.u32(b)})"
        if "HI" in parts:
            c.write(to, f"(({product} + {c.pair(addend)}{carry}) >> 32).astype(uint32)")
            return
        c.do(f"s = {product}")
        c.do("t = s" if addend in zero and not carry else f"t = s + {c.pair(addend)}{carry}")
        if sets:
            c.do("carry = t < s")
            c.write(sets[0], "carry")
        c.write_pair(to, "t")
    elif a in zero or b in zero:
        c.write(to, f"{c.u32(addend)}{carry}")
    else:
        product = c.u32(a) if b == "0x1" else f"{c.u32(a)} * {c.u32(b)}"
        c.write(to, f"{product}{'' if addend in zero else f' + {c.u32(addend)}'}{carry}")


@_translates("LEA", "ULEA")
def _lea(c: _Code, o: list[str], parts: list[str]) -> None:
    to, sets, rest, reads = _split(o)
    carry = "".join(f" + {c.predicate(p)}" for p in reads if p not in ("!PT", "!UPT")) if "X" in parts else ""
    shift = int(rest[-1], 16)
    if "HI" in parts:
        if "SX32" in parts:
            shifted = f"(wide_signed({c.u32(rest[0])}) << {shift})"
        else:
            shifted = f"(join({c.u32(rest[0])}, {c.u32(rest[2])}) << {shift})"
        c.do(f"s = ({shifted} >> 32) + wide({c.u32(rest[1])}){carry}")
    else:
        c.do(f"s = wide({c.u32(rest[0])} << {shift}) + wide({c.u32(rest[1])}){carry}")
    if sets:
        c.do("carry = s > 0xffffffff")
    c.write(to, "s.astype(uint32)")
    if sets:
        c.write(sets[0], "carry")


@_translates("SHF", "USHF")
def _shf(c: _Code, o: list[str], parts: list[str]) -> None:
    to, low, by, high = o[:4]
    most = 31 if "W" in parts and "U32" in parts else 63
    count = f"minimum({c.u32(by)}, 63)" if "W" not in parts else f"({c.u32(by)} & {most})"
    value = f"join({c.u32(low)}, {c.u32(high)})"
    if parts[0] == "L":
        c.do(f"s = {value} << {count}")
    elif any(p.startswith("S") for p in parts):
        c.do(f"s = ({value}.view(int64) >> {count}).view(uint64)")
    else:
        c.do(f"s = {value} >> {count}")
    c.write(to, "(s >> 32).astype(uint32)" if "HI" in parts else "s.astype(uint32)")


@_translates("LOP3", "ULOP3", "LOP")
def _lop3(c: _Code, o: list[str], _: list[str]) -> None:
    sets = []
    while is_predicate(o[0]):
        sets.append(o.pop(0))
    to, a, b, d, lut = o[:5]
    names = [c.u32(x) for x in (a, b, d)]
    table = int(lut, 16)
    simple = {0xC0: "{0} & {1}", 0xFC: "{0} | {1}", 0x3C: "{0} ^ {1}", 0xF8: "{0} | {1} & {2}", 0xF0: "{0}",
              0xCC: "{1}", 0xAA: "{2}", 0x30: "{0} & ~{1}", 0x0C: "~{0} & {1}", 0x33: "~{1}", 0x0F: "~{0}"}  # fmt: skip
    if table in simple:
        value = simple[table].format(*names)
    else:
        terms = []
        for bits in range(8):
            if table >> bits & 1:
                x, y, z = (n if bits >> (2 - m) & 1 else f"~{n}" for m, n in enumerate(names))
                terms.append(f"({x} & {y} & {z})")
        value = " | ".join(terms) or c.u32("RZ")
    c.do(f"v = {value}")
    c.write(to, "v")
    for p in sets:
        c.write(p, "v != 0")


@_translates("PLOP3", "UPLOP3")
def _plop3(c: _Code, o: list[str], _: list[str]) -> None:
    names = [c.predicate(p) for p in o[2:5]]
    results = []
    for lut in o[5:7]:
        terms = []
        for bits in range(8):
            if int(lut, 16) >> bits & 1:
                x, y, z = (n if bits >> (2 - m) & 1 else f"~{n}" for m, n in enumerate(names))
                terms.append(f"({x} & {y} & {z})")
        results.append(" | ".join(terms) or "~true")
    for name, value in zip("vx", results, strict=True):
        c.do(f"{name} = {value}")
    for to, name in zip(o[:2], "vx", strict=True):
        c.write(to, name)


_COMPARE = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}


def _join_predicate(c: _Code, o: list[str], how: str, reads: list[str]) -> None:
    """Write a comparison `v` and its opposite, combined with the predicate that is read."""
    joined = reads[0] if reads else "PT"
    sign = {"AND": "&", "OR": "|", "XOR": "^"}[how]
    if joined in ("PT", "UPT") and how == "AND":
        c.do("x = ~v")
    else:
        c.do(f"v, x = v {sign} {c.predicate(joined)}, ~v {sign} {c.predicate(joined)}")
    c.write(o[0], "v")
    c.write(o[1], "x")


@_translates("ISETP", "UISETP")
def _isetp(c: _Code, o: list[str], parts: list[str]) -> None:
    kind, reads = parts[0], o[4:]
    read = c.u32 if "U32" in parts else c.s32
    a, b = read(o[2]), read(o[3])
    if "EX" in parts:  # The high words; the predicate behind has the comparison of the low words.
        low = c.predicate(reads.pop())
        if kind in ("EQ", "NE"):
            value = f"({a} == {b}) & {low}" if kind == "EQ" else f"({a} != {b}) | {low}"
        else:
            value = f"({a} {_COMPARE[kind][0]} {b}) | ({a} == {b}) & {low}"
    else:
        value = f"{a} {_COMPARE[kind]} {b}"
    c.do(f"v = {value}")
    _join_predicate(c, o, next(p for p in parts if p in ("AND", "OR", "XOR")), reads)


@_translates("FSETP", "DSETP")
def _fsetp(c: _Code, o: list[str], parts: list[str]) -> None:
    read = c.f64 if c.ins.opcode[0] == "D" else c.f32
    a, b, kind = read(o[2]), read(o[3]), parts[0]
    if kind == "NAN":
        c.do(f"v = isnan({a}) | isnan({b})")
    elif kind == "NUM":
        c.do(f"v = ~(isnan({a}) | isnan({b}))")
    elif kind in ("NE", "EQU"):
        c.do(f"v = {'~' * (kind == 'EQU')}(({a} < {b}) | ({a} > {b}))")
    elif kind in _COMPARE:
        c.do(f"v = {a} {_COMPARE[kind]} {b}")
    else:  # Also true if one is NaN.
        opposite = {"NEU": "==", "LTU": ">=", "LEU": ">", "GTU": "<=", "GEU": "<"}[kind]
        c.do(f"v = ~({a} {opposite} {b})")
    _join_predicate(c, o, next(p for p in parts if p in ("AND", "OR", "XOR")), o[4:])


@_translates("SEL", "USEL")
def _sel(c: _Code, o: list[str], _: list[str]) -> None:
    c.write(o[0], f"where({c.predicate(o[3])}, {c.u32(o[1])}, {c.u32(o[2])})")


@_translates("FSEL")
def _fsel(c: _Code, o: list[str], _: list[str]) -> None:
    c.write_f32(o[0], f"where({c.predicate(o[3])}, {c.f32(o[1])}, {c.f32(o[2])})")


@_translates("VIMNMX", "IMNMX", "UIMNMX", "UVIMNMX")
def _imnmx(c: _Code, o: list[str], parts: list[str]) -> None:
    read = c.u32 if "U32" in parts else c.s32
    a, b = read(o[1]), read(o[2])
    c.write(o[0], f"where({c.predicate(o[3])}, minimum({a}, {b}), maximum({a}, {b})).view(uint32)")


@_translates("VIADDMNMX")
def _viaddmnmx(c: _Code, o: list[str], parts: list[str]) -> None:
    view = "" if "U32" in parts else ".view(int32)"
    a, b = f"({c.u32(o[1])} + {c.u32(o[2])}){view}", f"{c.u32(o[3])}{view}"
    c.write(o[0], f"where({c.predicate(o[4])}, minimum({a}, {b}), maximum({a}, {b})).view(uint32)")


@_translates("IABS")
def _iabs(c: _Code, o: list[str], _: list[str]) -> None:
    c.write(o[0], f"absolute({c.s32(o[1])}).view(uint32)")


@_translates("POPC", "UPOPC")
def _popc(c: _Code, o: list[str], _: list[str]) -> None:
    c.write(o[0], f"bitwise_count({c.u32(o[1])}).astype(uint32)")


@_translates("FLO", "UFLO")
def _flo(c: _Code, o: list[str], parts: list[str]) -> None:
    c.do(f"v = {c.u32(o[-1])}")
    c.do("x = where(v == 0, -1, frexp(v.astype(float64))[1] - 1)")
    if "SH" in parts:
        c.do("x = where(x < 0, x, 31 - x)")
    c.write(next(x for x in o if not is_predicate(x)), "x.astype(int32).view(uint32)")


@_translates("BMSK", "UBMSK")
def _bmsk(c: _Code, o: list[str], _: list[str]) -> None:
    c.write(o[0], f"(((1 << minimum(wide({c.u32(o[2])}), 32)) - 1) << wide({c.u32(o[1])})).astype(uint32)")


@_translates("SGXT", "USGXT")
def _sgxt(c: _Code, o: list[str], parts: list[str]) -> None:
    c.do(f"v = 32 - minimum({c.u32(o[2])}, 32)")
    view = "" if "U32" in parts else ".view(int32)"
    c.write(o[0], f"(({c.u32(o[1])} << v){view} >> v).view(uint32)")


@_translates("PRMT", "UPRMT")
def _prmt(c: _Code, o: list[str], _: list[str]) -> None:
    c.write(o[0], f"permute({c.u32(o[1])}, {c.u32(o[3])}, {c.u32(o[2])})")


@_translates("P2R")
def _p2r(c: _Code, o: list[str], _: list[str]) -> None:
    bits = " | ".join(f"{c.name(f'P{n}')}.astype(uint32) << {n}" for n in range(7))
    mask = c.u32(o[3])
    c.write(o[0], f"(({bits}) & {mask}) | ({c.u32(o[2])} & ~{mask})")


@_translates("R2P")
def _r2p(c: _Code, o: list[str], _: list[str]) -> None:
    mask = int(o[2], 16)
    c.do(f"v = {c.u32(o[1])}")
    for n in range(7):
        if mask >> n & 1:
            c.write(f"P{n}", f"(v >> {n} & 1) != 0")


@_translates("R2UR")
def _r2ur(c: _Code, o: list[str], _: list[str]) -> None:
    c.do(f"v = first_of_warp({c.u32(o[-1])}, {'None' if c.full and not c.ins.guard else 'g'})")
    c.write(o[0], "v")


@_translates("S2R", "S2UR", "CS2R")
def _s2r(c: _Code, o: list[str], parts: list[str]) -> None:
    wide = c.ins.opcode.startswith("CS2R") and "32" not in parts
    if o[1] == "SRZ":
        value = "RZ"
    elif o[1] in c.arrays.special:
        value = f"special['{o[1]}']"
    else:
        raise SassError(f"sass: special register is {o[1]}; expected one of {', '.join(c.arrays.special)}")
    (c.write_pair if wide else c.write)(o[0], f"wide({value})" if wide else value)


@_translates("FADD", "FMUL", "FFMA", "FADD32I", "FMUL32I", "FFMA32I")
def _float(c: _Code, o: list[str], parts: list[str]) -> None:
    a, b = c.f32(o[1]), c.f32(o[2])
    name = c.ins.opcode[:4]
    value = f"{a} + {b}" if name == "FADD" else f"{a} * {b}" if name == "FMUL" else f"fma({a}, {b}, {c.f32(o[3])})"
    c.write_f32(o[0], f"clip({value}, 0, 1)" if "SAT" in parts else value)


@_translates("DADD", "DMUL", "DFMA")
def _double(c: _Code, o: list[str], _: list[str]) -> None:
    a, b = c.f64(o[1]), c.f64(o[2])
    name = c.ins.opcode[:4]
    value = f"{a} + {b}" if name == "DADD" else f"{a} * {b}" if name == "DMUL" else f"{a} * {b} + {c.f64(o[3])}"
    c.write_pair(o[0], value)


@_translates("FMNMX")
def _fmnmx(c: _Code, o: list[str], _: list[str]) -> None:
    a, b = c.f32(o[1]), c.f32(o[2])
    c.write_f32(o[0], f"where({c.predicate(o[3])}, minimum({a}, {b}), maximum({a}, {b}))")


@_translates("MUFU")
def _mufu(c: _Code, o: list[str], parts: list[str]) -> None:
    if parts[0] in ("RCP64H", "RSQ64H"):
        x = f"join(RZ, {c.u32(o[1])}).view(float64)"
        value = f"1 / {x}" if parts[0] == "RCP64H" else f"1 / sqrt({x})"
        c.write(o[0], f"(({value}).view(uint64) >> 32).astype(uint32)")
        return
    x = c.f32(o[1])
    functions = {"RCP": f"1 / {x}", "RSQ": f"1 / sqrt({x})", "SQRT": f"sqrt({x})", "EX2": f"exp2({x})",
                 "LG2": f"log2({x})", "SIN": f"sin({x})", "COS": f"cos({x})", "TANH": f"tanh({x})"}  # fmt: skip
    c.write_f32(o[0], f"({functions[parts[0]]}).astype(float32)")


@_translates("FRND")
def _frnd(c: _Code, o: list[str], parts: list[str]) -> None:
    function = {"FLOOR": "floor", "CEIL": "ceil", "TRUNC": "trunc"}
    c.write_f32(o[0], f"{next((function[p] for p in parts if p in function), 'rint')}({c.f32(o[1])})")


@_translates("FCHK")
def _fchk(c: _Code, o: list[str], _: list[str]) -> None:
    c.write(o[0], f"division_is_slow({c.f32(o[1])}, {c.f32(o[2])})")


@_translates("I2F", "I2FP")
def _i2f(c: _Code, o: list[str], parts: list[str]) -> None:
    x = c.pair(o[1]) if "U64" in parts or "S64" in parts else c.u32(o[1])
    if "U16" in parts:
        x = f"({x} & 0xffff)"
    if not any(p in parts for p in ("U64", "U32", "U16", "U8")):
        x += ".view(int64)" if "S64" in parts else ".view(int32)"
    if "F64" in parts:
        c.write_pair(o[0], f"{x}.astype(float64)")
    else:
        c.write_f32(o[0], f"{'to_float_up' if 'RP' in parts else 'to_float'}({x})")


@_translates("F2I", "F2IP")
def _f2i(c: _Code, o: list[str], parts: list[str]) -> None:
    x = c.f64(o[1]) if "F64" in parts else f"{c.f32(o[1])}.astype(float64)"
    rounding = {"TRUNC": "trunc", "FLOOR": "floor", "CEIL": "ceil"}
    x = f"{next((rounding[p] for p in parts if p in rounding), 'rint')}({x})"
    if "U64" in parts or "S64" in parts:
        c.write_pair(o[0], f"to_integer({x}, {'uint64' if 'U64' in parts else 'int64'})")
    else:
        c.write(o[0], f"to_integer({x}, {'uint32' if 'U32' in parts else 'int32'}).view(uint32)")


@_translates("F2F")
def _f2f(c: _Code, o: list[str], parts: list[str]) -> None:
    to, source = [p for p in parts if p in ("F16", "F32", "F64", "BF16")]
    x = c.f64(o[1]) if source == "F64" else c.f32(o[1])
    if to == "F64":
        c.write_pair(o[0], f"{x}.astype(float64)")
    elif to == "F32":
        c.write_f32(o[0], f"{x}.astype(float32)")
    else:
        c.write(o[0], f"{x}.astype(float16).view(uint16).astype(uint32)")


@_translates("F2FP")
def _f2fp(c: _Code, o: list[str], parts: list[str]) -> None:
    kind = "to_bfloat16" if "BF16" in parts else "to_float16"
    c.write(o[0], f"{kind}({c.f32(o[1])}) << 16 | {kind}({c.f32(o[2])})")


@_translates("HFMA2", "HADD2", "HMUL2")
def _half(c: _Code, o: list[str], parts: list[str]) -> None:
    if "F32" in parts and c.ins.opcode.startswith("HADD2"):  # a conversion
        c.write_f32(o[0], f"{c.u32(o[2])}.astype(uint16).view(float16).astype(float32)")
    elif o[1] in ("-RZ", "RZ") and o[2] in ("-RZ", "RZ"):  # a constant
        high, low = (int(np.float16(_number(x)).view(np.uint16)) for x in o[3:5])
        c.write(o[0], c.arrays.constant(high << 16 | low))
    else:  # Packed arithmetic of 16 bits, whose values no count depends on.
        c.write(o[0], c.arrays.constant(PATTERN))


@_translates("HMMA", "IMMA", "DMMA")
def _mma(c: _Code, o: list[str], parts: list[str]) -> None:
    """Tensor cores. Of types other than bfloat16 the values are not computed."""
    halves = "F16" in parts and "F32" not in parts
    results = _registers(o[0], 8 if halves else 16)
    if "BF16" in parts:
        pieces = {"1688": 1, "16816": 2}[parts[0]]
        a, b, d = (
            ", ".join(c.u32(r) for r in _registers(x, 4 * count))
            for x, count in zip(o[1:4], (2 * pieces, pieces, 4), strict=True)
        )
        c.do(f"products = multiply_fragments(({a}), ({b},), ({d}))")
    for n, to in enumerate(results):
        c.write(to, f"products[{n}]" if "BF16" in parts else c.arrays.constant(PATTERN))


@_translates("SHFL")
def _shfl(c: _Code, o: list[str], parts: list[str]) -> None:
    p, to, x, by, _ = o if is_predicate(o[0]) else ["PT", *o]
    c.do(f"v = shuffle('{parts[0]}', {c.u32(x)}, {c.u32(by)})")
    c.write(to, "v")
    if p not in ("PT", "!PT"):
        c.write(p, "true")


@_translates("VOTE", "VOTEU")
def _vote(c: _Code, o: list[str], parts: list[str]) -> None:
    results = [x for x in o[:-1] if re.fullmatch(r"U?R(Z|\d+)", x)]
    mask = "None" if c.full and not c.ins.guard else "g"
    c.do(f"v, x = vote('{parts[0]}', {c.predicate(o[-1])}, {mask})")
    for to in o[:-1]:
        c.write(to, "v" if to in results else "x")


# Memory


def _address(c: _Code, text: str) -> str:
    """The sum in the last brackets of an operand."""
    inside = text[text.rindex("[") + 1 : -1]
    terms = []
    for term in re.findall(r"[+-]?[^+-]+", inside):
        negative, plain = term[0] == "-", term.lstrip("+-")
        if plain.startswith("0x"):
            terms.append(c.arrays.constant(-int(plain, 16) if negative else int(plain, 16), 64))
        elif plain.endswith(".64"):
            terms.append(c.pair(plain))
        elif match := re.fullmatch(r"(U?R\w+)\.X(\d+)", plain):
            terms.append(f"wide({c.u32(match[1])}) * {match[2]}")
        elif plain not in ("RZ", "URZ"):
            terms.append(f"wide({c.u32(plain.removesuffix('.U32'))})")
    return " + ".join(terms) or "zero64"


def _size(parts: Sequence[str]) -> int:
    return next((n for name, n in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1))
                 if name in parts), 4)  # fmt: skip


def _registers(first: str, size: int) -> list[str]:
    count = max(size // 4, 1)
    return [first] * count if first == "RZ" else [f"R{int(first[1:]) + n}" for n in range(count)]


def _active(c: _Code) -> str:
    return "None" if c.full and not c.ins.guard else "g"


def _load(c: _Code, o: list[str], parts: list[str], function: str) -> None:
    size = _size(parts)
    c.do(f"loaded = {function}({c.index}, {_address(c, o[-1])}, {size}, {_active(c)})")
    for number, to in enumerate(_registers(o[-2], size)):
        value = f"loaded[{number}]"
        if "S16" in parts or "S8" in parts:
            value = f"{value}.astype(int{8 * size}).astype(int32).view(uint32)"
        c.write(to, value)


@_translates("LDG", "LD")
def _ldg(c: _Code, o: list[str], parts: list[str]) -> None:
    _load(c, o, parts, "load_global")


@_translates("LDS")
def _lds(c: _Code, o: list[str], parts: list[str]) -> None:
    _load(c, o, parts, "load_shared")


@_translates("STG", "ST")
def _stg(c: _Code, o: list[str], parts: list[str]) -> None:
    size = _size(parts)
    values = ", ".join(c.u32(r) for r in _registers(o[1], size))
    c.do(f"store_global({c.index}, {_address(c, o[0])}, {size}, ({values},), {_active(c)})")


@_translates("STS")
def _sts(c: _Code, o: list[str], parts: list[str]) -> None:
    size = _size(parts)
    values = ", ".join(c.u32(r) for r in _registers(o[1], size))
    c.do(f"store_shared({c.index}, {_address(c, o[0])}, {size}, ({values},), {_active(c)})")


@_translates("LDGSTS")
def _ldgsts(c: _Code, o: list[str], parts: list[str]) -> None:
    """With a predicate: threads for which it is false copy zeros, and read nothing."""
    size, active = _size(parts), _active(c)
    reads = active
    if len(o) > 2:
        reads = c.predicate(o[2]) if active == "None" else f"({active} & {c.predicate(o[2])})"
    c.do(f"loaded = load_global({c.index}, {_address(c, o[1])}, {size}, {reads})")
    if reads != active:
        c.do(f"loaded = [where({c.predicate(o[2])}, x, 0) for x in loaded]")
    c.do(f"store_shared({c.index}, {_address(c, o[0])}, {size}, loaded, {active})")


@_translates("LDSM")
def _ldsm(c: _Code, o: list[str], parts: list[str]) -> None:
    """Each lane's address is one row of 16 bytes."""
    count = int(parts[-1]) if parts[-1] in ("2", "4") else 1
    c.do(f"loaded = load_matrices({c.index}, {_address(c, o[1])}, {count}, {_active(c)})")
    for number in range(count):
        value = f"loaded[{number}]"
        c.write(f"R{int(o[0][1:]) + number}", f"transpose({value})" if "MT88" in parts else value)


@_translates("MOVM")
def _movm(c: _Code, o: list[str], parts: list[str]) -> None:
    """The transpose of a matrix of 8 × 8 numbers that the lanes of a warp have."""
    c.do(f"v = transpose({c.u32(o[1])})")
    c.write(o[0], "v")


@_translates("CCTL")
def _cctl(c: _Code, o: list[str], parts: list[str]) -> None:
    # Its register is one of a pair, also where it is not printed so.
    address = _address(c, re.sub(r"(R\d+)(?!\.64|\d)", r"\1.64", o[0]))
    if any(p.startswith("PF") for p in parts):
        c.do(f"prefetch({c.index}, {address}, {_active(c)})")


@_translates("LDC", "ULDC")
def _ldc(c: _Code, o: list[str], parts: list[str]) -> None:
    match = re.fullmatch(r"c\[0x0\]\[(.*)\]", o[1])
    if match is None:
        raise SassError(f"sass: operand is {o[1]!r} in {c.ins.text!r}; expected constant bank 0")
    size = _size(parts)
    inside = match[1]
    if re.fullmatch(r"0x[0-9a-f]+", inside):
        at = int(inside, 16)
        values = [c.arrays.bank((at & ~3) + 4 * n) for n in range(max(size // 4, 1))]
        if size < 4:
            values = [f"{values[0]} >> {8 * (at & 3)} & {(1 << 8 * size) - 1}"]
    else:
        c.do(f"at = {_address(c, f'[{inside}]')}")
        values = [f"constant_words[(at >> 2) + {n}]" for n in range(max(size // 4, 1))]
        if size < 4:
            values = [f"({values[0]} >> (at & 3).astype(uint32) * 8) & {(1 << 8 * size) - 1}"]
    kind, number = re.fullmatch(r"(U?R)(Z|\d+)", o[0]).groups()  # type: ignore[union-attr]
    for n, value in enumerate(values):
        c.write(o[0] if number == "Z" else f"{kind}{int(number) + n}", value)


# Convergence


@_translates("BSSY")
def _bssy(c: _Code, o: list[str], _: list[str]) -> None:
    c.do(f"barriers[{int(o[0][1:])}][:] = alive" if c.full else f"copyto(barriers[{int(o[0][1:])}], g, where=w)")


@_translates("BREAK")
def _break(c: _Code, o: list[str], _: list[str]) -> None:
    c.do(f"barriers[{int(o[-1][1:])}] &= ~{'g' if c.ins.guard or not c.full else 'alive'}")


@_translates("BMOV")
def _bmov(c: _Code, o: list[str], parts: list[str]) -> None:
    if o[0][0] == "B":
        c.do(f"copyto(barriers[{int(o[0][1:])}], unpack({c.u32(o[1])}), where={'true' if c.full else 'w'})")
    else:
        c.write(o[0], f"pack(barriers[{int(o[1][1:])}])")


@_translates("NOP", "YIELD", "MEMBAR", "ERRBAR", "FENCE", "DEPBAR", "LDGDEPBAR", "NANOSLEEP", "CCTLL", "ACQBULK",
             "UCGABAR_ARV", "UCGABAR_WAIT", "PREEXIT")  # fmt: skip
def _nothing(c: _Code, o: list[str], _: list[str]) -> None:
    pass


# Instructions that may send threads different ways, or make them wait. `Run` does them.
CONTROL = {"BRA", "EXIT", "BSYNC", "BAR", "WARPSYNC", "CALL", "RET", "BRX", "BPT", "KILL", "JMP"}


# ---- functions that the translations call ----------------------------------------------------------------------------


def _wide(x: ndarray) -> ndarray:
    return x.astype(np.uint64)


def _wide_signed(x: ndarray) -> ndarray:
    return x.view(np.int32).astype(np.int64).view(np.uint64)


def _join(low: ndarray, high: ndarray) -> ndarray:
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def _fma(a: ndarray, b: ndarray, c: ndarray) -> ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _permute(low: ndarray, high: ndarray, selection: ndarray) -> ndarray:
    both = _join(low, high)
    out = np.zeros_like(low)
    for n in range(4):
        nibble = selection >> np.uint32(4 * n) & np.uint32(15)
        byte = (both >> (8 * (nibble & np.uint32(7))).astype(np.uint64)).astype(np.uint32) & np.uint32(255)
        sign = np.where(byte >> np.uint32(7) != 0, np.uint32(255), np.uint32(0))
        out |= np.where(nibble & np.uint32(8) != 0, sign, byte) << np.uint32(8 * n)
    return out


def _to_float(x: ndarray) -> ndarray:
    return x.astype(np.float32)


def _to_float_up(x: ndarray) -> ndarray:
    """Rounds up."""
    near = x.astype(np.float32)
    low = near.astype(np.float64) < x.astype(np.float64)
    return np.where(low, np.nextafter(near, np.float32(np.inf)), near)


def _to_integer(x: ndarray, kind: type) -> ndarray:
    limits = np.iinfo(kind)
    out = np.clip(np.nan_to_num(x), float(limits.min), float(limits.max))
    top = out >= float(limits.max)
    return np.where(top, kind(limits.max), np.where(top, 0, out).astype(kind))


def _division_is_slow(a: ndarray, b: ndarray) -> ndarray:
    _, e = np.frexp(a)
    _, f = np.frexp(b)
    return (b == 0) | ~np.isfinite(a) | ~np.isfinite(b) | (a != 0) & ((e - f > 125) | (e - f < -125) | (e < -100))


def _to_bfloat16(x: ndarray) -> ndarray:
    bits = x.view(np.uint32)
    return bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)


def _to_float16(x: ndarray) -> ndarray:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def _rows(words: ndarray) -> ndarray:
    """Matrices [warps, 8, 8] of 16-bit numbers: lane 4 g + t has numbers 2 t and 2 t + 1 of row g in a word."""
    return np.ascontiguousarray(words).view(np.uint16).reshape(-1, 8, 8)


def _transpose(words: ndarray) -> ndarray:
    return np.ascontiguousarray(_rows(words).transpose(0, 2, 1)).view(np.uint32).ravel()


def _multiply_fragments(a: Sequence[ndarray], b: Sequence[ndarray], c: Sequence[ndarray]) -> list[ndarray]:
    """The products of tensor cores a b + c: a [16, K] and b [K, 8] in bfloat16, c [16, 8] in float32.

    Args:
        a: for each 8 columns, the words of rows 0 to 7 and of rows 8 to 15.
        b: for each 8 rows, the words of their transpose.
        c: numbers 2 t and 2 t + 1 of row g, and of row g + 8.
    """

    def numbers(words: ndarray) -> ndarray:
        return (_rows(words).astype(np.uint32) << 16).view(np.float32)

    out = []
    for half in range(2):
        product = np.stack([x.view(np.float32) for x in c[2 * half : 2 * half + 2]], -1).reshape(-1, 8, 8)
        for left, right in zip(a[half::2], b, strict=True):
            product = product + numbers(left) @ numbers(right).transpose(0, 2, 1)
        pairs = product.astype(np.float32).reshape(-1, 2)
        out += [np.ascontiguousarray(pairs[:, n]).view(np.uint32) for n in range(2)]
    return out


FUNCTIONS: dict[str, Any] = {
    name: getattr(np, name)
    for name in (
        *("absolute", "bitwise_count", "ceil", "clip", "copyto", "cos", "exp2", "floor", "frexp", "isnan", "log2"),
        *("maximum", "minimum", "rint", "sin", "sqrt", "tanh", "trunc", "where"),
        *("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
    )
} | {
    "wide": _wide,
    "wide_signed": _wide_signed,
    "join": _join,
    "fma": _fma,
    "permute": _permute,
    "to_float": _to_float,
    "to_float_up": _to_float_up,
    "to_integer": _to_integer,
    "division_is_slow": _division_is_slow,
    "transpose": _transpose,
    "multiply_fragments": _multiply_fragments,
    "to_bfloat16": _to_bfloat16,
    "to_float16": _to_float16,
}
