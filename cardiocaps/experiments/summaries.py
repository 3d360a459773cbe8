"""The numbers of a table's row: metrics over the seeds, the published definitions, and the cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from cardiocaps.errors import plural
from cardiocaps.experiments.reported import Reported
from cardiocaps.experiments.results import Result
from cardiocaps.metrics import MeanEstimate, RunsReport, evaluate_runs, expected_calibration_error

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class Row:
    """A system of an exhibit and its results."""

    system: str  # its key
    title: str
    results: tuple[Result, ...]  # one for each seed, in their order; may be empty
    error: str | None  # why results are missing


@dataclass(frozen=True)
class Summary(Row):
    """A row with its numbers. Made by `summarise`."""

    unit: str  # what is counted: "video" or "frame"
    drawn: str  # what the bootstrap draws: "video", "patient" or "study"
    thresholds: tuple[float, ...]  # of each result
    report: RunsReport  # by `unit`, with decisions at the thresholds
    published: RunsReport  # by frame, with decisions at 0.5
    calibration_error: MeanEstimate
    reported: Reported | None  # the paper's own figures
    notes: tuple[str, ...]

    @property
    def seeds(self) -> int:
        return len(self.results)

    @property
    def threshold(self) -> MeanEstimate:
        return mean_and_deviation(self.thresholds)

    @property
    def parameters(self) -> int | None:
        """The number of trainable parameters."""
        return next((r.parameters for r in self.results if r.parameters is not None), None)

    @property
    def peak_memory(self) -> int | None:
        """The largest of all seeds, in bytes."""
        return max((r.peak_memory for r in self.results if r.peak_memory is not None), default=None)

    def cost(self, name: str) -> MeanEstimate:
        """`epochs`, `best_epoch`, `seconds_per_epoch` or `seconds`, over the seeds that have it."""
        return mean_and_deviation([x for x in (getattr(r, name) for r in self.results) if x is not None])


def mean_and_deviation(values: Sequence[float]) -> MeanEstimate:
    """Mean and deviation; NaN without a value, and for the deviation of a single one."""
    if not values:
        return MeanEstimate(math.nan)
    return MeanEstimate(fmean(values), stdev(values) if len(values) > 1 else math.nan)


def summarise(row: Row, of_paper: Reported | None, bootstrap: int) -> Summary:
    """The numbers of a row that has results.

    Args:
        of_paper: the paper's own figures, if it has any.
        bootstrap: resamples for the intervals; 0: none.

    Raises:
        ValueError: results are counted by different units.
    """
    units = {result.unit for result in row.results}
    if len(units) != 1:
        raise ValueError(f"summarise: units of {row.system!r} are {sorted(units)}; expected one")
    unit = units.pop()
    thresholds, notes = [], []
    for result in row.results:
        threshold, reason = result.threshold
        thresholds.append(threshold)
        if reason:
            notes.append(f"seed {result.seed}: {reason}, so the threshold is {threshold:g}")
    probabilities, labels, groups = zip(*(result.test.samples(unit) for result in row.results), strict=True)
    drawn = row.results[0].test.group_name
    report = evaluate_runs(probabilities, labels, groups, thresholds, bootstrap=bootstrap, group_name=drawn)
    notes += [f"{name} is undefined: {reason}" for name, reason in report.undefined.items()]
    notes += [f"{name} has no interval: {reason}" for name, reason in report.no_interval.items()]
    notes += report.notes
    if not report.paired:
        notes.append(f"the seeds were tested on different {plural(drawn)}, which were resampled by themselves")
    if row.error:
        notes.append(f"only {len(row.results)} of the seeds: {row.error}")
    by_frame = [result.test.samples("frame")[:2] for result in row.results]
    return Summary(
        **vars(row),
        unit=unit,
        drawn=drawn,
        thresholds=tuple(thresholds),
        report=report,
        published=evaluate_runs(*zip(*by_frame, strict=True), bootstrap=0),
        calibration_error=mean_and_deviation(
            [expected_calibration_error(p, y, CALIBRATION_BINS) for p, y in zip(probabilities, labels, strict=True)]
        ),
        reported=of_paper,
        notes=tuple(notes),
    )
