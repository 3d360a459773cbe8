"""Strict reader of EchoNet-LVH's `MeasurementsList.csv`, which has a row for each measurement.

A wrong table raises an error; a wrong row is left out and reported by its line. Messages repeat a cell only if it is a
number or the name of a known column or type, because a shifted column could hold the name of a patient.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import NamedTuple

from cardiocaps.data.cells import (
    LINES_NAMED,
    MAX_FPS,
    RowError,
    blank,
    claimed,
    find_columns,
    find_group,
    is_number,
    number,
    records,
    video_name,
    whole,
)
from cardiocaps.data.echonet_lvh.labels import CALCS, LIMITS, WALLS
from cardiocaps.data.header import MAX_FRAMES, MAX_SIDE, Header
from cardiocaps.data.problems import Problem, refuse_many
from cardiocaps.errors import DataError, printable

FILE_NAME = "MeasurementsList.csv"

_REQUIRED = ("HashedFileName", "Calc", "CalcValue", "Frame", "Frames")
_OPTIONAL = ("FPS", "Width", "Height", "X1", "X2", "Y1", "Y2", "split")
# The published file and its description differ in some names of columns.
_OTHER_SPELLINGS = {"NumFrames": "Frames", "Split": "split"}
_NO_TYPE = f"Calc is not a type of measurement: used are {', '.join(CALCS)}"

# The published code used these rows of the table.
PAPER_ROWS = range(11464, 11764)

# Ranges of medians that hearts have in millimetres and never in centimetres.
_MILLIMETRES = {"walls": (4.0, 40.0), "diameters": (15.0, 100.0)}


class Row(NamedTuple):
    """A measurement."""

    position: int  # of the row in the table, from 0
    line: int
    name: str
    calc: str
    cm: float
    frame: int | None  # None: the cell is blank
    split: str  # the cell's text in lower case; "" if blank or without the column
    points: str = ""  # the cells of the calipers
    group: int = 0  # the same number for all rows of a patient or study; 0: not stated


@dataclass(frozen=True)
class Table:
    """The content of the table, and what was left out."""

    rows: tuple[Row, ...]  # the usable ones, in order
    lines: Mapping[str, int]  # every video's name -> the line where it comes first
    unmeasured: frozenset[str]  # videos without a row of a used type
    claims: Mapping[str, Header]  # what the usable rows state about a video; 0: not stated
    total: int  # data rows
    problems: tuple[Problem, ...]
    group_column: str | None  # the column that names patients or studies
    group_kind: str  # "patient" or "study"; "" without such a column


def read_measurements(
    path: Path, *, max_bad_share: float = 0.05, group_column: str | None = None, follow_links: bool = False
) -> Table:
    """Read and check the table, in time and memory proportional to its size.

    Args:
        path: the CSV file (UTF-8, a byte-order mark is accepted).
        max_bad_share: largest share of rows that may be left out; harmless ones do not count.
        group_column: the column that names patients or studies; None: one with a usual name (PatientID, patient_id,
            Patient, subject, study, …), if there is one.
        follow_links: the file may be a link that leaves its folder.

    Raises:
        DataError: unreadable, empty, a column missing or given twice, too many bad rows, or no usable one.
        ConfigError: there is no column `group_column`.
    """
    lines = records(path, follow_links)
    _, header = next(lines, (0, []))
    if not header:
        raise DataError(f"{printable(path.name)}: empty, expected the columns {', '.join(_REQUIRED)}")
    reader = _Reader(header, printable(path.name), group_column)
    rows: list[Row] = []
    problems: list[Problem] = []
    total = 0
    for line, cells in lines:
        if not cells:
            continue
        try:
            rows.append(reader.row(total, line, cells))
        except RowError as error:
            problems.append(Problem(f"line {line}", str(error), error.harmless))
        total += 1
    if not total:
        raise DataError(f"{printable(path.name)}: a header and no rows")
    contradictions = _contradictions(rows)
    problems += [contradictions[line] for line in sorted(contradictions)]
    rows = [row for row in rows if row.line not in contradictions]
    bad = [problem for problem in problems if not problem.harmless]
    note = reader.unit_note()
    refuse_many(bad, total, max_bad_share, f"rows of {path.name}", note)
    if not rows:
        first = f"; the first: {problems[0].where}: {problems[0].reason}"
        raise DataError(f"{printable(path.name)}: none of its {total} rows can be used{first}")
    if note:
        problems.append(Problem("the whole table", note, harmless=True))
    return Table(
        rows=tuple(rows),
        lines=reader.lines,
        unmeasured=frozenset(reader.lines.keys() - reader.measured),
        claims={name: claim for name, (claim, _) in reader.claims.items()},
        total=total,
        problems=tuple(problems),
        group_column=reader.group_column,
        group_kind=reader.group_kind,
    )


def paper_rows(rows: Sequence[Row], total: int) -> list[Row]:
    """The rows that the published code used; all rows, with a warning, if the table is too short."""
    if total < PAPER_ROWS.stop:
        warnings.warn(
            f"the paper protocol uses rows {PAPER_ROWS.start} to {PAPER_ROWS.stop - 1} of the table;"
            f" this one has {total} rows: all are used",
            stacklevel=3,
        )
        return list(rows)
    return [row for row in rows if row.position in PAPER_ROWS]


class _Reader:
    """Reads the rows one by one, and keeps what they have stated about each video."""

    def __init__(self, header: Sequence[str], file: str, group_column: str | None) -> None:
        self.width = len(header)
        self.lines: dict[str, int] = {}
        self.measured: set[str] = set()
        self.claims: dict[str, tuple[Header, int]] = {}
        self._columns = find_columns(header, file, _REQUIRED, _OPTIONAL, _OTHER_SPELLINGS)
        group, self.group_kind = find_group(header, file, group_column)
        self.group_column = None if group is None else printable(header[group])
        if group is not None:
            self._columns["group"] = group
        self._groups: dict[str, int] = {"": 0}
        self._values = {"walls": array("d"), "diameters": array("d")}

    def row(self, position: int, line: int, cells: Sequence[str]) -> Row:
        """Raises RowError."""
        if len(cells) != self.width:
            raise RowError(f"wrong number of fields: {len(cells)} (the header has {self.width})")
        cell = {column: cells[place] for column, place in self._columns.items()}
        name = video_name("HashedFileName", cell["HashedFileName"])
        self.lines.setdefault(name, line)
        calc = cell["Calc"]
        if why := _unused(calc, cell["CalcValue"], cell["Frame"]):
            raise RowError(why, harmless=True)
        self.measured.add(name)
        if calc not in LIMITS:
            raise RowError(_wrong_type(calc))
        cm = number("CalcValue", cell["CalcValue"])
        self._values["walls" if calc in WALLS else "diameters"].append(cm)
        low, high = LIMITS[calc]
        if not low <= cm <= high:
            raise RowError(f"CalcValue out of range: {cm:.6g} cm, {calc} is from {low:g} to {high:g}")
        claim = Header(
            whole("Frames", claimed("Frames", cell, MAX_FRAMES)),
            int(claimed("Width", cell, MAX_SIDE)),
            int(claimed("Height", cell, MAX_SIDE)),
            claimed("FPS", cell, MAX_FPS),
        )
        frame = None if blank(cell["Frame"]) else whole("Frame", number("Frame", cell["Frame"]))
        last = (claim.frames or MAX_FRAMES) - 1
        if frame is not None and not 0 <= frame <= last:
            raise RowError(f"Frame out of range: {frame:.10g} (allowed: 0 to {last})")
        self._describe(name, claim, line)
        group = cell.get("group", "").strip()
        return Row(
            position,
            line,
            name,
            calc,
            cm,
            frame,
            cell.get("split", "").strip().lower(),
            "\0".join(cell.get(point, "") for point in ("X1", "X2", "Y1", "Y2")),
            self._groups.setdefault(group, len(self._groups)),
        )

    def unit_note(self) -> str:
        """A note if the values look like millimetres; a wall is about 1 cm thick, a ventricle 5 cm wide."""
        for what, (low, high) in _MILLIMETRES.items():
            values = self._values[what]
            if values and low <= (middle := median_low(values)) <= high:
                found = f"the median of the {what} is {middle:.3g}"
                return f"CalcValue looks like millimetres where cm are expected ({found})"
        return ""

    def _describe(self, name: str, claim: Header, line: int) -> None:
        """Keep what a row states about its video; another row may state what this one leaves blank."""
        before, first = self.claims.setdefault(name, (claim, line))
        if before == claim:
            return
        pairs = [(getattr(before, part), getattr(claim, part)) for part in ("frames", "width", "height", "fps")]
        if any(one and other and one != other for one, other in pairs):
            raise RowError(f"Frames, Width, Height or FPS contradict another row: line {first}")
        self.claims[name] = Header(*(one or other for one, other in pairs)), first


def _unused(calc: str, value: str, frame: str) -> str:
    """Why a row is not needed; "" if it is needed, or wrong."""
    if calc in LIMITS:
        return "nothing measured: CalcValue and Frame are blank" if blank(value) and blank(frame) else ""
    if _wrong_type(calc) != _NO_TYPE or is_number(calc):
        return ""
    measured = blank(value) or is_number(value)
    return f"Calc is of a type that is not used: used are {', '.join(CALCS)}" if measured else ""


def _wrong_type(calc: str) -> str:
    if blank(calc):
        return "Calc is blank"
    known = {name.lower(): name for name in CALCS}.get(calc.strip().lower())
    return f"Calc is spelled otherwise than {known}" if known else _NO_TYPE


def _contradictions(rows: Iterable[Row]) -> dict[int, Problem]:
    """Line -> problem, for repeated rows and for several values of one measurement.

    Of repeated rows the first is kept, so they are harmless. Of contradicting values none is kept, because any may be
    wrong. A measurement on an unknown frame contradicts nothing.
    """
    groups: dict[tuple[str, str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.name, row.calc, row.frame), []).append(row)
    problems: dict[int, Problem] = {}
    for group in groups.values():
        if group[0].frame is not None and len({row.cm for row in group}) > 1:
            lines = ", ".join(str(row.line) for row in group[:LINES_NAMED])
            more = f" and {len(group) - LINES_NAMED} more" if len(group) > LINES_NAMED else ""
            reason = f"conflicting values of one measurement: lines {lines}{more}"
            problems |= {row.line: Problem(f"line {row.line}", reason) for row in group}
            continue
        seen: dict[tuple[float, str], int] = {}
        for row in group:
            first = seen.setdefault((row.cm, row.points), row.line)
            if first != row.line:
                problems[row.line] = Problem(f"line {row.line}", f"duplicate row: as line {first}", harmless=True)
    return problems
