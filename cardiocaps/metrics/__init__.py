"""Metrics of a classifier's probabilities, with intervals, and of a regression.

The frames of a video are not independent, nor are the videos of a patient: the bootstrap draws whole groups (videos,
or patients where they are known), separately within each class, so that no resample loses a class. A resample is a
weight for each group, and every metric is written for weighted samples; the estimate itself is the case in which all
weights are one.

Intervals cover 95 % and are of two kinds, and each says of which:

* `bootstrap`: the middle 95 % of the resamples. Too narrow for few groups, which a note then says.
* `exact`: for sensitivity, specificity and accuracy the interval of Clopper and Pearson (1934), wherever each group
  is a single sample. The bootstrap has no width where all samples are right, and is too narrow where most are. Groups
  of several samples are drawn by the bootstrap; only where that has no width, since the metric is 0 or 1, is the
  number of groups put in place of the number of samples.
* `exact/bootstrap`: for the mean of these three over runs on the same single samples, at either end the farther of
  both. The bootstrap draws the runs too; the exact interval, of the mean number of right samples, a fraction as in Korn
  and Graubard (1998), knows what rare errors leave open.

An AUROC of 1 (or 0) has no width under the bootstrap either, nor has the variance of Hanley and McNeil (1982). Its
exact bound: take m disjoint pairs of a positive and a negative group. Each is in the right order with probability
AUROC, independently of the others, so all are with probability AUROC^m, and a perfect order of all samples is no more
probable than that. The bound is therefore that of Clopper and Pearson for m of m. No larger one holds for every
distribution: where all of the more frequent class have one value, perfect order has exactly that probability.

Other metrics of which all resamples have the same value (an F1 or an average precision of 1) get no interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cardiocaps.errors import plural

THRESHOLD = 0.5
"""Abnormal where the probability is above it, unless another threshold is given: l1 / (l0 + l1) > 1/2 is l1 > l0."""

LEVEL = 0.95
"""Coverage of the intervals."""

PUBLISHED = ("accuracy", "f1", "roc_auc", "pr_auc")
"""The four columns of the paper's tables, by the definitions of its published code; see `Report`."""

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

BOOTSTRAP, EXACT, BOTH, NO_INTERVAL = "bootstrap", "exact", "exact/bootstrap", "no interval"
"""What `Estimate.method` can be, besides empty where no interval was asked for."""

DECISIONS = ("sensitivity", "specificity", "f1", "f1_weighted", "accuracy")
"""The metrics that a threshold moves."""

PROPORTIONS = ("sensitivity", "specificity", "accuracy")
"""The metrics that count samples out of a number that is known beforehand."""

_NARROW = 0.05
"""A bootstrap interval that is too narrow by this share, or more, is noted."""

_KINDS = ("are normal", "are abnormal", "have both labels")
"""Of groups, by the labels of their samples."""

_CHUNK = 1 << 21
"""Weights held at a time (resamples x samples), 16 MiB an array."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A metric, its interval and how that was found: BOOTSTRAP, EXACT, BOTH, or NO_INTERVAL where it cannot be had. NaN
    where undefined, and where no interval was asked for or can be had."""

    value: float
    low: float = math.nan
    high: float = math.nan
    method: str = ""

    def __str__(self) -> str:
        return "undefined" if math.isnan(self.value) else f"{self.value:.3f}{interval_text(self)}"


