"""Calibration of probabilities."""

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.metrics.samples import Floats, Integers, checked_samples


def reliability(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> tuple[Floats, Floats, Integers]:
    """Mean probability [b], observed share of class 1 [b] and number of samples [b] in bins of equal mass.

    Equal probabilities share a bin, so there can be fewer than `bins`.

    Raises:
        ValueError: see `checked_samples`.
    """
    p, y = checked_samples(probability, label)
    member = bins_of_equal_mass(p, bins)
    size = np.bincount(member)
    return np.bincount(member, weights=p) / size, np.bincount(member, weights=y) / size, size.astype(np.int64)


def bins_of_equal_mass(probability: Floats, bins: int = 10) -> Integers:
    """The number [n] of each sample's bin, from 0 on in the order of the probabilities [n], as `reliability` has it."""
    order = np.sort(probability)
    edges = np.unique(order[[probability.size * k // bins for k in range(1, bins)]])
    numbers = np.searchsorted(edges, probability, side="right")
    return np.unique(numbers, return_inverse=True)[1].astype(np.int64)


def expected_calibration_error(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> float:
    """Mean distance between mean probability and observed share in the bins of `reliability`, weighted by their size.

    As in Naeini et al. (2015), but with bins of equal mass.
    """
    predicted, observed, size = reliability(probability, label, bins)
    return float((size * np.abs(predicted - observed)).sum() / size.sum())


def calibration_error_by_chance(probability: ArrayLike, bins: int = 10, draws: int = 200, seed: int = 0) -> float:
    """The mean `expected_calibration_error` if these probabilities were perfectly calibrated.

    Labels are drawn with the probabilities, independently. The error is positive then too, because the shares that are
    observed in bins of few samples vary (Bröcker and Smith, Increasing the Reliability of Reliability Diagrams, 2007).

    Args:
        draws: of all labels.
        seed: of the draws.
    """
    p = np.asarray(probability, np.float64)
    drawn = np.random.default_rng(seed).random((draws, p.size)) < p
    return float(np.mean([expected_calibration_error(p, label.astype(np.int64), bins) for label in drawn]))
