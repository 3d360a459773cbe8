"""Metrics of a classifier's probabilities, with bootstrap intervals over videos, and of a regression.

The frames of a video are not independent: the bootstrap draws whole videos, separately within each class, so
that no resample loses a class. A resample is a weight for each video, and every metric is written for
weighted samples; the estimate itself is the case in which all weights are one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.5
"""Abnormal where the probability is above it: l1 / (l0 + l1) > 1/2 is l1 > l0."""

LEVEL = 0.95
"""Coverage of the intervals."""

METRICS = (
    "auroc",
    "average_precision",
    "sensitivity",
    "specificity",
    "f1",
    "f1_weighted",
    "accuracy",
    "brier",
)

_FEW = 5
"""With fewer videos of a class, a percentile interval is too narrow to be believed."""

_CHUNK = 1 << 21
"""Weights held at a time (resamples x samples), 16 MiB an array."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A metric and its bootstrap interval; NaN where undefined or not asked for."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        interval = "" if math.isnan(self.low) else f" ({self.low:.3f} to {self.high:.3f})"
        return f"{self.value:.3f}{interval}"


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `metrics` has a key for each of METRICS; `paper` the definitions of the published
    code of CardioCaps: `accuracy`, `f1` (weighted), `roc_auc` (of hard labels: balanced accuracy) and `pr_auc`
    (precision of the positive class). `undefined` gives the reason for every NaN, `notes` what limits the
    intervals. `confusion`: rows truth, columns prediction.
    """

    n: int
    positives: int
    groups: int
    metrics: Mapping[str, Estimate]
    paper: Mapping[str, float]
    confusion: tuple[tuple[int, int], tuple[int, int]]
    undefined: Mapping[str, str]
    notes: tuple[str, ...]
    bootstrap: int
    seed: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return {
            "n": self.n,
            "positives": self.positives,
            "groups": self.groups,
            "threshold": THRESHOLD,
            "metrics": {
                name: {"value": _finite(e.value), "low": _finite(e.low), "high": _finite(e.high)}
                for name, e in self.metrics.items()
            },
            "paper": {name: _finite(value) for name, value in self.paper.items()},
            "confusion": [list(row) for row in self.confusion],
            "undefined": dict(self.undefined),
            "notes": list(self.notes),
            "bootstrap": {"resamples": self.bootstrap, "seed": self.seed, "level": LEVEL},
        }


@dataclass(frozen=True)
class RegressionReport:
    """Errors in the target's unit, over the `n` samples that have a target; NaN where undefined, with the
    reason."""

    n: int
    mae: float
    rmse: float
    r2: float
    undefined: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return {
            "n": self.n,
            "mae": _finite(self.mae),
            "rmse": _finite(self.rmse),
            "r2": _finite(self.r2),
            "undefined": dict(self.undefined),
        }


def evaluate(
    probability: ArrayLike,
    label: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Report:
    """All metrics of `probability` [n] of class 1 against `label` [n] in {0, 1}, with 95 % percentile
    intervals.

    `groups` [n], integers or text: what is resampled as a whole, that is, the video; None: every sample by
    itself. `bootstrap`: number of resamples, 0 for none. Where only one class is present, the metrics that
    need both are NaN, with the reason in `undefined`. Raises ValueError for lengths that differ, no sample,
    probabilities outside [0, 1] and labels other than 0, 1.
    """
    p, y = _checked(probability, label)
    if bootstrap < 0:
        raise ValueError(f"bootstrap: must be 0 or more, is {bootstrap}")
    group = _group_index(groups, p.size)
    sample = _Sample.of(p, y, group)
    count = sample.size.size
    value = {name: float(v[0]) for name, v in sample.scores(np.ones((1, count))).items()}

    strata = _strata(y, group, count)
    low, high = dict.fromkeys(METRICS, math.nan), dict.fromkeys(METRICS, math.nan)
    if bootstrap:
        drawn = _drawn(sample, strata, bootstrap, np.random.default_rng(seed))
        tail = 100 * (1 - LEVEL) / 2
        for name in METRICS:
            if not math.isnan(value[name]):
                low[name], high[name] = (float(q) for q in np.percentile(drawn[name], (tail, 100 - tail)))

    (tn, fp), (fn, tp) = confusion(p, y).tolist()
    paper = {
        "accuracy": value["accuracy"],
        "f1": value["f1_weighted"],
        "roc_auc": (value["sensitivity"] + value["specificity"]) / 2,
        "pr_auc": tp / (tp + fp) if tp + fp else 0.0,
    }
    one_class = f"every label is {int(y[0])}, the metric needs both classes"
    reasons = {
        "auroc": one_class,
        "average_precision": one_class,
        "sensitivity": "no label is 1",
        "specificity": "no label is 0",
        "f1": "no label is 1 and none is predicted",
        "paper.roc_auc": one_class,
    }
    values = value | {f"paper.{name}": v for name, v in paper.items()}
    notes = [
        f"of {count} videos only {members.size} {kind}: the intervals are too narrow"
        for kind, members in strata.items()
        if bootstrap and members.size < _FEW
    ]
    return Report(
        n=p.size,
        positives=int(y.sum()),
        groups=count,
        metrics={name: Estimate(value[name], low[name], high[name]) for name in METRICS},
        paper=paper,
        confusion=((tn, fp), (fn, tp)),
        undefined={name: reason for name, reason in reasons.items() if math.isnan(values[name])},
        notes=tuple(notes),
        bootstrap=bootstrap,
        seed=seed,
    )


def by_video(probability: ArrayLike, label: ArrayLike, clip: ArrayLike) -> tuple[Floats, Integers]:
    """Mean probability and label of each video, in the order of the sorted values of `clip` [n] (integers or
    text).

    Raises ValueError as `evaluate`, and where the frames of one video have different labels.
    """
    p, y = _checked(probability, label)
    group = _group_index(clip, p.size, name="clip")
    size = np.bincount(group)
    positive = np.bincount(group, weights=y)
    mixed = np.flatnonzero((positive != 0) & (positive != size))
    if mixed.size:
        where = np.asarray(clip)[group == mixed[0]][0]
        raise ValueError(f"label: must be the same for all frames of a clip, differs within clip {where}")
    return np.clip(np.bincount(group, weights=p) / size, 0.0, 1.0), (positive > 0).astype(np.int64)


def confusion(probability: ArrayLike, label: ArrayLike) -> Integers:
    """Counts [[tn, fp], [fn, tp]]: rows are the true class, columns the predicted one (probability > 0.5)."""
    p, y = _checked(probability, label)
    return np.bincount(2 * y + (p > THRESHOLD), minlength=4).reshape(2, 2).astype(np.int64)


def threshold_counts(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Integers, Integers]:
    """Thresholds [t], true and false positives [t]: predicting 1 where probability ≥ threshold, thresholds
    falling.

    The first is infinite (nothing predicted), the last the smallest probability (everything). The points of
    both curves.
    """
    p, y = _checked(probability, label)
    order = np.argsort(-p, kind="stable")
    p, y = p[order], y[order]
    last = _last_of_ties(p)
    tp = np.cumsum(y)[last]
    return (
        np.concatenate(([np.inf], p[last])),
        np.concatenate(([0], tp)).astype(np.int64),
        np.concatenate(([0], last + 1 - tp)).astype(np.int64),
    )


def regression_report(prediction: ArrayLike, target: ArrayLike) -> RegressionReport:
    """Mean absolute error, root mean squared error and R² of `prediction` [n] over the targets that are not
    NaN.

    Raises ValueError for lengths that differ, a prediction that is not finite and an infinite target.
    """
    predicted, truth = _vector(prediction, "prediction"), _vector(target, "target")
    if predicted.size != truth.size:
        raise ValueError(f"target: must have the length of prediction, {predicted.size}; has length {truth.size}")
    if not np.isfinite(predicted).all():
        raise ValueError(f"prediction: must be finite, one is {predicted[~np.isfinite(predicted)][0]}")
    if np.isinf(truth).any():
        raise ValueError("target: must be finite, or NaN where missing; one is infinite")
    measured = ~np.isnan(truth)
    predicted, truth = predicted[measured], truth[measured]
    if truth.size == 0:
        reason = "no sample has a target"
        return RegressionReport(0, math.nan, math.nan, math.nan, dict.fromkeys(("mae", "rmse", "r2"), reason))
    error = predicted - truth
    constant = bool((truth == truth[0]).all())
    spread = float(np.square(truth - truth.mean()).sum())
    return RegressionReport(
        n=int(truth.size),
        mae=float(np.abs(error).mean()),
        rmse=math.sqrt(float(np.square(error).mean())),
        r2=math.nan if constant else 1 - float(np.square(error).sum()) / spread,
        undefined={"r2": "the targets do not vary"} if constant else {},
    )


@dataclass(frozen=True)
class _Sample:
    """The samples in falling order of probability, and the sums over each group that the threshold metrics
    need."""

    group: Integers  # [n] in falling order of probability
    positive: Floats  # [n] 0 or 1, in the same order
    last: Integers  # [t] last position of each run of equal probabilities
    cells: Floats  # [g, 4] tn, fp, fn, tp of each group
    squared: Floats  # [g] sum of (p - y)^2
    size: Floats  # [g]

    @classmethod
    def of(cls, p: Floats, y: Integers, group: Integers) -> "_Sample":
        count = int(group.max()) + 1
        order = np.argsort(-p, kind="stable")
        cell = 4 * group + 2 * y + (p > THRESHOLD)
        return cls(
            group=group[order],
            positive=y[order].astype(np.float64),
            last=_last_of_ties(p[order]),
            cells=np.bincount(cell, minlength=4 * count).reshape(count, 4).astype(np.float64),
            squared=np.bincount(group, weights=np.square(p - y), minlength=count).astype(np.float64),
            size=np.bincount(group, minlength=count).astype(np.float64),
        )

    def scores(self, weight: Floats) -> dict[str, Floats]:
        """Every metric, [r], for the group weights `weight` [r, g]; NaN where it is undefined."""
        tn, fp, fn, tp = (weight @ self.cells).T
        total = weight @ self.size
        with np.errstate(divide="ignore", invalid="ignore"):
            f1 = 2 * tp / (2 * tp + fp + fn)
            f1_of_zero = 2 * tn / (2 * tn + fp + fn)
            # A class that does not occur has weight zero, and its F1, perhaps 0/0, does not count.
            f1_weighted = (
                np.where(tp + fn > 0, (tp + fn) * f1, 0.0) + np.where(tn + fp > 0, (tn + fp) * f1_of_zero, 0.0)
            ) / total
            scores = {
                "sensitivity": tp / (tp + fn),
                "specificity": tn / (tn + fp),
                "f1": f1,
                "f1_weighted": f1_weighted,
                "accuracy": (tp + tn) / total,
                "brier": weight @ self.squared / total,
            }
        scores["auroc"], scores["average_precision"] = self._areas(weight)
        return scores

    def _areas(self, weight: Floats) -> tuple[Floats, Floats]:
        """AUROC and average precision, [r] each."""
        of_sample = weight[:, self.group]
        flagged = np.cumsum(of_sample, axis=1)[:, self.last]
        tp = np.cumsum(of_sample * self.positive, axis=1)[:, self.last]
        fp = flagged - tp
        positives, negatives = tp[:, -1], fp[:, -1]
        new_tp = np.diff(tp, axis=1, prepend=0.0)
        new_fp = np.diff(fp, axis=1, prepend=0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            # Trapezoids: a tie between a positive and a negative counts one half.
            auroc = (new_fp * (tp - new_tp / 2)).sum(axis=1) / (positives * negatives)
            precision = np.where(flagged > 0, tp / flagged, 0.0)
            average_precision = (new_tp * precision).sum(axis=1) / positives
        average_precision[negatives == 0] = np.nan
        return auroc, average_precision


def _strata(y: Integers, group: Integers, count: int) -> dict[str, Integers]:
    """Groups by the classes they hold. Under the paper's protocol one video can have frames of both."""
    positive = np.bincount(group, weights=y, minlength=count) > 0
    negative = np.bincount(group, weights=1 - y, minlength=count) > 0
    strata = {
        "are normal": np.flatnonzero(negative & ~positive),
        "are abnormal": np.flatnonzero(positive & ~negative),
        "have both labels": np.flatnonzero(positive & negative),
    }
    return {kind: members for kind, members in strata.items() if members.size}


