"""A folder in EchoNet-LVH's layout: ``Batch*/NAME.avi`` and ``MeasurementsList.csv``.

Reading it opens no video: what only decoding shows (a truncated file, a table that disagrees with its
video) is found when the frames are cached.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from cardiocaps.data import splits
from cardiocaps.data.labels import THRESHOLDS, abnormal, check_thresholds, teichholz_ef, width_target
from cardiocaps.data.measurements import (
    FILE_NAME,
    SUFFIXES,
    Problem,
    Row,
    read_measurements,
    refuse_many,
    summarise,
)
from cardiocaps.data.video import Header, VideoError, regular_file
from cardiocaps.errors import ConfigError, DataError

PROTOCOLS = ("video", "paper")
SPLIT_RULES = ("auto", "column", "stratified", "frames")


@dataclass(frozen=True)
class Clip:
    """One video (protocol ``video``) or one measurement row (protocol ``paper``)."""

    name: str
    path: Path
    split: str  # "train", "val", "test"; "mixed" in the paper protocol, which splits frames
    label: int  # 1 = abnormal
    width: float  # cm; NaN where not measured
    ef: float  # percent (Teichholz); NaN where not measured
    measurements: Mapping[str, float]  # Calc -> cm, the mean where measured on several frames
    # The same key, made up for this study, for videos of one patient; None where the table names no patients. To be
    # counted and drawn by, never to be shown or written.
    patient: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Study:
    """The usable clips of a folder, and what was left out and why."""

    root: Path
    protocol: str
    split_rule: str  # "column", "stratified" or "frames"
    clips: tuple[Clip, ...]
    problems: tuple[Problem, ...]
    claims: Mapping[str, Header]  # video name -> what the table says about the video
    unlisted: int  # videos in the folder that the table does not name
    label_rule: Mapping[str, float]  # Calc -> smallest abnormal value in cm, of every type
    needed_splits: tuple[str, ...] = splits.SPLITS  # those without which the study is of no use

    def clips_in(self, split: str) -> tuple[Clip, ...]:
        """The clips that have frames in a split, in the order that a batch's ``clip`` counts them."""
        if split not in splits.SPLITS:
            raise ConfigError(f"split must be one of {', '.join(splits.SPLITS)}, got {split!r}")
        return tuple(clip for clip in self.clips if clip.split in (split, splits.MIXED))

    def check_splits(self) -> None:
        """Raise DataError unless each needed split (all clips, in the paper protocol) has clips of both classes."""
        splits.check_classes({s: [clip.label for clip in self.clips_in(s)] for s in self.needed_splits})

    def summary(self) -> str:
        """A few lines of text: clips and abnormal ones per split, problems by kind."""
        rule = {
            "column": "by video, the table's own column",
            "stratified": "by video, drawn at random in each class",
            "frames": "over frames: it leaks",
        }[self.split_rule]
        lines = [f"{len(self.clips)} clips, protocol {self.protocol}, split {rule}"]
        for split in splits.SPLITS if self.split_rule != "frames" else ():
            labels = [clip.label for clip in self.clips_in(split)]
            lines.append(f"  {split:5s} {len(labels):6d} clips, {sum(labels)} abnormal")
        if self.split_rule == "frames":
            lines.append(f"  all   {len(self.clips):6d} clips, {sum(clip.label for clip in self.clips)} abnormal")
        else:
            lines.append("  (the table names no patients: videos of one patient may stand in different splits)")
        if self.unlisted:
            lines.append(f"videos in the folder that the table does not name: {self.unlisted}")
        if self.problems:
            lines += [f"{len(self.problems)} problems:", summarise(self.problems)]
        return "\n".join(lines)


