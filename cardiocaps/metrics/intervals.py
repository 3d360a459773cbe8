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
from dataclasses import dataclass

import numpy as np

from cardiocaps.errors import plural
from cardiocaps.metrics.samples import Floats, Integers
from cardiocaps.metrics.scores import METRICS, Sample

LEVEL = 0.95
"""Coverage of the intervals."""

BOOTSTRAP, EXACT, BOTH, NO_INTERVAL = "bootstrap", "exact", "exact/bootstrap", "no interval"
"""What `Estimate.method` can be, besides empty where no interval was asked for."""

PROPORTIONS = ("sensitivity", "specificity", "accuracy")
"""The metrics that count samples out of a number that is known beforehand."""

_NARROW = 0.05
"""A bootstrap interval that is too narrow by this share, or more, is noted."""

_KINDS = ("are normal", "are abnormal", "have both labels")
"""Of groups, by the labels of their samples."""

_CHUNK = 1 << 21
"""Weights held at a time (resamples x samples), 16 MiB an array."""


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


def strata_of(y: Integers, group: Integers, count: int) -> dict[str, Integers]:
    """Groups by the classes they hold. Under the paper's protocol one video can have frames of both."""
    positive = np.bincount(group, weights=y, minlength=count) > 0
    negative = np.bincount(group, weights=1 - y, minlength=count) > 0
    members = (negative & ~positive, positive & ~negative, positive & negative)
    strata = {kind: np.flatnonzero(of_kind) for kind, of_kind in zip(_KINDS, members, strict=True)}
    return {kind: found for kind, found in strata.items() if found.size}


def draw_weights(strata: Mapping[str, Integers], resamples: int, rng: np.random.Generator) -> Floats:
    """How often each group is drawn, [resamples, g]: with replacement, within its stratum."""
    weight = np.zeros((resamples, sum(members.size for members in strata.values())))
    for members in strata.values():
        m = members.size
        cell = rng.integers(m, size=(resamples, m)) + m * np.arange(resamples)[:, None]
        weight[:, members] = np.bincount(cell.ravel(), minlength=resamples * m).reshape(resamples, m)
    return weight


def draw_scores(
    sample: Sample, strata: Mapping[str, Integers], resamples: int, rng: np.random.Generator, samples: int
) -> dict[str, Floats]:
    """Every metric of each resample, [resamples], computed so many at a time as fit in a few small arrays. `samples`:
    of this run, or the most of the runs that are to draw the same."""
    rows = max(1, _CHUNK // samples)
    parts = [
        sample.scores(draw_weights(strata, min(rows, resamples - done), rng)) for done in range(0, resamples, rows)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}


@dataclass(frozen=True)
class Counts:
    """By metric, how many independent trials an exact interval counts: groups, of an AUROC disjoint pairs of them.
    `single`: each group is one sample (the same for all runs), so that the samples themselves are the trials."""

    trials: Mapping[str, int]
    single: bool
    runs: int = 1

    @classmethod
    def of(cls, strata: Mapping[str, Integers], sample: "Sample") -> "Counts":
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
    def of_runs(cls, runs: Sequence["Counts"], paired: bool) -> "Counts":
        """The fewest of each run's."""
        trials = {name: min(run.trials[name] for run in runs) for name in runs[0].trials}
        return cls(trials, paired and all(run.single for run in runs), len(runs))


def with_interval(name: str, value: float, drawn: Floats, counts: Counts) -> tuple[Estimate, str | None]:
    """A metric with its interval, or with the reason why it has none; `drawn` are its resamples."""
    trials = counts.trials.get(name, 0)
    tail = 100 * (1 - LEVEL) / 2
    low, high = (float(bound) for bound in np.percentile(drawn, (tail, 100 - tail)))
    if name in PROPORTIONS and counts.single:
        exact_low, exact_high = exact_interval(value * trials, trials)
        if counts.runs == 1:
            return Estimate(value, exact_low, exact_high, EXACT), None
        return Estimate(value, min(low, exact_low), max(high, exact_high), BOTH), None
    if high - low > 1e-12:  # more than rounding
        return Estimate(value, low, high, BOOTSTRAP), None
    if trials and value in (0.0, 1.0):
        return Estimate(value, *exact_interval(value * trials, trials), EXACT), None
    return Estimate(value, method=NO_INTERVAL), "the middle 95 % of the resamples have one and the same value"


def exact_interval(right: float, trials: int) -> tuple[float, float]:
    """The interval of Clopper and Pearson (1934) for a proportion, as quantiles of beta distributions, which a mean
    number of right ones has too."""
    from scipy.special import betaincinv

    tail = (1 - LEVEL) / 2
    low = float(betaincinv(right, trials - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, trials - right, 1 - tail)) if right < trials else 1.0
    return low, high


def notes_on_size(strata: Mapping[str, Integers], count: int, group_name: str) -> list[str]:
    groups = plural(group_name)
    return [
        f"of {count} {groups} only {members.size} {kind}: bootstrap intervals are {too_narrow(members.size)}"
        for kind, members in strata.items()
        if narrowness(members.size) >= _NARROW
    ]


def narrowness(n: int) -> float:
    """By what share a bootstrap percentile interval of a mean of `n` is narrower than Student's, which is right where
    values are normally distributed (Hesterberg 2015, What Teachers Should Know About the Bootstrap)."""
    from scipy.special import ndtri, stdtrit

    upper = (1 + LEVEL) / 2
    return 1.0 if n < 2 else 1 - float(math.sqrt((n - 1) / n) * ndtri(upper) / stdtrit(n - 1, upper))


def too_narrow(n: int) -> str:
    return "without meaning" if n < 2 else f"about {100 * narrowness(n):.0f} % too narrow"
