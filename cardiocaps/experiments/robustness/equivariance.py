"""How features of a network change with the angle of the heart: change, linear equivariance, and the angle in them.

For the features f(θ) of a patient whose heart is turned by θ:

* change: the cosine distance of f(θ) and f(0), divided by the median distance of two patients at 0. An invariant
  network has 0; 1 is as far as from one patient to the next.
* map: R² of a linear map f(0) -> f(θ) on patients that it was not fitted to, against predicting the mean. This is the
  equivariance of Lenc and Vedaldi (Understanding image representations by measuring their equivariance and
  equivalence, CVPR 2015): the features transform by one linear map, the same for all patients. Invariance is a special
  case, with the identity, so a high R² alone does not say that a network knows the angle.
* angle: R² of a linear regression from the features at all angles to the angle of the heart in the image, on patients
  that it was not fitted to. An invariant network has 0.

The number of features matters in both regressions. So each is measured with all features, with the first 16 principal
components, as many as a class capsule has numbers, and with the first 8, as many as the smallest network has (the
CNN-(1) and CNN-(2) of the paper). The claims are judged by the latter, where all have the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from cardiocaps.metrics import MeanEstimate
from cardiocaps.metrics.comparison import Difference, difference_of
from cardiocaps.metrics.intervals import BOOTSTRAP, LEVEL, draw_weights, strata_of
from cardiocaps.metrics.samples import Floats, Integers

SIZES = (None, 16, 8)
"""Numbers of principal components that the features are reduced to; None: all features."""

JUDGED = 8
"""The one that claims are judged by."""

FOLDS = 5
_INNER_FOLDS = 3
_PENALTIES = np.logspace(-5, 3, 9)
"""Of ridge regression, chosen by cross-validation among the patients that it is fitted to."""


@dataclass(frozen=True)
class PatientRatio:
    """A ratio of two sums over patients, for each seed of a system.

    Attributes:
        above: [seeds, patients].
        below: [seeds, patients].
        complement: the statistic is one minus the ratio, as in R².
    """

    above: Floats
    below: Floats
    complement: bool

    def values(self, weight: Floats) -> Floats:
        """The statistic [r, seeds] for the weights [r, patients]; NaN where it is 0 / 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (weight @ self.above.T) / (weight @ self.below.T)
        return 1 - ratio if self.complement else ratio

    def per_seed(self) -> list[float]:
        seeds: list[float] = self.values(np.ones((1, self.above.shape[1])))[0].tolist()
        return seeds

    @classmethod
    def joined(cls, seeds: Sequence[PatientRatio]) -> PatientRatio:
        """The seeds of a system as one."""
        return cls(
            np.concatenate([one.above for one in seeds]),
            np.concatenate([one.below for one in seeds]),
            seeds[0].complement,
        )


def mean_estimate(ratio: PatientRatio, label: Integers, bootstrap: int, seed: int = 0) -> MeanEstimate:
    """The mean over the seeds with its bootstrap interval over patients, within each `label` [patients], and seeds.

    What was fitted is not fitted again in the resamples.
    """
    values = ratio.per_seed()
    deviation = stdev(values) if len(values) > 1 and np.isfinite(values).all() else float("nan")
    if not bootstrap or not np.isfinite(values).all():
        return MeanEstimate(fmean(values), deviation)
    chosen = np.random.default_rng([seed, 1]).integers(len(values), size=(bootstrap, len(values)))
    drawn = np.take_along_axis(ratio.values(_weights(label, bootstrap, seed)), chosen, axis=1).mean(axis=1)
    low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return MeanEstimate(fmean(values), deviation, low, high, BOOTSTRAP)


def contrast(
    systems: Sequence[tuple[float, PatientRatio]], label: Integers, bootstrap: int, seed: int = 0
) -> Difference:
    """The sum of coefficients times statistics, means over the seeds; as `metrics.comparison.paired_contrast`.

    What was fitted is not fitted again in the resamples.
    """
    weight = _weights(label, bootstrap, seed)
    drawn = sum(
        (coefficient * ratio.values(weight).mean(axis=1) for coefficient, ratio in systems), np.zeros(bootstrap)
    )
    by_seed = [[coefficient * x for x in ratio.per_seed()] for coefficient, ratio in systems]
    return difference_of(by_seed, drawn, int(np.bincount(label).min()))


def _weights(label: Integers, bootstrap: int, seed: int) -> Floats:
    """How often each patient is drawn [bootstrap, patients], within each label."""
    strata = strata_of(label, np.arange(label.size))
    return draw_weights(strata, bootstrap, np.random.default_rng(seed))


def change(before: Floats, after: Floats) -> PatientRatio:
    """The relative cosine distances of features [patients, d] before and after a turn.

    NaN if a patient's features are all zero, or if all patients have the same direction.
    """
    from scipy.spatial.distance import pdist

    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (before, after))
        usual = float(np.median(pdist(one, "sqeuclidean"))) / 2  # of unit vectors: 1 - cosine
        distance = np.square(one - other).sum(axis=1) / 2 / (usual if usual > 0 else np.nan)
    return PatientRatio(distance[None], np.ones((1, len(distance))), complement=False)


