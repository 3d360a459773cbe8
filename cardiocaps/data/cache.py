"""Decoded frames on disk, so that a video is decoded once and not once an epoch.

There is one `.npy` file for each video, uint8 [T, 3, S, S], which is read one frame at a time. Its name is a hash of
the video's bytes and of the settings, so a changed video or setting never finds an old file. `index.json` keeps each
video's size, time of change, hashes and header, so that a second run reads only three small parts of each video.

The files are as confidential as the videos. Only their owner can read them, and only the owner can list a folder that
holds nothing but the cache. A damaged or foreign file is written anew, except for a file of another user: replacing
it would break that user's runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cardiocaps.data.problems import Problem, refuse_many, summarise
from cardiocaps.data.study import Clip, Study
from cardiocaps.data.video import (
    MAX_FRAMES,
    MAX_SIDE,
    READER_VERSION,
    READERS,
    RESIZE_VERSION,
    Header,
    VideoError,
    probe,
    read_frames,
    regular_file,
)
from cardiocaps.errors import ConfigError, DataError, OutputError, printable
from cardiocaps.runtime.files import atomic_write, output_errors, remove_leftovers
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.processes import cores, in_parallel
from cardiocaps.runtime.progress import shown

FRAME_CHOICES = ("spread", "first")
_FPS_TOLERANCE = 0.05  # relative; tables round frame rates
_INDEX = "index.json"
_ABANDONED = 3600.0  # age in seconds from which an unfinished file counts as left behind, not as being written
_MAX_INDEX = 1 << 28  # bytes; a video takes about 500
_SAMPLE = 4096  # bytes of head, middle and tail each
_SHA256 = re.compile("[0-9a-f]{64}")
_BLANK = 16  # a frame whose grey levels (of 255) differ by no more than this shows nothing


@dataclass(frozen=True)
class Entry:
    """What the index keeps of a video."""

    size: int  # bytes
    mtime_ns: int  # time of change
    sha256: str  # of all bytes
    sample: str  # SHA-256 of head, middle and tail
    header: Header


@dataclass(frozen=True)
class Cached:
    """A study in which every clip could be decoded, and the files with its frames."""

    study: Study
    files: Mapping[Path, Path]  # video -> .npy
    numbers: Mapping[Path, NDArray[np.int64]]  # video -> the number that each cached frame has in the video
    size: int  # side of the frames in pixels
    digests: Mapping[Path, str]  # video -> SHA-256 of its bytes

    def frame(self, clip: Clip, index: int) -> NDArray[np.uint8]:
        """The cached frame number `index` of a clip, uint8 [3, S, S].

        The file is read, not mapped: thousands of maps would need as many file descriptors, and their pages would count
        as memory of the program.

        Raises:
            OutputError: another user has replaced the file.
        """
        count = 3 * self.size**2
        with _own(self.files[clip.path]), self.files[clip.path].open("rb", buffering=0) as file:
            file.seek((index - len(self.numbers[clip.path])) * count, io.SEEK_END)
            return np.fromfile(file, np.uint8, count).reshape(3, self.size, self.size)


def default_folder() -> Path:
    """`$CARDIOCAPS_CACHE`, else `$XDG_CACHE_HOME/cardiocaps`, else `~/.cache/cardiocaps`."""
    if chosen := os.environ.get("CARDIOCAPS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cardiocaps"


def choose_frames(count: int, wanted: int, choice: str) -> NDArray[np.int64]:
    """Choose at most `wanted` of `count` frames; returns their numbers.

    Args:
        count: frames of the clip.
        wanted: at least 1.
        choice: "first": the first frames; "spread": the middles of `wanted` equal parts of the clip.

    Raises:
        ConfigError: `wanted` or `choice` is not allowed.
    """
    if wanted < 1:
        raise ConfigError(f"frames_per_clip is {wanted}; expected at least 1")
    if choice not in FRAME_CHOICES:
        raise ConfigError(f"frame_choice is {choice!r}; expected one of {', '.join(FRAME_CHOICES)}")
    n = min(wanted, count)
    if choice == "first":
        return np.arange(n, dtype=np.int64)
    return (2 * np.arange(n, dtype=np.int64) + 1) * count // (2 * n)


def build(
    study: Study,
    *,
    size: int,
    frames_per_clip: int,
    frame_choice: str = "spread",
    folder: Path | str | None = None,
    max_bad_share: float = 0.05,
    workers: int | None = None,
    reader: str = "pyav",
    progress: bool = False,
) -> Cached:
    """Decode the videos that are not in the cache yet.

    Args:
        study: the result leaves out its unusable videos and adds a problem for each of them.
        size: side of the cached frames in pixels.
        frames_per_clip: see `choose_frames`.
        frame_choice: see `choose_frames`.
        folder: of the cache; None: `default_folder`.
        max_bad_share: largest share of the videos that may be unusable.
        workers: threads, None: one for each core. The result does not depend on it.
        reader: "pyav" or "decord", see `read_frames`.
        progress: show on standard error how many videos are decoded.

    Raises:
        DataError: too many videos are unusable, or a split is left without both classes.
        OutputError: the cache cannot be written, or holds files of another user that cannot be read.
    """
    if size < 1:
        raise ConfigError(f"size is {size}; expected at least 1")
    workers = cores() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers is {workers}; expected at least 1")
    if reader not in READERS:
        raise ConfigError(f"reader is {reader!r}; expected one of {', '.join(READERS)}")
    if reader == "decord":
        require_package("decord", "decord", "video_reader: 'decord'", extra="decord")
    choose_frames(1, frames_per_clip, frame_choice)
    folder = default_folder() if folder is None else Path(folder)
    with output_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _keep_private(folder)
    remove_leftovers(folder, older_than=_ABANDONED)
    index = _read_index(folder / _INDEX)
    known = dict(index)
    headers = {entry.sha256: entry.header for entry in known.values()}

    def decode(path: Path) -> tuple[Entry, Path, NDArray[np.int64], bool] | str:
        try:
            entry = _examine(path, known.get(path), headers)
            numbers = choose_frames(entry.header.frames, frames_per_clip, frame_choice)
            # decord decodes damaged videos that PyAV refuses, so the two readers never share a file.
            by = "decord" if reader == "decord" and entry.header.is_plain else READER_VERSION
            settings = f"{entry.sha256} {frame_choice} {frames_per_clip} {size} {RESIZE_VERSION} {by}"
            file = folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:40]}.npy"
            shape = (len(numbers), 3, size, size)
            if not _intact(file, shape):
                content = io.BytesIO()
                np.save(content, read_frames(path, numbers, size, reader), allow_pickle=False)
                _write(file, content.getvalue())
            return entry, file, numbers, _blank(file, shape)
        except VideoError as error:
            return str(error)

    names = {clip.path: clip.name for clip in study.clips}
    files: dict[Path, Path] = {}
    numbers: dict[Path, NDArray[np.int64]] = {}
    bad: list[Problem] = []
    notes: list[Problem] = []
    decoded: dict[Path, tuple[Entry, Path, NDArray[np.int64], bool] | str] = {}
    try:
        with in_parallel(partial(ThreadPoolExecutor, workers), decode, names) as results:
            decoded.update(shown(results, len(names), "decoding videos") if progress else results)
    finally:
        index.update((path, result[0]) for path, result in decoded.items() if not isinstance(result, str))
        if index != known:
            _save_index(folder / _INDEX, index)
    for path, name in names.items():
        result = decoded[path]
        if isinstance(result, str):
            bad.append(Problem(name, result))
            continue
        entry, file, chosen, blank = result
        differs = _disagreement(study.claims[name], entry.header)
        if differs:
            bad.append(Problem(name, f"table and file disagree: table says {differs}"))
            continue
        notes += [Problem(name, note, harmless=True) for note in _small_disagreements(study.claims[name], entry.header)]
        if blank:
            reason = "blank video (kept): all that was read of it is black, or of one colour"
            notes.append(Problem(name, reason, harmless=True))
        files[path], numbers[path] = file, chosen
    refuse_many(len(bad), len(names), max_bad_share, f"videos of {study.root}", bad)
    clips = tuple(clip for clip in study.clips if clip.path in files)
    notes += _repeats(clips, index)
    usable = replace(study, clips=clips, problems=(*study.problems, *bad, *notes))
    if bad:
        try:
            usable.check_splits()
        except DataError as error:
            raise DataError(f"{error}; {len(bad)} of {len(names)} videos were left out:\n{summarise(bad)}") from None
    return Cached(usable, files, numbers, size, {path: index[path].sha256 for path in files})


def _examine(path: Path, known: Entry | None, headers: Mapping[str, Header]) -> Entry:
    """The entry of a video. The whole file is read only if its size, its time of change or its sample is new."""
    try:
        regular_file(path, path.parent)
        status = path.stat()
        sample = _sample(path, status.st_size)
        if known and (known.size, known.mtime_ns, known.sample) == (status.st_size, status.st_mtime_ns, sample):
            return known
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        header = headers.get(digest) or probe(path)
    except OSError as error:
        raise VideoError(f"unreadable: {error.strerror}") from None
    return Entry(status.st_size, status.st_mtime_ns, digest, sample, header)


def _sample(path: Path, size: int) -> str:
    """SHA-256 of head, middle and tail: a program can change a file and keep its size and time."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        for place in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
            file.seek(max(place, 0))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _disagreement(claim: Header, header: Header) -> str:
    """How the table contradicts the file; such a video is unusable. "" if it does not.

    The table may count the frames that are shown or those that the container claims, and give the width and height of
    the frames as shown or as stored.
    """
    sides = (header.width, header.height)
    if header.turned and (claim.width or header.height, claim.height or header.width) == sides[::-1]:
        sides = sides[::-1]
    frames = header.claimed if claim.frames == header.claimed else header.frames
    return ", ".join(
        f"{said} {what}, file has {there}"
        for what, said, there in (
            ("frames", claim.frames, frames),
            ("pixels width", claim.width, sides[0]),
            ("pixels height", claim.height, sides[1]),
        )
        if said and said != there
    )