def read_folder(
    root: Path | str,
    *,
    protocol: str = "video",
    thresholds: Mapping[str, float] = THRESHOLDS,
    split: str = "auto",
    seed: int = 10,
    max_bad_share: float = 0.05,
    limit: int | None = None,
    needed_splits: Sequence[str] = splits.SPLITS,
) -> Study:
    """Read a folder in EchoNet-LVH's layout.

    Args:
        root: holds ``MeasurementsList.csv`` and the videos, in ``Batch*`` folders or directly, .avi or .mp4.
        protocol: ``video``: a clip per video, abnormal where any measurement is. ``paper``: a clip per row,
            as the published code did; warns that it leaks.
        thresholds: measurement -> smallest abnormal value in cm.
        split: ``column`` (the table's own), ``stratified`` (60/20/20 by video), ``auto`` (the first where
            there is one), ``frames`` (60/32/8 over the frames of all videos; warns that it leaks). The paper
            protocol splits frames and takes only ``auto``.
        seed: of the stratified split.
        max_bad_share: largest share of rows, and of videos, that may be unusable.
        limit: at most so many clips, evenly over splits and classes.
        needed_splits: each of these needs clips of both classes; for evaluation alone, ``("test",)``.

    Raises:
        DataError: folder, table or videos missing or unusable, a video in two splits, a needed split without
            both classes.
        ConfigError: an argument that is not allowed.
    """
    root = Path(root)
    if protocol not in PROTOCOLS:
        raise ConfigError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if split not in SPLIT_RULES:
        raise ConfigError(f"split must be one of {', '.join(SPLIT_RULES)}, got {split!r}")
    if protocol == "paper" and split != "auto":
        raise ConfigError(f"split must be auto in the paper protocol, which splits frames, got {split!r}")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}")
    if not needed_splits or not set(needed_splits) <= set(splits.SPLITS):
        raise ConfigError(f"needed_splits must name some of {', '.join(splits.SPLITS)}, got {tuple(needed_splits)!r}")
    check_thresholds(thresholds)

    found = _find_videos(root)
    table = read_measurements(root / FILE_NAME, max_bad_share=max_bad_share)
    unlisted = len(set(found) - set(table.names))
    by_name: dict[str, list[Row]] = {name: [] for name in table.names}
    for row in table.rows:
        by_name[row.name].append(row)
    videos, problems = _locate(root, by_name, found)
    usable = {name: by_name[name] for name in videos}

    split_rule, chosen = "frames", dict.fromkeys(usable, splits.MIXED)
    if protocol == "video":
        has_column = any(row.split for row in table.rows)
        split_rule = split if split != "auto" else "column" if has_column else "stratified"
        if split_rule == "column":
            chosen, unknown = splits.from_column({n: [row.split for row in rows] for n, rows in usable.items()})
            problems += unknown
        elif split_rule == "stratified":
            chosen = splits.stratified({n: _label(rows, thresholds) for n, rows in usable.items()}, seed)
    if split_rule == "frames":
        splits.warn_of_leak("the paper protocol" if protocol == "paper" else "a split by frame")
    refuse_many(len(problems), len(by_name), max_bad_share, f"videos of {root}", problems)

    if protocol == "paper":
        groups = [[row] for row in splits.paper_rows(table.rows, table.total) if row.name in chosen]
    else:
        groups = [usable[name] for name in chosen]
    clips = [
        _clip(rows, videos[rows[0].name], chosen[rows[0].name], protocol, by_name[rows[0].name], thresholds)
        for rows in groups
    ]
    if limit is not None and limit < len(clips):
        clips = _thinned(clips, limit)
    study = Study(
        root=root,
        protocol=protocol,
        split_rule=split_rule,
        clips=tuple(clips),
        problems=(*table.problems, *problems),
        claims={clip.name: by_name[clip.name][0].claim for clip in clips},
        unlisted=unlisted,
        label_rule=dict(thresholds),
        needed_splits=tuple(needed_splits),
    )
    study.check_splits()
    return study


def _find_videos(root: Path) -> dict[str, list[Path]]:
    """Video name -> its files, in ``root`` and in its ``Batch*`` folders."""
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        address = " (addresses are not read)" if re.match(r"\w+:/", str(root)) else ""
        raise DataError(f"{root}: {what}{address}")
    found: dict[str, list[Path]] = {}
    try:
        folders = [root, *sorted(path for path in root.glob("Batch*") if path.is_dir())]
        for folder in folders:
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() in SUFFIXES:
                    found.setdefault(path.stem, []).append(path)
        empty = next(root.iterdir(), None) is None
    except OSError as error:
        raise DataError(f"{root}: {error.strerror}") from None
    if empty:
        raise DataError(f"{root}: the folder is empty")
    if not (root / FILE_NAME).exists():
        raise DataError(f"{root}: no {FILE_NAME}")
    if not found:
        raise DataError(f"{root}: no .avi or .mp4 file, neither directly nor in a Batch* folder")
    return found


def _locate(
    root: Path, by_name: Mapping[str, Sequence[Row]], found: Mapping[str, Sequence[Path]]
) -> tuple[dict[str, Path], list[Problem]]:
    """The real path of each video in the table that has usable rows and one plausible file."""
    videos: dict[str, Path] = {}
    problems: list[Problem] = []
    for name, rows in by_name.items():
        paths = found.get(name, ())
        try:
            if not rows:
                raise VideoError("no usable row in the table")
            if len(paths) != 1:
                raise VideoError(f"several files: {len(paths)} of this name" if paths else "no video file")
            videos[name] = regular_file(paths[0], root)
        except VideoError as error:
            problems.append(Problem(name, str(error)))
    return videos, problems


def _clip(
    rows: Sequence[Row],
    path: Path,
    split: str,
    protocol: str,
    of_video: Iterable[Row],
    thresholds: Mapping[str, float],
) -> Clip:
    """A clip from its rows; the ejection fraction may need another row of the same video."""
    measurements, all_measurements = _means(rows), _means(of_video)
    return Clip(
        name=rows[0].name,
        path=path,
        split=split,
        label=_label(rows, thresholds),
        width=rows[0].cm if protocol == "paper" else width_target(measurements),
        ef=teichholz_ef(*(all_measurements.get(calc, float("nan")) for calc in ("LVIDd", "LVIDs"))),
        measurements=measurements,
    )


def _label(rows: Iterable[Row], thresholds: Mapping[str, float]) -> int:
    return int(any(abnormal(row.calc, row.cm, thresholds) for row in rows))


def _means(rows: Iterable[Row]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for row in rows:
        values.setdefault(row.calc, []).append(row.cm)
    return {calc: fmean(cms) for calc, cms in values.items()}


def _thinned(clips: Sequence[Clip], limit: int) -> list[Clip]:
    """The first ``limit`` clips, dealt out so that each split and class keeps its share, and one at least."""
    groups: dict[tuple[str, int], list[int]] = {}
    for i, clip in enumerate(clips):
        groups.setdefault((clip.split, clip.label), []).append(i)
    place = {i: rank / len(group) for group in groups.values() for rank, i in enumerate(group)}
    return [clips[i] for i in sorted(sorted(place, key=lambda i: (place[i], i))[:limit])]
