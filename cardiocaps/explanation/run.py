"""Explains what a network says of videos, and writes a row and a picture for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cardiocaps import DISCLAIMER
from cardiocaps.config import read_run
from cardiocaps.data.problems import Problem, summarise
from cardiocaps.errors import DataError, printable
from cardiocaps.explanation.maps import Maps, check_explainable, maps_of, methods_for
from cardiocaps.explanation.picture import draw
from cardiocaps.plots import CLASSES
from cardiocaps.prediction import inputs
from cardiocaps.prediction.ensemble import Ensemble, FrameSettings, Video, load
from cardiocaps.prediction.report import hidden_name
from cardiocaps.prediction.results import Kind, Results
from cardiocaps.prediction.run import scored
from cardiocaps.runtime.device import machine_for
from cardiocaps.runtime.files import atomic_write
from cardiocaps.runtime.program import print_line
from cardiocaps.runtime.quiet import quiet

EXPLANATIONS = Kind("explanations", "explain.json")


def explain(
    run: Path,
    given: Sequence[Path],
    out: Path,
    changed: Mapping[str, Any],
    *,
    methods: Sequence[str] = (),
    explained: str = "decided",
    arrays: bool = False,
    path_column: str | None = None,
    retry: bool = False,
) -> None:
    """Explain every video that has no row in `out` yet, and write its row and its picture.

    Args:
        run: folder of a run.
        given: files, folders and tables, see `inputs.find`.
        out: folder of the results.
        changed: settings that differ from the run's: device, threads, decode_workers, follow_links, progress.
        methods: names of `maps.METHODS`; none: all that the network allows.
        explained: the class: "decided", "normal" or "abnormal".
        arrays: also write the maps of all frames to NAME.npz.
        path_column: of tables.
        retry: try the videos again that could not be read before.

    Raises:
        CardioCapsError: the run, an input or the folder cannot be used; or no video could be read.
    """
    quiet()
    videos = inputs.find(given, path_column)
    with machine_for(replace(read_run(run), **changed)) as machine:
        ensemble = load([run], machine, changed)
        (member,) = ensemble.members
        check_explainable(ensemble)
        config = member.config
        methods = methods_for(member.network.model, methods)
        columns = [
            *("input", "status", "reason", "frames", "frames_used", "probability", "threshold", "decision"),
            *("class", "frame", *(f"{name}_{what}" for name in methods for what in ("sum", "x", "y"))),
            *("picture", "flags"),
        ]
        identity = {"runs": ensemble.identity, "methods": list(methods), "class": explained, "arrays": arrays}
        with Results.opened(out, identity, columns, retry=retry, kind=EXPLANATIONS) as results:
            todo = [video for video in videos if video.name not in results.done]
            if len(todo) < len(videos):
                print_line(f"{len(videos) - len(todo)} of {len(videos)} videos have their rows already")
            unreadable: list[Problem] = []
            for one in scored(ensemble, todo, config, "explaining"):
                row = one.row
                if isinstance(one.found, str):
                    unreadable.append(Problem(one.input.name, one.found))
                else:
                    assert one.found is not None  # it was decoded in this process
                    place = out / hidden_name(one.input.name)
                    row |= _explained(ensemble, one.found, row, one.frames, place, methods, explained, arrays)
                results.write(row)
    read_now = len(todo) - len(unreadable)
    if todo:
        print_line(f"{read_now} videos explained by {', '.join(methods)}; {len(unreadable)} could not be read")
    if unreadable:
        print_line(summarise(unreadable))
    print_line(f"written to {printable(out)}. {DISCLAIMER}")
    if unreadable and not read_now and len(todo) == len(videos):
        raise DataError(f"none of the {len(videos)} videos could be read")


def _explained(
    ensemble: Ensemble,
    video: Video,
    row: Mapping[str, Any],
    frames: Sequence[Mapping[str, Any]],
    path: Path,
    methods: Sequence[str],
    explained: str,
    arrays: bool,
) -> dict[str, Any]:
    """Write the picture and, if wanted, the arrays of a video; return what its row says of them.

    Args:
        path: of the files, without their suffix.
    """
    (member,) = ensemble.members
    seen = video.frames[FrameSettings.of(member.config)]
    label = row["decision"] if explained == "decided" else ("normal", "abnormal").index(explained)
    maps = maps_of(member, ensemble.machine, seen.pixels, label, methods)
    middle = len(seen.numbers) // 2
    probabilities = [frame["probability"] for frame in frames]
    if arrays:
        _write_arrays(path.with_suffix(".npz"), maps, seen.numbers, probabilities, label)
    decided = CLASSES[row["decision"]]
    title = f"{decided}: probability of abnormal {row['probability']:.2f} (threshold {row['threshold']:.2f})"
    title += f"\nexplained: {CLASSES[label]}, frame {seen.numbers[middle]}"
    picture = path.with_suffix(".png")
    draw(
        picture,
        seen.pixels[middle],
        video.aspect,
        {name: values[middle] for name, values in maps.items()},
        title,
        seen.numbers.tolist(),
        probabilities,
        row["threshold"],
    )
    said: dict[str, Any] = {"class": CLASSES[label], "frame": int(seen.numbers[middle]), "picture": picture.name}
    for name, values in maps.items():
        x, y = centre(values[middle])
        said |= {f"{name}_sum": float(values[middle].sum()), f"{name}_x": x, f"{name}_y": y}
    return said


def centre(values: np.ndarray[Any, np.dtype[np.float32]]) -> tuple[float | None, float | None]:
    """The centre of a map's positive mass, as shares of the frame's width and height; None if there is none."""
    mass = np.maximum(values, 0).astype(np.float64)
    if not mass.sum() > 0:
        return None, None
    at = (np.arange(len(mass)) + 0.5) / len(mass)
    return float(mass.sum(0) @ at / mass.sum()), float(mass.sum(1) @ at / mass.sum())


def _write_arrays(path: Path, maps: Maps, numbers: Any, probabilities: Sequence[float], label: int) -> None:
    with atomic_write(path, sync=False) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, frames=numbers, probability=probabilities, label=label, **maps)
