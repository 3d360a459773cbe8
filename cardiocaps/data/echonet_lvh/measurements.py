"""Strict reader of EchoNet-LVH's `MeasurementsList.csv`, which has a row for each measurement.

All cells are read as text, one row at a time: a parser that looks for numbers and missing values would turn the name
`12E5` into a number and `NA` into nothing. A wrong table raises an error; a wrong row is left out and reported by its
line. Messages repeat a cell only if it is a number or the name of a known column or type, because a shifted column
could hold the name of a patient.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import NamedTuple

from cardiocaps.data.echonet_lvh.labels import CALCS, LIMITS, WALLS
from cardiocaps.data.header import MAX_FRAMES, MAX_SIDE, Header, VideoError
from cardiocaps.data.problems import Problem, refuse_many
from cardiocaps.data.video import allowed_name, regular_file
from cardiocaps.errors import ConfigError, DataError, printable

FILE_NAME = "MeasurementsList.csv"
SUFFIXES = (".avi", ".mp4", ".dcm")
MAX_FPS = 10_000.0

_REQUIRED = ("HashedFileName", "Calc", "CalcValue", "Frame", "Frames")
_OPTIONAL = ("FPS", "Width", "Height", "X1", "X2", "Y1", "Y2", "split")
# The published file and its description differ in some names of columns.
_OTHER_SPELLINGS = {"NumFrames": "Frames", "Split": "split"}
# Names of columns of patients and studies (a study is of one patient on one day), lower case, without _, - and spaces.
_GROUPS = {"patient": ("patientid", "patient", "subjectid", "subject"), "study": ("studyid", "study")}

# Two repeated parts never match the same text, so the time is linear in the length of a cell.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LONGEST_NAME = 255  # characters of a file's name
_NO_TYPE = f"Calc is not a type of measurement: used are {', '.join(CALCS)}"
_LINES_NAMED = 4  # the most lines that a message names

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


class _RowError(Exception):
    """The reason for which a row is left out. Harmless: the row is not needed."""

    def __init__(self, reason: str, harmless: bool = False) -> None:
        super().__init__(reason)
        self.harmless = harmless


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
    records = _records(path, follow_links)
    _, header = next(records, (0, []))
    if not header:
        raise DataError(f"{printable(path.name)}: empty, expected the columns {', '.join(_REQUIRED)}")
    reader = _Reader(header, printable(path.name), group_column)
    rows: list[Row] = []
    problems: list[Problem] = []
    total = 0
    for line, cells in records:
        if not cells:
            continue
        try:
            rows.append(reader.row(total, line, cells))
        except _RowError as error:
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


def _records(path: Path, follow_links: bool) -> Iterator[tuple[int, list[str]]]:
    """The number of its last line and the cells of every row, the header first; a blank line gives no cells."""
    name = printable(path.name)
    try:
        with regular_file(path, path.parent, follow_links).open("rb") as file:
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            reader = csv.reader(text, strict=True)
            try:
                for cells in reader:
                    yield reader.line_num, cells
            except UnicodeDecodeError as error:
                place = file.tell() - len(error.object) + error.start
                found = error.object[error.start]
                raise DataError(f"{name}: not UTF-8 text, byte {place} is 0x{found:02x}") from None
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not a CSV table ({error})") from None
    except VideoError as error:
        raise DataError(f"{printable(path)}: {error}") from None
    except OSError as error:
        raise DataError(f"{printable(path)}: {error.strerror}") from None


class _Reader:
    """Reads the rows one by one, and keeps what they have stated about each video."""

    def __init__(self, header: Sequence[str], file: str, group_column: str | None) -> None:
        self.width = len(header)
        self.lines: dict[str, int] = {}
        self.measured: set[str] = set()
        self.claims: dict[str, tuple[Header, int]] = {}
        self._columns = _find_columns(header, file)
        group, self.group_kind = _find_group(header, file, group_column)
        self.group_column = None if group is None else printable(header[group])
        if group is not None:
            self._columns["group"] = group
        self._groups: dict[str, int] = {"": 0}
        self._values = {"walls": array("d"), "diameters": array("d")}

    def row(self, position: int, line: int, cells: Sequence[str]) -> Row:
        """Raises _RowError."""
        if len(cells) != self.width:
            raise _RowError(f"wrong number of fields: {len(cells)} (the header has {self.width})")
        cell = {column: cells[place] for column, place in self._columns.items()}
        name = _name(cell["HashedFileName"])
        self.lines.setdefault(name, line)
        calc = cell["Calc"]
        if why := _unused(calc, cell["CalcValue"], cell["Frame"]):
            raise _RowError(why, harmless=True)
        self.measured.add(name)
        if calc not in LIMITS:
            raise _RowError(_wrong_type(calc))
        cm = _number("CalcValue", cell["CalcValue"])
        self._values["walls" if calc in WALLS else "diameters"].append(cm)
        low, high = LIMITS[calc]
        if not low <= cm <= high:
            raise _RowError(f"CalcValue out of range: {cm:.6g} cm, {calc} is from {low:g} to {high:g}")
        claim = Header(
            _whole("Frames", _claimed("Frames", cell, MAX_FRAMES)),
            int(_claimed("Width", cell, MAX_SIDE)),
            int(_claimed("Height", cell, MAX_SIDE)),
            _claimed("FPS", cell, MAX_FPS),
        )
        frame = None if _blank(cell["Frame"]) else _whole("Frame", _number("Frame", cell["Frame"]))
        last = (claim.frames or MAX_FRAMES) - 1
        if frame is not None and not 0 <= frame <= last:
            raise _RowError(f"Frame out of range: {frame:.10g} (allowed: 0 to {last})")
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
            raise _RowError(f"Frames, Width, Height or FPS contradict another row: line {first}")
        self.claims[name] = Header(*(one or other for one, other in pairs)), first


def _find_columns(header: Sequence[str], file: str) -> dict[str, int]:
    """The index of each known column that is there."""
    names = [_OTHER_SPELLINGS.get(name, name) for name in header]
    places = {column: names.index(column) for column in (*_REQUIRED, *_OPTIONAL) if column in names}
    for column in places:
        if names.count(column) > 1:
            raise DataError(f"{file}: column {column} stands there {names.count(column)} times")
    missing = [column for column in _REQUIRED if column not in places]
    if missing:
        # A table without a header begins with data of a patient, so unknown names are not shown.
        others = len(header) - len(places)
        there = ", ".join((*places, *([f"{others} of other names"] if others else [])))
        one = "; one field: are they separated by commas?" if len(header) == 1 else ""
        raise DataError(f"{file}: no column {missing[0]} in its first line; columns there: {there}{one}")
    return places


def _find_group(header: Sequence[str], file: str, wanted: str | None) -> tuple[int | None, str]:
    """The index of the column that names patients or studies, and which of them it names; (None, "") without one."""
    if wanted is not None:
        places = [place for place, name in enumerate(header) if name == wanted]
        if not places:
            raise ConfigError(f"group_column is {printable(wanted)}; expected a column of {file}, which has none of it")
        if len(places) > 1:
            raise DataError(f"{file}: column {printable(wanted)} stands there {len(places)} times")
        return places[0], "study" if _plain(wanted) in _GROUPS["study"] else "patient"
    plain = [_plain(name) for name in header]
    for kind, names in _GROUPS.items():
        places = [place for place, name in enumerate(plain) if name in names]
        if len(places) > 1:
            found = " and ".join(printable(header[place]) for place in places[:_LINES_NAMED])
            raise DataError(f"{file}: the columns {found} may each name the {kind}; choose with --group-column")
        if places:
            return places[0], kind
    return None, ""


def _plain(column: str) -> str:
    """A column's name as `_GROUPS` spells it."""
    return re.sub(r"[\s_-]", "", column).lower()


