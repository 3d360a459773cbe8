"""Rows of a table that no system was trained for: always normal; on the phantom the Bayes bound and another reader."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import numpy as np

from cardiocaps.experiments.reported import ALWAYS_NORMAL
from cardiocaps.experiments.results import Result
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.metrics import METRICS, PUBLISHED, MeanEstimate, RunsReport, evaluate_runs

if TYPE_CHECKING:
    from cardiocaps.config import TrainConfig
    from cardiocaps.phantom import Variant
    from cardiocaps.phantom.patients import Patient

BAYES_BOUND, ANOTHER_READER = "bayes-bound", "another-reader"
BOUNDS: Mapping[str, str] = {BAYES_BOUND: "Bayes bound", ANOTHER_READER: "Another reader"}
"""The rows that the phantom knows: key -> title."""

REFERENCES = (ALWAYS_NORMAL, *BOUNDS)
"""The keys of all rows of this kind."""

_RANKING = ("auroc", "average_precision")
"""The metrics that need neither a threshold nor probabilities that are calibrated."""

_NOTES = {
    BAYES_BOUND: "orders the test videos by the probability of the label given the true lengths of the heart, which "
    "the phantom knows: 1 − Π Φ((threshold − length) / (error × length)) over IVSd, LVIDd and LVPWd "
    "(`cardiocaps/phantom/ceiling.py`). As no image says how the reader erred whose measurements are the label, no "
    "classifier orders them better, in the mean over readers' errors",
    ANOTHER_READER: "measures the same lengths with errors of the same size, and orders the videos by the largest "
    "share of a threshold that a length reaches. The size is that of the difficulty, from the differences between two "
    "readers in J Am Soc Echocardiogr 2021;34:443–445, table 2",
}
_NOTE = "the order alone is known, so what needs a threshold or calibrated probabilities is empty"
_EASY = (
    "1 for any test videos, and so without interval: at difficulty easy no reader errs, no heart lies near a "
    "threshold, and the label follows from the true lengths"
)


def always_normal(known: Result) -> Row:
    """The row of a classifier that calls all samples normal, on the data of a result."""
    test, validation = (replace(x, probability=np.zeros(x.clip.size)) for x in (known.test, known.validation))
    result = Result(
        system=ALWAYS_NORMAL,
        unit=known.unit,
        device="–",
        seed=0,
        parameters=None,
        seconds=0.0,
        at_once=known.at_once,
        threads=known.threads,
        validation=validation,
        test=test,
    )
    return Row(ALWAYS_NORMAL, "Always normal", (result,), None)


@dataclass(frozen=True)
class Truth:
    """What the phantom of an experiment knows about its patients.

    Attributes:
        patients: of all splits.
        variant: of the phantom.
    """

    patients: Sequence[Patient]
    variant: Variant

    @classmethod
    def of(cls, config: TrainConfig) -> Self | None:
        """That of an experiment's phantom; None for other data."""
        if config.data is not None:
            return None
        from cardiocaps.phantom import Variant
        from cardiocaps.phantom.patients import plan

        variant = Variant.of(config)
        return cls(plan(config.phantom_videos, config.phantom_seed, variant), variant)

    def bounds(self, known: Result, bootstrap: int) -> list[Summary]:
        """The rows BOUNDS for the test videos of a result.

        They have no results, AUROC and average precision alone, and a note with their definition.

        Args:
            known: a result of a system that was tested on videos of this phantom.
            bootstrap: resamples for the intervals; 0: none.

        Returns:
            The summaries; none if the result is counted by frame, whose split tests no new video, or if its test videos
            have one label.
        """
        from cardiocaps.phantom.ceiling import scores

        _, label, names = known.test.samples("video")
        if known.unit != "video" or len(set(label.tolist())) < 2:
            return []
        place = {str(name): number for number, name in enumerate(names)}
        tested = [patient for patient in self.patients if patient.name in place]
        labels = label[[place[patient.name] for patient in tested]]
        if self.variant.difficulty_settings is None:
            one = dict.fromkeys(_RANKING, MeanEstimate(1.0))
            return [_bound(key, one, (_EASY, _NOTE)) for key in BOUNDS]
        found = []
        for key, score in zip(BOUNDS, scores(tested, self.variant), strict=True):
            report = evaluate_runs([score], [labels], bootstrap=bootstrap)
            metrics = {name: report.metrics[name] for name in _RANKING}
            found.append(_bound(key, metrics, (_NOTES[key], _NOTE)))
        return found


def _bound(key: str, metrics: Mapping[str, MeanEstimate], notes: tuple[str, ...]) -> Summary:
    nothing = MeanEstimate(math.nan)

    def report(metrics: Mapping[str, MeanEstimate]) -> RunsReport:
        return RunsReport(
            metrics={**dict.fromkeys(METRICS, nothing), **metrics},
            paper=dict.fromkeys(PUBLISHED, nothing),
            runs=(),
            paired=True,
            undefined={},
            no_interval={},
            notes=(),
        )

    return Summary(
        system=key,
        title=BOUNDS[key],
        results=(),
        error=None,
        unit="video",
        drawn="video",
        thresholds=(),
        report=report(metrics),
        published=report({}),
        calibration_error=nothing,
        reported=None,
        notes=notes,
    )