def _drawn(
    sample: _Sample, strata: Mapping[str, Integers], resamples: int, rng: np.random.Generator
) -> dict[str, Floats]:
    """Every metric of each resample, [resamples], computed so many at a time as fit in a few small arrays."""
    rows = max(1, _CHUNK // sample.group.size)
    parts = [sample.scores(_resamples(strata, min(rows, resamples - done), rng)) for done in range(0, resamples, rows)]
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


def _resamples(strata: Mapping[str, Integers], resamples: int, rng: np.random.Generator) -> Floats:
    """How often each group is drawn, [resamples, g]: with replacement, within its stratum."""
    weight = np.zeros((resamples, sum(members.size for members in strata.values())))
    for members in strata.values():
        m = members.size
        cell = rng.integers(m, size=(resamples, m)) + m * np.arange(resamples)[:, None]
        weight[:, members] = np.bincount(cell.ravel(), minlength=resamples * m).reshape(resamples, m)
    return weight


def _checked(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Integers]:
    p, y = _vector(probability, "probability"), _vector(label, "label")
    if p.size == 0:
        raise ValueError("probability: must have at least one value, is empty")
    if p.size != y.size:
        raise ValueError(f"label: must have the length of probability, {p.size}; has length {y.size}")
    wrong = ~((p >= 0) & (p <= 1))
    if wrong.any():
        raise ValueError(f"probability: must lie in [0, 1], one is {p[wrong][0]} (at {wrong.argmax()})")
    wrong = (y != 0) & (y != 1)
    if wrong.any():
        raise ValueError(f"label: must be 0 or 1, one is {y[wrong][0]} (at {wrong.argmax()})")
    return p, y.astype(np.int64)


def _vector(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: must be one-dimensional and numeric, is {array.dtype} {list(array.shape)}")
    return array.astype(np.float64)


def _group_index(groups: ArrayLike | None, n: int, name: str = "groups") -> Integers:
    if groups is None:
        return np.arange(n)
    array = np.asarray(groups)
    if array.shape != (n,) or array.dtype.kind not in "iuUS":
        raise ValueError(f"{name}: must be integers or text of length {n}, is {array.dtype} {list(array.shape)}")
    return np.unique(array, return_inverse=True)[1].astype(np.int64)


def _last_of_ties(sorted_values: Floats) -> Integers:
    return np.append(np.flatnonzero(np.diff(sorted_values)), sorted_values.size - 1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
