"""The evaluation of a regression alone: errors in the unit of the target, beside those of the training mean.

It has no threshold, no calibration and no curve, because there are no labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from cardiocaps import DISCLAIMER, plots
from cardiocaps.config import TrainConfig
from cardiocaps.errors import CheckpointError
from cardiocaps.evaluation.decision import training_mean
from cardiocaps.evaluation.familiarity import Familiarity, write_familiarity
from cardiocaps.evaluation.predictions import UNITS, Predictions, unit_of, write_predictions
from cardiocaps.evaluation.report import ResultsTable, print_table, write_run_page
from cardiocaps.metrics import RegressionReport, regression_report
from cardiocaps.models import title as network_title
from cardiocaps.runtime.files import output_errors, read_json, write_json
from cardiocaps.training.run_folder import RunFolder

if TYPE_CHECKING:
    from cardiocaps.data.datamodule import EchoDataModule

_KIND = "cardiocaps target"


@dataclass(frozen=True)
class Target:
    """What a run regresses, kept in `target.json`.

    Attributes:
        name: as in `Study.units`.
        unit: of the errors.
        mean: over the training clips.
    """

    name: str
    unit: str
    mean: float

    @classmethod
    def of(cls, data: EchoDataModule) -> Target:
        assert data.target is not None
        return cls(data.target, data.study.units[data.target], training_mean(data))

    @classmethod
    def read(cls, path: Path) -> Target | None:
        """The target of a run; None if it has not been evaluated. Raises CheckpointError if the file is damaged."""

        def make(content: dict[str, Any]) -> Target:
            found = cls(str(content["name"]), str(content["unit"]), float(content["mean"]))
            if not math.isfinite(found.mean):
                raise ValueError(f"mean is {found.mean}; expected a finite number")
            return found

        return read_json(path, _KIND, make, CheckpointError) if path.exists() else None

    def write(self, path: Path) -> None:
        """Raises OutputError."""
        write_json(path, {"kind": _KIND, **asdict(self)})


@dataclass(frozen=True)
class TargetScores:
    """The errors of a network on the test split, by video and by frame."""

    test: Predictions
    validation: Predictions | None
    target: Target
    reports: dict[str, RegressionReport]

    @classmethod
    def of(cls, test: Predictions, validation: Predictions | None, target: Target) -> TargetScores:
        reports = {unit: regression_report(*test.regressed(unit), target.mean) for unit in UNITS}
        return cls(test, validation, target, reports)

    def main(self, unit: str) -> dict[str, float]:
        """The errors on the test split by `unit`, in one level of names."""
        return {f"test_{name}": getattr(self.reports[unit], name) for name in ("mae", "rmse", "r2")}

    def table(self, config: TrainConfig) -> ResultsTable:
        """The errors beside those of the training mean."""
        unit, report = unit_of(config), self.reports[unit_of(config)]

        def cell(value: float) -> str:
            return f"{value:.2f} {self.target.unit}".rstrip()

        rows = [
            ("mean absolute error", cell(report.mae), cell(report.constant_mae)),
            ("root mean square error", cell(report.rmse), cell(report.constant_rmse)),
            ("R²", "undefined" if math.isnan(report.r2) else f"{report.r2:.3f}", ""),
        ]
        head = (self.target.name, network_title(config), f"training mean ({report.constant:.4g})")
        notes = [f"{name}: {why}" for name, why in report.undefined.items()]
        return ResultsTable(f"test split, {report.n} {unit}s", head, [rows], "", notes)

    def write(
        self,
        run: RunFolder,
        config: TrainConfig,
        familiarity: Familiarity | None,
        data: EchoDataModule,
        **identity: str | int | None,
    ) -> None:
        """Write the predictions, the plot, the page and, last, metrics.json into a run's folder.

        Args:
            run: the folder.
            config: settings of the run.
            familiarity: of the network; None: there is none.
            data: on which it was evaluated.
            identity: what was evaluated, and on what.
        """
        with output_errors(run.plots):
            run.plots.mkdir(exist_ok=True)
        self.target.write(run.target)
        if familiarity is not None:
            write_familiarity(run.familiarity, familiarity)
        write_predictions(run, self.test, self.validation, None)
        said, truth = self.test.regressed(unit_of(config))
        plots.regression(said, truth, self.target.mean, f"{self.target.name} ({self.target.unit})", run.regression)
        report = self.reports[unit_of(config)]
        numbers = [
            (f"{report.mae:.2f}", f"mean absolute error, {self.target.unit}".rstrip(", ")),
            (f"{report.constant_mae:.2f}", "that of the training mean"),
            (str(report.n), f"test {unit_of(config)}s"),
        ]
        write_run_page(run, self.table(config), numbers, None, config, data, **identity)
        by_unit = {unit: self.reports[unit].as_dict() for unit in UNITS}
        regression = {"target": self.target.name, "unit": self.target.unit, **by_unit}
        # metrics.json comes last: its presence says that the run is complete.
        content = {**identity, "network": {"name": network_title(config), "regression": regression}, "use": DISCLAIMER}
        write_json(run.metrics_json, content)


def print_target_means(runs: Sequence[tuple[TargetScores, TrainConfig]]) -> None:
    """Print mean and standard deviation of the errors over several runs."""
    (first, config), unit = runs[0], unit_of(runs[0][1])
    measure = first.target.unit

    def cell(values: Sequence[float], text: str) -> str:
        return f"{fmean(values):.3g} ± {stdev(values):.2g} {text}".rstrip()

    reports = [scores.reports[unit] for scores, _ in runs]
    rows = [
        (
            "mean absolute error",
            cell([r.mae for r in reports], measure),
            cell([r.constant_mae for r in reports], measure),
        ),
        (
            "root mean square error",
            cell([r.rmse for r in reports], measure),
            cell([r.constant_rmse for r in reports], measure),
        ),
        ("R²", cell([r.r2 for r in reports], ""), ""),
    ]
    head = (first.target.name, network_title(config), "training mean")
    table = ResultsTable("± standard deviation", head, [rows], "", [])
    print_table(table, f"Mean over {len(runs)} runs")
