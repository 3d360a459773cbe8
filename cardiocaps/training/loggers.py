"""Gives the numbers of a run to the loggers of the setting `logger`: TensorBoard, Weights & Biases, MLflow.

Everything stays on this machine, in the run's folder, unless the user's WANDB_MODE or MLFLOW_TRACKING_URI say
otherwise. What is logged names no video, no patient and no path of the data. `loggers.json` holds how each logger knows
the run, and how many epochs it has, so that a resumed run goes on there.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from cardiocaps.config import TrainConfig, options, settings_that_affect
from cardiocaps.errors import CheckpointError, ConfigError, printable
from cardiocaps.runtime.files import read_json, write_json
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.program import Interrupted, print_line
from cardiocaps.training.callbacks import History
from cardiocaps.training.run_folder import RunFolder

_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow-skinny"}
_PROJECT = "cardiocaps"
_KIND = "cardiocaps loggers"

_ENVIRONMENT = {
    # These packages report to their makers that and how they are used.
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A database in place of the folder would need further packages.
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
"""Variables that are set, unless the user has set them, before the packages are imported."""

_NOT_LOGGED = ("table",)
"""Settings that affect the result but name a file of the data."""


def require_loggers(config: TrainConfig) -> None:
    """Import the packages of the loggers. Raises ConfigError where one is missing."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in config.loggers:
        require_package(name, _PACKAGES[name], f"logger: {name!r}", "loggers")


def logged_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the numbers of a run, without those that are not given and those that hold a path."""
    names = settings_that_affect("result", "shape", "length", "rounding")
    values = {name: getattr(config, name) for name in names if name not in _NOT_LOGGED}
    return {name: x for name, x in values.items() if x is not None and options()[name].kind is not Path}


class RunLog(Callback):
    """The loggers of a run. Beside the settings they get each epoch of metrics.csv, and scores of the evaluation.

    A logger that fails is left out from there on, with a note: the run does not depend on it. The loggers are ended at
    the end of the `with` block of this object.

    Raises:
        ConfigError: a logger cannot be opened.
        CheckpointError: `loggers.json` is damaged.
    """

    def __init__(self, run: RunFolder, config: TrainConfig) -> None:
        self._run = run
        self._known: dict[str, dict[str, Any]] = {}
        if run.loggers.is_file():
            self._known = read_json(run.loggers, _KIND, _entries, CheckpointError)
        self._loggers: dict[str, Logger] = {}
        for name in config.loggers:
            try:
                self._open(name, config)
            except Exception as error:  # each package has errors of its own
                self.close("failed")
                raise ConfigError(f"logger: {name!r} cannot be used: {_reason(error)}") from error

    def _open(self, name: str, config: TrainConfig) -> None:
        known = self._known.get(name)
        logger, identity = _OPEN[name](self._run, None if known is None else known["id"])
        _ = logger.experiment  # type: ignore[attr-defined]  # opens it
        self._loggers[name] = logger
        if known is None:
            logger.log_hyperparams(logged_settings(config))
            self._known[name] = {"id": identity, "epochs": 0}
            self._write()

    def _write(self) -> None:
        write_json(self._run.loggers, {"kind": _KIND, **self._known})

    def epochs(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Log the rows of metrics.csv that a logger does not have yet."""
        for name in list(self._loggers):
            new = [row for row in rows if row["epoch"] > self._known[name]["epochs"]]
            if new and all(self._log(name, row, int(row["epoch"])) for row in new):
                self._known[name]["epochs"] = int(new[-1]["epoch"])
                self._write()

    def scores(self, values: Mapping[str, float], epoch: int) -> None:
        """Log scores of the evaluation, at the last epoch."""
        for name in list(self._loggers):
            self._log(name, values, epoch)

    def _log(self, name: str, values: Mapping[str, float], epoch: int) -> bool:
        try:
            self._loggers[name].log_metrics({key: x for key, x in values.items() if math.isfinite(x)}, step=epoch)
        except Exception as error:  # a server that cannot be reached, a full disk
            print_line(f"note: logger {name} has failed ({_reason(error)}); the run goes on without it")
            del self._loggers[name]
            return False
        return True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        (history,) = (x for x in callbacks if isinstance(x, History))
        self.epochs(history.rows)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.close("success" if error is None else "KILLED" if isinstance(error, Interrupted) else "failed")

    def close(self, status: str) -> None:
        """End the loggers: status is "success", "failed" or "KILLED", as Lightning and MLflow call it."""
        for name, logger in self._loggers.items():
            try:
                logger.finalize(status)
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish(exit_code=int(status != "success"))
            except Exception as error:
                print_line(f"note: logger {name} could not be ended ({_reason(error)})")
        self._loggers.clear()


def _entries(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The content of `loggers.json`. Raises ValueError, KeyError or TypeError for other values."""
    for name, entry in content.items():
        if name not in _PACKAGES or not isinstance(entry["id"], str) or not isinstance(entry["epochs"], int):
            raise ValueError(f"{name} is no logger, or its entry has no id or number of epochs")
    return content


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return printable(lines[0][:300] if lines else type(error).__name__)


def _tensorboard(run: RunFolder, _: str | None) -> tuple[Logger, str]:
    # Files of later sessions lie beside those of the first; TensorBoard shows them as one.
    logger = TensorBoardLogger(run.path, name=run.tensorboard.name, version="", default_hp_metric=False)
    return logger, run.tensorboard.name


def _wandb(run: RunFolder, identity: str | None) -> tuple[Logger, str]:
    import wandb

    identity = identity or secrets.token_hex(4)
    mode = os.environ.get("WANDB_MODE", "offline")
    settings = wandb.Settings(
        # What wandb gathers by itself: the command with its paths, the code, the machine, and what is printed.
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
        host="",
        disable_git=True,
        disable_code=True,
        console="off",
        silent=mode == "offline",
    )
    name = run.path.resolve().name
    return WandbLogger(name, run.path, identity, project=_PROJECT, mode=mode, settings=settings), identity


def _mlflow(run: RunFolder, identity: str | None) -> tuple[Logger, str]:
    from mlflow.tracking import MlflowClient

    place = os.environ.get("MLFLOW_TRACKING_URI") or run.mlflow.resolve().as_uri()
    client = MlflowClient(place)
    if identity is None:
        # Not by Lightning, which also logs the user's name and the place of the program.
        experiment = client.get_experiment_by_name(_PROJECT)
        experiment_id = client.create_experiment(_PROJECT) if experiment is None else experiment.experiment_id
        identity = client.create_run(experiment_id, run_name=run.path.resolve().name).info.run_id
    else:
        client.update_run(identity, status="RUNNING")
    return MLFlowLogger(_PROJECT, tracking_uri=place, run_id=identity), identity


_OPEN = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
"""Each makes a logger and returns it with how it knows the run. It gets what it returned for this run before."""
