"""The reader of any table with a row for each video: a CSV or Parquet file with columns that the user names.

A label is a cell of the table, or follows from a number in it and a threshold. The label rule is then the user's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from cardiocaps.config.option import did_you_mean
from cardiocaps.data.cells import RowError, blank, find_group, is_number, number, records
from cardiocaps.data.header import Header, VideoError
from cardiocaps.data.listing import Item, check_folder, make_study, numbered, read_rows
from cardiocaps.data.study import Study
from cardiocaps.data.video import regular_file
from cardiocaps.errors import ConfigError, DataError, printable
from cardiocaps.runtime.packages import require_package

CSV, PARQUET = (".csv",), (".parquet", ".pq")
SUFFIXES = (*CSV, *PARQUET)
"""Suffixes of the tables."""

PATH, LABEL, SPLIT = "path", "label", "split"
"""Columns that are read if the user names no others."""

_LONGEST_PATH = 1000  # characters
_NOTHING = Header(0, 0, 0, 0)


def is_table(path: Path) -> bool:
    """Whether a path is that of a table, by its suffix."""
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def read_folder(
    root: Path | str,
    *,
    table: str | None = None,
    path_column: str | None = None,
    label_column: str | None = None,
    positive: str | None = None,
    target_column: str | None = None,
    abnormal: str | None = None,
    split_column: str | None = None,
    thresholds: Mapping[str, float] | None = None,
    group_column: str | None = None,
    follow_links: bool = False,
    labels: bool = True,
    **how: Any,
) -> Study:
    """Read a table with a row for each video.

    Args:
        root: the table, or the folder that holds it.
        table: the name of the table in the folder `root`.
        path_column: the column with the videos' paths, relative to the table; None: PATH.
        label_column: the column with the labels, 0 (normal) and 1 (abnormal), or two words; None: LABEL, unless
            `thresholds` makes the labels.
        positive: of two words the one that means abnormal.
        target_column: what is regressed: a column of numbers, or COLUMN:UNIT with the unit of reports.
        abnormal: with `thresholds`: "below": values below the threshold are abnormal, "above": values from it on.
        split_column: the column with train, val and test; None: SPLIT, if there is one.
        thresholds: {the column of `target_column`: the smallest value of the upper class}.
        group_column: the table's column that names patients or studies; see `cells.find_group`.
        follow_links: the table and the videos may be links that leave the folder.
        labels: False: the table needs no labels, and those that it has are not read.
        how: the other arguments of `listing.make_study`, from `split` on.

    Raises:
        DataError: the table cannot be used; or as `listing.make_study`.
        ConfigError: a column is missing, or the settings do not say what the labels are.
    """
    path = _table_file(Path(root), table)
    folder, file = path.parent, printable(path.name)
    header, rows = _opened(path, follow_links)
    if not header:
        raise DataError(f"{file}: empty, expected a line with the names of its columns")
    columns = _Columns(header, file)
    target, unit = columns.target(target_column)
    if not labels and target is None:
        raise ConfigError(
            f"target_column is None; expected a column of {file}, because task 'regression' needs a target"
        )
    rule = _Labels.of(columns, target, label_column, positive, abnormal, thresholds) if labels else None
    place = columns.index("path_column", path_column or PATH)
    values = None if target is None else columns.index("target_column", target)
    split = None
    if split_column is not None or SPLIT in header:
        split = columns.index("split_column", split_column or SPLIT)
    group, kind = find_group(header, file, group_column)

    def item(where: str, cells: Sequence[str]) -> Item:
        video = _relative(cells[place].strip())
        value = math.nan if values is None else _measured(str(target), cells[values])
        return Item(
            where,
            str(video),
            regular_file(folder / video, folder, follow_links),
            rule.label(cells, value) if rule else 0,
            {} if target is None else {target: value},
            _NOTHING,
            split="" if split is None else cells[split].strip().lower(),
            group="" if group is None else cells[group].strip(),
        )

    listing = read_rows(
        path,
        rows,
        len(header),
        item,
        has_splits=split is not None,
        group_column=None if group is None else printable(header[group]),
        group_kind=kind,
    )
    if rule:
        rule.check(file)
    return make_study(
        folder,
        [listing],
        label_rule=rule.rule if rule else {},
        rule=rule.text if rule else "",
        units={} if target is None else {target: unit},
        note=rule.note if rule else "",
        group_column=group_column,
        labels=labels,
        **how,
    )


def _table_file(root: Path, table: str | None) -> Path:
    """The path of the table. Raises ConfigError unless exactly one is named, DataError if there is no folder."""
    if is_table(root):
        if table is not None:
            raise ConfigError(f"table is {printable(table)!r}; expected none, because data is a table itself")
        return root
    check_folder(root)
    if table is None:
        raise ConfigError(f"table is None; expected the name of a table in {printable(root)}, or a table as data")
    path = root / table
    if path.parent != root or not is_table(path):
        raise ConfigError(f"table is {printable(table)!r}; expected the name of a file in data ({', '.join(SUFFIXES)})")
    return path


def _opened(path: Path, follow_links: bool) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """The names of a table's columns, and its rows with their places as messages call them."""
    if path.suffix.lower() in PARQUET:
        return _parquet(path, follow_links)
    lines = records(path, follow_links)
    _, header = next(lines, (0, []))
    return header, numbered(lines)


