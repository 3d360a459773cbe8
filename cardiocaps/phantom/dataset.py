"""Writes a phantom study: a folder of MJPEG videos with a table. After an interruption it goes on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cardiocaps.errors import OutputError, printable
from cardiocaps.phantom.layouts import LAYOUTS, LVH, Layout
from cardiocaps.phantom.patients import Patient, plan
from cardiocaps.phantom.variants import USUAL, Variant
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
MARKER = "phantom.json"  # written first; the table comes last
_OURS = re.compile(
    rf"({MARKER}|"
    + "|".join(f"{layout.table}|({'|'.join(layout.folders)})/0X\\w+\\.avi" for layout in LAYOUTS.values())
    + r")(\.[0-9a-f]{8}\.part)?"
)


def write_phantom(
    out: Path,
    videos: int = 300,
    seed: int = 10,
    *,
    overwrite: bool = False,
    progress: bool = False,
    processes: int | None = None,
    layout: str = LVH,
    variant: Variant = USUAL,
) -> int:
    """Write a phantom study into the folder `out`.

    An unfinished study with the same settings is completed, and a complete one is left unchanged. If two processes
    write to the same folder, the second waits for the first. Processes are spawned, so a script that calls this
    function needs the usual `if __name__ == "__main__"`.

    Args:
        out: the folder.
        videos: number of videos, at least 10.
        seed: the same `videos`, `seed` and `variant` give the same bytes.
        overwrite: make an existing phantom anew.
        progress: show on standard error how many videos are made.
        processes: None: one for each CPU.
        layout: a name of LAYOUTS.
        variant: difficulty, test videos, share of abnormal ones, and shift.

    Returns:
        The number of videos that were made.

    Raises:
        OutputError: `out` cannot be written, or holds files that are not part of a phantom.
        ConfigError: as `plan`.
    """
    patients = plan(videos, seed, variant)
    with output_errors(out):
        if out.exists() and not out.is_dir():
            raise OutputError(f"{out} is a file, not a folder")
        out.mkdir(parents=True, exist_ok=True)
    # If another process is making the same phantom, this one waits and finds it complete.
    with lock_folder(out, wait=True):
        settings = _settings(videos, seed, LAYOUTS[layout], variant)
        return _write(out, patients, settings, LAYOUTS[layout], overwrite, progress, processes or cores())


def _write(
    out: Path,
    patients: Sequence[Patient],
    settings: bytes,
    layout: Layout,
    overwrite: bool,
    progress: bool,
    processes: int,
) -> int:
    _claim(out, settings, overwrite)
    missing = [patient for patient in patients if not _has_content(out / layout.place(patient))]
    if not missing and _is_complete(out, layout, settings, patients):
        return 0
    with output_errors(out):
        write_bytes(out / MARKER, settings, sync=False)
        for folder in layout.folders:
            (out / folder).mkdir(exist_ok=True)
        _make_videos([(patient, out / layout.place(patient)) for patient in missing], out, progress, processes)
        remove_leftovers(out, *(out / folder for folder in layout.folders))
        write_bytes(out / layout.table, layout.text(patients))
    return len(missing)


def phantom_is_complete(out: Path, videos: int, seed: int, variant: Variant = USUAL) -> bool:
    """Whether `out` holds everything that `write_phantom(out, videos, seed, variant=variant)` writes."""
    layout = LAYOUTS[LVH]
    return _is_complete(out, layout, _settings(videos, seed, layout, variant), plan(videos, seed, variant))


def _is_complete(out: Path, layout: Layout, settings: bytes, patients: Sequence[Patient]) -> bool:
    try:
        if (out / MARKER).read_bytes() != settings:
            return False
    except OSError:
        return False
    return all(_has_content(out / name) for name in (layout.table, *(layout.place(patient) for patient in patients)))


def _settings(videos: int, seed: int, layout: Layout, variant: Variant = USUAL) -> bytes:
    note = "synthetic parasternal long-axis echocardiograms; no patient's data"
    settings = {"phantom": note, "version": VERSION, "videos": videos, "seed": seed, **variant.as_dict()}
    if layout is not LAYOUTS[LVH]:  # the only one of older versions, which do not name it
        settings["table"] = layout.table
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
                f"{printable(out)} holds a phantom with other settings: choose a new folder (of a run: --phantom-dir), "
                f"or replace it: python -m cardiocaps.phantom {printable(out)} … --overwrite"
            )


def _clear(out: Path) -> None:
    """Remove the files of a phantom; raise OutputError, and remove nothing, if there are other files."""
    named = (out / name for layout in LAYOUTS.values() for name in layout.folders)
    folders = [folder for folder in named if folder.is_dir() and not folder.is_symlink()]
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


def _make_videos(missing: Sequence[tuple[Patient, Path]], out: Path, progress: bool, processes: int) -> None:
    def counted(made: Iterable[object]) -> None:
        for _ in shown(made, len(missing), "making videos") if progress else made:
            pass

    processes = min(processes, (len(missing) + 7) // 8)  # starting a process takes as long as several videos
    if processes <= 1:
        counted(map(_make_video, missing))
        return
    pool = partial(ProcessPoolExecutor, processes, get_context("spawn"), die_with_parent)
    try:
        with in_parallel(pool, _make_video, missing) as made:
            counted(made)
    except BrokenProcessPool as error:
        raise OutputError(
            f"{out}: a process that makes videos was killed (out of memory?); run again to go on"
        ) from error


def _make_video(wanted: tuple[Patient, Path]) -> None:
    from cardiocaps.phantom.ultrasound import render

    patient, path = wanted
    images = render(patient)
    with atomic_write(path, sync=False) as part:
        _encode(part, images, patient.scan.fps, patient.scan.effects.quality)


def _encode(path: Path, images: NDArray[np.uint8], fps: int, quality: int) -> None:
    """Grey frames [T, height, width] as Motion JPEG in an AVI file."""
    import av

    _, height, width = images.shape
    with av.open(path, "w", format="avi", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("mjpeg", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuvj420p"
        stream.thread_count = 1
        stream.codec_context.qmin = stream.codec_context.qmax = quality
        planes = np.full((height * 3 // 2, width), 128, np.uint8)  # luma, then grey chroma
        for image in images:
            planes[:height] = image
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuvj420p")))
        container.mux(stream.encode(None))
