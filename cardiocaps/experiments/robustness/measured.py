"""The numbers of the experiment from what the systems gave in the tests: curves, equivariance, verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cardiocaps.errors import CheckpointError
from cardiocaps.experiments.results import Result
from cardiocaps.experiments.robustness.claims import Evidence, claims
from cardiocaps.experiments.robustness.equivariance import Equivariance
from cardiocaps.experiments.robustness.shifts import UNSHIFTED, ShiftedTest, phantom_of, with_unshifted
from cardiocaps.experiments.robustness.verdicts import Judged, judge
from cardiocaps.experiments.summaries import CALIBRATION_BINS, mean_and_deviation
from cardiocaps.metrics import Floats, MeanEstimate, evaluate_runs, expected_calibration_error
from cardiocaps.metrics.comparison import Difference, Runs, paired_contrast
from cardiocaps.metrics.samples import Integers
from cardiocaps.phantom.patients import plan
from cardiocaps.runtime.progress import shown

if TYPE_CHECKING:
    from cardiocaps.experiments.jobs import Job
    from cardiocaps.experiments.robustness.scoring import Scored

CURVES = ("auroc", "average_precision", "brier")
"""The metrics of the curves, with intervals. The Brier score is that of calibration and ranking together."""


@dataclass(frozen=True)
class Point:
    """A system in one test.

    Attributes:
        seeds: number of trained networks.
        metrics: of CURVES, means over the seeds.
        changes: of CURVES, minus the same in the unshifted test; zero there.
        calibration_error: mean over the seeds of the expected calibration error.
    """

    seeds: int
    metrics: Mapping[str, MeanEstimate]
    changes: Mapping[str, Difference]
    calibration_error: MeanEstimate


@dataclass(frozen=True)
class Measured:
    """Everything that the exhibit shows.

    Attributes:
        points: (system, name of the test) -> its numbers. A system has all tests or none.
        equivariance: system -> its measures.
        label: of the patients of `equivariance`, in its order.
        verdicts: of the claims.
        bootstrap: resamples for intervals and verdicts.
    """

    points: Mapping[tuple[str, str], Point]
    equivariance: Mapping[str, Equivariance]
    label: Integers
    verdicts: Sequence[Judged]
    bootstrap: int

    @property
    def systems(self) -> list[str]:
        return list(dict.fromkeys(system for system, _ in self.points))


def measure(
    jobs: Sequence[Job],
    tests: Sequence[ShiftedTest],
    results: Mapping[str, Sequence[Result]],
    bootstrap: int,
    progress: bool = False,
) -> Measured:
    """Measure systems from the files that `scoring.score_all` has left.

    Args:
        jobs: finished ones of the systems that were tested under shifts. A job without the scores of a test is left
            out of all.
        tests: that they were scored on.
        results: system -> its results on the unshifted test, for the claims about it.
        bootstrap: resamples; 0: no intervals, and no verdicts but that about times.
        progress: show how many systems have been measured, which takes minutes.
    """
    tests = with_unshifted(tests)
    runs: dict[tuple[str, str], Runs] = {}
    features: dict[str, list[dict[float, Floats]]] = {}
    label = np.zeros(0, np.int64)
    threshold = {(r.system, r.seed): r.threshold[0] for own in results.values() for r in own}
    for system in dict.fromkeys(job.system.key for job in jobs):
        complete = {job.seed: found for job in jobs if job.system.key == system and (found := _scores(job, tests))}
        if not complete:
            continue
        for test in tests:
            parts = [found[test.name].test.samples("video") for found in complete.values()]
            probabilities, labels, groups = zip(*parts, strict=True)
            runs[system, test.name] = Runs(
                probabilities, labels, groups, [threshold[system, seed] for seed in complete]
            )
        turned = [{t.size: _by_name(found[t.name]) for t in tests if _turns(t)} for found in complete.values()]
        if all(x is not None for of_seed in turned for x in of_seed.values()) and len(turned[0]) > 1:
            features[system] = [{size: x for size, x in one.items() if x is not None} for one in turned]
        _, of_video, names = next(iter(complete.values()))[UNSHIFTED.name].test.samples("video")
        label = of_video[np.argsort(names)]
    angle = _angles(jobs, tests) if features else {}
    each = shown(features.items(), len(features), "measuring equivariance") if progress else features.items()
    equivariance = {system: Equivariance.of(of_seeds, angle) for system, of_seeds in each}
    evidence = Evidence(results, runs, equivariance, label, bootstrap)
    pairs = shown(runs.items(), len(runs), "measuring curves") if progress else runs.items()
    return Measured(
        {key: _point(own, runs[key[0], UNSHIFTED.name], bootstrap) for key, own in pairs},
        equivariance,
        label,
        judge(claims(evidence)),
        bootstrap,
    )


def _scores(job: Job, tests: Sequence[ShiftedTest]) -> dict[str, Scored] | None:
    """The scores of a job in all tests; None if one is missing."""
    from cardiocaps.experiments.robustness.scoring import read_scores

    try:
        return {test.name: read_scores(job, test) for test in tests}
    except CheckpointError:
        return None


def _turns(test: ShiftedTest) -> bool:
    return test.axis in ("", "angle")


def _by_name(scored: Scored) -> Floats | None:
    """The features in the order of the videos' names."""
    return None if scored.features is None else scored.features[np.argsort(scored.test.samples("video")[2])]


def _angles(jobs: Sequence[Job], tests: Sequence[ShiftedTest]) -> dict[float, Floats]:
    """By turn, the angle of each test patient's heart in the image, degrees, in the order of the names."""
    config = jobs[0].config
    found = {}
    for test in filter(_turns, tests):
        patients = plan(config.phantom_videos, config.phantom_seed, phantom_of(config, test))
        tested = sorted((patient.name, patient.scan.tilt) for patient in patients if patient.split == "test")
        found[test.size] = np.degrees([tilt for _, tilt in tested])
    return found


def _point(own: Runs, before: Runs, bootstrap: int) -> Point:
    report = evaluate_runs(own.probabilities, own.labels, own.groups, own.thresholds, bootstrap=bootstrap)
    changes = (
        dict.fromkeys(CURVES, Difference(0.0))
        if own is before
        else paired_contrast([[(1.0, own), (-1.0, before)]], CURVES, bootstrap=bootstrap)
    )
    errors = [
        expected_calibration_error(p, y, CALIBRATION_BINS) for p, y in zip(own.probabilities, own.labels, strict=True)
    ]
    return Point(len(errors), {name: report.metrics[name] for name in CURVES}, changes, mean_and_deviation(errors))
