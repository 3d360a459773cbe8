"""Files that appear whole or not at all, and what the disk refuses as an error that says why.

A file is written beside its place under a temporary name, NAME.XXXXXXXX.part, and renamed. A process that is killed
leaves its temporary file behind; `remove_leftovers` finds those by the lock that a living process holds on its own.
"""

import csv
import errno
import io
import json
import math
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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

_PART = re.compile(r"\.[0-9a-f]{8}\.part$")

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
def lock_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
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
def atomic_write(path: Path, *, sync: bool = True, mode: int = 0o666) -> Iterator[Path]:
    """A temporary path in the folder of `path` for the block to write; it then takes the place of `path` in
    one step.

    If the block fails, `path` stays as it was and the temporary file goes. `sync`: wait until the disk has the file and
    its new name; without, a machine that loses power may keep a torn file or the old one. `mode`: who may read and
    write it, as far as the umask allows. Raises OutputError as `output_errors`.
    """
    with output_errors(path):
        temporary, handle = _new_part(path, mode)
        try:
            yield temporary
            if sync:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105 (named so that a test can make it fail)
            if sync:
                sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)


def is_missing(path: Path) -> bool:
    """Whether nothing lies at a path. What may not be looked at is not missing: who reads it learns why not.
    (`Path.exists` raises PermissionError.)"""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names of a folder's files, as after a rename. A file system that cannot do that for
    folders is trusted, as SQLite trusts it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(*folders: Path, older_than: float = 0.0) -> None:
    """Remove the temporary files that killed processes have left in these folders (not in folders within them).

    A file that a living process writes is locked and stays. Where the file system has no locks, or keeps them from
    other machines, the age must tell: who does not hold the folder (`exclusive`) gives `older_than`, in seconds.
    """
    for folder in folders:
        # What cannot be read or removed is in nobody's way.
        with suppress(OSError):
            parts = [Path(entry.path) for entry in os.scandir(folder) if _PART.search(entry.name)]
            for part in parts:
                with suppress(OSError):
                    _remove_leftover(part, older_than)


def _remove_leftover(part: Path, older_than: float) -> None:
    status = part.lstat()
    young = older_than and time.time() - status.st_mtime < older_than
    if young or not stat.S_ISREG(status.st_mode):
        return
    handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        if _locked(handle):
            part.unlink()
    finally:
        os.close(handle)


def _new_part(path: Path, mode: int) -> tuple[Path, int]:
    """A temporary file for `path`, empty and locked, and the handle that holds the lock."""
    while True:
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        try:
            if _locked(handle) and part.exists():
                return part, handle
            os.close(handle)  # another process took it for a leftover before it was locked
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(handle)
            raise


def _locked(handle: int) -> bool:
    """Lock a file for as long as the handle is open; False where another process has it. A file system without locks
    is trusted."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    with atomic_write(path, sync=sync) as temporary:
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