def _small_disagreements(claim: Header, header: Header) -> Iterator[str]:
    """Contradictions that are only noted: no label depends on the frame count, and no pixel on the frame rate."""
    if claim.frames and claim.frames == header.claimed:
        yield f"frame counts disagree (kept): table and file say {claim.frames} frames, {header.frames} are shown"
    if claim.fps and header.fps and abs(claim.fps - header.fps) > _FPS_TOLERANCE * header.fps:
        yield f"frame rates disagree (kept): table says {claim.fps:g} a second, file has {header.fps:g}"


def _repeats(clips: Iterable[Clip], index: Mapping[Path, Entry]) -> list[Problem]:
    """A note for each video with the same bytes as another one, if their splits or their labels differ.

    In different splits it is a leak that the table cannot show; with different labels it is a contradiction.
    """
    alike: dict[str, list[Clip]] = {}
    repeated: dict[tuple[str, str], Problem] = {}
    for clip in clips:
        others = alike.setdefault(index[clip.path].sha256, [])
        for what, same in (("with another label", "label"), ("in another split", "split")):
            for other in others:
                if other.path != clip.path and getattr(other, same) != getattr(clip, same):
                    reason = f"same video {what} (kept): {other.name}"
                    repeated.setdefault((clip.name, what), Problem(clip.name, reason))
                    break
        others.append(clip)
    return list(repeated.values())


