"""Comparison of two systems on the same test videos, with videos and seeds as random effects.

The AUROC is compared by the method of DeLong et al. (1988), in the form of Sun and Xu (2014). (No library that is kept
up has it: SciPy, scikit-learn and statsmodels lack it.) Its structural components are averaged over the seeds of a
system, which gives the variance of the mean AUROC over videos; the variance over seeds is added, so that the test
speaks of videos and seeds such as these. Every other metric is compared by the bootstrap alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.metrics.intervals import LEVEL, Tested
from cardiocaps.metrics.samples import Floats, Integers, checked_samples

POWER = 0.8
"""The power at which the smallest difference that a test finds is stated."""


@dataclass(frozen=True, eq=False)
class Runs:
    """The runs of one system: of each seed the probabilities, labels, groups (see `evaluate`) and threshold."""

    probabilities: Sequence[ArrayLike]
    labels: Sequence[ArrayLike]
    groups: Sequence[ArrayLike]
    thresholds: Sequence[float]
    _drawn: dict[tuple[int, int, int], list[dict[str, Floats]]] = field(default_factory=dict, init=False, repr=False)

    def drawn(self, bootstrap: int, seed: int, samples: int) -> list[dict[str, Floats]]:
        """Every metric of each resample, by run; see `Tested.draw`. Kept, because a system is in many comparisons.

        All runs restart the same random numbers, so those with the same groups draw the same ones.
        """
        key = bootstrap, seed, samples
        if key not in self._drawn:
            self._drawn[key] = [test.draw(bootstrap, np.random.default_rng(seed), samples) for test in self.tested()]
        return self._drawn[key]

    def tested(self) -> list[Tested]:
        return [
            Tested.of(*checked_samples(p, y), group, threshold)
            for p, y, group, threshold in zip(
                self.probabilities, self.labels, self.groups, self.thresholds, strict=True
            )
        ]


@dataclass(frozen=True)
class Difference:
    """A metric of a system minus that of another one, means over their seeds, or another sum of such means.

    Attributes:
        low: of the 95 % bootstrap interval; NaN without resamples.
        high: of it.
        p: of the bootstrap, two-sided: twice the share of resamples on the other side of 0, or of the value that is
            asked for; NaN without resamples.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


@dataclass(frozen=True)
class DeLong:
    """The difference of two mean AUROCs.

    Attributes:
        value: of the difference.
        se_videos: standard error for other videos and the same seeds.
        se_seeds: standard error for other seeds and the same videos; NaN if a system has one seed.
        p_videos: two-sided, for these seeds: the test of DeLong et al.
        p: two-sided, for other videos and seeds: Student's t with the degrees of freedom of Satterthwaite (1946).
    """

    value: float
    se_videos: float
    se_seeds: float
    p_videos: float
    p: float

    @property
    def se(self) -> float:
        """Of videos and seeds together; of videos alone where a system has one seed."""
        return self.se_videos if math.isnan(self.se_seeds) else math.hypot(self.se_videos, self.se_seeds)