def _unused(calc: str, value: str, frame: str) -> str:
    """Why a row is not needed; "" if it is needed, or wrong."""
    if calc in LIMITS:
        return "nothing measured: CalcValue and Frame are blank" if _blank(value) and _blank(frame) else ""
    if _wrong_type(calc) != _NO_TYPE or _is_number(calc):
        return ""
    whole = _blank(value) or _is_number(value)
    return f"Calc is of a type that is not used: used are {', '.join(CALCS)}" if whole else ""


def _wrong_type(calc: str) -> str:
    if _blank(calc):
        return "Calc is blank"
    known = {name.lower(): name for name in CALCS}.get(calc.strip().lower())
    return f"Calc is spelled otherwise than {known}" if known else _NO_TYPE


def _name(text: str) -> str:
    """A video's name without its suffix; the published table gives none, some copies do."""
    stem = text[:-4] if text[-4:].lower() in SUFFIXES else text
    # Check the length first: to normalise a letter with many marks takes quadratic time.
    if len(stem) > _LONGEST_NAME or not allowed_name(name := plain_name(stem)):
        raise _RowError("HashedFileName not allowed (letters, digits, _ . - only)")
    return name


def plain_name(text: str) -> str:
    """A name in Unicode's form NFC: file systems differ in the form that they use for letters with marks."""
    return unicodedata.normalize("NFC", text)


def _blank(text: str) -> bool:
    return not text or text.isspace()


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


def _number(column: str, text: str) -> float:
    if _blank(text):
        raise _RowError(f"{column} is blank")
    if not _is_number(text):
        raise _RowError(f"{column} is not a number")
    return float(text.strip())  # float() itself keeps some of what strip() takes off


def _whole(column: str, value: float) -> int:
    if not math.isfinite(value) or value != int(value):
        raise _RowError(f"{column} is not a whole number")
    return int(value)


def _claimed(column: str, cell: Mapping[str, str], most: float) -> float:
    """An optional property of the video; 0 if the column is missing or blank."""
    text = cell.get(column, "")
    if _blank(text):
        return 0.0
    value = _number(column, text)
    if not 0 < value <= most:
        raise _RowError(f"{column} out of range: {value:.10g} (allowed: above 0, at most {most:g})")
    return value


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
            lines = ", ".join(str(row.line) for row in group[:_LINES_NAMED])
            more = f" and {len(group) - _LINES_NAMED} more" if len(group) > _LINES_NAMED else ""
            reason = f"conflicting values of one measurement: lines {lines}{more}"
            problems |= {row.line: Problem(f"line {row.line}", reason) for row in group}
            continue
        seen: dict[tuple[float, str], int] = {}
        for row in group:
            first = seen.setdefault((row.cm, row.points), row.line)
            if first != row.line:
                problems[row.line] = Problem(f"line {row.line}", f"duplicate row: as line {first}", harmless=True)
    return problems