def _parquet(path: Path, follow_links: bool) -> tuple[list[str], Iterator[tuple[str, list[str]]]]:
    """As `_opened`, for a Parquet file."""
    parquet = require_package("pyarrow.parquet", "pyarrow", f"data: {printable(path.name)}", extra="parquet")
    try:
        file = parquet.ParquetFile(regular_file(path, path.parent, follow_links))
        header = [str(name) for name in file.schema_arrow.names]
    except VideoError as error:
        raise DataError(f"{printable(path)}: {error}") from None
    except Exception as error:  # pyarrow's own, and those of the system
        raise DataError(f"{printable(path.name)}: not a readable Parquet file") from error

    def rows() -> Iterator[tuple[str, list[str]]]:
        number = 0
        try:
            for batch in file.iter_batches():
                for values in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    number += 1
                    yield f"row {number}", [_text(value) for value in values]
        except Exception as error:
            raise DataError(f"{printable(path.name)}: not readable after row {number}") from error

    return header, rows()


def _text(value: Any) -> str:
    """A value of a Parquet file as the cell of a CSV table."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)


def _relative(text: str) -> PurePosixPath:
    """The path in a cell. Raises RowError unless it is one relative to the table that stays in its folder."""
    if blank(text):
        raise RowError("path is blank")
    path = PurePosixPath(text)
    if len(text) > _LONGEST_PATH or not text.isprintable():
        raise RowError(f"path not allowed: expected at most {_LONGEST_PATH} printable characters")
    if path.is_absolute() or ".." in path.parts:
        raise RowError("path leaves the folder: expected one relative to the table")
    return path


def _measured(column: str, text: str) -> float:
    """The number in a cell; NaN if it is blank. Raises RowError."""
    value = math.nan if blank(text) else number(printable(column), text)
    if math.isinf(value):
        raise RowError(f"{printable(column)} out of range")
    return value


class _Columns:
    """The columns of a table, found by the names that the user gives."""

    def __init__(self, header: Sequence[str], file: str) -> None:
        self.header, self.file = header, file

    def index(self, setting: str, name: str) -> int:
        """The index of a column. Raises ConfigError if it is missing, DataError if there are several."""
        count = self.header.count(name)
        if count > 1:
            raise DataError(f"{self.file}: column {printable(name)} stands there {count} times")
        if not count:
            # Only a similar name is shown: a table without a header begins with data of a patient.
            near = printable(did_you_mean(name, self.header))
            raise ConfigError(f"{setting} is {printable(name)!r}; expected one of {self.file}'s columns{near}")
        return self.header.index(name)

    def target(self, spec: str | None) -> tuple[str | None, str]:
        """Column and unit of COLUMN or COLUMN:UNIT; the name of a column may have a colon itself."""
        if spec is None:
            return None, ""
        if spec in self.header or ":" not in spec:
            return spec, ""
        name, _, unit = spec.rpartition(":")
        return name, unit.strip()


@dataclass
class _Labels:
    """What makes a label of a row: a column of labels, or a threshold of the target."""

    rule: dict[str, float]
    text: str  # in words
    column: str = ""
    place: int = 0
    positive: str | None = None
    below: bool = False

    def __post_init__(self) -> None:
        self.words: set[str] = set()  # some of those that were found: three are too many

    @classmethod
    def of(
        cls,
        columns: _Columns,
        target: str | None,
        column: str | None,
        positive: str | None,
        abnormal: str | None,
        thresholds: Mapping[str, float] | None,
    ) -> _Labels:
        """Raises ConfigError if the settings do not say what the labels are, or say it twice."""
        if thresholds is None:
            if abnormal is not None:
                raise ConfigError(f"abnormal is {abnormal!r}; expected none without a threshold, which it explains")
            if column is None and LABEL not in columns.header:
                raise ConfigError(
                    f"label_column is None; expected a column of {columns.file}, which has no column {LABEL}, or a "
                    "threshold of target_column"
                )
            column = column or LABEL
            text = f"abnormal: column {printable(column)} is {1 if positive is None else printable(positive)}"
            return cls({}, text, column, columns.index("label_column", column), positive)
        for name, value in (("label_column", column), ("positive", positive)):
            if value is not None:
                raise ConfigError(f"{name} is {printable(value)!r}; expected none, because threshold makes the labels")
        given = ", ".join(f"{printable(name)}={value:g}" for name, value in thresholds.items())
        if target is None or set(thresholds) != {target}:
            names = "target_column is None" if target is None else f"it is for {printable(target)}, the target_column"
            raise ConfigError(f"threshold is {given}; expected one number for the target_column ({names})")
        if abnormal is None:
            raise ConfigError(f"abnormal is None; expected below or above, because threshold {given} makes the labels")
        sign = "below" if abnormal == "below" else "at least"
        text = f"abnormal: {printable(target)} {sign} {thresholds[target]:g}"
        return cls(dict(thresholds), text, target, below=abnormal == "below")

    def label(self, cells: Sequence[str], value: float) -> int:
        """The label of a row with these cells and this value of the target. Raises RowError if it has none."""
        if self.rule:
            if math.isnan(value):
                raise RowError(f"{printable(self.column)} is blank")
            return int((value < self.rule[self.column]) == self.below)
        text = cells[self.place].strip()
        if not text:
            raise RowError("label is blank")
        if self.positive is None:
            if not is_number(text) or float(text) not in (0, 1):
                raise RowError("label is not 0 or 1")
            return int(float(text))
        if len(self.words) < 3:
            self.words.add(text)
        return int(text == self.positive)

    def check(self, file: str) -> None:
        """Raise an error unless the labels were one or two words, `positive` among them."""
        if self.positive is None:
            return
        if len(self.words) > 2:
            raise DataError(
                f"{file}: column {printable(self.column)} has more than two words; expected two, of which positive "
                "names the abnormal one"
            )
        if self.words and self.positive not in self.words:
            raise ConfigError(
                f"positive is {printable(self.positive)!r}; expected a word of the column {printable(self.column)} of "
                f"{file}, none of whose rows has it"
            )

    @property
    def note(self) -> str:
        """Advice for a table with too many bad rows."""
        return "" if self.rule or self.positive else "positive names the abnormal one of two words"