@dataclass(frozen=True)
class Report:
    """What `evaluate` found. `metrics` has a key for each of METRICS, and with `confusion` (rows truth, columns
    prediction) holds for decisions at `threshold`; `paper` the definitions of the published code of CardioCaps,
    always at 0.5: `accuracy`, `f1` (weighted), `roc_auc` (of hard labels: balanced accuracy) and `pr_auc`
    (precision of the positive class). `undefined` gives the reason for every NaN, `no_interval` for every metric
    without an interval, `notes` what limits the intervals. `groups` is how many of what `group_name` says were drawn.
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
    threshold: float = THRESHOLD
    no_interval: Mapping[str, str] = field(default_factory=dict)
    group_name: str = "video"

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        return {
            "n": self.n,
            "positives": self.positives,
            "groups": self.groups,
            "drawn": plural(self.group_name),
            "threshold": self.threshold,
            "metrics": {
                name: {
                    "value": _finite(e.value),
                    "low": _finite(e.low),
                    "high": _finite(e.high),
                    "method": e.method or None,
                }
                for name, e in self.metrics.items()
            },
            "paper": {name: _finite(value) for name, value in self.paper.items()},
            "confusion": [list(row) for row in self.confusion],
            "undefined": dict(self.undefined),
            "no_interval": dict(self.no_interval),
            "notes": list(self.notes),
            "bootstrap": {"resamples": self.bootstrap, "seed": self.seed, "level": LEVEL},
        }


@dataclass(frozen=True)
class MeanEstimate:
    """A metric's mean over runs, its standard deviation (that of a sample, n - 1), the interval of the mean and its
    method, as in `Estimate`; NaN where undefined, and the deviation of a single run."""

    value: float
    sd: float = math.nan
    low: float = math.nan
    high: float = math.nan
    method: str = ""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return "undefined"
        deviation = "" if math.isnan(self.sd) else f" ± {self.sd:.3f}"
        return f"{self.value:.3f}{deviation}{interval_text(self)}"


def interval_text(estimate: Estimate | MeanEstimate, to: str = " to ") -> str:
    """For example " (0.815 to 1.000, exact)"; empty where no interval was asked for."""
    if estimate.method == NO_INTERVAL:
        return f" ({NO_INTERVAL})"
    if math.isnan(estimate.low):
        return ""
    method = f", {estimate.method}" if estimate.method else ""
    return f" ({estimate.low:.3f}{to}{estimate.high:.3f}{method})"


@dataclass(frozen=True)
class RunsReport:
    """What `evaluate_runs` found: a mean over the runs for each of METRICS and, in `paper`, of PUBLISHED; the runs'
    own reports, which have no intervals. `undefined`, `no_interval` and `notes` as in `Report`. `paired`: all runs
    were tested on the same videos."""

    metrics: Mapping[str, MeanEstimate]
    paper: Mapping[str, MeanEstimate]
    runs: tuple[Report, ...]
    paired: bool
    undefined: Mapping[str, str]
    no_interval: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def confusion(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Counts summed over the runs, each at its own threshold: rows truth, columns prediction."""
        (tn, fp), (fn, tp) = np.sum([run.confusion for run in self.runs], axis=0).tolist()
        return (tn, fp), (fn, tp)


