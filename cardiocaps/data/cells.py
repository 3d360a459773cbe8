"""Strict reading of a CSV table: its columns, and the cells of its rows as text, numbers and names of videos.

All cells are read as text, one row at a time: a parser that looks for numbers and missing values would turn the name
`12E5` into a number and `NA` into nothing. Messages repeat a cell only if it is a number, because a shifted column
could hold the name of a patient.
"""

from __future__ import annotations

import csv
import io
import math
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from cardiocaps.config.option import did_you_mean
from cardiocaps.data.header import VideoError
from cardiocaps.data.video import allowed_name, regular_file
from cardiocaps.errors import ConfigError, DataError, printable

SUFFIXES = (".avi", ".mp4", ".dcm")
"""Suffixes of the videos of EchoNet's data sets."""

MAX_FPS = 10_000.0
LINES_NAMED = 4
"""The most lines that a message names."""

# Names of columns of patients and studies (a study is of one patient on one day), lower case, without _, - and spaces.
_GROUPS = {"patient": ("patientid", "patient", "subjectid", "subject"), "study": ("studyid", "study")}

# Two repeated parts never match the same text, so the time is linear in the length of a cell.
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LONGEST_NAME = 255  # characters of a file's name


class RowError(Exception):
    """The reason for which a row is left out. Harmless: the row is not needed."""

    def __init__(self, reason: str, harmless: bool = False) -> None:
        super().__init__(reason)
        self.harmless = harmless


def records(path: Path, follow_links: bool) -> Iterator[tuple[int, list[str]]]:
    """The number of its last line and the cells of every row, the header first; a blank line gives no cells.

    Args:
        path: the CSV file (UTF-8, a byte-order mark is accepted).
        follow_links: the file may be a link that leaves its folder.

    Raises:
        DataError: the file cannot be read, or is no CSV table.
    """
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


def find_columns(
    header: Sequence[str],
    file: str,
    required: Sequence[str],
    optional: Sequence[str],
    spellings: Mapping[str, str] | None = None,
) -> dict[str, int]:
    """The index of each known column that is there.

    Args:
        header: the cells of the table's first line.
        file: the table's name, for messages.
        required: columns without which the table cannot be read.
        optional: other columns that are read.
        spellings: another name of a column -> its name.

    Raises:
        DataError: a required column is missing, or a column is there twice.
    """
    names = [(spellings or {}).get(name, name) for name in header]
    places = {column: names.index(column) for column in (*required, *optional) if column in names}
    for column in places:
        if names.count(column) > 1:
            raise DataError(f"{file}: column {column} stands there {names.count(column)} times")
    missing = [column for column in required if column not in places]
    if missing:
        # A table without a header begins with data of a patient, so unknown names are not shown.
        others = len(header) - len(places)
        there = ", ".join((*places, *([f"{others} of other names"] if others else [])))
        one = "; one field: are they separated by commas?" if len(header) == 1 else ""
        raise DataError(f"{file}: no column {missing[0]} in its first line; columns there: {there}{one}")
    return places


def find_group(header: Sequence[str], file: str, wanted: str | None) -> tuple[int | None, str]:
    """The column that names patients or studies, and which of them it names; (None, "") without one.

    Args:
        header: the cells of the table's first line.
        file: the table's name, for messages.
        wanted: the column; None: one with a usual name (PatientID, patient_id, Patient, subject, study, …).

    Returns:
        Its index, and "patient" or "study".

    Raises:
        ConfigError: there is no column `wanted`.
        DataError: several columns may be meant.
    """
    if wanted is not None:
        places = [place for place, name in enumerate(header) if name == wanted]
        if not places:
            near = printable(did_you_mean(wanted, header))
            raise ConfigError(
                f"group_column is {printable(wanted)}; expected a column of {file}, which has none of it{near}"
            )
        if len(places) > 1:
            raise DataError(f"{file}: column {printable(wanted)} stands there {len(places)} times")
        return places[0], "study" if _plain(wanted) in _GROUPS["study"] else "patient"
    plain = [_plain(name) for name in header]
    for kind, names in _GROUPS.items():
        places = [place for place, name in enumerate(plain) if name in names]
        if len(places) > 1:
            found = " and ".join(printable(header[place]) for place in places[:LINES_NAMED])
            raise DataError(f"{file}: the columns {found} may each name the {kind}; choose with --group-column")
        if places:
            return places[0], kind
    return None, ""


def _plain(column: str) -> str:
    """A column's name as `_GROUPS` spells it."""
    return re.sub(r"[\s_-]", "", column).lower()


def video_name(column: str, text: str) -> str:
    """A video's name without its suffix: some tables give it, some do not. Raises RowError."""
    stem = text[:-4] if text[-4:].lower() in SUFFIXES else text
    # Check the length first: to normalise a letter with many marks takes quadratic time.
    if len(stem) > _LONGEST_NAME or not allowed_name(name := plain_name(stem)):
        raise RowError(f"{column} not allowed (letters, digits, _ . - only)")
    return name


def plain_name(text: str) -> str:
    """A name in Unicode's form NFC: file systems differ in the form that they use for letters with marks."""
    return unicodedata.normalize("NFC", text)


def blank(text: str) -> bool:
    """Whether a cell is empty."""
    return not text or text.isspace()


def is_number(text: str) -> bool:
    """Whether a cell holds a number and nothing else."""
    return _NUMBER.fullmatch(text.strip()) is not None


def number(column: str, text: str) -> float:
    """The number in a cell. Raises RowError if it is blank or holds something else."""
    if blank(text):
        raise RowError(f"{column} is blank")
    if not is_number(text):
        raise RowError(f"{column} is not a number")
    return float(text.strip())  # float() itself keeps some of what strip() takes off


def whole(column: str, value: float) -> int:
    """A number of a cell as an integer. Raises RowError if it is none."""
    if not math.isfinite(value) or value != int(value):
        raise RowError(f"{column} is not a whole number")
    return int(value)


def claimed(column: str, cell: Mapping[str, str], most: float) -> float:
    """A property of a video that a row may state; 0 if the column is missing or blank. Raises RowError."""
    text = cell.get(column, "")
    if blank(text):
        return 0.0
    value = number(column, text)
    if not 0 < value <= most:
        raise RowError(f"{column} out of range: {value:.10g} (allowed: above 0, at most {most:g})")
    return value
