"""Evaluation of a classifier's probabilities."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.errors import plural
from cardiocaps.metrics.intervals import LEVEL, NO_INTERVAL, NO_WIDTH, Estimate, Tested, interval
from cardiocaps.metrics.samples import checked_samples
from cardiocaps.metrics.scores import METRICS, published_scores
from cardiocaps.metrics.thresholds import THRESHOLD, confusion


@dataclass(frozen=True)
class Report:
    """The result of `evaluate`.

    Attributes:
        groups: the number of groups that the bootstrap draws from; `group_name` says what they are.
        metrics: an estimate for each of METRICS, for decisions at `threshold`.
        paper: the metrics of PUBLISHED, which the published code of CardioCaps computes at 0.5: `accuracy`, `f1`
            (weighted), `roc_auc` (of hard labels, that is, balanced accuracy) and `pr_auc` (precision of class 1).
        confusion: counts at `threshold`: rows are the true class, columns the predicted one.
        undefined: the reason for each metric that is NaN.
        no_interval: the reason for each metric without an interval.
        notes: what limits the intervals.
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
        """Plain values for `write_json`."""
        return {
            "n": self.n,
            "positives": self.positives,
            "groups": self.groups,
            "drawn": plural(self.group_name),
            "threshold": self.threshold,
            "metrics": {name: {**asdict(e), "method": e.method or None} for name, e in self.metrics.items()},
            "paper": dict(self.paper),
            "confusion": self.confusion,
            "undefined": dict(self.undefined),
            "no_interval": dict(self.no_interval),
            "notes": self.notes,
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
    """All metrics of a classifier, with 95 % intervals (see `intervals`).

    Metrics that need both classes are NaN if only one is present; `Report.undefined` has the reason.

    Args:
        probability: [n] of class 1.
        label: [n], 0 or 1.
        groups: [n], integers or text: what the bootstrap draws as a whole, that is, the video, or the patient if
            several videos are of one. None: every sample by itself.
        threshold: class 1 is predicted above it. (The metrics of PUBLISHED always use 0.5.)
        bootstrap: number of resamples; 0: no intervals of any method.
        seed: of the resamples.
        group_name: what the notes call one group.

    Raises:
        ValueError: see `checked_samples`.
    """
    p, y = checked_samples(probability, label)
    tested = Tested.of(p, y, groups, threshold)
    value = tested.sample.estimate()
    metrics = {name: Estimate(value[name]) for name in METRICS}
    if bootstrap:
        drawn = tested.draw(bootstrap, np.random.default_rng(seed), p.size)
        for name in METRICS:
            if not math.isnan(value[name]):
                metrics[name] = Estimate(value[name], *interval(name, value[name], drawn[name], [tested]))

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
        groups=tested.names.size,
        metrics=metrics,
        paper=paper,
        confusion=((tn, fp), (fn, tp)),
        undefined={name: reason for name, reason in reasons.items() if math.isnan(values[name])},
        notes=tuple(tested.notes(group_name)) if bootstrap else (),
        bootstrap=bootstrap,
        seed=seed,
        threshold=float(threshold),
        no_interval={name: NO_WIDTH for name, estimate in metrics.items() if estimate.method == NO_INTERVAL},
        group_name=group_name,
    )
