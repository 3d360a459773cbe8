"""Strict reader of EchoNet-LVH's ``MeasurementsList.csv``: a row per measurement, nothing guessed.

Everything is read as text (a parser that looks for numbers and missing values turns the name ``12E5`` into
a number and ``NA`` into nothing). A table that cannot be what it should be raises; a row that cannot be
right is left out and reported by line. What a cell holds is repeated only where it is a number: a shifted
column could hold a patient's name.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cardiocaps.data.labels import CALCS
from cardiocaps.data.video import MAX_FRAMES, MAX_SIDE, Header, VideoError, allowed_name, regular_file
from cardiocaps.errors import ConfigError, DataError

FILE_NAME = "MeasurementsList.csv"
SUFFIXES = (".avi", ".mp4")
MAX_CM = 20.0
MAX_FPS = 10_000.0

# Column -> the names it goes by: the published file and its description differ.
_REQUIRED = {
    "HashedFileName": ("HashedFileName",),
    "Calc": ("Calc",),
    "CalcValue": ("CalcValue",),
    "Frame": ("Frame",),
    "Frames": ("Frames", "NumFrames"),
}
_OPTIONAL = {
    **{name: (name,) for name in ("FPS", "Width", "Height", "X1", "X2", "Y1", "Y2")},
    "split": ("split", "Split"),
}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True)
class Problem:
    """Something left out, or worth knowing: where (a line of the table, a video) and why.

    The reason reads ``kind`` or ``kind: detail``; summaries count the kinds.
    """

    where: str
    reason: str

    @property
    def kind(self) -> str:
        return self.reason.partition(": ")[0]


@dataclass(frozen=True)
class Row:
    """One measurement: its place in the table (``position`` counts data rows from 0), value and video."""

    position: int
    line: int
    name: str
    calc: str
    cm: float
    frame: int
    split: str  # the cell's text; "" where blank or without the column
    claim: Header
    points: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """The usable rows, the names of all videos, the number of data rows, and what was left out."""

    rows: tuple[Row, ...]
    names: tuple[str, ...]
    total: int
    problems: tuple[Problem, ...]


class _RowError(Exception):
    """Why one row is left out."""


def read_measurements(path: Path, *, max_bad_share: float = 0.05) -> Table:
    """Read and check the table.

    Args:
        path: the CSV file (UTF-8, a byte-order mark is accepted).
        max_bad_share: largest share of rows that may be left out.

    Raises:
        DataError: unreadable, empty, a column missing or given twice, or too many bad rows.
        ConfigError: ``max_bad_share`` outside [0, 1].
    """
    header, records = _read_cells(path)
    columns = _find_columns(header, path.name)
    if not records:
        raise DataError(f"{path.name}: a header and no rows")
    rows: list[Row] = []
    problems: list[Problem] = []
    names: dict[str, None] = {}
    for position, (line, cells) in enumerate(records):
        try:
            if len(cells) != len(header):
                raise _RowError(f"wrong number of fields: {len(cells)} (the header has {len(header)})")
            record = {column: cells[place] for column, place in columns.items()}
            name = _name(record["HashedFileName"])
            names.setdefault(name)
            rows.append(_row(position, line, name, record))
        except _RowError as error:
            problems.append(Problem(f"line {line}", str(error)))
    contradictions = _contradictions(rows)
    problems += [Problem(f"line {line}", reason) for line, reason in sorted(contradictions.items())]
    rows = [row for row in rows if row.line not in contradictions]
    refuse_many(len(problems), len(records), max_bad_share, f"rows of {path.name}", problems)
    return Table(tuple(rows), tuple(names), len(records), tuple(problems))


def refuse_many(bad: int, total: int, max_bad_share: float, what: str, problems: Sequence[Problem]) -> None:
    """Raise DataError, with the first problems, where more than ``max_bad_share`` of ``total`` is bad."""
    if not 0 <= max_bad_share <= 1:
        raise ConfigError(f"max_bad_share must be from 0 to 1, got {max_bad_share}")
    if bad > max_bad_share * total:
        first = "; ".join(f"{p.where}: {p.reason}" for p in problems[:4])
        raise DataError(
            f"{bad} of {total} {what} cannot be used, max_bad_share = {max_bad_share:g} allows"
            f" {int(max_bad_share * total)}; the first: {first}"
        )


def summarise(problems: Iterable[Problem]) -> str:
    """Problems counted by kind, one line each, most frequent first, with the first place each was seen."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for problem in problems:
        counts[problem.kind] += 1
        first.setdefault(problem.kind, problem.where)
    return "\n".join(f"{count:6d} × {kind} (first: {first[kind]})" for kind, count in counts.most_common())


