"""What the benchmark programs share: errors in one line, and files that appear whole or not at all.

`benchmarks` measures capsops and imports nothing of cardiocaps, but for the training step that it times.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TextIO


class BenchmarkError(Exception):
    """Base of all errors that are reported as one line instead of a traceback. `exit_code` is the exit status."""

    exit_code = 1


class ResultsError(BenchmarkError):
    """A file of results cannot be read."""

    exit_code = 3


class OutputError(BenchmarkError):
    """The output folder cannot be written, or holds something that would be overwritten."""

    exit_code = 4


def run_program(body: Callable[[], None]) -> int:
    """Run a program's body. Returns the exit status: 0, an error's `exit_code`, or 128 + the signal that ended it.

    Signals raise KeyboardInterrupt, so that every `finally` runs. A signal that was ignored at the start stays ignored.
    """
    received: list[int] = []

    def stop(signum: int, _: FrameType | None) -> None:
        received.append(signum)
        raise KeyboardInterrupt

    watched = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    before = {signum: signal.signal(signum, stop) for signum in watched}
    try:
        body()
    except BenchmarkError as error:
        print_line(f"error: {error}", sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        signum = received[0] if received else signal.SIGINT
        print_line(f"error: stopped by {signal.Signals(signum).name}", sys.stderr)
        return 128 + signum
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 0


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Print text at once. The program goes on if the reader of a pipe has gone."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block into an OutputError that names `path`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes that use this function out of an existing folder. Raises OutputError if one is in it."""
    import fcntl

    with output_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{folder} is being used by another process") from None
        yield
    finally:
        os.close(handle)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    with output_errors(path):
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """As `write_bytes`; paths become text."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a table. Raises ResultsError if it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ResultsError(f"cannot read {path}: {error}") from error
    return rows


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """As `write_bytes`, with floats of six significant digits, which is more than a time repeats.

    `columns` defaults to all keys in order of appearance; a missing value and NaN are empty cells.
    """

    def cell(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return "" if math.isnan(value) else f"{value:.6g}"

    table = io.StringIO()
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    write_text(path, table.getvalue())