def _intact(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether a cached array is complete; a machine that loses power can leave a short one.

    Compares the size and the bytes of the header, because `numpy.load` parses the header with `ast`, which sometimes
    fails with a SystemError if several threads do it at once (Python 3.11).
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with _regular(file) as stream:
        if stream is None:
            return False
        start = stream.read(header.tell())
        size = stream.seek(0, io.SEEK_END)
    return start == header.getvalue() and size == header.tell() + math.prod(shape)


def _blank(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether every channel of an intact array is blank. A few rows in the middle nearly always show that it is not."""
    side, size = shape[-1], math.prod(shape)
    rows = min(side, 16)
    with file.open("rb", buffering=0) as stream:
        stream.seek((shape[0] // 2 * 3 + 1) * side**2 + (side - rows) // 2 * side - size, io.SEEK_END)
        if np.ptp(np.fromfile(stream, np.uint8, rows * side)) > _BLANK:
            return False
        stream.seek(-size, io.SEEK_END)
        frames = np.fromfile(stream, np.uint8, size).reshape(shape)
    return bool((np.ptp(frames, axis=(0, 2, 3)) <= _BLANK).all())


def _keep_private(folder: Path) -> None:
    """Make the cache folder of this user private, unless it holds other files too."""
    status = folder.stat()
    if status.st_uid != os.geteuid() or not status.st_mode & 0o077:
        return
    if all(entry.name == _INDEX or entry.suffix in (".npy", ".part") for entry in folder.iterdir()):
        folder.chmod(0o700)


def _write(file: Path, content: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all. Raises OutputError."""
    with atomic_write(file, sync=False, mode=0o600) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _own(file: Path) -> Iterator[None]:
    """Raise OutputError if the block is not permitted to open a file of the cache."""
    try:
        yield
    except PermissionError:
        raise OutputError(
            f"cache_dir is {printable(file.parent)}; expected a cache of your own, but {file.name} in it belongs to "
            "another user; choose another folder with --cache-dir"
        ) from None


@contextmanager
def _regular(file: Path) -> Iterator[BinaryIO | None]:
    """Open a regular file of the cache and make it private; None if it is missing, a FIFO, a device or a link.

    Raises:
        OutputError: it belongs to another user and cannot be read.
    """
    try:
        handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (OSError, ValueError) as error:
        if isinstance(error, PermissionError):
            with _own(file):
                if file.lstat().st_uid != os.geteuid():
                    raise
        yield None
        return
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(handle)
        if status.st_uid == os.geteuid() and status.st_mode & 0o077 and stat.S_ISREG(status.st_mode):
            os.fchmod(handle, 0o600)
        yield stream if stat.S_ISREG(status.st_mode) else None


def _save_index(file: Path, index: Mapping[Path, Entry]) -> None:
    """Write the index together with the entries that another run has written meanwhile."""
    merged = _read_index(file) | dict(index)
    text = json.dumps({str(path): asdict(entry) for path, entry in merged.items()}, indent=0)
    _write(file, text.encode())


def _read_index(file: Path) -> dict[Path, Entry]:
    """The index, without damaged entries; empty if the file is missing or damaged."""
    try:
        with _regular(file) as stream:
            content = b"" if stream is None else stream.read(_MAX_INDEX + 1)
        entries = json.loads(content) if len(content) <= _MAX_INDEX else None
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(entries, dict):
        return {}
    found = ((Path(path), _entry(value)) for path, value in entries.items())
    return {path: entry for path, entry in found if entry is not None}


def _entry(value: Any) -> Entry | None:
    """An entry from the JSON of the index; None if it is damaged."""
    try:
        header = Header(**value["header"])
        entry = Entry(**(value | {"header": header}))
        whole = (entry.size, entry.mtime_ns, header.frames, header.width, header.height, header.claimed)
        right = (
            all(type(number) is int for number in whole)
            and 1 <= header.frames <= MAX_FRAMES
            and 1 <= header.width <= MAX_SIDE
            and 1 <= header.height <= MAX_SIDE
            and header.claimed >= 0
            and type(header.fps) in (int, float)
            and 0 <= header.fps < math.inf
            and type(header.turned) is bool
            and type(header.form) is str
            and all(_SHA256.fullmatch(digest) for digest in (entry.sha256, entry.sample))
        )
    except (KeyError, TypeError):
        return None
    return entry if right else None
