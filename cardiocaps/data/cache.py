"""Decoded frames on disk, so that a video is decoded once and not once an epoch.

One ``.npy`` per video, uint8 [T, 3, S, S], read a frame at a time. Its name is a hash of the video's
bytes and of the settings, so a changed video or setting never meets an old file. ``index.json`` remembers
each video's size, time of change, hash and header: a second run reads no video at all. The files are pixels
of the data set: they are as confidential as the videos, and a new cache folder is readable by its owner
only.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cardiocaps.data.echonet import Clip, Study
from cardiocaps.data.measurements import Problem, refuse_many, summarise
from cardiocaps.data.video import RESIZE_VERSION, Header, VideoError, probe, read_frames
from cardiocaps.errors import ConfigError, DataError
from cardiocaps.files import output_errors, write_bytes
from cardiocaps.parallel import in_parallel

FRAME_CHOICES = ("spread", "first")
_FPS_TOLERANCE = 0.05  # tables round frame rates
_INDEX = "index.json"
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """What the index knows about a video: size in bytes, time of change, SHA-256 of its bytes, header."""

    size: int
    mtime_ns: int
    sha256: str
    header: Header


@dataclass(frozen=True)
class Cached:
    """A study whose clips all decode, and where their frames are."""

    study: Study
    files: Mapping[Path, Path]  # video -> .npy
    numbers: Mapping[Path, NDArray[np.int64]]  # video -> number in the video of each cached frame
    size: int  # side of the frames in pixels

    def frame(self, clip: Clip, index: int) -> NDArray[np.uint8]:
        """A cached frame, uint8 [3, S, S], by its place among those of the clip.

        Read, not mapped: a map for each of thousands of videos would take a file descriptor each, and what of it is in
        memory would count as the program's.
        """
        count = 3 * self.size**2
        with self.files[clip.path].open("rb", buffering=0) as file:
            file.seek((index - len(self.numbers[clip.path])) * count, io.SEEK_END)
            return np.fromfile(file, np.uint8, count).reshape(3, self.size, self.size)


def default_folder() -> Path:
    """``$CARDIOCAPS_CACHE``, else ``$XDG_CACHE_HOME/cardiocaps``, else ``~/.cache/cardiocaps``."""
    if chosen := os.environ.get("CARDIOCAPS_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cardiocaps"


def choose_frames(count: int, wanted: int, choice: str) -> NDArray[np.int64]:
    """At most ``wanted`` of ``count`` frame numbers: ``spread`` evenly over the clip, or the ``first``.

    ``spread`` takes the middle of ``wanted`` equal stretches.
    """
    if wanted < 1:
        raise ConfigError(f"frames_per_clip must be at least 1, got {wanted}")
    if choice not in FRAME_CHOICES:
        raise ConfigError(f"frame_choice must be one of {', '.join(FRAME_CHOICES)}, got {choice!r}")
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
    workers: int = 2,
    progress: bool = False,
) -> Cached:
    """Decode what is not in the cache yet.

    Args:
        study: its unusable videos are left out of the result and join its problems.
        size: side of the cached frames in pixels.
        frames_per_clip, frame_choice: see `choose_frames`.
        folder: of the cache; default `default_folder`.
        max_bad_share: largest share of the study's videos that may turn out unusable.
        workers: threads; the result doesn't depend on their number.
        progress: show a bar on standard error where it takes more than two seconds.

    Raises:
        DataError: too many unusable videos, or a split that is left without both classes.
        OutputError: the cache cannot be written.
    """
    if size < 1:
        raise ConfigError(f"size must be at least 1, got {size}")
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    choose_frames(1, frames_per_clip, frame_choice)
    folder = default_folder() if folder is None else Path(folder)
    with output_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    index = _read_index(folder / _INDEX)
    known = dict(index)

    def decode(path: Path) -> tuple[Entry, Path, NDArray[np.int64]] | str:
        try:
            entry = _examine(path, known.get(path))
            numbers = choose_frames(entry.header.frames, frames_per_clip, frame_choice)
            settings = f"{entry.sha256} {frame_choice} {frames_per_clip} {size} {RESIZE_VERSION}"
            file = folder / f"{hashlib.sha256(settings.encode()).hexdigest()[:40]}.npy"
            if not _intact(file, (len(numbers), 3, size, size)):
                frames = read_frames(path, numbers, size)
                content = io.BytesIO()
                np.save(content, frames, allow_pickle=False)
                write_bytes(file, content.getvalue(), sync=False)
            return entry, file, numbers
        except VideoError as error:
            return str(error)

    names = {clip.path: clip.name for clip in study.clips}
    files: dict[Path, Path] = {}
    numbers: dict[Path, NDArray[np.int64]] = {}
    bad: list[Problem] = []
    notes: list[Problem] = []
    decoded: dict[Path, tuple[Entry, Path, NDArray[np.int64]] | str] = {}
    try:
        with in_parallel(partial(ThreadPoolExecutor, workers), decode, names) as results:
            decoded.update(_shown(results, len(names), progress))
    finally:
        index.update((path, result[0]) for path, result in decoded.items() if not isinstance(result, str))
        if index != known:
            _save_index(folder / _INDEX, index)
    for path, name in names.items():
        result = decoded[path]
        if isinstance(result, str):
            bad.append(Problem(name, result))
            continue
        entry, file, chosen = result
        differs, note = _disagreement(study.claims[name], entry.header)
        if differs:
            bad.append(Problem(name, f"table and file disagree: table says {differs}"))
            continue
        if note:
            notes.append(Problem(name, f"frame rates disagree (kept): table says {note}", harmless=True))
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
    return Cached(usable, files, numbers, size)


def _examine(path: Path, known: Entry | None) -> Entry:
    """The video's entry; the file is read only where its size or its time of change is new."""
    try:
        status = path.stat()
        if known and (known.size, known.mtime_ns) == (status.st_size, status.st_mtime_ns):
            return known
        header = probe(path)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VideoError(f"unreadable: {error.strerror}") from None
    return Entry(status.st_size, status.st_mtime_ns, digest, header)


