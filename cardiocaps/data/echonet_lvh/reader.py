"""The reader of EchoNet-LVH's layout: `Batch*/NAME.avi` and `MeasurementsList.csv`.

It opens no video. Problems that only decoding shows, such as a truncated file or a table that contradicts its video,
are found when the frames are cached.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from cardiocaps.data import splits
from cardiocaps.data.echonet_lvh.labels import THRESHOLDS, abnormal, teichholz_ef, width_target
from cardiocaps.data.echonet_lvh.measurements import (
    FILE_NAME,
    Row,
    Table,
    paper_rows,
    read_measurements,
)
from cardiocaps.data.header import VideoError
from cardiocaps.data.listing import check_folder, video_file, videos_in
from cardiocaps.data.problems import Problem, refuse_many
from cardiocaps.data.study import Clip, Study
from cardiocaps.data.thresholds import with_given
from cardiocaps.errors import DataError, plural, printable

UNITS = {"width": "cm", "ef": "percentage points"}
"""Regression target -> unit of its errors. Two ejection fractions, in percent, differ by percentage points."""

_THRESHOLD_BOUNDS = (0.01, 100.0)
_UNMEASURED = "no measurement of a type that is used"


def read_folder(
    root: Path | str,
    *,
    protocol: str = "video",
    thresholds: Mapping[str, float] | None = None,
    split: str = "auto",
    seed: int = 10,
    max_bad_share: float = 0.05,
    limit: int | None = None,
    needed_splits: Sequence[str] = splits.SPLITS,
    group_column: str | None = None,
    allow_split_patients: bool = False,
    follow_links: bool = False,
    labels: bool = True,
) -> Study:
    """Read a folder in EchoNet-LVH's layout.

    Args:
        root: holds `MeasurementsList.csv` and the videos (.avi, .mp4 or .dcm), in `Batch*` folders or directly.
        protocol: "video": a clip for each video, abnormal if any of its measurements is. "paper": a clip for each row,
            as in the published code; warns that it leaks.
        thresholds: measurement -> smallest abnormal value in cm, where it differs from THRESHOLDS.
        split: "column" (the table's own), "stratified" (60/20/20 by video, or by patient if the table names patients),
            "auto" ("column" if the table has one, else "stratified"), or "frames" (60/32/8 over the frames of all
            videos; warns that it leaks). The paper protocol splits frames and takes only "auto".
        seed: of the stratified split.
        max_bad_share: largest share of rows, and of videos, that may be unusable.
        limit: the most clips, spread evenly over splits and classes; None: all.
        needed_splits: each of these needs clips of both classes. For evaluation `("test",)` is enough.
        group_column: the table's column that names patients or studies; see `read_measurements`.
        allow_split_patients: keep the table's own split even if videos of one patient are in several splits. Without
            "train" in `needed_splits` it is kept anyway.
        follow_links: the table and the videos may be links that leave the folder.
        labels: False: they are not needed, and the splits are not checked; see `Study.of_target`.

    Raises:
        DataError: folder, table or videos are missing or unusable; a video or (unless allowed) a patient is in two
            splits; or a needed split lacks a class.
        ConfigError: there is no column `group_column`, or no such measurement in `thresholds`.
    """
    root = Path(root)
    thresholds = with_given(THRESHOLDS, thresholds, _THRESHOLD_BOUNDS, "cm")
    found = _find_videos(root)
    table = read_measurements(
        root / FILE_NAME, max_bad_share=max_bad_share, group_column=group_column, follow_links=follow_links
    )
    unlisted = len(found.keys() - table.lines.keys())
    by_name: dict[str, list[Row]] = {name: [] for name in table.lines}
    for row in table.rows:
        by_name[row.name].append(row)
    videos, problems = _locate(root, table, by_name, found, follow_links)
    usable = {name: by_name[name] for name in videos}
    groups = {name: max(row.group for row in rows) for name, rows in usable.items()}
    patients, kind, notes = splits.by_patient(
        groups, table.group_kind, table.group_column, asked=group_column is not None
    )
    notes += [note for name, rows in usable.items() if (note := _backwards(name, rows))]

    split_rule, chosen = "frames", dict.fromkeys(usable, splits.MIXED)
    if protocol == "video":
        has_column = any(row.split for row in table.rows)
        split_rule = split if split != "auto" else "column" if has_column else "stratified"
        if split_rule == "column":
            chosen, unknown = splits.from_column({n: [row.split for row in rows] for n, rows in usable.items()})
            problems += unknown
            # Without training, patients in several splits do no harm: the run's own training data decide.
            if kind and not allow_split_patients and "train" in needed_splits:
                splits.refuse_divided(chosen, patients, FILE_NAME, kind, table.group_column)
        elif split_rule == "stratified":
            label_of = {n: _label(rows, thresholds) for n, rows in usable.items()}
            chosen = splits.stratified(label_of, seed, groups=patients if kind else None)
    if split_rule == "frames":
        splits.warn_of_leak("the paper protocol" if protocol == "paper" else "a split by frame")
    bad = [problem for problem in problems if not problem.harmless]
    refuse_many(bad, len(by_name), max_bad_share, f"videos of {root}")

    if protocol == "paper":
        of_clips = [[row] for row in paper_rows(table.rows, table.total) if row.name in chosen]
    else:
        of_clips = [usable[name] for name in chosen]
    clips = []
    for rows in of_clips:
        name, measurements = rows[0].name, _means(rows)
        diameters = _means(by_name[name])  # of all rows of the video, also in the paper protocol
        targets = {
            "width": rows[0].cm if protocol == "paper" else width_target(measurements),
            "ef": teichholz_ef(diameters.get("LVIDd", math.nan), diameters.get("LVIDs", math.nan)),
        }
        label = _label(rows, thresholds)
        clips.append(Clip(name, videos[name], chosen[name], label, targets, measurements, patients.get(name)))
    clips = [clips[i] for i in splits.thinned([(clip.split, clip.label) for clip in clips], limit)]
    study = Study(
        root=root,
        table=root / FILE_NAME,
        protocol=protocol,
        split_rule=split_rule,
        clips=tuple(clips),
        problems=(*table.problems, *problems, *notes),
        claims={clip.name: table.claims[clip.name] for clip in clips},
        unlisted=unlisted,
        label_rule=dict(thresholds),
        rule=f"smallest abnormal lengths in cm: {', '.join(f'{calc} {cm:g}' for calc, cm in thresholds.items())}",
        units=UNITS,
        needed_splits=tuple(needed_splits),
        group_column=table.group_column if kind else None,
        group_kind=kind,
    )
    if labels:
        study.check_splits()
    return study


def _find_videos(root: Path) -> dict[str, list[Path]]:
    """Video name -> its files, in `root` and in its `Batch*` folders."""
    check_folder(root)
    try:
        found = videos_in([root, *sorted(path for path in root.glob("Batch*") if path.is_dir())])
    except OSError as error:
        raise DataError(f"{printable(root)}: {error.strerror}") from None
    if not found:
        raise DataError(f"{printable(root)}: no .avi, .mp4 or .dcm file, neither directly nor in a Batch* folder")
    return found


def _locate(
    root: Path,
    table: Table,
    by_name: Mapping[str, Sequence[Row]],
    found: Mapping[str, Sequence[Path]],
    follow_links: bool,
) -> tuple[dict[str, Path], list[Problem]]:
    """The real path of each video of the table that has usable rows and exactly one file, and the problems."""
    videos: dict[str, Path] = {}
    names: dict[Path, str] = {}
    problems: list[Problem] = []
    for name, rows in by_name.items():
        paths = found.get(name, ())
        try:
            if name in table.unmeasured:
                raise VideoError(_UNMEASURED)
            if not rows:
                raise VideoError("no usable row in the table")
            if len(paths) == 1 and len({row.group for row in rows} - {0}) > 1:
                raise VideoError(f"its rows name several {plural(table.group_kind)}")
            path = video_file(paths, root, follow_links)
            if path in names:
                raise VideoError(f"a link to the file of another video: {names[path]}")
            videos[name], names[path] = path, name
        except VideoError as error:
            # A name without a file is not shown: the cell may hold anything.
            where = name if paths else f"line {table.lines[name]}"
            problems.append(Problem(where, str(error), harmless=str(error) == _UNMEASURED))
    return videos, problems


def _backwards(name: str, rows: Iterable[Row]) -> Problem | None:
    """A note if the ventricle is larger in systole than in diastole: a wrong or swapped measurement."""
    means = _means(rows)
    diastole, systole = means.get("LVIDd", math.inf), means.get("LVIDs", 0.0)
    if systole <= diastole:
        return None
    detail = f"{systole:.3g} cm and {diastole:.3g} cm"
    return Problem(name, f"LVIDs above LVIDd (kept, without ejection fraction): {detail}", harmless=True)


def _label(rows: Iterable[Row], thresholds: Mapping[str, float]) -> int:
    return int(any(abnormal(row.calc, row.cm, thresholds) for row in rows))


def _means(rows: Iterable[Row]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.calc, []).append(row.cm)
    return {calc: fmean(cms) for calc, cms in values.items()}
