"""Decoded frames on disk, so that a video is decoded once and not once an epoch.

There is one `.npy` file for each video, uint8 [T, 3, S, S], which is read one frame at a time. Its name is a hash of
the video's bytes and of the settings, so a changed video or setting never finds an old file. `index.json` keeps each
video's size, time of change, hashes and header, so that a second run reads only three small parts of each video.

The files are as confidential as the videos, so only their owner can read them. A damaged file is written anew, and so
is an entry of the index that does not match its check.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cardiocaps.data import dicom
from cardiocaps.data.header import Header, VideoError
from cardiocaps.data.problems import Problem, refuse_many, summarise
from cardiocaps.data.study import Clip, Study
from cardiocaps.data.video import (
    READER_VERSION,
    RESIZE_VERSION,
    probe,
    read_frames,
    regular_file,
)
from cardiocaps.errors import DataError, OutputError, printable
from cardiocaps.runtime.files import atomic_write, output_errors, remove_leftovers
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.processes import cores, in_parallel
from cardiocaps.runtime.progress import shown

_FPS_TOLERANCE = 0.05  # relative; tables round frame rates
_INDEX = "index.json"
_ABANDONED = 3600.0  # age in seconds from which an unfinished file counts as left behind, not as being written
_SAVED_EVERY = 60.0  # seconds between two states of the index
_SAMPLE = 4096  # bytes of head, middle and tail each
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
class Frames:
    """The cached frames of a video."""

    video: Entry
    file: Path  # .npy
    numbers: NDArray[np.int64]  # the number that each of them has in the video
    blank: bool  # every channel is black, or of one colour
    decoded: bool  # now; False: they were in the cache


@dataclass(frozen=True)
class Cached:
    """A study in which every clip could be decoded, and its frames."""

    study: Study
    frames: Mapping[Path, Frames]  # by the video's path
    size: int  # side of the frames in pixels

    def frame(self, clip: Clip, index: int) -> NDArray[np.uint8]:
        """The cached frame number `index` of a clip, uint8 [3, S, S].

        The file is read, not mapped: thousands of maps would need as many file descriptors, and their pages would count
        as memory of the program.

        Raises:
            OutputError: the file may not be read.
        """
        frames, count = self.frames[clip.path], 3 * self.size**2
        with _open(frames.file) as file:
            file.seek((index - len(frames.numbers)) * count, io.SEEK_END)
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
    """
    n = min(wanted, count)
    if choice == "first":
        return np.arange(n, dtype=np.int64)
    return (2 * np.arange(n, dtype=np.int64) + 1) * count // (2 * n)


@dataclass(frozen=True)
class Decoder:
    """Decodes a video into the cache, unless its frames are there already.

    Attributes:
        folder: of the cache.
        size: side of the cached frames in pixels.
        frames_per_clip: see `choose_frames`.
        frame_choice: see `choose_frames`.
        reader: "pyav" or "decord", see `read_frames`.
    """

    folder: Path
    size: int
    frames_per_clip: int
    frame_choice: str
    reader: str

    def __call__(self, path: Path, known: Entry | None = None, headers: Mapping[str, Header] | None = None) -> Result:
        """The frames of a video, or the reason for which it cannot be used.

        Args:
            path: of the video.
            known: what the index has of it.
            headers: known headers, by the SHA-256 of the video: it may have been moved.
        """
        try:
            entry = _examine(path, known, headers or {})
            numbers = choose_frames(entry.header.frames, self.frames_per_clip, self.frame_choice)
            file, shape = self._file(entry), (len(numbers), 3, self.size, self.size)
            missing = not _intact(file, shape)
            if missing:
                content = io.BytesIO()
                np.save(content, read_frames(path, numbers, self.size, self.reader), allow_pickle=False)
                _write(file, content.getvalue())
            return Frames(entry, file, numbers, _blank(file, shape), missing)
        except VideoError as error:
            return str(error)

    def _file(self, entry: Entry) -> Path:
        # decord decodes damaged videos that PyAV refuses, so the two readers never share a file.
        by: str | int = "decord" if self.reader == "decord" and entry.header.is_plain else READER_VERSION
        if entry.header.is_dicom:
            by = f"dicom {dicom.READER_VERSION}"
        settings = f"{entry.sha256} {self.frame_choice} {self.frames_per_clip} {self.size} {RESIZE_VERSION} {by}"
        return self.folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:40]}.npy"

    def has(self, frames: Frames) -> bool:
        """Whether this machine sees the file of the frames, whole."""
        return _intact(frames.file, (len(frames.numbers), 3, self.size, self.size))


