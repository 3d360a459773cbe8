"""Files that are written whole or not at all, and errors of the disk with their reason.

A file is written under a temporary name in the same folder, NAME.XXXXXXXX.part, and then renamed. A process that is
killed leaves its temporary file behind; `remove_leftovers` removes it later.
"""

import csv
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_IMODE
from typing import Any, TypeVar

from cardiocaps.errors import CardioCapsError, OutputError, printable

T = TypeVar("T")

READABLE = 6
"""Significant digits of the numbers in a table for people."""

LAG = 90.0
"""Seconds in which a shared file system shows everywhere what one machine has written. NFS keeps names for 60."""

_PART = re.compile(r"\.[0-9a-f]{8}\.part$")

_TORCH_WRITER = ("PytorchStreamWriter", "inline_container", "iostream error")


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system inside the block into an OutputError with `path` and the reason.

    torch's file writer reports a full disk as a RuntimeError of its own; that is translated too.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {printable(path)}: {error.strerror or error}") from error
    except RuntimeError as error:
        if not any(part in str(error) for part in _TORCH_WRITER):
            raise
        raise OutputError(f"cannot write {printable(path)}: the file is not complete; is the disk full?") from error


@contextmanager
def lock_folder(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of an existing folder inside the block. The system releases it when the process ends in any way.

    A file system without locks, such as some network folders, gives none, and the block runs without.

    Args:
        wait: for another process that holds the lock.

    Raises:
        OutputError: another process holds the lock, or the folder cannot be opened.
    """
    from filelock import lock_descriptor

    with output_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # no locks
            if not lock_descriptor(handle, blocking=wait):
                raise OutputError(f"{printable(folder)} is being used by another process")
        yield
    finally:
        os.close(handle)


@contextmanager
def atomic_write(path: Path, *, sync: bool = True, mode: int = 0o666) -> Iterator[Path]:
    """A temporary path in the folder of `path` for the block to write to; `path` then becomes that file in one step.

    If the block fails, `path` stays as it was and the temporary file is removed.

    Args:
        sync: wait until the file and its new name are on the disk. Without it, `path` may be the old file or a torn
            one after a power failure.
        mode: permissions of the file, as far as the umask allows.

    Raises:
        OutputError: see `output_errors`.
    """
    with output_errors(path):
        temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        permissions = S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        try:
            yield temporary
            if S_IMODE(temporary.stat().st_mode) != permissions:  # some writers put a file of their own in its place
                temporary.chmod(permissions)
            if sync:
                with temporary.open("rb") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)  # noqa: PTH105 (a test replaces this function)
            if sync:
                sync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def appears(folder: Path, is_there: Callable[[], bool], seconds: float) -> bool:
    """Whether something in a folder is there, or comes to be seen within the time that a shared file system may lag."""
    until = time.monotonic() + seconds
    while not is_there():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
        with suppress(OSError):  # listing the folder makes a file system of the network ask anew
            list(folder.iterdir())
    return True


def is_missing(path: Path) -> bool:
    """Whether there is no file or folder at `path`.

    Where permissions forbid the question the answer is no: an attempt to read then gives the reason.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def sync_folder(folder: Path) -> None:
    """Wait until the names of a folder's files are on the disk, for example after a rename.

    Some file systems cannot do this for folders; the error is ignored, as in SQLite.
    """
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(*folders: Path, older_than: float = 0.0) -> None:
    """Remove the temporary files that killed processes left in these folders, but not in their subfolders.

    No other process may be writing there: call it while `lock_folder` holds the folders, or give `older_than`, an age
    in seconds that a file being written does not reach.
    """
    for folder in folders:
        with suppress(OSError):  # the folder is missing, or may not be read
            for entry in os.scandir(folder):
                if _PART.search(entry.name) and entry.is_file(follow_symlinks=False):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    if not older_than or age >= older_than:
                        Path(entry.path).unlink(missing_ok=True)


def is_unused(folder: Path, first: Path) -> bool:
    """Whether an existing folder is empty, or was left by a process that was killed while it wrote the file `first`.

    A program that writes `first` before any other file can begin again in such a folder. Raises OSError.
    """
    names = [entry.name for entry in folder.iterdir()]
    return all(_PART.search(name) and _PART.sub("", name) == first.name for name in names)


def write_bytes(path: Path, content: bytes, *, sync: bool = True) -> None:
    """Write a file in one step (see `atomic_write`). Raises OutputError."""
    with atomic_write(path, sync=sync) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, its line ends unchanged, as `write_bytes` does."""
    write_bytes(path, text.encode())


def json_text(value: Any) -> str:
    """`value` as JSON; NaN and infinity become null. Raises TypeError for types that JSON does not have."""
    return json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON (see `json_text`), as `write_bytes` does."""
    write_text(path, json_text(value))


def read_json(path: Path, kind: str, make: Callable[[dict[str, Any]], T], error: type[CardioCapsError]) -> T:
    """What `make` makes of the content of a JSON file of this program.

    Args:
        kind: what the file says that it is; `make` gets the rest.
        error: raised if the file cannot be read, is of another kind, or `make` cannot use it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("kind") != kind:
            raise ValueError("it is not a file of this program")
        return make(content)
    except OSError as why:
        raise error(f"cannot read {printable(path)}: {why.strerror}") from why
    except (AttributeError, KeyError, TypeError, ValueError) as why:
        raise error(f"{printable(path)} is damaged: {why}") from why


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], *, digits: int | None = None) -> None:
    """Write a table with all keys of the rows, in order of appearance.

    Args:
        rows: a missing value, NaN and infinity are empty cells.
        digits: significant digits of a float, for a table that people read. By default a float has all that it takes
            to read the same number back.
    """

    def cell(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        if not math.isfinite(value):
            return ""
        return value if digits is None else f"{value:.{digits}g}"

    table = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(table, list(columns), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)
    write_text(path, table.getvalue())


def _plain(value: Any) -> Any:
    """`value` in the types of JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # a NumPy array or scalar, a tensor
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