@dataclass(frozen=True)
class RegressionReport:
    """Errors in the target's unit, over the `n` samples that have a target: of the predictions, and of predicting one
    `constant` for all of them. NaN where undefined, with the reason."""

    n: int
    mae: float
    rmse: float
    r2: float
    constant: float
    constant_mae: float
    constant_rmse: float
    undefined: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None."""
        names = ("mae", "rmse", "r2", "constant", "constant_mae", "constant_rmse")
        return {
            "n": self.n,
            **{name: _finite(getattr(self, name)) for name in names},
            "undefined": dict(self.undefined),
        }


def evaluate(
    probability: ArrayLike,
    label: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    threshold: float = THRESHOLD,
    bootstrap: int = 1000,
    seed: int = 0,
    group_name: str = "video",
) -> Report:
    """All metrics of `probability` [n] of class 1 against `label` [n] in {0, 1}, with 95 % intervals: see the top of
    this module for how.

    `groups` [n], integers or text: what is resampled as a whole, that is, the video, or the patient where several
    videos are of one; None: every sample by itself. `group_name`: what notes call one of them. `threshold`: class 1 is
    predicted above it; the definitions of the published code stay at 0.5. `bootstrap`: number of resamples, 0 for no
    intervals of any kind. Where only one class is present, the metrics that need both are NaN, with the reason in
    `undefined`. Raises ValueError for lengths that differ, no sample, probabilities and a threshold outside [0, 1] and
    labels other than 0, 1.
    """
    p, y = _checked(probability, label)
    _check_decision(threshold, bootstrap)
    group = _group_index(groups, p.size)
    sample = _Sample.of(p, y, group, threshold)
    count = sample.size.size
    value = sample.estimate()

    strata = _strata(y, group, count)
    metrics = {name: Estimate(value[name]) for name in METRICS}
    no_interval: dict[str, str] = {}
    if bootstrap:
        drawn = _drawn(sample, strata, bootstrap, np.random.default_rng(seed), p.size)
        counts = _Counts.of(strata, sample)
        for name in METRICS:
            if not math.isnan(value[name]):
                metrics[name], reason = _with_interval(name, value[name], drawn[name], counts)
                no_interval |= {name: reason} if reason else {}

    (tn, fp), (fn, tp) = confusion(p, y, threshold).tolist()
    paper = _published(p, y)
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
    return Report(
        n=p.size,
        positives=int(y.sum()),
        groups=count,
        metrics=metrics,
        paper=paper,
        confusion=((tn, fp), (fn, tp)),
        undefined={name: reason for name, reason in reasons.items() if math.isnan(values[name])},
        notes=tuple(_few(strata, count, group_name)) if bootstrap else (),
        bootstrap=bootstrap,
        seed=seed,
        threshold=float(threshold),
        no_interval=no_interval,
        group_name=group_name,
    )


def evaluate_runs(
    probabilities: Sequence[ArrayLike],
    labels: Sequence[ArrayLike],
    groups: Sequence[ArrayLike | None] | None = None,
    thresholds: Sequence[float] | None = None,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    group_name: str = "video",
) -> RunsReport:
    """Metrics averaged over several runs of one system, each argument with one entry for a run, as `evaluate` takes
    them (thresholds: None for 0.5 in all).

    The interval is that of the average, for videos and seeds such as these: a resample draws groups, gives the same
    ones to every run that was tested on them, draws as many runs as there are, with replacement, and averages the
    metric over these runs. Runs with other groups, or other labels of them, draw groups by themselves. A single run has
    the intervals of `evaluate`. A metric that is undefined in one run is undefined. Raises ValueError as `evaluate`,
    for no run, and for sequences of different lengths.
    """
    count = len(probabilities)
    groups = [None] * count if groups is None else groups
    thresholds = [THRESHOLD] * count if thresholds is None else thresholds
    if not count:
        raise ValueError("probabilities: must have at least one run, is empty")
    for name, values in (("labels", labels), ("groups", groups), ("thresholds", thresholds)):
        if len(values) != count:
            raise ValueError(f"{name}: must have one entry for each of {count} runs, has {len(values)}")
    runs = tuple(
        evaluate(p, y, group, threshold=threshold, bootstrap=0, seed=seed, group_name=group_name)
        for p, y, group, threshold in zip(probabilities, labels, groups, thresholds, strict=True)
    )
    _check_decision(THRESHOLD, bootstrap)

    undefined: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        for name, reason in run.undefined.items():
            undefined.setdefault(name, reason if count == 1 else f"run {number} of {count}: {reason}")
    videos: dict[Any, int] = {}  # the videos of the runs seen so far, and which stream of random numbers draws them
    samples, notes = [], []
    most = max(run.n for run in runs)
    for p, y, group, threshold in zip(probabilities, labels, groups, thresholds, strict=True):
        checked, truth = _checked(p, y)
        index = _group_index(group, checked.size)
        names = np.unique(np.arange(checked.size) if group is None else np.asarray(group))
        sample = _Sample.of(checked, truth, index, threshold)
        strata = _strata(truth, index, names.size)
        same = (tuple(names.tolist()), *((kind, tuple(members.tolist())) for kind, members in strata.items()))
        stream = videos.setdefault(same, len(videos))
        samples.append((sample, strata, stream))
        if bootstrap:
            notes += _few(strata, names.size, group_name)
    summarised = {
        name: MeanEstimate(*_mean_and_deviation([run.metrics[name].value for run in runs])) for name in METRICS
    }
    no_interval: dict[str, str] = {}
    if bootstrap:
        drawn = [
            # The numbers of a stream begin anew for every run, and so draw the same videos.
            _drawn(sample, strata, bootstrap, np.random.default_rng([seed, stream] if stream else seed), most)
            for sample, strata, stream in samples
        ]
        chosen = np.random.default_rng([seed, len(videos)]).integers(count, size=(bootstrap, count))
        counts = _Counts.of_runs([_Counts.of(strata, sample) for sample, strata, _ in samples], len(videos) == 1)
        for name, mean in summarised.items():
            if name not in undefined:
                of_runs = np.stack([values[name] for values in drawn], axis=1)
                means = np.take_along_axis(of_runs, chosen, axis=1).mean(axis=1) if count > 1 else of_runs[:, 0]
                found, why = _with_interval(name, mean.value, means, counts)
                summarised[name] = replace(mean, low=found.low, high=found.high, method=found.method)
                no_interval |= {name: why} if why else {}
        if any(mean.sd > 0 for mean in summarised.values()) and _narrowness(count) >= _NARROW:
            notes.append(f"only {count} seeds: what bootstrap intervals owe to them is {_too_narrow(count)}")
    return RunsReport(
        metrics=summarised,
        paper={name: MeanEstimate(*_mean_and_deviation([run.paper[name] for run in runs])) for name in PUBLISHED},
        runs=runs,
        paired=len(videos) == 1,
        undefined=undefined,
        no_interval=no_interval,
        notes=tuple(dict.fromkeys(notes)),
    )


def choose_threshold(probability: ArrayLike, label: ArrayLike) -> float:
    """The threshold with the largest Youden index (sensitivity + specificity - 1; Youden 1950) for `probability` [n]
    against `label` [n]: the middle between two neighbouring probabilities, of equally good ones the nearest to 0.5,
    then the smaller. THRESHOLD where all probabilities are equal.

    Raises ValueError as `evaluate`, and where only one class is present.
    """
    p, y = _checked(probability, label)
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
    _, y = _checked(probability, label)
    if y.min() == y.max():
        return THRESHOLD, f"every validation label is {y[0]}"
    return choose_threshold(probability, label), None


def reliability(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> tuple[Floats, Floats, Integers]:
    """Mean predicted probability [b], observed share of class 1 [b] and number of samples [b] in bins of equal mass,
    b ≤ `bins`: equal probabilities share a bin, so there can be fewer.

    Raises ValueError as `evaluate`, and for `bins` below 1.
    """
    p, y = _checked(probability, label)
    if bins < 1:
        raise ValueError(f"bins: must be 1 or more, is {bins}")
    order = np.sort(p)
    edges = np.unique(order[[p.size * k // bins for k in range(1, bins)]])
    member = np.unique(np.searchsorted(edges, p, side="right"), return_inverse=True)[1]
    size = np.bincount(member)
    return np.bincount(member, weights=p) / size, np.bincount(member, weights=y) / size, size.astype(np.int64)


def expected_calibration_error(probability: ArrayLike, label: ArrayLike, bins: int = 10) -> float:
    """Mean distance between predicted probability and observed share over the bins of `reliability`, weighted by
    their samples (Naeini et al. 2015, with bins of equal mass). Raises ValueError as `reliability`."""
    predicted, observed, size = reliability(probability, label, bins)
    return float((size * np.abs(predicted - observed)).sum() / size.sum())


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


def confusion(probability: ArrayLike, label: ArrayLike, threshold: float = THRESHOLD) -> Integers:
    """Counts [[tn, fp], [fn, tp]]: rows are the true class, columns the predicted one (probability > threshold)."""
    p, y = _checked(probability, label)
    return np.bincount(2 * y + (p > threshold), minlength=4).reshape(2, 2).astype(np.int64)


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


def regression_report(prediction: ArrayLike, target: ArrayLike, constant: float = math.nan) -> RegressionReport:
    """Mean absolute error, root mean squared error and R² of `prediction` [n] over the targets that are not NaN, and
    the errors of predicting `constant`, the mean of the training targets, for each; NaN where there is none.

    R² compares with the mean of these very targets. Raises ValueError for lengths that differ, a prediction that is not
    finite and an infinite target.
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
    errors = ("mae", "rmse", "r2", "constant_mae", "constant_rmse")
    if truth.size == 0:
        undefined = dict.fromkeys(errors, "no sample has a target")
        return RegressionReport(n=0, constant=constant, undefined=undefined, **dict.fromkeys(errors, math.nan))
    undefined = dict.fromkeys(errors[3:], "no training sample has a target") if math.isnan(constant) else {}
    same = bool((truth == truth[0]).all())
    if same:
        undefined["r2"] = "the targets do not vary"
    error, of_constant = predicted - truth, constant - truth
    spread = float(np.square(truth - truth.mean()).sum())
    return RegressionReport(
        n=int(truth.size),
        mae=float(np.abs(error).mean()),
        rmse=math.sqrt(float(np.square(error).mean())),
        r2=math.nan if same else 1 - float(np.square(error).sum()) / spread,
        constant=constant,
        constant_mae=float(np.abs(of_constant).mean()),
        constant_rmse=math.sqrt(float(np.square(of_constant).mean())),
        undefined=undefined,
    )


