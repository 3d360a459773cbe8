"""95 % intervals of the metrics.

The frames of a video are not independent, and neither are the videos of a patient. The bootstrap therefore draws whole
groups: videos, or patients where they are known. It draws separately within each class, so that every resample has both
classes. A resample is a weight for each group, and `scores` computes every metric for weighted samples.

An interval has one of these methods:

* `bootstrap`: the middle 95 % of the resamples. It is too narrow for few groups; a note then says so.
* `exact`: the interval of Clopper and Pearson (1934), for sensitivity, specificity and accuracy where each group is a
  single sample. The bootstrap would have no width if all samples are right, and is too narrow if most are. Where groups
  have several samples, it is used only if the bootstrap has no width (the metric is 0 or 1), and counts groups.
* `exact/bootstrap`: for the mean of these three metrics over runs that were tested on the same single samples, the
  lower of both low ends and the higher of both high ends. The bootstrap also draws the runs; the exact interval, of the
  mean number of right samples (a fraction, as in Korn and Graubard 1998), covers errors too rare to be in the samples.

An AUROC of 1 or 0 has no width under the bootstrap either, nor has the variance of Hanley and McNeil (1982). Its exact
bound: take m disjoint pairs of a positive and a negative group. Each pair is in order with probability AUROC,
independently of the others. All pairs are in order with probability AUROC^m. Perfect order of all samples implies that,
so its probability is at most AUROC^m. The bound is therefore that of Clopper and Pearson for m of m. No larger bound
holds for every distribution: if the more frequent class has one value only, perfect order has exactly that probability.

Other metrics whose resamples all have the same value (an F1 or an average precision of 1) get no interval.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cardiocaps.errors import plural
from cardiocaps.metrics.samples import Floats, Integers, group_index
from cardiocaps.metrics.scores import METRICS, Sample

LEVEL = 0.95
"""Coverage of the intervals."""

BOOTSTRAP, EXACT, BOTH, NO_INTERVAL = "bootstrap", "exact", "exact/bootstrap", "no interval"
"""Values of `Estimate.method`; it is empty if no interval was asked for."""

NO_WIDTH = "the middle 95 % of the resamples have one and the same value"
"""The reason for NO_INTERVAL."""

PROPORTIONS = ("sensitivity", "specificity", "accuracy")
"""The metrics that are a number of samples out of a fixed total."""

_NARROW = 0.05
"""A bootstrap interval gets a note if it is too narrow by this share or more."""

_KINDS = ("are normal", "are abnormal", "have both labels")
"""Kinds of groups, by the labels of their samples."""

_CHUNK = 1 << 21
"""Weights (resamples x samples) that are computed at a time: 16 MiB for each array."""


@dataclass(frozen=True)
class Estimate:
    """A metric and its 95 % interval; NaN where undefined, and for an interval that is missing.

    Attributes:
        method: how the interval was found: BOOTSTRAP, EXACT, BOTH or NO_INTERVAL.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    method: str = ""

    def __str__(self) -> str:
        return "undefined" if math.isnan(self.value) else f"{self.value:.3f}{interval_text(self)}"


@dataclass(frozen=True)
class MeanEstimate:
    """The mean of a metric over runs, its sample standard deviation `sd` (NaN for one run), and the mean's interval."""

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
    """For example " (0.815 to 1.000, exact)"; empty if no interval was asked for."""
    if estimate.method == NO_INTERVAL:
        return f" ({NO_INTERVAL})"
    if math.isnan(estimate.low):
        return ""
    method = f", {estimate.method}" if estimate.method else ""
    return f" ({estimate.low:.3f}{to}{estimate.high:.3f}{method})"


def strata_of(y: Integers, group: Integers) -> dict[str, Integers]:
    """The groups by kind (see `_KINDS`). Under the paper's protocol, one video can have frames of both classes."""
    positive = np.bincount(group, weights=y) > 0
    negative = np.bincount(group, weights=1 - y) > 0
    members = (negative & ~positive, positive & ~negative, positive & negative)
    strata = {kind: np.flatnonzero(of_kind) for kind, of_kind in zip(_KINDS, members, strict=True)}
    return {kind: found for kind, found in strata.items() if found.size}


def draw_weights(strata: Mapping[str, Integers], resamples: int, rng: np.random.Generator) -> Floats:
    """How often each group is drawn [resamples, g], with replacement within its stratum."""
    weight = np.zeros((resamples, sum(members.size for members in strata.values())))
    for members in strata.values():
        m = members.size
        cell = rng.integers(m, size=(resamples, m)) + m * np.arange(resamples)[:, None]
        weight[:, members] = np.bincount(cell.ravel(), minlength=resamples * m).reshape(resamples, m)
    return weight