def paired_differences(
    one: Runs, other: Runs, names: Sequence[str], *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """Differences one − other of metrics, by a paired bootstrap.

    A resample draws groups (videos or patients), the same ones for both systems, and for each system as many of its
    seeds as it has, and takes the difference of the means.

    Args:
        names: some of METRICS.
        bootstrap: resamples; 0: values alone.
        seed: of the resamples.

    Raises:
        ValueError: the systems were tested on different groups or labels.
    """
    return paired_contrast([[(1.0, one)], [(-1.0, other)]], names, bootstrap=bootstrap, seed=seed)


def paired_contrast(
    systems: Sequence[Sequence[tuple[float, Runs]]],
    names: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    least: float = 0.0,
) -> dict[str, Difference]:
    """Sums of coefficients times metrics, for example how much more one system falls under a shift than another one.

    A resample draws groups, the same ones for all runs, and for each system as many of its seeds as it has, the same
    ones in all its terms.

    Args:
        systems: of each system its terms, coefficient and runs. All terms of a system have the same trained networks
            in the same order, for example in several tests.
        names: some of METRICS.
        bootstrap: resamples; 0: values alone.
        seed: of the resamples.
        least: what p compares the sum with.

    Raises:
        ValueError: the runs were tested on different groups or labels, or the terms of a system have different numbers
            of runs.
    """
    tested = [[(coefficient, runs, runs.tested()) for coefficient, runs in terms] for terms in systems]
    _check_paired([test for terms in tested for *_, tests in terms for test in tests])
    if any(len({len(tests) for *_, tests in terms}) > 1 for terms in tested):
        raise ValueError("runs of a system differ in number between its terms; expected the same networks in all")
    found = dict.fromkeys(names, 0.0)
    for terms in tested:
        for coefficient, _, tests in terms:
            of_runs = [test.sample.estimate() for test in tests]
            found = {name: x + coefficient * fmean(run[name] for run in of_runs) for name, x in found.items()}
    if not bootstrap:
        return {name: Difference(value) for name, value in found.items()}
    samples = max(test.sample.group.size for terms in tested for *_, tests in terms for test in tests)
    sums = {name: np.zeros(bootstrap) for name in names}
    for number, terms in enumerate(tested):
        chosen = chosen_runs(len(terms[0][2]), bootstrap, seed, number)
        for coefficient, runs, _ in terms:
            drawn = runs.drawn(bootstrap, seed, samples)
            for name in names:
                of_name = np.stack([x[name] for x in drawn], axis=1)
                sums[name] += coefficient * np.take_along_axis(of_name, chosen, axis=1).mean(axis=1)
    return {name: difference_of(value, sums[name], least) for name, value in found.items()}


def chosen_runs(runs: int, bootstrap: int, seed: int, number: int) -> Integers:
    """The runs [bootstrap, runs] that the resamples draw of the system with this number, with replacement."""
    return np.random.default_rng([seed, 1 + number]).integers(runs, size=(bootstrap, runs))


def difference_of(value: float, drawn: Floats, least: float = 0.0) -> Difference:
    """A value with the interval and p of its resamples [r]; p is of the two-sided comparison with `least`."""
    tail = 100 * (1 - LEVEL) / 2
    low, high = (float(x) for x in np.percentile(drawn, (tail, 100 - tail)))
    sides = int((drawn <= least).sum()), int((drawn >= least).sum())
    # With one more on each side, because p = 0 cannot be known from a finite number.
    return Difference(value, low, high, min(1.0, 2 * (min(sides) + 1) / (drawn.size + 1)))


def delong(one: Runs, other: Runs) -> DeLong | None:
    """The difference of the mean AUROCs one − other; None if a group has several samples, which are not independent.

    Raises:
        ValueError: the systems were tested on different groups or labels, or there are not two groups of each class.
    """
    tests = [one.tested(), other.tested()]
    _check_paired([*tests[0], *tests[1]])
    if any(test.sample.size.max() > 1 for of_system in tests for test in of_system):
        return None
    of_systems = []
    for runs in (one, other):
        parts = [
            structural_components(*_by_group(*values))
            for values in zip(runs.probabilities, runs.labels, runs.groups, strict=True)
        ]
        of_systems.append(parts)
    means = [[fmean(part[0].tolist()) for part in parts] for parts in of_systems]  # AUROC of each seed
    value = fmean(means[0]) - fmean(means[1])
    squares = 0.0
    for kind in (0, 1):
        averaged = [np.mean([part[kind] for part in parts], axis=0) for parts in of_systems]
        squares += float(np.var(averaged[0] - averaged[1], ddof=1)) / averaged[0].size
    se_videos = math.sqrt(squares)
    videos = tests[0][0].names.size
    by_seed = [variance(x) / len(x) if len(x) > 1 else math.nan for x in means]
    se_seeds = math.sqrt(sum(by_seed))
    return DeLong(
        value,
        se_videos,
        se_seeds,
        _two_sided(value, [(se_videos**2, math.inf)]),
        _two_sided(
            value,
            [
                (se_videos**2, videos - 2),
                *((v, len(x) - 1) for v, x in zip(by_seed, means, strict=True) if not math.isnan(se_seeds)),
            ],
        ),
    )


def structural_components(probability: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    """The components of DeLong et al. (1988): of each positive sample the share of negatives below it, and of each
    negative sample the share of positives above it; equal probabilities count one half. The mean of each is the AUROC.

    Raises:
        ValueError: there are not two samples of each class.
    """
    from scipy.stats import rankdata

    p, y = checked_samples(probability, label)
    positive, negative = p[y == 1], p[y == 0]
    m, n = positive.size, negative.size
    if min(m, n) < 2:
        raise ValueError(f"label has {m} ones and {n} zeros; expected two of each at least")
    rank = rankdata(np.concatenate([positive, negative]))
    return (rank[:m] - rankdata(positive)) / n, 1 - (rank[m:] - rankdata(negative)) / m


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm (1979); NaN stays, and does not count."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[i] = largest
    return corrected


def cohens_h(one: float, other: float) -> float:
    """The effect size of two proportions: 2 arcsin √p₁ − 2 arcsin √p₂ (Cohen 1988)."""
    return 2 * math.asin(math.sqrt(one)) - 2 * math.asin(math.sqrt(other))


def cohens_d(auroc: float) -> float:
    """The distance of two normal distributions, in deviations, that has this AUROC: √2 Φ⁻¹(AUROC) (Ruscio 2008)."""
    from scipy.special import ndtri

    return math.sqrt(2) * float(ndtri(auroc))


def detectable(se: float, comparisons: int = 1) -> float:
    """The smallest difference that a two-sided test finds with POWER, at 5 % over all `comparisons` (Bonferroni).

    `se`: the standard error of the difference.
    """
    from scipy.special import ndtri

    return se * float(ndtri(1 - (1 - LEVEL) / (2 * comparisons)) + ndtri(POWER))


def hanley_mcneil(auroc: float, positives: int, negatives: int) -> float:
    """The standard error of an AUROC before anything is measured (Hanley and McNeil 1982, negative exponential)."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    square = auroc * (1 - auroc) + (positives - 1) * (q1 - auroc**2) + (negatives - 1) * (q2 - auroc**2)
    return math.sqrt(square / (positives * negatives))


def _by_group(probability: ArrayLike, label: ArrayLike, group: ArrayLike) -> tuple[Floats, Floats]:
    """Probability and label in the order of the groups, so that runs can be paired."""
    order = np.argsort(np.asarray(group), kind="stable")
    return np.asarray(probability, np.float64)[order], np.asarray(label, np.float64)[order]


def _check_paired(tests: Sequence[Tested]) -> None:
    if len({test.groups for test in tests}) > 1:
        raise ValueError("groups differ between the runs; expected the same test groups with the same labels")


def _two_sided(value: float, parts: Sequence[tuple[float, float]]) -> float:
    """p of a value whose variance is the sum of `parts` (variance, degrees of freedom), by Satterthwaite."""
    from scipy.special import ndtr, stdtr

    total = sum(v for v, _ in parts)
    if total == 0:
        return 1.0 if value == 0 else math.nan
    freedom = total**2 / max(sum(v**2 / df for v, df in parts), 1e-300)
    below = ndtr(-abs(value) / math.sqrt(total)) if freedom > 1e6 else stdtr(freedom, -abs(value) / math.sqrt(total))
    return float(2 * below)
