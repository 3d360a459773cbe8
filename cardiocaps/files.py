"""Files that appear whole or not at all, and what the disk refuses as an error that says why.

A file is written beside its place under a temporary name, and renamed.
"""

import csv
import errno
import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cardiocaps.errors import OutputError, printable

_REASONS = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would pass the size limit",
    errno.EACCES: "no permission to write there",
    errno.EPERM: "no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "a folder is in the file's place",
    errno.ENOENT: "a folder on the way does not exist",
    errno.EEXIST: "something else is in its place",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "the path is a circle of links",
    errno.EIO: "the disk reports an input/output error",
}

_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses inside the block into an OutputError that names `path` and the
    reason.

    torch's file writer hides a full disk in a RuntimeError of its own; that is translated too.
    """
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0) or error.strerror or str(error)
        raise OutputError(f"cannot write {printable(path)}: {reason}") from error
    except RuntimeError as error:
        if not any(part in str(error) for part in _TORCH_WRITER):
            raise
        raise OutputError(
            f"cannot write {printable(path)}: the file could not be completed, is the disk full?"
        ) from error


@contextmanager
def exclusive(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an existing folder against other processes that ask for it in this way.

    `wait` for the other to finish; without, raises OutputError. A file system that has no locks is trusted.
    """
    import fcntl

    with output_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise OutputError(f"{folder} is being used by another process") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextmanager
def replacing(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """A temporary path in the folder of `path` for the block to write; it then takes the place of `path` in
    one step.

    If the block fails, `path` stays as it was and the temporary file goes. `sync`: wait until the disk has it;
    without, a machine that loses power may keep a torn file. Raises OutputError as `output_errors`.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    with output_errors(path):
        try:
            yield temporary
            if sync:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105 (named so that a test can make it fail)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    with replacing(path, sync=sync) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """As `write_bytes`, in UTF-8 with the line ends as they are."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON; what is not a finite number becomes null. Raises TypeError for what JSON has no
    form for."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write a table. `columns`: default all keys of the rows in order of appearance; a missing value is an
    empty cell.

    Raises ValueError for a row with a key outside `columns`.
    """
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def _plain(value: Any) -> Any:
    """`value` in JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # a NumPy array or scalar, a tensor
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
