"""Writes a phantom study: a folder of MJPEG videos with a table. After an interruption it goes on."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cardiocaps.errors import OutputError, printable
from cardiocaps.phantom.patients import Patient, plan
from cardiocaps.runtime.files import (
    atomic_write,
    is_unused,
    lock_folder,
    output_errors,
    remove_leftovers,
    write_bytes,
)
from cardiocaps.runtime.processes import cores, die_with_parent, in_parallel
from cardiocaps.runtime.progress import shown

VERSION = 1  # raise it when a seed gives other files than before
TABLE = "MeasurementsList.csv"
MARKER = "phantom.json"  # written first; the table comes last
BATCHES = ("Batch1", "Batch2", "Batch3", "Batch4")
COLUMNS = (
    *("", "HashedFileName", "Calc", "CalcValue", "Frame", "X1", "X2", "Y1", "Y2"),
    *("Frames", "FPS", "Width", "Height", "split"),
)
_OURS = re.compile(rf"({MARKER}|{TABLE}|Batch[1-4]/0X\w+\.avi)(\.[0-9a-f]{{8}}\.part)?")
QUALITY = 4  # of MJPEG's quantiser; 2 is the best


def write_phantom(
    out: Path,
    videos: int = 300,
    seed: int = 10,
    *,
    overwrite: bool = False,
    progress: bool = False,
    processes: int | None = None,
) -> int:
    """Write a phantom study into the folder `out`.

    An unfinished study with the same settings is completed, and a complete one is left unchanged. If two processes
    write to the same folder, the second waits for the first. Processes are spawned, so a script that calls this
    function needs the usual `if __name__ == "__main__"`.

    Args:
        out: the folder.
        videos: number of videos, at least 10.
        seed: the same `videos` and `seed` give the same bytes.
        overwrite: make an existing phantom anew.
        progress: show on standard error how many videos are made.
        processes: None: one for each CPU.

    Returns:
        The number of videos that were made.

    Raises:
        OutputError: `out` cannot be written, or holds files that are not part of a phantom.
    """
    with output_errors(out):
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file, not a folder")
        out.mkdir(parents=True, exist_ok=True)
    # If another process is making the same phantom, this one waits and finds it complete.
    with lock_folder(out, wait=True):
        return _write(out, videos, seed, overwrite, progress, processes or cores())


def _write(out: Path, videos: int, seed: int, overwrite: bool, progress: bool, processes: int) -> int:
    settings = _settings(videos, seed)
    _claim(out, settings, overwrite)
    patients = plan(videos, seed)
    missing = [patient for patient in patients if not _has_content(out / patient.video)]
    if not missing and phantom_is_complete(out, videos, seed):
        return 0
    with output_errors(out):
        write_bytes(out / MARKER, settings, sync=False)
        for batch in BATCHES:
            (out / batch).mkdir(exist_ok=True)
        _make_videos(out, missing, progress, processes)
        remove_leftovers(out, *(out / batch for batch in BATCHES))
        write_bytes(out / TABLE, _table(patients))
    return len(missing)


def phantom_is_complete(out: Path, videos: int, seed: int) -> bool:
    """Whether `out` holds everything that `write_phantom(out, videos, seed)` writes."""
    try:
        if (out / MARKER).read_bytes() != _settings(videos, seed):
            return False
    except OSError:
        return False
    return all(_has_content(out / name) for name in (TABLE, *(patient.video for patient in plan(videos, seed))))


def _settings(videos: int, seed: int) -> bytes:
    note = "synthetic parasternal long-axis echocardiograms; no patient's data"
    settings = {"phantom": note, "version": VERSION, "videos": videos, "seed": seed}
    return (json.dumps(settings, indent=2) + "\n").encode()


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _claim(out: Path, settings: bytes, overwrite: bool) -> None:
    """Raise OutputError unless `out` is empty, or a phantom that may be continued or replaced."""
    with output_errors(out):
        marker = out / MARKER
        if is_unused(out, marker):
            return
        if not marker.is_file():
            raise OutputError(f"{out} is not empty and not a phantom: choose a new folder")
        if overwrite:
            _clear(out)
        elif marker.read_bytes() != settings:
            raise OutputError(
                f"{out} holds a phantom with other settings: choose a new folder, or replace it (--overwrite)"
            )


def _clear(out: Path) -> None:
    """Remove the files of a phantom; raise OutputError, and remove nothing, if there are other files."""
    folders = [out / batch for batch in BATCHES if (out / batch).is_dir() and not (out / batch).is_symlink()]
    files = [entry for folder in (out, *folders) for entry in folder.iterdir() if entry not in folders]
    for file in files:
        if not (file.is_file() and _OURS.fullmatch(str(file.relative_to(out)))):
            raise OutputError(f"{printable(file)} is not part of a phantom: {out} is not overwritten")
    for file in files:
        if file != out / MARKER:
            file.unlink()
    for folder in folders:
        folder.rmdir()
    (out / MARKER).unlink()  # last, so that after an interruption the folder is still recognised as a phantom


def _make_videos(out: Path, missing: list[Patient], progress: bool, processes: int) -> None:
    def counted(made: Iterable[object]) -> None:
        for _ in shown(made, len(missing), "making videos") if progress else made:
            pass

    make = partial(_make_video, out)
    processes = min(processes, (len(missing) + 7) // 8)  # starting a process takes as long as several videos
    if processes <= 1:
        counted(map(make, missing))
        return
    pool = partial(ProcessPoolExecutor, processes, get_context("spawn"), die_with_parent)
    try:
        with in_parallel(pool, make, missing) as made:
            counted(made)
    except BrokenProcessPool as error:
        raise OutputError(
            f"{out}: a process that makes videos was killed (out of memory?); run again to go on"
        ) from error


def _make_video(out: Path, patient: Patient) -> None:
    from cardiocaps.phantom.ultrasound import render

    images = render(patient)
    with atomic_write(out / patient.video, sync=False) as part:
        _encode(part, images, patient.scan.fps)


def _encode(path: Path, images: NDArray[np.uint8], fps: int) -> None:
    """Grey frames [T, height, width] as Motion JPEG in an AVI file."""
    import av

    _, height, width = images.shape
    with av.open(path, "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        stream.thread_count = 1
        stream.codec_context.qmin = stream.codec_context.qmax = QUALITY
        planes = np.full((height * 3 // 2, width), 128, np.uint8)  # luma, then grey chroma
        for image in images:
            planes[:height] = image
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuvj420p")))
        container.mux(stream.encode(None))


def _table(patients: tuple[Patient, ...]) -> bytes:
    """The table in EchoNet-LVH's layout, with a row for each measurement."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    index = 0
    for patient in patients:
        scan = patient.scan
        for row in patient.measurements():
            points = (f"{value:.3f}" for value in (row.x1, row.x2, row.y1, row.y2))
            about = scan.frames, scan.fps, scan.width, scan.height, patient.split
            writer.writerow((index, patient.name, row.calc, f"{row.cm:.4f}", row.frame, *points, *about))
            index += 1
    return text.getvalue().encode()
