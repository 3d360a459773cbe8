"""Decisions at a threshold, and its choice."""

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.metrics.samples import Floats, Integers, checked_samples

THRESHOLD = 0.5
"""Abnormal where the probability is above it, unless another threshold is given: l1 / (l0 + l1) > 1/2 is l1 > l0."""


def confusion(probability: ArrayLike, label: ArrayLike, threshold: float = THRESHOLD) -> Integers:
    """Counts [[tn, fp], [fn, tp]]: rows are the true class, columns the predicted one (probability > threshold)."""
    p, y = checked_samples(probability, label)
    return np.bincount(2 * y + (p > threshold), minlength=4).reshape(2, 2).astype(np.int64)


def threshold_counts(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Integers, Integers]:
    """Thresholds [t], true and false positives [t]: predicting 1 where probability ≥ threshold, thresholds
    falling.

    The first is infinite (nothing predicted), the last the smallest probability (everything). The points of
    both curves.
    """
    p, y = checked_samples(probability, label)
    order = np.argsort(-p, kind="stable")
    p, y = p[order], y[order]
    last = last_of_ties(p)
    tp = np.cumsum(y)[last]
    return (
        np.concatenate(([np.inf], p[last])),
        np.concatenate(([0], tp)).astype(np.int64),
        np.concatenate(([0], last + 1 - tp)).astype(np.int64),
    )


def choose_threshold(probability: ArrayLike, label: ArrayLike) -> float:
    """The threshold with the largest Youden index (sensitivity + specificity - 1; Youden 1950) for `probability` [n]
    against `label` [n]: the middle between two neighbouring probabilities, of equally good ones the nearest to 0.5,
    then the smaller. THRESHOLD where all probabilities are equal.

    Raises ValueError as `evaluate`, and where only one class is present.
    """
    p, y = checked_samples(probability, label)
    positives = int(y.sum())
    if positives in (0, y.size):
        raise ValueError(f"label: must hold both classes for a threshold to be chosen, every one is {int(y[0])}")
    falling, tp, fp = threshold_counts(p, y)
    upper, lower = falling[1:-1], falling[2:]
    if not lower.size:
        return THRESHOLD
    middle = lower + (upper - lower) / 2
    middle = np.where(middle < upper, middle, lower)  # between neighbouring floats there is no other
    # The index times the number of samples of each class, in integers, so that ties are exact.
    index = tp[1:-1] * (y.size - positives) - fp[1:-1] * positives
    best = middle[index == index.max()]
    return float(min(best, key=lambda threshold: (abs(threshold - THRESHOLD), threshold)))


def decision_threshold(probability: ArrayLike, label: ArrayLike) -> tuple[float, str | None]:
    """The threshold of a run's decisions from its validation split, as `choose_threshold`; where that has one class
    only, THRESHOLD and the reason. Raises ValueError as `evaluate`."""
    _, y = checked_samples(probability, label)
    if y.min() == y.max():
        return THRESHOLD, f"every validation label is {y[0]}"
    return choose_threshold(probability, label), None


def last_of_ties(sorted_values: Floats) -> Integers:
    return np.append(np.flatnonzero(np.diff(sorted_values)), sorted_values.size - 1)