@dataclass(frozen=True)
class Tested:
    """The samples that one run was tested on, the names of their groups [g], and the groups by kind."""

    sample: Sample
    names: NDArray[Any]
    strata: Mapping[str, Integers]

    @classmethod
    def of(cls, p: Floats, y: Integers, groups: ArrayLike | None, threshold: float) -> "Tested":
        names, group = group_index(groups, p.size)
        return cls(Sample.of(p, y, group, threshold), names, strata_of(y, group))

    @property
    def groups(self) -> tuple[Any, ...]:
        """Equal for runs that were tested on the same groups with labels of the same kind."""
        return tuple(self.names.tolist()), *((kind, tuple(x.tolist())) for kind, x in self.strata.items())

    def draw(self, resamples: int, rng: np.random.Generator, samples: int) -> dict[str, Floats]:
        """Every metric of each resample [resamples], computed in chunks that keep the arrays small.

        Args:
            samples: the size of a resample that the chunks are made for. Runs that shall draw the same groups need
                the same number.
        """
        rows = max(1, _CHUNK // samples)
        sizes = [min(rows, resamples - done) for done in range(0, resamples, rows)]
        parts = [self.sample.scores(draw_weights(self.strata, size, rng)) for size in sizes]
        return {name: np.concatenate([part[name] for part in parts]) for name in METRICS}

    def trials(self) -> dict[str, int]:
        """By metric, the number of independent trials: groups, or for the AUROC disjoint pairs of groups."""
        normal, abnormal, both = (self.strata[kind].size if kind in self.strata else 0 for kind in _KINDS)
        return {
            "sensitivity": abnormal + both,
            "specificity": normal + both,
            "accuracy": self.names.size,
            "auroc": min(normal + both, abnormal + both, self.names.size // 2),
        }

    def notes(self, group_name: str) -> list[str]:
        """A note on each kind of groups that is too small for the bootstrap."""
        return [
            f"of {self.names.size} {plural(group_name)} only {members.size} {kind}: bootstrap intervals are "
            f"{too_narrow(members.size)}"
            for kind, members in self.strata.items()
            if is_narrow(members.size)
        ]


def interval(
    name: str, value: float, drawn: Floats, tests: Sequence[Tested], *, paired: bool = True
) -> tuple[float, float, str]:
    """Low end, high end and method of the interval of a metric; the reason for NO_INTERVAL is NO_WIDTH.

    Args:
        value: of the metric, or its mean over runs.
        drawn: its resamples [r].
        tests: of each run.
        paired: all runs were tested on the same groups.
    """
    trials = min(test.trials().get(name, 0) for test in tests)
    tail = 100 * (1 - LEVEL) / 2
    low, high = (float(bound) for bound in np.percentile(drawn, (tail, 100 - tail)))
    if name in PROPORTIONS and paired and all(test.sample.size.max() == 1 for test in tests):
        exact_low, exact_high = exact_interval(value * trials, trials)
        if len(tests) == 1:
            return exact_low, exact_high, EXACT
        return min(low, exact_low), max(high, exact_high), BOTH
    if high - low > 1e-12:  # more than rounding
        return low, high, BOOTSTRAP
    if trials and value in (0.0, 1.0):
        return *exact_interval(value * trials, trials), EXACT
    return math.nan, math.nan, NO_INTERVAL


def exact_interval(right: float, trials: int) -> tuple[float, float]:
    """The interval of Clopper and Pearson (1934) for the proportion `right` / `trials`.

    Its ends are quantiles of beta distributions. These exist for a fractional `right` too, the mean over several runs,
    which `scipy.stats.binomtest` does not accept.
    """
    from scipy.special import betaincinv

    tail = (1 - LEVEL) / 2
    low = float(betaincinv(right, trials - right + 1, tail)) if right > 0 else 0.0
    high = float(betaincinv(right + 1, trials - right, 1 - tail)) if right < trials else 1.0
    return low, high


def narrowness(n: int) -> float:
    """The share by which a bootstrap percentile interval of a mean of `n` values is narrower than Student's interval.

    Student's interval is right for normally distributed values (Hesterberg 2015, What Teachers Should Know About the
    Bootstrap).
    """
    from scipy.special import ndtri, stdtrit

    upper = (1 + LEVEL) / 2
    return 1.0 if n < 2 else 1 - float(math.sqrt((n - 1) / n) * ndtri(upper) / stdtrit(n - 1, upper))


def is_narrow(n: int) -> bool:
    """Whether bootstrap intervals of `n` groups or runs need a note."""
    return narrowness(n) >= _NARROW


def too_narrow(n: int) -> str:
    return "without meaning" if n < 2 else f"about {100 * narrowness(n):.0f} % too narrow"
