"""The metrics, computed for weighted samples. With scikit-learn, each of thousands of resamples would be a call."""

from dataclasses import dataclass

import numpy as np

from cardiocaps.metrics.samples import Floats, Integers
from cardiocaps.metrics.thresholds import THRESHOLD, confusion, last_of_ties

PUBLISHED = ("accuracy", "f1", "roc_auc", "pr_auc")
"""The four columns of the paper's tables, as its published code defines them; see `Report`."""

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

DECISIONS = ("sensitivity", "specificity", "f1", "f1_weighted", "accuracy")
"""The metrics that depend on the threshold."""


@dataclass(frozen=True)
class Sample:
    """Samples in falling order of probability, and the sums over each group that the metrics need."""

    group: Integers  # [n] in falling order of probability
    positive: Floats  # [n] 0 or 1, in the same order
    last: Integers  # [t] last positions of equal probabilities
    cells: Floats  # [g, 4] tn, fp, fn, tp of each group
    squared: Floats  # [g] sum of (p - y)^2
    size: Floats  # [g]

    @classmethod
    def of(cls, p: Floats, y: Integers, group: Integers, threshold: float = THRESHOLD) -> "Sample":
        count = int(group.max()) + 1
        order = np.argsort(-p, kind="stable")
        cell = 4 * group + 2 * y + (p > threshold)
        return cls(
            group=group[order],
            positive=y[order].astype(np.float64),
            last=last_of_ties(p[order]),
            cells=np.bincount(cell, minlength=4 * count).reshape(count, 4).astype(np.float64),
            squared=np.bincount(group, weights=np.square(p - y), minlength=count).astype(np.float64),
            size=np.bincount(group, minlength=count).astype(np.float64),
        )

    def estimate(self) -> dict[str, float]:
        """Every metric of the unweighted samples."""
        return {name: float(v[0]) for name, v in self.scores(np.ones((1, self.size.size))).items()}

    def scores(self, weight: Floats) -> dict[str, Floats]:
        """Every metric [r] for the weights `weight` [r, g] of the groups; NaN where it is undefined."""
        tn, fp, fn, tp = (weight @ self.cells).T
        total = weight @ self.size
        with np.errstate(divide="ignore", invalid="ignore"):
            f1 = 2 * tp / (2 * tp + fp + fn)
            f1_of_zero = 2 * tn / (2 * tn + fp + fn)
            # The F1 of a class that does not occur may be 0/0; its weight is zero.
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
            # Trapezoids: a tie between a positive and a negative counts as one half.
            auroc = (new_fp * (tp - new_tp / 2)).sum(axis=1) / (positives * negatives)
            precision = np.where(flagged > 0, tp / flagged, 0.0)
            average_precision = (new_tp * precision).sum(axis=1) / positives
        average_precision[negatives == 0] = np.nan
        return auroc, average_precision


def published_scores(p: Floats, y: Integers) -> dict[str, float]:
    """The metrics of PUBLISHED, for decisions at THRESHOLD."""
    _, fp, _, tp = confusion(p, y).ravel().tolist()
    value = Sample.of(p, y, np.arange(p.size)).estimate()
    return {
        "accuracy": value["accuracy"],
        "f1": value["f1_weighted"],
        "roc_auc": (value["sensitivity"] + value["specificity"]) / 2,
        "pr_auc": tp / (tp + fp) if tp + fp else 0.0,
    }
