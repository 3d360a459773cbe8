"""Splits of the videos, or of their frames, into training, validation and test.

If a table names patients, all videos of a patient are in one split. EchoNet-LVH publishes no patients, so there a split
by video is the best that can be guaranteed.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cardiocaps.data.problems import Problem
from cardiocaps.errors import DataError, plural

SPLITS = ("train", "val", "test")
MIXED = "mixed"  # the frames of such a clip are spread over all three splits
SHARES = (0.6, 0.2, 0.2)

# Shares of the published code: training, validation, test.
PAPER_SHARES = (0.6, 0.32, 0.08)

_COLUMN_VALUES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def from_column(cells: Mapping[str, Iterable[str]]) -> tuple[dict[str, str], list[Problem]]:
    """The split of each video as a column of the table gives it.

    Args:
        cells: video -> the cells of its rows in lower case; blank ones are ignored.

    Returns:
        video -> split, and a problem for each video without a known split.

    Raises:
        DataError: the rows of a video name two splits, which would put its frames into both.
    """
    chosen: dict[str, str] = {}
    problems: list[Problem] = []
    for name, texts in cells.items():
        given = {_COLUMN_VALUES.get(text, "") for text in texts if text}
        if len(given - {""}) > 1:
            raise DataError(f"video {name} stands in the splits {' and '.join(sorted(given - {''}))} at once")
        if not given or "" in given:
            problems.append(
                Problem(name, f"split {'blank' if not given else 'unknown'}: allowed are {', '.join(SPLITS)}")
            )
        else:
            chosen[name] = given.pop()
    return chosen, problems


def stratified(
    labels: Mapping[str, int], seed: int, shares: Sequence[float] = SHARES, groups: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A random split with the same shares in each class. It does not depend on the order of the videos.

    Args:
        labels: video -> label.
        seed: of the random numbers.
        shares: of training, validation and test.
        groups: video -> patient. Patients are then split instead, each with all of their videos; a patient is abnormal
            if any of the videos is.

    Returns:
        video -> split.
    """
    if groups is not None:
        first: dict[str, str] = {}  # patient -> first video, which identifies the patient: keys differ between tables
        whole: dict[str, int] = {}
        for name in sorted(labels):
            known = first.setdefault(groups[name], name)
            whole[known] = max(whole.get(known, 0), labels[name])
        dealt = stratified(whole, seed, shares)
        return {name: dealt[first[groups[name]]] for name in labels}
    chosen: dict[str, str] = {}
    for label in sorted(set(labels.values())):
        names = sorted(name for name, other in labels.items() if other == label)
        order = np.random.default_rng([seed, label]).permutation(len(names))
        for split, part in zip(SPLITS, _cut(order, shares), strict=True):
            chosen |= {names[i]: split for i in part}
    return chosen


def divided(chosen: Mapping[str, str], groups: Mapping[str, str]) -> list[tuple[str, str]]:
    """Two videos of each patient (`groups`: video -> patient) whose videos are in several splits."""
    first: dict[str, str] = {}
    apart: dict[str, tuple[str, str]] = {}
    for name, split in chosen.items():
        other = first.setdefault(groups[name], name)
        if chosen[other] != split:
            apart.setdefault(groups[name], (other, name))
    return list(apart.values())


def refuse_divided(
    chosen: Mapping[str, str], patients: Mapping[str, str], file: str, kind: str, column: str | None
) -> None:
    """Raise DataError if a table's own split puts videos of one patient into different splits.

    Args:
        chosen: video -> split.
        patients: video -> patient.
        file: the table's name.
        kind: what `column` names, "patient" or "study".
        column: of the table, with the patients.
    """
    apart = divided(chosen, patients)
    if not apart:
        return
    one, other = apart[0]
    kinds = plural(kind)
    total = len({patients[name] for name in chosen})
    raise DataError(
        f"{file}: its split divides {len(apart)} of {total} {kinds} (column {column}), as one with the videos {one} in "
        f"{chosen[one]} and {other} in {chosen[other]}; --split stratified keeps the {kinds} whole, "
        "--allow-split-patients takes the split as it is"
    )


