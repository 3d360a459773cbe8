"""How well the label can be known at all: the Bayes bound of a phantom, and what a second reader reaches.

The label is the rule applied to a reader's measurements, which err. Nothing in the images says how this reader erred.
So no classifier can do better than to order the patients by the probability of the label given the true lengths:

    P(abnormal) = 1 - product over IVSd, LVIDd, LVPWd of Phi((threshold - length) / (error x length)).

Patients are drawn until their label is the wanted one, which multiplies the odds of all by one factor and keeps their
order. The bound holds in the mean over readers' errors; on the patients of one phantom it is an estimate with an
interval, like the score of a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cardiocaps.errors import ConfigError
from cardiocaps.metrics.classification import Report, evaluate
from cardiocaps.phantom.anatomy import Floats
from cardiocaps.phantom.patients import DECIDING_CALCS, READER_ERROR, THRESHOLDS, Patient
from cardiocaps.phantom.variants import Difficulty, Variant, normal_cdf


@dataclass(frozen=True)
class Ceiling:
    """Two rows for a table of classifiers.

    Attributes:
        bayes: metrics of the probability of the label given the true lengths, the best that any classifier can do.
        second_reader: metrics of another reader, who measures the true lengths with errors of the same size.
    """

    bayes: Report
    second_reader: Report


def ceiling(patients: Sequence[Patient], variant: Variant, *, bootstrap: int = 1000, seed: int = 0) -> Ceiling:
    """The ceiling on these patients, for example those of the test split.

    Args:
        patients: of `plan`, both normal and abnormal ones.
        variant: of the phantom.
        bootstrap: number of resamples for the intervals; 0: no intervals.
        seed: of the second reader's errors and of the resamples.

    Raises:
        ConfigError: as `scores`; or there are no patients of one label.
    """
    of_patients = scores(patients, variant, seed=seed)
    label = np.array([int(patient.abnormal) for patient in patients])
    if len(set(label.tolist())) < 2:
        raise ConfigError(f"ceiling: {len(label)} patients have one label; expected both")
    return Ceiling(*(evaluate(score, label, bootstrap=bootstrap, seed=seed) for score in of_patients))


def scores(patients: Sequence[Patient], variant: Variant, *, seed: int = 0) -> tuple[Floats, Floats]:
    """The probability of the label given the true lengths, and a second reader's score; both [patients], in [0, 1].

    Args:
        patients: of `plan`.
        variant: of the phantom.
        seed: of the second reader's errors.

    Raises:
        ConfigError: the difficulty is easy, where the label follows from the drawn lengths without an error.
    """
    difficulty = variant.difficulty_settings
    if difficulty is None:
        raise ConfigError("ceiling: difficulty is easy; expected moderate or hard: at easy the label has no error")
    rng = np.random.default_rng([seed, 1])
    lengths = [patient.true or {} for patient in patients]
    bayes = np.array([abnormal_probability(cm, difficulty) for cm in lengths])
    return bayes, np.array([_reading(cm, difficulty, rng) for cm in lengths])


def abnormal_probability(lengths: Mapping[str, float], difficulty: Difficulty) -> float:
    """The probability that a reader of these true lengths in cm finds one at or above its threshold."""
    normal = 1.0
    for calc in DECIDING_CALCS:
        cm = lengths[calc]
        normal *= normal_cdf((THRESHOLDS[calc] - cm) / (difficulty.reader * READER_ERROR[calc] * cm))
    return 1 - normal


def _reading(lengths: Mapping[str, float], difficulty: Difficulty, rng: np.random.Generator) -> float:
    """A reader's score in (0, 1), 0.5 on the threshold: the largest share of a threshold that a measurement reaches."""
    errors = rng.standard_normal(len(DECIDING_CALCS)) * difficulty.reader
    share = max(
        lengths[calc] * (1 + READER_ERROR[calc] * error) / THRESHOLDS[calc]
        for calc, error in zip(DECIDING_CALCS, errors, strict=True)
    )
    return float(max(share, 0.0) / (1 + max(share, 0.0)))
