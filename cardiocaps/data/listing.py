"""Tables with a row for each video: from their rows to a study.

A reader of such a table makes an `Item` of each row, and `make_study` does the rest: repeated rows, splits, patients.
Messages call a video by its line, because names of files may say who the patient is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cardiocaps.data import splits
from cardiocaps.data.cells import LINES_NAMED, SUFFIXES, RowError, plain_name
from cardiocaps.data.header import Header, VideoError
from cardiocaps.data.problems import Problem, refuse_many
from cardiocaps.data.study import Clip, Study
from cardiocaps.data.video import regular_file
from cardiocaps.errors import ConfigError, DataError, printable


@dataclass(frozen=True)
class Item:
    """A usable row: a video, and what the table says about it."""

    where: str  # its line, as messages call it
    name: str
    path: Path
    label: int
    targets: Mapping[str, float]
    claim: Header
    split: str = ""  # "" if the cell is blank, or without the column
    group: str = ""  # patient or study, likewise
    note: str = ""  # what is noted about the row, which is kept


@dataclass(frozen=True)
class Listing:
    """The rows of a table: those that can be used, and what was left out."""

    table: Path
    items: tuple[Item, ...]
    problems: tuple[Problem, ...]
    total: int  # rows
    has_splits: bool  # whether it has a column of splits
    group_column: str | None = None  # the column that names patients or studies
    group_kind: str = ""  # "patient" or "study"; "" without such a column


def read_rows(
    table: Path,
    rows: Iterable[tuple[str, Sequence[str]]],
    width: int,
    item: Callable[[str, Sequence[str]], Item],
    *,
    has_splits: bool,
    group_column: str | None,
    group_kind: str,
) -> Listing:
    """Make an item of each row.

    Args:
        table: the file.
        rows: where each row stands, and its cells; blank lines have none.
        width: number of cells that each row must have.
        item: makes the item of a row from the same. It raises RowError, or VideoError about the video's file.
        has_splits: see `Listing`.
        group_column: likewise.
        group_kind: likewise.

    Raises:
        DataError: the table has no rows.
    """
    items: list[Item] = []
    problems: list[Problem] = []
    total = 0
    for where, cells in rows:
        if not cells:
            continue
        total += 1
        try:
            if len(cells) != width:
                raise RowError(f"wrong number of fields: {len(cells)} (the header has {width})")
            items.append(item(where, cells))
        except RowError as error:
            problems.append(Problem(where, str(error), error.harmless))
        except VideoError as error:
            problems.append(Problem(where, str(error)))
    if not total:
        raise DataError(f"{printable(table.name)}: a header and no rows")
    usable, repeated = _without_repeats(items)
    return Listing(table, tuple(usable), (*problems, *repeated), total, has_splits, group_column, group_kind)


def _without_repeats(items: Sequence[Item]) -> tuple[list[Item], list[Problem]]:
    """The items without rows of the same video, and a problem for each of these.

    Of equal rows the first is kept, so the others are harmless. Of rows that contradict each other none is kept.
    """
    by_path: dict[Path, list[Item]] = {}
    for item in items:
        by_path.setdefault(item.path, []).append(item)
    usable: list[Item] = []
    problems: list[Problem] = []
    for same in by_path.values():
        stated = {(i.label, repr(sorted(i.targets.items())), i.split, i.group, i.claim) for i in same}
        if len(stated) == 1:
            usable.append(same[0])
            problems += [Problem(i.where, f"duplicate row: as {same[0].where}", harmless=True) for i in same[1:]]
        else:
            named = ", ".join(i.where for i in same[:LINES_NAMED])
            more = f" and {len(same) - LINES_NAMED} more" if len(same) > LINES_NAMED else ""
            reason = f"rows of one video contradict each other: {named}{more}"
            problems += [Problem(i.where, reason) for i in same]
    return usable, problems


def make_study(
    root: Path,
    listings: Sequence[Listing],
    *,
    label_rule: Mapping[str, float],
    rule: str,
    units: Mapping[str, str],
    unlisted: int = 0,
    note: str = "",
    split: str = "auto",
    seed: int = 10,
    max_bad_share: float = 0.05,
    limit: int | None = None,
    needed_splits: Sequence[str] = splits.SPLITS,
    group_column: str | None = None,
    allow_split_patients: bool = False,
    labels: bool = True,
) -> Study:
    """The study of one table or several.

    Args:
        root: the folder.
        listings: the tables; their videos have different names. All have a column of splits, or none.
        label_rule: see `Study`.
        rule: see `Study`.
        units: see `Study`.
        unlisted: see `Study`.
        note: advice that the error about too many bad rows ends with.
        split: "column" (the table's own), "stratified" (60/20/20 by video, or by patient if the table names patients),
            "auto" ("column" if the table has one, else "stratified"), or "frames" (60/32/8 over the frames of all
            videos; warns that it leaks).
        seed: of the stratified split.
        max_bad_share: largest share of rows that may be unusable.
        limit: the most clips, spread evenly over splits and classes; None: all.
        needed_splits: each of these needs clips of both classes. For evaluation `("test",)` is enough.
        group_column: the column of patients that was asked for.
        allow_split_patients: keep the table's own split even if videos of one patient are in several splits. Without
            "train" in `needed_splits` it is kept anyway.
        labels: False: they are not needed, and the splits are not checked; see `Study.of_target`.

    Raises:
        DataError: too many rows are bad, or none is left; a patient is in two splits (unless allowed); or a needed
            split lacks a class.
        ConfigError: the tables have no column of splits, which was asked for.
    """
    first = listings[0]
    file = printable(first.table.name)
    by_name = {item.name: item for listing in listings for item in listing.items}
    problems = [problem for listing in listings for problem in listing.problems]
    notes = [Problem(item.where, item.note, harmless=True) for item in by_name.values() if item.note]
    patients, kind, of_patients = splits.by_patient(
        {name: item.group for name, item in by_name.items()},
        first.group_kind,
        first.group_column,
        asked=group_column is not None,
    )
    split_rule = split if split != "auto" else "column" if first.has_splits else "stratified"
    if split_rule == "column":
        if not first.has_splits:
            raise ConfigError(f"split is 'column'; expected auto or stratified, because {file} has no column of splits")
        at = {item.where: item for item in by_name.values()}
        said, unknown = splits.from_column({where: [item.split] for where, item in at.items()})
        problems += unknown
        # Without training, patients in several splits do no harm: the run's own training data decide.
        if kind and not allow_split_patients and "train" in needed_splits:
            of = {where: patients[item.name] for where, item in at.items()}
            splits.refuse_divided(said, of, file, kind, first.group_column)
        chosen = {at[where].name: s for where, s in said.items()}
    elif split_rule == "stratified":
        label_of = {name: item.label for name, item in by_name.items()}
        chosen = splits.stratified(label_of, seed, groups=patients if kind else None)
    else:
        splits.warn_of_leak("a split by frame")
        chosen = dict.fromkeys(by_name, splits.MIXED)
    bad = [problem for problem in problems if not problem.harmless]
    total = sum(listing.total for listing in listings)
    refuse_many(bad, total, max_bad_share, f"rows of {file}", note)
    clips = [
        Clip(
            name,
            item.path,
            chosen[name],
            item.label,
            item.targets,
            item.targets,
            patients.get(name),
            shown_as=item.where,
        )
        for name, item in by_name.items()
        if name in chosen
    ]
    if not clips:
        why = f"; the first: {problems[0].where}: {problems[0].reason}" if problems else ""
        raise DataError(f"{file}: none of its {total} rows can be used{why}")
    clips = [clips[i] for i in splits.thinned([(clip.split, clip.label) for clip in clips], limit)]
    study = Study(
        root=root,
        table=first.table,
        protocol="video",
        split_rule=split_rule,
        clips=tuple(clips),
        problems=(*problems, *of_patients, *notes),
        claims={clip.name: by_name[clip.name].claim for clip in clips},
        unlisted=unlisted,
        label_rule=dict(label_rule),
        units=units,
        rule=rule,
        further_tables=tuple(listing.table for listing in listings[1:]),
        needed_splits=tuple(needed_splits),
        group_column=first.group_column if kind else None,
        group_kind=kind,
    )
    if labels:
        study.check_splits()
    return study


def check_folder(folder: Path) -> None:
    """Raise DataError unless a path leads to a folder."""
    try:
        if folder.is_dir():
            return
        what = "not a folder" if folder.exists() else "no such folder"
    except OSError as error:
        what = error.strerror or "not readable"
    address = " (addresses are not read)" if re.match(r"\w+:/", str(folder)) else ""
    raise DataError(f"{printable(folder)}: {what}{address}")


def videos_in(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Name of a video, without suffix -> its files in these folders. Raises OSError."""
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.suffix.lower() in SUFFIXES:
                found.setdefault(plain_name(path.stem), []).append(path)
    return found


def video_file(paths: Sequence[Path], root: Path, follow_links: bool) -> Path:
    """The real path of a video, of the files that have its name. Raises VideoError unless it is exactly one."""
    if len(paths) != 1:
        raise VideoError(f"several files: {len(paths)} of this name" if paths else "no video file")
    return regular_file(paths[0], root, follow_links)


def numbered(rows: Iterator[tuple[int, list[str]]], before: str = "") -> Iterator[tuple[str, list[str]]]:
    """The rows of a CSV table with their lines as messages call them, `before` in front."""
    return ((f"{before}line {line}", cells) for line, cells in rows)
