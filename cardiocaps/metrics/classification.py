"""Evaluation of a classifier's probabilities."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.errors import plural
from cardiocaps.metrics.intervals import LEVEL, Counts, Estimate, draw_scores, notes_on_size, strata_of, with_interval
from cardiocaps.metrics.samples import checked_samples, finite_or_none, group_index
from cardiocaps.metrics.scores import METRICS, Sample, published_scores
from cardiocaps.metrics.thresholds import THRESHOLD, confusion


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
                    "value": finite_or_none(e.value),
                    "low": finite_or_none(e.low),
                    "high": finite_or_none(e.high),
                    "method": e.method or None,
                }
                for name, e in self.metrics.items()
            },
            "paper": {name: finite_or_none(value) for name, value in self.paper.items()},
            "confusion": [list(row) for row in self.confusion],
            "undefined": dict(self.undefined),
            "no_interval": dict(self.no_interval),
            "notes": list(self.notes),
            "bootstrap": {"resamples": self.bootstrap, "seed": self.seed, "level": LEVEL},
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
    p, y = checked_samples(probability, label)
    check_decision(threshold, bootstrap)
    group = group_index(groups, p.size)
    sample = Sample.of(p, y, group, threshold)
    count = sample.size.size
    value = sample.estimate()

    strata = strata_of(y, group, count)
    metrics = {name: Estimate(value[name]) for name in METRICS}
    no_interval: dict[str, str] = {}
    if bootstrap:
        drawn = draw_scores(sample, strata, bootstrap, np.random.default_rng(seed), p.size)
        counts = Counts.of(strata, sample)
        for name in METRICS:
            if not math.isnan(value[name]):
                metrics[name], reason = with_interval(name, value[name], drawn[name], counts)
                no_interval |= {name: reason} if reason else {}

    (tn, fp), (fn, tp) = confusion(p, y, threshold).tolist()
    paper = published_scores(p, y)
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
        notes=tuple(notes_on_size(strata, count, group_name)) if bootstrap else (),
        bootstrap=bootstrap,
        seed=seed,
        threshold=float(threshold),
        no_interval=no_interval,
        group_name=group_name,
    )


def check_decision(threshold: float, bootstrap: int) -> None:
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: must lie in [0, 1], is {threshold}")
    if bootstrap < 0:
        raise ValueError(f"bootstrap: must be 0 or more, is {bootstrap}")
