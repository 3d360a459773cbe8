"""The videos that a prediction is asked for: files, folders and tables of paths, here or in a bucket."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cardiocaps.config.option import did_you_mean
from cardiocaps.data.dicom import is_dicom
from cardiocaps.data.remote_files import beside, files_below, is_url, read_text
from cardiocaps.errors import ConfigError, DataError, printable

SUFFIXES = (".avi", ".mp4", ".m4v", ".mov", ".dcm", ".dicom")
"""The files of a folder that are taken without a look at their content. Files without a suffix are taken if they are
DICOM."""

PATH_COLUMNS = ("path", "video", "file", "filename", "FileName", "HashedFileName")
"""Columns of a table that are taken for paths unless one is named; the first that is there."""


@dataclass(frozen=True)
class Input:
    """A video to predict for.

    Attributes:
        name: what the results call it, and no other: its path, as it was given or as found below a folder that was
            given.
        path: where it is.
        root: the folder that a link in `path` may not leave.
        url: of a video that is not on this machine; then `path` means nothing.
    """

    name: str
    path: Path
    root: Path
    url: str | None = None

    @classmethod
    def at(cls, url: str, name: str | None = None) -> Input:
        return cls(name or url, Path(), Path(), url)


def place(text: Path | str) -> Path | str:
    """A path, or as it is a URL, which `Path` would damage."""
    return text if isinstance(text, str) and is_url(text) else Path(text)


def find(given: Sequence[Path | str], path_column: str | None = None) -> list[Input]:
    """The videos that files, folders (with their subfolders) and CSV tables stand for, each of them once.

    Of two videos with one name in two tables, the second is called by its path with the folder of its table.

    Args:
        given: what was typed; text is a URL. A file with the suffix .csv is a table; its paths are relative to its
            folder, and may be URLs.
        path_column: of the tables; None: the first of PATH_COLUMNS that is there.

    Raises:
        ConfigError: a path does not exist, a table has no such column, or two videos cannot be told apart by a name.
        DataError: there is no video, or a table cannot be read.
    """
    found: dict[str, Input] = {}
    names: set[str] = set()
    for path in given:
        if isinstance(path, str):
            inputs = _in_bucket(path, path_column)
        elif path.is_dir():
            inputs = _in_folder(path)
        elif path.suffix.lower() == ".csv":
            inputs = _in_table(path, path_column)
        elif os.path.lexists(path):
            inputs = iter([Input(str(path), path, path.parent)])
        else:
            raise ConfigError(f"INPUT: {printable(path)} does not exist")
        for one in inputs:
            where = one.url or os.path.realpath(one.path)
            if where in found:
                continue
            # A row belongs to a name.
            name = next((x for x in (one.name, one.url or str(one.path), where) if x not in names), None)
            if name is None:
                raise ConfigError(f"INPUT: {printable(one.name)} is the name of two videos; expected one of them")
            names.add(name)
            found[where] = replace(one, name=name)
    if not found:
        where = ", ".join(printable(path) for path in given)
        raise DataError(f"no video in {where}: no file with the suffix {', '.join(SUFFIXES)}, and no DICOM file")
    return list(found.values())


def _in_folder(folder: Path) -> Iterator[Input]:
    for parent, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            # A FIFO would never be opened.
            if path.suffix.lower() in SUFFIXES or (not path.suffix and path.is_file() and is_dicom(path)):
                yield Input(str(path), path, folder)


def _in_table(table: Path, path_column: str | None) -> Iterator[Input]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            names = _names(file, table, path_column)
    except OSError as error:
        raise DataError(f"cannot read {printable(table)}: {error.strerror}") from error
    for name in names:
        path = table.parent / name
        yield Input.at(name) if is_url(name) else Input(name, path, path.parent)


def _in_bucket(url: str, path_column: str | None) -> Iterator[Input]:
    if url.lower().endswith(".csv"):
        for name in _names(io.StringIO(read_text(url), newline=""), url, path_column):
            yield Input.at(beside(url, name), name)
    else:
        files = files_below(url)
        # A file that was named is taken, whatever its suffix is.
        alone = [url] if [file.rstrip("/") for file in files] == [url.rstrip("/")] else None
        yield from (Input.at(file) for file in alone or files if alone or file.lower().endswith(SUFFIXES))


def _names(file: Iterable[str], table: Path | str, path_column: str | None) -> list[str]:
    """The paths in a table."""
    try:
        rows = csv.DictReader(file, strict=True)
        columns = list(rows.fieldnames or ())
        column = path_column or next((name for name in PATH_COLUMNS if name in columns), None)
        if column not in columns:
            asked = f"--path-column is {column!r}; " if column else "no column of paths: "
            near = did_you_mean(column, columns) if column else ""
            raise ConfigError(
                f"{asked}the columns of {printable(table)} are {printable(', '.join(columns))}{near}; name one by "
                "--path-column"
            )
        return [row[column] for row in rows if row[column]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{printable(table)} is not a CSV table in UTF-8: {error}") from error