def _read_cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The header and, with its line number, every row that is not blank."""
    try:
        text = regular_file(path, path.parent).read_bytes().decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        records = [(reader.line_num, cells) for cells in reader if cells]
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path.name}: not UTF-8 text, byte {error.start} is 0x{error.object[error.start]:02x}"
        ) from None
    except csv.Error as error:
        raise DataError(f"{path.name}, line {reader.line_num}: not a CSV table ({error})") from None
    except VideoError as error:
        raise DataError(f"{path}: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    if not header:
        raise DataError(f"{path.name}: empty, expected the columns {', '.join(_REQUIRED)}")
    return header, records


def _find_columns(header: list[str], file: str) -> dict[str, int]:
    places: dict[str, int] = {}
    for column, spellings in (_REQUIRED | _OPTIONAL).items():
        found = [place for place, name in enumerate(header) if name in spellings]
        if len(found) > 1:
            raise DataError(f"{file}: column {column} ({' or '.join(spellings)}) stands there {len(found)} times")
        if found:
            places[column] = found[0]
        elif column in _REQUIRED:
            there = ", ".join(name[:40] for name in header[:20] if name) or "none with a name"
            raise DataError(f"{file}: no column {' or '.join(spellings)}; columns there: {there}")
    return places


def _row(position: int, line: int, name: str, record: Mapping[str, str]) -> Row:
    calc = record["Calc"]
    if calc not in CALCS:
        raise _RowError(f"unknown Calc: allowed are {', '.join(CALCS)}")
    cm = _number("CalcValue", record["CalcValue"])
    if not 0 < cm <= MAX_CM:
        raise _RowError(f"CalcValue out of range: {cm:g} cm, allowed above 0 and at most {MAX_CM:g}")
    frames = _whole("Frames", record["Frames"])
    if not 0 < frames <= MAX_FRAMES:
        raise _RowError(f"Frames out of range: {frames} (allowed: 1 to {MAX_FRAMES})")
    frame = _whole("Frame", record["Frame"])
    if not 0 <= frame < frames:
        raise _RowError(f"Frame out of range: {frame} (allowed: 0 to {frames - 1})")
    claim = Header(
        frames,
        int(_claim("Width", record, MAX_SIDE)),
        int(_claim("Height", record, MAX_SIDE)),
        _claim("FPS", record, MAX_FPS),
    )
    points = tuple(record.get(column, "") for column in ("X1", "X2", "Y1", "Y2"))
    return Row(position, line, name, calc, cm, frame, record.get("split", "").strip().lower(), claim, points)


def _name(text: str) -> str:
    """A video's name without its suffix; the published table gives none, some copies do."""
    stem = text[:-4] if text.lower().endswith(SUFFIXES) else text
    if not allowed_name(stem):
        raise _RowError("HashedFileName not allowed (letters, digits, _ . - only)")
    return stem


def _number(column: str, text: str) -> float:
    text = text.strip()
    if not text:
        raise _RowError(f"{column} is blank")
    if not _NUMBER.fullmatch(text):
        raise _RowError(f"{column} is not a number")
    return float(text)


def _whole(column: str, text: str) -> int:
    value = _number(column, text)
    if not math.isfinite(value) or value != int(value):
        raise _RowError(f"{column} is not a whole number")
    return int(value)


def _claim(column: str, record: Mapping[str, str], most: float) -> float:
    """An optional property of the video; 0 where the table has no such column or leaves it blank."""
    text = record.get(column, "")
    if not text.strip():
        return 0.0
    value = _number(column, text)
    if not 0 < value <= most:
        raise _RowError(f"{column} out of range: {value:g} (allowed: above 0, at most {most:g})")
    return value


def _contradictions(rows: Sequence[Row]) -> dict[int, str]:
    """Line -> reason: repeated rows, two values for one measurement, two descriptions of one video.

    Of a repeated row the first is kept; of contradicting values none, since nothing says which is right.
    """
    reasons: dict[int, str] = {}
    first: dict[str, Row] = {}
    same: defaultdict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        described = first.setdefault(row.name, row)
        if described.claim != row.claim:
            reasons[row.line] = f"Frames, Width, Height or FPS contradict another row: line {described.line}"
        else:
            same[row.name, row.calc, row.frame].append(row)
    for group in same.values():
        if len({row.cm for row in group}) > 1:
            lines = ", ".join(str(row.line) for row in group)
            reasons |= {row.line: f"conflicting values of one measurement: lines {lines}" for row in group}
            continue
        seen: dict[tuple[str, ...], int] = {}
        for row in group:
            if row.points in seen:
                reasons[row.line] = f"duplicate row: as line {seen[row.points]}"
            seen.setdefault(row.points, row.line)
    return reasons