def linear_map(before: Floats, after: Floats, components: int | None = None, seed: int = 0) -> PatientRatio:
    """Squared errors of a ridge map before -> after on held-out patients, and those of the mean.

    Args:
        before: features [patients, d].
        after: of the same patients in the same order.
        components: principal components of `before` that both are reduced to; None: all features.
        seed: of the folds.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold

    errors, spread = np.zeros(len(before)), np.zeros(len(before))
    for fitted, held in KFold(FOLDS, shuffle=True, random_state=seed).split(before):
        reduce = _reduction(before[fitted], components)
        x, y = reduce(before), reduce(after)
        said = RidgeCV(_PENALTIES).fit(x[fitted], y[fitted]).predict(x[held]).reshape(y[held].shape)
        errors[held] = np.square(y[held] - said).sum(axis=1)
        spread[held] = np.square(y[held] - y[fitted].mean(axis=0)).sum(axis=1)
    return PatientRatio(errors[None], spread[None], complement=True)


def angle_decoded(features: Floats, angle: Floats, components: int | None = None, seed: int = 0) -> PatientRatio:
    """Squared errors of a ridge regression features -> angle on held-out patients, and those of the mean.

    Args:
        features: [tests, patients, d].
        angle: of the heart in the image [tests, patients], degrees.
        components: principal components of the features; None: all features.
        seed: of the folds.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, KFold

    tests, patients, _ = features.shape
    errors, spread = np.zeros(patients), np.zeros(patients)
    for fitted, held in KFold(FOLDS, shuffle=True, random_state=seed).split(np.arange(patients)):
        reduce = _reduction(features[:, fitted].reshape(tests * len(fitted), -1), components)
        x, y = reduce(features[:, fitted].reshape(tests * len(fitted), -1)), angle[:, fitted].ravel()
        # All angles of a patient are in one fold, or the penalty would be chosen for knowing the patients.
        inner = GroupKFold(_INNER_FOLDS).split(x, y, np.tile(np.arange(len(fitted)), tests))
        model = RidgeCV(_PENALTIES, cv=list(inner), scoring="neg_mean_squared_error").fit(x, y)
        said = model.predict(reduce(features[:, held].reshape(tests * len(held), -1))).reshape(tests, len(held))
        errors[held] = np.square(angle[:, held] - said).sum(axis=0)
        spread[held] = np.square(angle[:, held] - y.mean()).sum(axis=0)
    return PatientRatio(errors[None], spread[None], complement=True)


def _reduction(features: Floats, components: int | None) -> Any:
    """Centres features [n, d] and scales all by one factor, then projects on principal components; a function.

    One factor for all: scaled by itself, a feature that hardly varies would count as much as the others.
    """
    mean = features.mean(axis=0)
    scale = float(np.sqrt(np.square(features - mean).sum(axis=1).mean())) or 1.0
    if components is None or components >= features.shape[1]:
        return lambda x: (x - mean) / scale
    from sklearn.decomposition import PCA

    main = PCA(min(components, len(features)), svd_solver="full").fit((features - mean) / scale)
    return lambda x: main.transform((x - mean) / scale)


@dataclass(frozen=True)
class Equivariance:
    """The measures of a system, its seeds joined. Keys: (components, angle); components None: all features."""

    features: int  # d
    changes: Mapping[float, PatientRatio]  # by angle
    maps: Mapping[tuple[int | None, float], PatientRatio]
    angles: Mapping[int | None, PatientRatio]

    @classmethod
    def of(cls, features: Sequence[Mapping[float, Floats]], angle: Mapping[float, Floats]) -> Equivariance:
        """From the features [patients, d] of each seed by turn, 0 among them, and the true angles [patients]."""
        turns = [turn for turn in angle if turn]
        stacked = np.stack([angle[turn] for turn in angle])
        return cls(
            features[0][0.0].shape[1],
            {turn: PatientRatio.joined([change(one[0.0], one[turn]) for one in features]) for turn in turns},
            {
                (size, turn): PatientRatio.joined([linear_map(one[0.0], one[turn], size) for one in features])
                for size in SIZES
                for turn in turns
            },
            {
                size: PatientRatio.joined(
                    [angle_decoded(np.stack([one[turn] for turn in angle]), stacked, size) for one in features]
                )
                for size in SIZES
            },
        )

    def mapped(self, components: int | None) -> PatientRatio:
        """The map over all angles together."""
        parts = [ratio for (size, _), ratio in self.maps.items() if size == components]
        return PatientRatio(
            np.sum([part.above for part in parts], axis=0), np.sum([part.below for part in parts], axis=0), True
        )