def mean_by(values: ArrayLike, group: ArrayLike) -> Floats:
    """Mean of `values` [n] over each group, in the order of the sorted values of `group` [n]. Raises ValueError for
    lengths that differ."""
    numbers = _vector(values, "values")
    index = _group_index(group, numbers.size, name="group")
    return np.bincount(index, weights=numbers) / np.bincount(index)


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
    def of(cls, p: Floats, y: Integers, group: Integers, threshold: float = THRESHOLD) -> "_Sample":
        count = int(group.max()) + 1
        order = np.argsort(-p, kind="stable")
        cell = 4 * group + 2 * y + (p > threshold)
        return cls(
            group=group[order],
            positive=y[order].astype(np.float64),
            last=_last_of_ties(p[order]),
            cells=np.bincount(cell, minlength=4 * count).reshape(count, 4).astype(np.float64),
            squared=np.bincount(group, weights=np.square(p - y), minlength=count).astype(np.float64),
            size=np.bincount(group, minlength=count).astype(np.float64),
        )

    def estimate(self) -> dict[str, float]:
        """Every metric of the samples as they are."""
        return {name: float(v[0]) for name, v in self.scores(np.ones((1, self.size.size))).items()}

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


def _published(p: Floats, y: Integers) -> dict[str, float]:
    """The metrics of PUBLISHED, of decisions at THRESHOLD."""
    _, fp, _, tp = confusion(p, y).ravel().tolist()
    value = _Sample.of(p, y, np.arange(p.size)).estimate()
    return {
        "accuracy": value["accuracy"],
        "f1": value["f1_weighted"],
        "roc_auc": (value["sensitivity"] + value["specificity"]) / 2,
        "pr_auc": tp / (tp + fp) if tp + fp else 0.0,
    }