def _disagreement(claim: Header, header: Header) -> tuple[str, str]:
    """How the table contradicts the file: in what makes the video unusable, and in the frame rate.

    No pixel depends on the frame rate, so a wrong one is only worth a note.
    """
    differs = [
        f"{said} {what}, file has {there}"
        for what, said, there in (
            ("frames", claim.frames, header.frames),
            ("pixels width", claim.width, header.width),
            ("pixels height", claim.height, header.height),
        )
        if said and said != there
    ]
    slower = claim.fps and header.fps and abs(claim.fps - header.fps) > _FPS_TOLERANCE * header.fps
    return ", ".join(differs), f"{claim.fps:g} a second, file has {header.fps:g}" if slower else ""


def _repeats(clips: Iterable[Clip], index: Mapping[Path, Entry]) -> list[Problem]:
    """Videos with the very bytes of a video in another split: a leak that the table cannot show."""
    first: dict[str, Clip] = {}
    repeated: dict[str, Problem] = {}
    for clip in clips:
        other = first.setdefault(index[clip.path].sha256, clip)
        if other.split != clip.split:
            repeated[clip.name] = Problem(clip.name, f"same video in another split (kept): {other.name}")
    return list(repeated.values())


def _intact(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether a cached array is there whole; a machine that was switched off may leave a short one.

    By its size and the bytes of its header: `numpy.load` parses the header with `ast`, which in several
    threads at once fails now and then with a SystemError (Python 3.11).
    """
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    try:
        with file.open("rb") as stream:
            start = stream.read(header.tell())
            size = stream.seek(0, io.SEEK_END)
    except OSError:
        return False
    return start == header.getvalue() and size == header.tell() + math.prod(shape)


def _save_index(file: Path, index: Mapping[Path, Entry]) -> None:
    """Another run may have written meanwhile: its videos are kept."""
    merged = _read_index(file) | dict(index)
    text = json.dumps({str(path): asdict(entry) for path, entry in merged.items()}, indent=0)
    write_bytes(file, text.encode(), sync=False)


def _read_index(file: Path) -> dict[Path, Entry]:
    """The index; an absent or damaged one only costs time."""
    try:
        entries = json.loads(file.read_text())
        return {
            Path(path): Entry(e["size"], e["mtime_ns"], str(e["sha256"]), Header(**e["header"]))
            for path, e in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _shown(results: Iterable[T], total: int, progress: bool) -> Iterator[T]:
    """Pass results on; a bar appears once they have taken two seconds."""
    if not progress:
        yield from results
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task, start, running = bar.add_task("decoding videos", total=total), time.monotonic(), False
    try:
        for result in results:
            yield result
            bar.advance(task)
            if not running and time.monotonic() - start > 2:
                bar.start()
                running = True
    finally:
        if running:
            bar.stop()