def by_patient(
    groups: Mapping[str, Hashable], kind: str, column: str | None, *, asked: bool
) -> tuple[dict[str, str], str, list[Problem]]:
    """Group the videos by patient or study.

    A video without a patient counts as a patient of its own. A column that was not `asked` for is not used if it has
    the same value for all videos.

    Args:
        groups: video -> what the column says; a false value: nothing.
        kind: what the column names, "patient" or "study".
        column: its name; None: there is none.
        asked: the user named the column.

    Returns:
        video -> key of its patient or study; what the column names, "" if it is not used; notes.
    """
    if column is None:
        return {}, "", []
    where = f"column {column}"
    if len(set(groups.values())) < 2 and not asked:
        return {}, "", [Problem(where, "not used, for it says the same of all videos", harmless=True)]
    numbers: dict[Hashable, int] = {}
    patients = {
        name: f"{kind} {numbers.setdefault(group, len(numbers))}" if group else f"video {i}"
        for i, (name, group) in enumerate(groups.items())
    }
    alone = sum(not group for group in groups.values())
    note = f"{alone} of {len(groups)} videos name no {kind}; each counts as one of its own"
    return patients, kind, [Problem(where, note, harmless=True)] if alone else []


def thinned(kinds: Sequence[Hashable], limit: int | None) -> list[int]:
    """The indices of at most `limit` items, so that each of the `kinds` keeps its share, and at least one item.

    Args:
        kinds: of each item, such as its split and class.
        limit: None: all.
    """
    if limit is None or limit >= len(kinds):
        return list(range(len(kinds)))
    groups: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(i)
    place = {i: rank / len(group) for group in groups.values() for rank, i in enumerate(group)}
    return sorted(sorted(place, key=lambda i: (place[i], i))[:limit])


def warn_of_leak(what: str) -> None:
    """Warn that `what`, a protocol or a split, puts frames of one video into training and test."""
    advice = "its scores are too good, use it only to compare with the published figures"
    warnings.warn(f"{what} leaks: frames of one video land in training and in test; {advice}", stacklevel=3)


def frame_items(
    clip_splits: Sequence[str], counts: Sequence[int], labels: Sequence[int], seed: int
) -> dict[str, NDArray[np.int64]]:
    """The frames of each split.

    Args:
        clip_splits: split of each clip. The frames of all `MIXED` clips are split at random by `PAPER_SHARES`, in each
            class by itself, as the published code does.
        counts: number of frames of each clip.
        labels: of each clip.
        seed: of the random numbers.

    Returns:
        split -> int64 [n, 2], rows (clip, frame). Clips are counted within their split; `MIXED` clips are in each.
    """
    items: dict[str, NDArray[np.int64]] = {}
    for split in (*SPLITS, MIXED):
        own = [count for clip, count in zip(clip_splits, counts, strict=True) if clip == split]
        pairs = [(clip, frame) for clip, count in enumerate(own) for frame in range(count)]
        items[split] = np.array(pairs, np.int64).reshape(-1, 2)
    pool = items.pop(MIXED)
    if len(pool):
        mixed = np.array([label for clip, label in zip(clip_splits, labels, strict=True) if clip == MIXED])
        label = mixed[pool[:, 0]]
        dealt: dict[str, list[NDArray[np.int64]]] = {split: [] for split in SPLITS}
        for value in np.unique(label).tolist():
            members = np.flatnonzero(label == value)
            order = np.random.default_rng([seed, value]).permutation(members)
            for split, part in zip(SPLITS, _cut(order, PAPER_SHARES), strict=True):
                dealt[split].append(part)
        items |= {split: pool[np.sort(np.concatenate(parts))] for split, parts in dealt.items()}
    return items


def check(labels: Mapping[str, Sequence[int] | NDArray[np.int64]], what: str, classes: bool = True) -> None:
    """Raise DataError unless each split in `labels` holds both classes, which every score of them needs.

    Args:
        labels: split -> the labels of its clips or frames.
        what: "clips" or "frames".
        classes: False: it is enough that the split holds some.
    """
    if not classes:
        empty = [split for split, values in labels.items() if not len(values)]
        if empty:
            raise DataError(f"each split needs {what} with a target, this data has none in {' and in '.join(empty)}")
        return
    counts = {split: [int(np.sum(np.asarray(values) == c)) for c in (0, 1)] for split, values in labels.items()}
    if any(min(count) == 0 for count in counts.values()):
        table = "; ".join(f"{split}: {normal} normal, {high} abnormal" for split, (normal, high) in counts.items())
        raise DataError(f"each split needs {what} of both classes, this data has {table}")


def _cut(order: NDArray[np.int64], shares: Sequence[float]) -> list[NDArray[np.int64]]:
    """Three parts in these shares. None is empty if there are at least three items."""
    n = len(order)
    sizes = [int(share * n) for share in shares]
    sizes = [max(size, 1) for size in sizes] if n >= len(shares) else sizes
    sizes[0] = n - sum(sizes[1:])
    first, second = sizes[0], sizes[0] + sizes[1]
    return [order[:first], order[first:second], order[second:]]