Result = Frames | str
"""The frames of a video, or the reason for which it cannot be used."""

Engine = Callable[[Decoder, Mapping[Path, Entry | None]], AbstractContextManager[Iterator[tuple[Path, Result]]]]
"""What decodes videos: takes what the index has of each, and gives their results in the order in which they are done,
each once."""


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
    on: Engine | None = None,
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
        on: what decodes them; None: threads of this process.

    Raises:
        DataError: too many videos are unusable, or a split is left without both classes.
        OutputError: the cache cannot be written, or holds files that may not be read.
        ConfigError: decord is not installed, or pydicom and there are DICOM files.
    """
    if reader == "decord":
        require_package("decord", "decord", "video_reader: 'decord'", extra="decord")
    folder = default_folder() if folder is None else Path(folder)
    with output_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _make_private(folder)
    remove_leftovers(folder, older_than=_ABANDONED)
    known = _read_index(folder / _INDEX)
    decoder = Decoder(folder, size, frames_per_clip, frame_choice, reader)
    clips_by_path = {clip.path: clip for clip in study.clips}
    decoded: dict[Path, Result] = {}
    index, saved, last = dict(known), dict(known), time.monotonic()

    def save() -> None:
        nonlocal saved, last
        if index != saved:
            _save_index(folder / _INDEX, index)
            saved = dict(index)
        last = time.monotonic()

    headers = {entry.sha256: entry.header for entry in known.values()}
    decoding = _in_threads(workers or cores(), headers) if on is None else on
    try:
        with decoding(decoder, {path: known.get(path) for path in clips_by_path}) as results:
            for path, found in shown(results, len(clips_by_path), "decoding videos") if progress else results:
                decoded[path] = found
                if isinstance(found, Frames):
                    index[path] = found.video
                if time.monotonic() - last > _SAVED_EVERY:
                    save()
    finally:
        save()
    frames: dict[Path, Frames] = {}
    bad: list[Problem] = []
    notes: list[Problem] = []
    for path, clip in clips_by_path.items():
        found, claim = decoded[path], study.claims[clip.name]
        if isinstance(found, str):
            bad.append(Problem(clip.where, found))
        elif differs := _disagreement(claim, found.video.header):
            bad.append(Problem(clip.where, f"table and file disagree: table says {differs}"))
        else:
            notes += [Problem(clip.where, note, harmless=True) for note in _notes(claim, found)]
            frames[path] = found
    refuse_many(bad, len(clips_by_path), max_bad_share, f"videos of {study.root}")
    clips = tuple(clip for clip in study.clips if clip.path in frames)
    notes += _repeats(clips, frames)
    usable = replace(study, clips=clips, problems=(*study.problems, *bad, *notes))
    if bad:
        try:
            usable.check_splits()
        except DataError as error:
            raise DataError(
                f"{error}; {len(bad)} of {len(clips_by_path)} videos were left out:\n{summarise(bad)}"
            ) from None
    return Cached(usable, frames, size)


def _in_threads(workers: int, headers: Mapping[str, Header]) -> Engine:
    """The engine of this process. `headers`: see `Decoder`."""

    def decoding(
        decoder: Decoder, known: Mapping[Path, Entry | None]
    ) -> AbstractContextManager[Iterator[tuple[Path, Result]]]:
        pool = partial(ThreadPoolExecutor, workers)
        return in_parallel(pool, lambda path: decoder(path, known[path], headers), known)

    return decoding


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
    the frames as shown or as stored: before they were turned, or cropped to the region of a DICOM file.
    """
    sides = (header.width, header.height)
    stored = (header.stored_width, header.stored_height)
    if header.is_dicom and (claim.width or stored[0], claim.height or stored[1]) == stored:
        sides = stored
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


def _notes(claim: Header, frames: Frames) -> Iterator[str]:
    """What is only noted of a video: no label depends on the frame count, and no pixel on the frame rate."""
    header = frames.video.header
    if claim.frames and claim.frames == header.claimed:
        yield f"frame counts disagree (kept): table and file say {claim.frames} frames, {header.frames} are shown"
    if claim.fps and header.fps and abs(claim.fps - header.fps) > _FPS_TOLERANCE * header.fps:
        yield f"frame rates disagree (kept): table says {claim.fps:g} a second, file has {header.fps:g}"
    for flag in header.flags.split():
        yield f"{dicom.FLAGS.get(flag, flag)} (kept)"
    if frames.blank:
        yield "blank video (kept): all that was read of it is black, or of one colour"


