"""The folder of a prediction or an explanation: one row for each video, written as soon as it is known.

A program that is killed leaves whole rows. The same command then goes on with the videos that have none.
"""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cardiocaps import DISCLAIMER, __version__
from cardiocaps.errors import OutputError, printable
from cardiocaps.runtime.files import (
    READABLE,
    atomic_write,
    is_unused,
    lock_folder,
    output_errors,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)

_SYNC_EVERY = 1.0  # seconds
OK, FAILED = "ok", "failed"


@dataclass(frozen=True)
class Kind:
    """What a folder holds.

    Attributes:
        noun: for example "predictions"; the table is called so too.
        marker: the file that says that the folder holds this.
    """

    noun: str
    marker: str


PREDICTIONS = Kind("predictions", "predict.json")


class RowFile:
    """A CSV file that grows by rows.

    Args:
        path: of the file; it is made if it is missing.
        columns: of the file.
        keep: which rows of an earlier run stay.

    Raises:
        OutputError: the file cannot be written, or has other columns.
    """

    def __init__(self, path: Path, columns: Sequence[str], keep: Callable[[Mapping[str, str]], bool]) -> None:
        self.path, self.columns = path, list(columns)
        self.rows = self._read()
        kept = [row for row in self.rows if keep(row)]
        whole = path.exists() and len(kept) == len(self.rows) and self._ends_whole()
        self.rows = kept
        if not whole:
            write_text(path, self._text([dict(zip(columns, columns, strict=True)), *kept]))
        with output_errors(path):
            self.file = path.open("a", encoding="utf-8", newline="")
        self.synced = time.monotonic()

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows. A float gets as many digits as in the files of an evaluation."""
        with output_errors(self.path):
            self.file.write(self._text(rows))
            self.file.flush()
            if time.monotonic() - self.synced > _SYNC_EVERY:
                os.fsync(self.file.fileno())
                self.synced = time.monotonic()

    def close(self) -> None:
        with output_errors(self.path):
            os.fsync(self.file.fileno())
            self.file.close()

    def _text(self, rows: Sequence[Mapping[str, Any]]) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writerows(
            {name: f"{x:.{READABLE}g}" if isinstance(x, float) else x for name, x in row.items()} for row in rows
        )
        return text.getvalue()

    def _read(self) -> list[dict[str, str]]:
        """The whole rows that are there. The last line of a killed program may be cut off."""
        if not self.path.exists():
            return []
        with output_errors(self.path):
            content = self.path.read_bytes()
        content = content[: content.rfind(b"\n") + 1]
        try:
            reader = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
            rows = list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise OutputError(f"{printable(self.path)} is damaged: {error}") from error
        if content and reader.fieldnames != self.columns:
            raise OutputError(f"{printable(self.path)} has other columns than this program writes")
        return rows

    def _ends_whole(self) -> bool:
        with output_errors(self.path), self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            if not size:
                return False
            file.seek(size - 1)
            return file.read(1) == b"\n"


class Results:
    """The rows of an output folder. `opened` makes one."""

    def __init__(
        self, folder: Path, kind: Kind, columns: Sequence[str], frame_columns: Sequence[str], retry: bool
    ) -> None:
        self.videos = RowFile(folder / f"{kind.noun}.csv", columns, lambda row: not retry or row["status"] != FAILED)
        self.done = {row["input"] for row in self.videos.rows}
        self.failed = sum(row["status"] == FAILED for row in self.videos.rows)
        self.frames: RowFile | None = None
        if frame_columns:
            # Rows of frames are written before the row of their video.
            self.frames = RowFile(folder / "frames.csv", frame_columns, lambda row: row["input"] in self.done)

    @classmethod
    @contextmanager
    def opened(
        cls,
        folder: Path,
        identity: Mapping[str, Any],
        columns: Sequence[str],
        frame_columns: Sequence[str] = (),
        retry: bool = False,
        kind: Kind = PREDICTIONS,
    ) -> Iterator[Results]:
        """Make the folder, or go on in it.

        Args:
            identity: what decides the results. A folder with another identity is refused.
            columns: of the table; with `input` and `status`.
            frame_columns: of `frames.csv`, with `input`; empty: no such file.
            retry: drop the rows of videos that could not be read.
            kind: what the folder holds.

        Raises:
            OutputError: the folder cannot be written, is in use, or holds something else.
        """
        marker = folder / kind.marker
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with lock_folder(folder):
                if marker.exists():
                    _check(marker, identity, kind)
                elif is_unused(folder, marker):
                    write_json(
                        marker,
                        {"kind": f"cardiocaps {kind.noun}", "version": __version__, **identity, "use": DISCLAIMER},
                    )
                else:
                    raise OutputError(
                        f"--out is {printable(folder)}, which holds other files than {kind.noun}; choose a new folder"
                    )
                remove_leftovers(folder)
                results = cls(folder, kind, columns, frame_columns, retry)
                try:
                    yield results
                finally:
                    for file in (results.frames, results.videos):
                        if file is not None:
                            file.close()

    def write(self, video: Mapping[str, Any], frames: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write the row of a video, and before it those of its frames. Raises OutputError."""
        if self.frames is not None:
            self.frames.append(*frames)
        self.videos.append(video)


def write_parquet(table: Path) -> None:
    """Write the rows of a CSV file of `Results` as a Parquet file beside it; empty cells become null.

    Raises:
        OutputError: it cannot be written.
    """
    from pyarrow import csv as arrow_csv
    from pyarrow import parquet, string

    texts = dict.fromkeys(("input", "status", "reason", "flags"), string())
    options = arrow_csv.ConvertOptions(column_types=texts, null_values=[""], strings_can_be_null=True)
    rows = arrow_csv.read_csv(table, None, arrow_csv.ParseOptions(newlines_in_values=True), options)
    with atomic_write(table.with_suffix(".parquet")) as temporary:
        parquet.write_table(rows, temporary)


def _check(marker: Path, identity: Mapping[str, Any], kind: Kind) -> None:
    """Raise OutputError unless what the folder holds was made with the same identity."""

    def differing(content: dict[str, Any]) -> list[str]:
        return [name for name, value in identity.items() if content.get(name) != value]

    names = read_json(marker, f"cardiocaps {kind.noun}", differing, OutputError)
    if names:
        raise OutputError(
            f"--out is {printable(marker.parent)}, which holds {kind.noun} with other {', '.join(names)}; choose a new "
            "folder"
        )