def _few(strata: Mapping[str, Integers], count: int, group_name: str) -> list[str]:
    groups = plural(group_name)
    return [
        f"of {count} {groups} only {members.size} {kind}: bootstrap intervals are {_too_narrow(members.size)}"
        for kind, members in strata.items()
        if _narrowness(members.size) >= _NARROW
    ]


def _narrowness(n: int) -> float:
    """By what share a bootstrap percentile interval of a mean of `n` is narrower than Student's, which is right where
    values are normally distributed (Hesterberg 2015, What Teachers Should Know About the Bootstrap)."""
    from scipy.special import ndtri, stdtrit

    upper = (1 + LEVEL) / 2
    return 1.0 if n < 2 else 1 - float(math.sqrt((n - 1) / n) * ndtri(upper) / stdtrit(n - 1, upper))


def _too_narrow(n: int) -> str:
    return "without meaning" if n < 2 else f"about {100 * _narrowness(n):.0f} % too narrow"


@dataclass(frozen=True)
class _Counts:
    """By metric, how many independent trials an exact interval counts: groups, of an AUROC disjoint pairs of them.
    `single`: each group is one sample (the same for all runs), so that the samples themselves are the trials."""

    trials: Mapping[str, int]
    single: bool
    runs: int = 1

    @classmethod
    def of(cls, strata: Mapping[str, Integers], sample: "_Sample") -> "_Counts":
        normal, abnormal, both = (strata[kind].size if kind in strata else 0 for kind in _KINDS)
        groups = normal + abnormal + both
        trials = {
            "sensitivity": abnormal + both,
            "specificity": normal + both,
            "accuracy": groups,
            "auroc": min(normal + both, abnormal + both, groups // 2),
        }
        return cls(trials, single=bool(sample.size.max() == 1))

    @classmethod
    def of_runs(cls, runs: Sequence["_Counts"], paired: bool) -> "_Counts":
        """The fewest of each run's."""
        trials = {name: min(run.trials[name] for run in runs) for name in runs[0].trials}
        return cls(trials, paired and all(run.single for run in runs), len(runs))


def _with_interval(name: str, value: float, drawn: Floats, counts: _Counts) -> tuple[Estimate, str | None]:
    """A metric with its interval, or with the reason why it has none; `drawn` are its resamples."""
    trials = counts.trials.get(name, 0)
    tail = 100 * (1 - LEVEL) / 2
    low, high = (float(bound) for bound in np.percentile(drawn, (tail, 100 - tail)))
    if name in PROPORTIONS and counts.single:
        exact_low, exact_high = _exact(value * trials, trials)
        if counts.runs == 1:
            return Estimate(value, exact_low, exact_high, EXACT), None
        return Estimate(value, min(low, exact_low), max(high, exact_high), BOTH), None
    if high - low > 1e-12:  # more than rounding
        return Estimate(value, low, high, BOOTSTRAP), None
    if trials and value in (0.0, 1.0):
        return Estimate(value, *_exact(value * trials, trials), EXACT), None
    return Estimate(value, method=NO_INTERVAL), "the middle 95 % of the resamples have one and the same value"


def _exact(right: float, trials: int) -> tuple[float, float]:
    """The interval of Clopper and Pearson (1934) for a proportion, as quantiles of beta distributions, which a mean
    number of right ones has too."""
    from scipy.special import betaincinv

    tail = (1 - LEVEL) / 2
    low = float(betaincinv(right, trials - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, trials - right, 1 - tail)) if right < trials else 1.0
    return low, high


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    # Not with np.std: of equal values it need not be zero.
    return fmean(values), stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan


def _strata(y: Integers, group: Integers, count: int) -> dict[str, Integers]:
    """Groups by the classes they hold. Under the paper's protocol one video can have frames of both."""
    positive = np.bincount(group, weights=y, minlength=count) > 0
    negative = np.bincount(group, weights=1 - y, minlength=count) > 0
    members = (negative & ~positive, positive & ~negative, positive & negative)
    strata = {kind: np.flatnonzero(of_kind) for kind, of_kind in zip(_KINDS, members, strict=True)}
    return {kind: found for kind, found in strata.items() if found.size}


def _drawn(
    sample: _Sample, strata: Mapping[str, Integers], resamples: int, rng: np.random.Generator, samples: int
) -> dict[str, Floats]:
    """Every metric of each resample, [resamples], computed so many at a time as fit in a few small arrays. `samples`:
    of this run, or the most of the runs that are to draw the same."""
    rows = max(1, _CHUNK // samples)
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


def _check_decision(threshold: float, bootstrap: int) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: must lie in [0, 1], is {threshold}")
    if bootstrap < 0:
        raise ValueError(f"bootstrap: must be 0 or more, is {bootstrap}")


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
