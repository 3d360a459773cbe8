"""Videos and tables in buckets and on servers: whatever fsspec has a file system for (s3://, gs://, https://, …).

A video is copied to a private temporary file while it is read, because decoders want files.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cardiocaps.data.header import VideoError
from cardiocaps.errors import ConfigError, DataError, printable
from cardiocaps.runtime.packages import require_package


def is_url(text: str) -> bool:
    return "://" in text


def files_below(url: str) -> list[str]:
    """The URLs of the file at `url`, or of all files below the folder, sorted.

    Raises:
        ConfigError: fsspec or its package for this kind of URL is missing, or there is nothing.
        DataError: the server refuses.
    """
    system, path = _file_system(url)
    try:
        found = sorted(system.find(path))
    except FileNotFoundError:
        found = []
    except Exception as error:  # each file system has its own
        raise DataError(f"cannot list {printable(url)}: {_reason(error)}") from error
    if not found:
        raise ConfigError(f"INPUT: {printable(url)} does not exist, or is an empty folder")
    return [system.unstrip_protocol(one) for one in found]


def read_text(url: str) -> str:
    """A text in UTF-8. Raises ConfigError or DataError."""
    system, path = _file_system(url)
    try:
        return system.cat_file(path).decode("utf-8-sig")
    except Exception as error:
        raise DataError(f"cannot read {printable(url)}: {_reason(error)}") from error


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The path of a copy, with the suffix of the URL, which only its owner can read and which ends with the block.

    Raises:
        VideoError: it cannot be read.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="cardiocaps-"))
    except OSError as error:
        raise VideoError(f"cannot be copied: {_reason(error)}") from error
    try:
        copy = folder / f"video{PurePosixPath(url).suffix}"
        try:
            system, path = _file_system(url)
            with system.open(path, "rb") as source, copy.open("wb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
        except FileNotFoundError as error:
            raise VideoError("no such file") from error
        except ConfigError as error:
            raise VideoError(str(error)) from error
        except Exception as error:
            raise VideoError(f"cannot be read: {type(error).__name__}") from error
        yield copy
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def beside(url: str, name: str) -> str:
    """The URL of a file that is named in the file at `url`: relative to its folder."""
    return name if is_url(name) else f"{url.rpartition('/')[0]}/{name}"


def _file_system(url: str) -> tuple[Any, str]:
    core = require_package("fsspec.core", "fsspec", "INPUT: a URL", extra="cluster")
    try:
        return core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3", an unknown protocol
        raise ConfigError(f"INPUT: {printable(url)}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    text = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
    return printable(text.partition("\n")[0] or type(error).__name__)
