"""Splits of the videos, or of their frames, into training, validation and test.

If a table names patients, all videos of a patient are in one split. EchoNet-LVH publishes no patients, so there a split
by video is the best that can be guaranteed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from cardiocaps.data.problems import Problem
from cardiocaps.errors import DataError

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


def frame_items(clip_splits: Sequence[str], counts: Sequence[int], seed: int) -> dict[str, NDArray[np.int64]]:
    """The frames of each split.

    Args:
        clip_splits: split of each clip. The frames of all `MIXED` clips are split at random by `PAPER_SHARES`.
        counts: number of frames of each clip.
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
        order = np.random.default_rng(seed).permutation(len(pool))
        for split, part in zip(SPLITS, _cut(order, PAPER_SHARES), strict=True):
            items[split] = pool[np.sort(part)]
    return items


def check_classes(labels: Mapping[str, Sequence[int] | NDArray[np.int64]], what: str = "clips") -> None:
    """Raise DataError unless each split in `labels` holds both classes, which every score needs."""
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