def _repeats(clips: Iterable[Clip], frames: Mapping[Path, Frames]) -> list[Problem]:
    """A note for each video with the same bytes as another one, if their splits or their labels differ.

    In different splits it is a leak that the table cannot show; with different labels it is a contradiction.
    """
    alike: dict[str, list[Clip]] = {}
    repeated: dict[tuple[str, str], Problem] = {}
    for clip in clips:
        others = alike.setdefault(frames[clip.path].video.sha256, [])
        for what, same in (("with another label", "label"), ("in another split", "split")):
            for other in others:
                if other.path != clip.path and getattr(other, same) != getattr(clip, same):
                    reason = f"same video {what} (kept): {other.where}"
                    repeated.setdefault((clip.name, what), Problem(clip.where, reason))
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
    expected = header.getvalue()
    try:
        with _open(file) as stream:
            return stream.read(len(expected)) == expected and _size(stream) == len(expected) + math.prod(shape)
    except OSError:
        return False


def _blank(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether every channel of an intact array is blank. A few rows in the middle nearly always show that it is not."""
    with _open(file) as stream:
        frames = np.memmap(stream, np.uint8, "r", _size(stream) - math.prod(shape), shape)
    top = max(shape[-1] // 2 - 8, 0)
    if np.ptp(frames[len(frames) // 2, 1, top : top + 16]) > _BLANK:
        return False
    return bool((np.ptp(frames, axis=(0, 2, 3)) <= _BLANK).all())


def _write(file: Path, content: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all. Raises OutputError."""
    with atomic_write(file, sync=False, mode=0o600) as temporary:
        temporary.write_bytes(content)


def _open(file: Path) -> io.FileIO:
    """Open a file of the cache for reading, and make it private again if it is not.

    Raises:
        OSError: the file is missing, or is a link, a FIFO or a device, none of which this program puts there.
        OutputError: the file may not be read: it is another user's, whose runs need it.
    """
    try:
        stream = io.FileIO(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except PermissionError:
        raise OutputError(
            f"cache_dir is {printable(file.parent)}; expected a cache of your own, but {file.name} in it is not "
            "readable; choose another folder with --cache-dir"
        ) from None
    status = os.fstat(stream.fileno())
    if not stat.S_ISREG(status.st_mode):
        stream.close()
        raise OSError(f"{file} is not a file")
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        os.fchmod(stream.fileno(), 0o600)
    return stream


def _size(stream: io.FileIO) -> int:
    """The size of an open file in bytes."""
    return os.fstat(stream.fileno()).st_size


def _make_private(folder: Path) -> None:
    """Let only its owner use a cache folder, unless it holds other files too: others may need these."""
    status = folder.stat()
    if status.st_uid == os.geteuid() and status.st_mode & 0o077:
        names = [Path(entry.name) for entry in os.scandir(folder)]
        if all(name.suffix in (".npy", ".part") or name.name == _INDEX for name in names):
            folder.chmod(0o700)


def _save_index(file: Path, index: Mapping[Path, Entry]) -> None:
    """Write the index together with the entries that another run has written meanwhile."""
    merged = _read_index(file) | dict(index)
    content = {str(path): to_json(entry) for path, entry in merged.items()}
    _write(file, json.dumps(content, indent=0).encode())


def _read_index(file: Path) -> dict[Path, Entry]:
    """The index without damaged entries; empty if the file is missing or damaged."""
    try:
        with _open(file) as stream:
            found = {Path(path): from_json(value) for path, value in json.loads(stream.read()).items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return {path: entry for path, entry in found.items() if entry is not None}


def to_json(entry: Entry) -> dict[str, Any]:
    """An entry in types of JSON."""
    return {**asdict(entry), "check": _check(entry)}


def from_json(value: Any) -> Entry | None:
    """The entry that `to_json` has written; None if anything in it is not what was written."""
    try:
        check = value.pop("check")
        entry = Entry(**{**value, "header": Header(**value["header"])})
    except (AttributeError, LookupError, TypeError):
        return None
    return entry if check == _check(entry) else None


def _check(entry: Entry) -> str:
    """A digest of an entry's values and their types."""
    return hashlib.sha256(repr(entry).encode()).hexdigest()
