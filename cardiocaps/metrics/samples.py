"""Arrays of samples: their checks, and their means over groups."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def checked_samples(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Integers]:
    """Both arguments as arrays [n].

    Raises:
        ValueError: they are empty, their lengths differ, a probability is outside [0, 1], or a label is not 0 or 1.
    """
    p, y = as_vector(probability, "probability"), as_vector(label, "label")
    if p.size == 0:
        raise ValueError("probability is empty; expected at least one value")
    if p.size != y.size:
        raise ValueError(f"label has length {y.size}; expected the length of probability, {p.size}")
    wrong = ~((p >= 0) & (p <= 1))
    if wrong.any():
        raise ValueError(f"probability is {p[wrong][0]} (at {wrong.argmax()}); expected values in [0, 1]")
    wrong = (y != 0) & (y != 1)
    if wrong.any():
        raise ValueError(f"label is {y[wrong][0]} (at {wrong.argmax()}); expected 0 or 1")
    return p, y.astype(np.int64)


def as_vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; expected numbers of shape [n]")
    return array.astype(np.float64)


def group_index(groups: ArrayLike | None, n: int, name: str = "groups") -> tuple[NDArray[Any], Integers]:
    """The sorted names [g] of the groups and each sample's index [n] into them; None: every sample is a group."""
    array = np.arange(n) if groups is None else np.asarray(groups)
    if array.shape != (n,) or array.dtype.kind not in "iuUS":
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; expected integers or text of length {n}")
    names, index = np.unique(array, return_inverse=True)
    return names, index.astype(np.int64)


def by_video(probability: ArrayLike, label: ArrayLike, clip: ArrayLike) -> tuple[Floats, Integers]:
    """Mean probability and label of each video, in the order of the sorted values of `clip` [n], integers or text.

    Raises:
        ValueError: see `checked_samples`; or the frames of one video have different labels.
    """
    p, y = checked_samples(probability, label)
    names, group = group_index(clip, p.size, name="clip")
    size = np.bincount(group)
    positive = np.bincount(group, weights=y)
    mixed = np.flatnonzero((positive != 0) & (positive != size))
    if mixed.size:
        raise ValueError(f"label differs within clip {names[mixed[0]]}; expected the same for all frames of a clip")
    return np.clip(np.bincount(group, weights=p) / size, 0.0, 1.0), (positive > 0).astype(np.int64)


def mean_by(values: ArrayLike, group: ArrayLike) -> Floats:
    """Mean of `values` [n] over each group, in the order of the sorted values of `group` [n]."""
    numbers = as_vector(values, "values")
    _, index = group_index(group, numbers.size, name="group")
    return np.bincount(index, weights=numbers) / np.bincount(index)
