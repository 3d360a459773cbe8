"""Comparison of two systems on the same test videos, with videos and seeds as random effects.

The variance of a difference has two parts. The part of the videos is, for the AUROC, that of DeLong et al. (1988), in
the form of Sun and Xu (2014), with the structural components averaged over the seeds of a system. (No library that is
kept up has it: SciPy, scikit-learn and statsmodels lack it.) For any metric it is that of a paired bootstrap. The part
of the seeds is the variance over the seeds of each system, divided by their number. Both together give Student's t with
the degrees of freedom of Satterthwaite (1946), so interval and p speak of other videos and other seeds. To draw the
seeds in the bootstrap too would be simpler, but with three seeds its p is far too small.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, variance

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.metrics.intervals import LEVEL, Tested
from cardiocaps.metrics.samples import Floats, checked_samples

POWER = 0.8
"""The power at which the smallest difference that a test finds is stated."""

_NORMAL = 1e6
"""Degrees of freedom from which Student's t is the normal distribution."""


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
        low: of the 95 % interval, for other videos and seeds; where a system has one seed, for other videos and these
            seeds. NaN without resamples, and where a class has one group.
        high: of it.
        p: two-sided, against 0 or the value that is asked for; NaN where `low` is, and where a system has one seed.
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
        p: two-sided, for other videos and seeds; NaN if a system has one seed.
        freedom: degrees of freedom of `se`.
    """

    value: float
    se_videos: float
    se_seeds: float
    p_videos: float
    p: float
    freedom: float

    @property
    def se(self) -> float:
        """Of videos and seeds together; of videos alone where a system has one seed."""
        return self.se_videos if math.isnan(self.se_seeds) else math.hypot(self.se_videos, self.se_seeds)


def paired_differences(
    one: Runs, other: Runs, names: Sequence[str], *, bootstrap: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """Differences one − other of metrics, by a paired bootstrap.

    A resample draws groups (videos or patients), the same ones for both systems and all their seeds.

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

    A resample draws groups, the same ones for all runs.

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
    every = [test for terms in tested for *_, tests in terms for test in tests]
    _check_paired(every)
    if any(len({len(tests) for *_, tests in terms}) > 1 for terms in tested):
        raise ValueError("runs of a system differ in number between its terms; expected the same networks in all")
    samples = max(test.sample.group.size for test in every)
    fewest = min(x.size for x in every[0].strata.values())
    by_seed = {name: [np.zeros(len(terms[0][2])) for terms in tested] for name in names}
    drawn = {name: np.zeros(bootstrap) for name in names}
    for number, terms in enumerate(tested):
        for coefficient, runs, tests in terms:
            estimates = [test.sample.estimate() for test in tests]
            resamples = runs.drawn(bootstrap, seed, samples) if bootstrap else []
            for name in names:
                by_seed[name][number] += [coefficient * of_run[name] for of_run in estimates]
                if resamples:
                    drawn[name] += coefficient * np.mean([of_run[name] for of_run in resamples], axis=0)
    return {name: difference_of([x.tolist() for x in by_seed[name]], drawn[name], fewest, least) for name in by_seed}


def difference_of(by_seed: Sequence[Sequence[float]], drawn: Floats, fewest: int, least: float = 0.0) -> Difference:
    """The sum over systems of means over seeds, with its interval and p.

    Args:
        by_seed: of each system the values of its seeds.
        drawn: the sum in resamples of the groups [r], in which all seeds are kept; empty: no interval.
        fewest: groups of the smaller class; the variance of the resamples has one degree of freedom less. One group: no
            interval, because nothing is known about others.
        least: what p compares the sum with.
    """
    from scipy.special import stdtrit

    value = sum(map(fmean, by_seed))
    if not drawn.size or not math.isfinite(value) or fewest < 2:
        return Difference(value)
    of_seeds = _of_seeds(by_seed)
    se, freedom = _satterthwaite([(float(np.var(drawn, ddof=1)), fewest - 1.0), *(of_seeds or ())])
    half = se * float(stdtrit(freedom, (1 + LEVEL) / 2)) if se else 0.0
    p = math.nan if of_seeds is None else _two_sided(value - least, se, freedom)
    return Difference(value, value - half, value + half, p)


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
    of_videos = []
    for kind in (0, 1):
        averaged = [np.mean([part[kind] for part in parts], axis=0) for parts in of_systems]
        n = averaged[0].size
        of_videos.append((float(np.var(averaged[0] - averaged[1], ddof=1)) / n, n - 1.0))
    of_seeds = _of_seeds(means)
    se_videos = math.sqrt(sum(v for v, _ in of_videos))
    se, freedom = _satterthwaite([*of_videos, *(of_seeds or ())])
    return DeLong(
        value,
        se_videos,
        math.nan if of_seeds is None else math.sqrt(sum(v for v, _ in of_seeds)),
        _two_sided(value, se_videos, math.inf),
        math.nan if of_seeds is None else _two_sided(value, se, freedom),
        freedom,
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


def detectable(se: float, comparisons: int = 1, freedom: float = math.inf) -> float:
    """The smallest difference that a two-sided test finds with POWER, at 5 % over all `comparisons` (Bonferroni).

    Args:
        se: the standard error of the difference.
        freedom: its degrees of freedom. The statistic of Student's t has the noncentral t distribution then.
    """
    from scipy.special import nctdtrinc, ndtri, stdtrit

    below = 1 - (1 - LEVEL) / (2 * comparisons)
    if freedom > _NORMAL:
        return se * float(ndtri(below) + ndtri(POWER))
    return se * float(nctdtrinc(freedom, 1 - POWER, stdtrit(freedom, below)))


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


def _of_seeds(by_seed: Sequence[Sequence[float]]) -> list[tuple[float, float]] | None:
    """The variance of each system's mean over seeds, with degrees of freedom; None if a system has a single seed."""
    if min(map(len, by_seed)) < 2:
        return None
    return [(variance(x) / len(x), len(x) - 1.0) for x in by_seed]


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Standard error and degrees of freedom of a sum of independent parts: (variance, degrees of freedom) of each."""
    total = sum(v for v, _ in parts)
    below = sum(v**2 / freedom for v, freedom in parts if v)
    return math.sqrt(total), total**2 / below if below else math.inf


def _two_sided(value: float, se: float, freedom: float) -> float:
    """p of Student's t; of the normal distribution for infinite `freedom`."""
    from scipy.special import ndtr, stdtr

    if se == 0:
        return 1.0 if value == 0 else math.nan
    t = -abs(value) / se
    return float(2 * (ndtr(t) if freedom > _NORMAL else stdtr(freedom, t)))
