"""Decisions at a threshold, and the choice of the threshold."""

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.metrics.samples import Floats, Integers, checked_samples

THRESHOLD = 0.5
"""The default threshold: abnormal means a probability above it. In capsule lengths, l1 / (l0 + l1) > 1/2 is l1 > l0."""


def confusion(probability: ArrayLike, label: ArrayLike, threshold: float = THRESHOLD) -> Integers:
    """Counts [[tn, fp], [fn, tp]]: rows are the true class, columns the predicted one (probability > threshold)."""
    p, y = checked_samples(probability, label)
    return np.bincount(2 * y + (p > threshold), minlength=4).reshape(2, 2).astype(np.int64)


def threshold_counts(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Integers, Integers]:
    """Thresholds [t] in falling order, and the true and false positives [t] of the rule probability ≥ threshold.

    These are the points of the ROC curve and the precision-recall curve. The first threshold is infinite, with no
    prediction of 1; the last is the smallest probability, with no prediction of 0.
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


def decision_threshold(probability: ArrayLike, label: ArrayLike) -> tuple[float, str | None]:
    """The threshold with the largest Youden index (sensitivity + specificity - 1; Youden 1950).

    Candidates are the midpoints between neighbouring probabilities. Of equally good ones, the nearest to 0.5 is
    chosen, then the smaller one. If all probabilities are equal, the result is THRESHOLD.

    Args:
        probability: [n] of class 1, of a validation split.
        label: [n], 0 or 1.

    Returns:
        The threshold and None; or THRESHOLD and the reason, if there is one class only.

    Raises:
        ValueError: see `checked_samples`.
    """
    p, y = checked_samples(probability, label)
    positives = int(y.sum())
    if positives in (0, y.size):
        return THRESHOLD, f"every validation label is {y[0]}"
    falling, tp, fp = threshold_counts(p, y)
    upper, lower = falling[1:-1], falling[2:]
    if not lower.size:
        return THRESHOLD, None
    middle = lower + (upper - lower) / 2
    middle = np.where(middle < upper, middle, lower)  # there is no number between neighbouring floats
    # The index times the numbers of positives and negatives is an integer, so ties are found exactly.
    index = tp[1:-1] * (y.size - positives) - fp[1:-1] * positives
    best = middle[index == index.max()]
    return float(min(best, key=lambda threshold: (abs(threshold - THRESHOLD), threshold))), None


def last_of_ties(sorted_values: Floats) -> Integers:
    """The last position of each run of equal values."""
    return np.append(np.flatnonzero(np.diff(sorted_values)), sorted_values.size - 1)
