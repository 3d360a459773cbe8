"""Metrics averaged over several runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.metrics.classification import Report, check_decision, evaluate
from cardiocaps.metrics.intervals import (
    _NARROW,
    Counts,
    MeanEstimate,
    draw_scores,
    narrowness,
    notes_on_size,
    strata_of,
    too_narrow,
    with_interval,
)
from cardiocaps.metrics.samples import checked_samples, group_index
from cardiocaps.metrics.scores import METRICS, PUBLISHED, Sample
from cardiocaps.metrics.thresholds import THRESHOLD


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
    check_decision(THRESHOLD, bootstrap)

    undefined: dict[str, str] = {}
    for number, run in enumerate(runs, start=1):
        for name, reason in run.undefined.items():
            undefined.setdefault(name, reason if count == 1 else f"run {number} of {count}: {reason}")
    videos: dict[Any, int] = {}  # the videos of the runs seen so far, and which stream of random numbers draws them
    samples, notes = [], []
    most = max(run.n for run in runs)
    for p, y, group, threshold in zip(probabilities, labels, groups, thresholds, strict=True):
        checked, truth = checked_samples(p, y)
        index = group_index(group, checked.size)
        names = np.unique(np.arange(checked.size) if group is None else np.asarray(group))
        sample = Sample.of(checked, truth, index, threshold)
        strata = strata_of(truth, index, names.size)
        same = (tuple(names.tolist()), *((kind, tuple(members.tolist())) for kind, members in strata.items()))
        stream = videos.setdefault(same, len(videos))
        samples.append((sample, strata, stream))
        if bootstrap:
            notes += notes_on_size(strata, names.size, group_name)
    summarised = {
        name: MeanEstimate(*_mean_and_deviation([run.metrics[name].value for run in runs])) for name in METRICS
    }
    no_interval: dict[str, str] = {}
    if bootstrap:
        drawn = [
            # The numbers of a stream begin anew for every run, and so draw the same videos.
            draw_scores(sample, strata, bootstrap, np.random.default_rng([seed, stream] if stream else seed), most)
            for sample, strata, stream in samples
        ]
        chosen = np.random.default_rng([seed, len(videos)]).integers(count, size=(bootstrap, count))
        counts = Counts.of_runs([Counts.of(strata, sample) for sample, strata, _ in samples], len(videos) == 1)
        for name, mean in summarised.items():
            if name not in undefined:
                of_runs = np.stack([values[name] for values in drawn], axis=1)
                means = np.take_along_axis(of_runs, chosen, axis=1).mean(axis=1) if count > 1 else of_runs[:, 0]
                found, why = with_interval(name, mean.value, means, counts)
                summarised[name] = replace(mean, low=found.low, high=found.high, method=found.method)
                no_interval |= {name: why} if why else {}
        if any(mean.sd > 0 for mean in summarised.values()) and narrowness(count) >= _NARROW:
            notes.append(f"only {count} seeds: what bootstrap intervals owe to them is {too_narrow(count)}")
    return RunsReport(
        metrics=summarised,
        paper={name: MeanEstimate(*_mean_and_deviation([run.paper[name] for run in runs])) for name in PUBLISHED},
        runs=runs,
        paired=len(videos) == 1,
        undefined=undefined,
        no_interval=no_interval,
        notes=tuple(dict.fromkeys(notes)),
    )


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    # Not with np.std: of equal values it need not be zero.
    return fmean(values), stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else math.nan
