"""Metrics averaged over several runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.metrics.classification import Report, evaluate
from cardiocaps.metrics.intervals import NO_INTERVAL, NO_WIDTH, MeanEstimate, Tested, interval, is_narrow, too_narrow
from cardiocaps.metrics.samples import checked_samples
from cardiocaps.metrics.scores import METRICS, PUBLISHED
from cardiocaps.metrics.thresholds import THRESHOLD


@dataclass(frozen=True)
class RunsReport:
    """The result of `evaluate_runs`.

    Attributes:
        metrics: a mean over the runs for each of METRICS.
        paper: a mean over the runs for each of PUBLISHED, without interval.
        runs: the report of each run, without intervals.
        paired: all runs were tested on the same videos.
        undefined: the reason for each metric that is NaN.
        no_interval: the reason for each metric without an interval.
        notes: what limits the intervals.
    """

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
    """Metrics averaged over several runs of one system; a metric that is undefined in one run is undefined.

    The interval is that of the average, for videos and seeds such as these. A resample draws groups, the same ones for
    all runs that were tested on them, draws as many runs as there are, with replacement, and averages the metric over
    these runs. Runs that were tested on other groups, or with other labels, draw their groups by themselves. A single
    run has the intervals of `evaluate`.

    Args:
        probabilities: of each run, [n] of class 1.
        labels: of each run, [n], 0 or 1.
        groups: of each run, as `evaluate` takes them. None: every sample by itself.
        thresholds: of each run. None: 0.5 for all.
        bootstrap: number of resamples; 0: no intervals of any method.
        seed: of the resamples.
        group_name: what the notes call one group.

    Raises:
        ValueError: see `evaluate`; or the sequences have different lengths.
    """
    count = len(probabilities)
    groups = [None] * count if groups is None else groups
    thresholds = [THRESHOLD] * count if thresholds is None else thresholds
    runs = tuple(
        evaluate(p, y, group, threshold=threshold, bootstrap=0, seed=seed, group_name=group_name)
        for p, y, group, threshold in zip(probabilities, labels, groups, thresholds, strict=True)
    )

    undefined: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        for name, reason in run.undefined.items():
            undefined.setdefault(name, reason if count == 1 else f"run {number} of {count}: {reason}")
    metrics = {name: _mean([run.metrics[name].value for run in runs]) for name in METRICS}
    tests = [
        Tested.of(*checked_samples(p, y), group, threshold)
        for p, y, group, threshold in zip(probabilities, labels, groups, thresholds, strict=True)
    ]
    known: dict[Any, int] = {}
    streams = [known.setdefault(test.groups, len(known)) for test in tests]  # of random numbers, by the groups
    paired = len(known) == 1
    notes: list[str] = []
    if bootstrap:
        notes = [note for test in tests for note in test.notes(group_name)]
        most = max(run.n for run in runs)
        drawn = [
            # Each run restarts the random numbers of its stream, so runs with the same groups draw the same ones.
            test.draw(bootstrap, np.random.default_rng([seed, stream] if stream else seed), most)
            for test, stream in zip(tests, streams, strict=True)
        ]
        chosen = np.random.default_rng([seed, len(known)]).integers(count, size=(bootstrap, count))
        for name, mean in metrics.items():
            if name not in undefined:
                of_runs = np.stack([values[name] for values in drawn], axis=1)
                means = np.take_along_axis(of_runs, chosen, axis=1).mean(axis=1) if count > 1 else of_runs[:, 0]
                found = interval(name, mean.value, means, tests, paired=paired)
                metrics[name] = MeanEstimate(mean.value, mean.sd, *found)
        if any(mean.sd > 0 for mean in metrics.values()) and is_narrow(count):
            notes.append(f"only {count} seeds: the part of bootstrap intervals due to seeds is {too_narrow(count)}")
    return RunsReport(
        metrics=metrics,
        paper={name: _mean([run.paper[name] for run in runs]) for name in PUBLISHED},
        runs=runs,
        paired=paired,
        undefined=undefined,
        no_interval={name: NO_WIDTH for name, mean in metrics.items() if mean.method == NO_INTERVAL},
        notes=tuple(dict.fromkeys(notes)),
    )


def _mean(values: Sequence[float]) -> MeanEstimate:
    has_deviation = len(values) > 1 and all(map(math.isfinite, values))
    # Not np.std, which need not be zero for equal values.
    return MeanEstimate(fmean(values), stdev(values) if has_deviation else math.nan)
