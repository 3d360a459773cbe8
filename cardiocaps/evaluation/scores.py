"""Predictions of a network, and the scores of a model on the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cardiocaps.config import TrainConfig
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.errors import CheckpointError
from cardiocaps.evaluation.calibration import Calibration
from cardiocaps.evaluation.decision import Decision
from cardiocaps.evaluation.predictions import UNITS, Predictions
from cardiocaps.metrics import (
    DECISIONS,
    THRESHOLD,
    RegressionReport,
    Report,
    evaluate,
    expected_calibration_error,
    regression_report,
)
from cardiocaps.runtime.device import Machine
from cardiocaps.training.fit import make_trainer
from cardiocaps.training.module import Classifier


@dataclass(frozen=True)
class Scores:
    """Reports of a model on the test split, by video and by frame: at its threshold, at 0.5, and of its regression."""

    test: Predictions
    validation: Predictions | None
    decision: Decision
    calibration: Calibration
    reports: Mapping[tuple[str, float], Report]  # by unit and threshold
    regression: Mapping[str, RegressionReport]  # by unit; empty if the model does not regress

    @classmethod
    def of(
        cls,
        test: Predictions,
        validation: Predictions | None,
        decision: Decision,
        calibration: Calibration,
        bootstrap: int,
    ) -> Scores:
        """From predictions. The bootstrap draws videos, or patients if the table names them."""
        reports = {
            (unit, threshold): evaluate(
                *test.samples(unit), threshold=threshold, bootstrap=bootstrap, group_name=test.group_name
            )
            for unit in UNITS
            for threshold in (decision.threshold, THRESHOLD)
        }
        regression = {}
        if test.regression is not None and test.target is not None:
            regression = {unit: regression_report(*test.regressed(unit), decision.target_mean) for unit in UNITS}
        return cls(test, validation, decision, calibration, reports, regression)

    def report(self, unit: str) -> Report:
        """The report by `unit`, "video" or "frame"."""
        return self.reports[unit, self.decision.threshold]

    def report_at_half(self, unit: str) -> Report:
        return self.reports[unit, THRESHOLD]

    def calibration_error(self, unit: str) -> tuple[float, float]:
        """The expected calibration error of the network's probabilities, and of the calibrated ones."""
        probability, label, _ = self.test.samples(unit)
        return (
            expected_calibration_error(probability, label),
            expected_calibration_error(self.calibration(probability), label),
        )

    def main(self, unit: str) -> dict[str, float]:
        """The scores of the test by `unit`, in one level of names; NaN where one is not defined."""
        values = {f"test_{name}": metric.value for name, metric in self.report(unit).metrics.items()}
        errors = zip(("calibration_error", "calibrated_calibration_error"), self.calibration_error(unit), strict=True)
        values |= {f"test_{name}": x for name, x in errors}
        if unit in self.regression:
            regression = self.regression[unit]
            values |= {f"test_{name}": getattr(regression, name) for name in ("mae", "rmse", "r2")}
        return values

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        content: dict[str, Any] = {
            "decision": {"threshold": self.decision.threshold, "unit": self.decision.unit, "rule": self.decision.rule}
        }
        content |= {unit: self.report(unit).as_dict() for unit in UNITS}
        for unit in UNITS:
            report = self.report_at_half(unit).as_dict()
            metrics = {name: report["metrics"][name] for name in DECISIONS}
            content[f"{unit}_at_0.5"] = {"metrics": metrics, "confusion": report["confusion"]}
        errors = zip(("before", "after"), self.calibration_error(self.calibration.unit), strict=True)
        content["calibration"] = {
            "method": self.calibration.method,
            "unit": self.calibration.unit,
            "reason": self.calibration.reason,
            "expected_calibration_error": dict(errors),
        }
        return content


def predict(
    config: TrainConfig, machine: Machine, network: Classifier, data: EchoDataModule, splits: Sequence[str]
) -> dict[str, Predictions]:
    """Predictions of the network for every frame of some splits, in evaluation mode and in one process.

    Raises:
        CheckpointError: an output is not finite.
    """
    machine.lay_out(network.model)
    trainer = make_trainer(config, machine)
    said = {}
    for split in splits:
        data.predicted = split
        batches = trainer.predict(network, datamodule=data, return_predictions=True)
        assert batches is not None
        out: dict[str, Any] = {name: torch.cat([b[name].cpu() for b in batches]).numpy() for name in batches[0]}
        if not data.study.has_labels:
            del out["label"]
        names = ("probability", "regression", "reconstruction_error")
        if not all(np.isfinite(out[name]).all() for name in names if name in out):
            raise CheckpointError("the network's output is not finite: its training diverged")
        if config.regression_target is None and data.target is None:
            del out["target"]  # and the head that regresses was not trained
            out.pop("regression", None)
        said[split] = Predictions.of(out, data.clips(split), data.study.group_kind)
    return said
