"""Metrics of a classifier's probabilities, with intervals, and of a regression."""

from cardiocaps.metrics.calibration import (
    bins_of_equal_mass,
    calibration_error_by_chance,
    expected_calibration_error,
    reliability,
)
from cardiocaps.metrics.classification import Report, evaluate
from cardiocaps.metrics.intervals import (
    BOOTSTRAP,
    BOTH,
    EXACT,
    NO_INTERVAL,
    Estimate,
    MeanEstimate,
    exact_interval,
    interval_text,
)
from cardiocaps.metrics.regression import RegressionReport, regression_report
from cardiocaps.metrics.runs import RunsReport, evaluate_runs
from cardiocaps.metrics.samples import Floats, Integers, by_video, mean_by
from cardiocaps.metrics.scores import DECISIONS, METRICS, PUBLISHED
from cardiocaps.metrics.thresholds import THRESHOLD, confusion, decision_threshold, threshold_counts

__all__ = [
    "BOOTSTRAP",
    "BOTH",
    "DECISIONS",
    "EXACT",
    "METRICS",
    "NO_INTERVAL",
    "PUBLISHED",
    "THRESHOLD",
    "Estimate",
    "Floats",
    "Integers",
    "MeanEstimate",
    "RegressionReport",
    "Report",
    "RunsReport",
    "bins_of_equal_mass",
    "by_video",
    "calibration_error_by_chance",
    "confusion",
    "decision_threshold",
    "evaluate",
    "evaluate_runs",
    "exact_interval",
    "expected_calibration_error",
    "interval_text",
    "mean_by",
    "regression_report",
    "reliability",
    "threshold_counts",
]
