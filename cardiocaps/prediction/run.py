"""Predicts for videos and writes their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cardiocaps import DISCLAIMER
from cardiocaps.config import TrainConfig, read_run
from cardiocaps.data.problems import Problem, summarise
from cardiocaps.errors import DataError, printable
from cardiocaps.evaluation.predictions import unit_of
from cardiocaps.prediction import inputs
from cardiocaps.prediction.ensemble import UNLIKE, Ensemble, Member, Video, load
from cardiocaps.prediction.inputs import Input
from cardiocaps.prediction.report import Illustration, write_pictures, write_report
from cardiocaps.prediction.results import FAILED, OK, Results, write_parquet
from cardiocaps.runtime.device import machine_for
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.processes import cores, in_order
from cardiocaps.runtime.program import print_line
from cardiocaps.runtime.progress import shown
from cardiocaps.runtime.quiet import quiet

_AHEAD = 2
"""Videos that each decoding thread may be ahead of the networks."""


def predict(
    runs: Sequence[Path],
    given: Sequence[Path | str],
    out: Path,
    changed: Mapping[str, Any],
    *,
    on: Callable[[Sequence[Input]], Iterator[Scored]] | None = None,
    path_column: str | None = None,
    by_frame: bool = False,
    report: bool = False,
    illustrated: Callable[[Ensemble], Illustration] | None = None,
    retry: bool = False,
    parquet: bool = False,
) -> None:
    """Predict for every video that has no row in `out` yet, and write its row.

    Args:
        runs: folders of runs; of several, the numbers are means.
        given: files, folders and tables, see `inputs.find`.
        out: folder of the results.
        changed: settings that differ from the runs': device, threads, decode_workers, follow_links, progress.
        on: an engine, which scores videos in any order; None: this process.
        path_column: of tables.
        by_frame: also write `frames.csv`.
        report: also write `report.html`, a picture of each video, and `frames.csv`.
        illustrated: what makes a further picture of each video for the report; None: nothing.
        retry: try the videos again that could not be read before.
        parquet: also write `predictions.parquet`, the same rows, when all are there.

    Raises:
        CardioCapsError: a run, an input or the folder cannot be used; or no video could be read.
    """
    quiet()
    videos = inputs.find(given, path_column)
    if parquet:
        require_package("pyarrow.parquet", "pyarrow", "--parquet", extra="parquet")
    if on is not None:
        changed = {**changed, "device": "cpu"}  # here the networks only say what they are
    config = replace(read_run(runs[0]), **changed)
    with machine_for(config) as machine:
        ensemble = load(runs, machine, changed)
        for member in ensemble.members:
            _warn(member)
        illustration = illustrated(ensemble) if illustrated and report else None
        columns = ("input", "status", "reason", *ensemble.columns)
        frame_columns = ("input", *ensemble.frame_columns) if by_frame or report else ()
        identity = {"runs": ensemble.identity, "by_frame": by_frame, "report": report}
        identity["maps"] = list(illustration.methods) if illustration else None
        with Results.opened(out, identity, columns, frame_columns, retry) as results:
            todo = [video for video in videos if video.name not in results.done]
            if len(todo) < len(videos):
                print_line(f"{len(videos) - len(todo)} of {len(videos)} videos have their rows already")
            found = scored(ensemble, todo, config, "predicting") if on is None else on(todo)
            unreadable, unlike, abnormal = _write_rows(found, results, out if report else None, illustration)
            if report:
                print_line(f"report: {printable(write_report(out, ensemble.target))}")
        if parquet:
            write_parquet(out / "predictions.csv")
    read = len(todo) - len(unreadable)
    if todo:
        decided = "" if ensemble.regresses_alone else f"{abnormal} abnormal at the threshold of validation, "
        print_line(
            f"{read} videos predicted: {decided}{unlike} unlike the training data; {len(unreadable)} could not be read"
        )
    if unreadable:
        print_line(summarise(unreadable))
    print_line(f"written to {printable(out)}. {DISCLAIMER}")
    if unreadable and not read and len(todo) == len(videos):
        raise DataError(f"none of the {len(videos)} videos could be read")


def predictions(runs: Sequence[Path | str], given: Sequence[Path | str], **changed: Any) -> Iterator[dict[str, Any]]:
    """The rows of `python -m cardiocaps.predict` for videos, one after the other; nothing is written.

    Args:
        runs: folders of runs; of several, the numbers are means.
        given: files, folders and tables, see `cardiocaps.prediction.inputs.find`.
        changed: settings that differ from the runs', for example device="cpu".

    Raises:
        CardioCapsError: a run or an input cannot be used.
    """
    paths, videos = [Path(run) for run in runs], inputs.find(list(map(inputs.place, given)))
    changed = {"progress": False, **changed}
    config = replace(read_run(paths[0]), **changed)
    with machine_for(config) as machine:
        for one in scored(load(paths, machine, changed), videos, config, "predicting"):
            yield one.row


@dataclass(frozen=True, eq=False)
class Scored:
    """A video with its row, and the rows of its frames.

    Attributes:
        found: why it could not be read, or what was read of it; None: that is on another machine.
    """

    input: Input
    found: Video | str | None
    row: dict[str, Any]
    frames: list[dict[str, Any]]


def scored(ensemble: Ensemble, videos: Sequence[Input], config: TrainConfig, what: str) -> Iterator[Scored]:
    """Decode videos in threads and score them, in their order; `what` is the step that the progress names."""
    workers = config.decode_workers or cores()
    read = partial(ensemble.read, follow_links=config.follow_links)
    with in_order(partial(ThreadPoolExecutor, workers), read, videos, _AHEAD * workers + ensemble.group) as decoded:
        counted = shown(decoded, len(videos), what) if config.progress else decoded
        for group in _groups(counted, ensemble.group):
            scores = iter(ensemble.score([found for _, found in group if isinstance(found, Video)]))
            for video, found in group:
                if isinstance(found, str):
                    row: dict[str, Any] = {"input": video.name, "status": FAILED, "reason": found}
                    yield Scored(video, found, row, [])
                else:
                    row, frames = next(scores)
                    named = [{"input": video.name, **frame} for frame in frames]
                    yield Scored(video, found, {"input": video.name, "status": OK, **row}, named)


def _write_rows(
    scored: Iterator[Scored], results: Results, pictures: Path | None, illustration: Illustration | None
) -> tuple[list[Problem], int, int]:
    """Write the rows, and pictures into a folder if there is one.

    Returns:
        The videos that could not be read, and how many are unlike the training data and abnormal.
    """
    unreadable: list[Problem] = []
    unlike = abnormal = 0
    for one in scored:
        if isinstance(one.found, str):
            unreadable.append(Problem(one.input.name, one.found))
        else:
            unlike += UNLIKE in one.row["flags"].split()
            abnormal += one.row.get("decision", 0)
            if pictures is not None and one.found is not None:
                write_pictures(pictures, one.input.name, one.found, one.row, illustration)
        results.write(one.row, one.frames)
    return unreadable, unlike, abnormal


def _groups(decoded: Iterator[tuple[Input, Video | str]], size: int) -> Iterator[list[tuple[Input, Video | str]]]:
    """Groups that hold `size` videos that could be read; the last may hold fewer."""
    group: list[tuple[Input, Video | str]] = []
    for one in decoded:
        group.append(one)
        if sum(isinstance(found, Video) for _, found in group) == size:
            yield group
            group = []
    if group:
        yield group


def _warn(member: Member) -> None:
    """Say what a run lacks."""
    name = printable(member.name)
    decides = member.config.task != "regression"
    if decides and not member.decision.is_chosen:
        print_line(f"note: {name}: the threshold is {member.decision.rule}")
    if decides and member.calibration.method == "none":
        print_line(f"note: {name} keeps no calibration: calibrated_probability is the network's own")
    if member.familiarity is None:
        why = "its network has no decoder, or it was trained by an older version"
        if unit_of(member.config) == "frame":
            why = "its frames were split, so no validation video was new to it"
        print_line(f"note: {name} cannot tell videos that are unlike its data: {why}")
