"""The folder of a training run and the paths of its files."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from cardiocaps import __version__
from cardiocaps.config import TrainConfig, write_run
from cardiocaps.errors import ConfigError, OutputError
from cardiocaps.runtime.files import (
    is_unused,
    lock_folder,
    output_errors,
    read_json,
    remove_leftovers,
    write_json,
    write_text,
)
from cardiocaps.training.environment import environment

_KIND = "cardiocaps run"


@dataclass(frozen=True)
class _File:
    """A class attribute that gives the path of a file in the folder."""

    name: str

    def __get__(self, folder: "RunFolder", _: type) -> Path:
        return folder.path / self.name


@dataclass(frozen=True)
class RunFolder:
    """A run's folder and the paths of its files. `create` makes it, `open` finds it again."""

    path: Path

    marker = _File("run.json")
    config = _File("config.yaml")
    environment = _File("environment.json")
    # The paths of the data. Only this file, `config` and the folders of loggers hold paths, which can identify the
    # user: remove them to share a run.
    paths = _File("paths.json")
    data = _File("data.json")  # the fingerprint of the data, see `cardiocaps.data.fingerprint`
    initial = _File("initial.json")  # digest of the weights that training began with, see `cardiocaps.training.initial`
    metrics_csv = _File("metrics.csv")  # a row for each epoch
    metrics_json = _File("metrics.json")  # the final evaluation
    predictions_csv = _File("predictions.csv")  # of the test split, a row for each frame
    predictions_by_video_csv = _File("predictions_by_video.csv")  # a row for each video, with decisions
    validation_csv = _File("validation.csv")
    validation_by_video_csv = _File("validation_by_video.csv")
    decision = _File("decision.json")  # see `cardiocaps.evaluation.decision`
    calibration = _File("calibration.json")  # see `cardiocaps.evaluation.calibration`
    target = _File("target.json")  # of a regression alone, see `cardiocaps.evaluation.regression`
    familiarity = _File("familiarity.json")  # see `cardiocaps.evaluation.familiarity`
    evaluation = _File("evaluation.json")  # which run was evaluated on which data; only outside of the run's own folder
    pixel_baseline = _File("pixel_baseline.json")  # the logistic regression on pixels of the run's training split
    report = _File("report.html")  # results, figures and wrong decisions on one page
    best = _File("best.ckpt")
    last = _File("last.ckpt")
    loggers = _File("loggers.json")  # see `cardiocaps.training.loggers`
    tensorboard = _File("tensorboard")
    mlflow = _File("mlflow")
    shifted = _File("shifted")  # scores of the shifted tests, see `cardiocaps.experiments.robustness`
    plots = _File("plots")
    learning_curves = _File("plots/learning_curves.png")
    confusion_matrix = _File("plots/confusion_matrix.png")
    reliability = _File("plots/reliability.png")
    regression = _File("plots/regression.png")
    roc_curve = _File("plots/roc_curve.png")
    precision_recall_curve = _File("plots/precision_recall_curve.png")

    @classmethod
    def create(cls, path: Path, overwrite: bool = False) -> "RunFolder":
        """Make the folder, and in it `run.json`, which marks it as the folder of a run.

        A process that is killed at any moment leaves a folder that `create` takes again, with `overwrite` if it holds
        `run.json`: this file is written first and removed last.

        Args:
            overwrite: first delete the files in the folder if it is the folder of a run.

        Raises:
            OutputError: the folder cannot be written, or holds files that are not to be deleted.
        """
        folder = cls(path)
        with output_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            with lock_folder(path):  # fails while a run is going on
                if not is_unused(path, folder.marker):
                    if not overwrite:
                        raise OutputError(
                            f"{path} exists and is not empty; choose another --out (training replaces a run by "
                            "--overwrite)"
                        )
                    _refuse_deletion(path)
                    folder._clear()
                folder.remove_leftovers()
                write_text(folder.marker, json.dumps({"kind": _KIND, "version": __version__}))
                folder.plots.mkdir()  # fails if another run has just started and the file system has no locks
        return folder

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The folder of an earlier run. Raises ConfigError if `path` is not one."""
        folder = cls(path)
        if not folder.is_run():
            raise ConfigError(f"{path} is not the folder of a run: it has no run.json of this program")
        return folder

    @property
    def is_trained(self) -> bool:
        """Whether it holds a checkpoint."""
        return self.last.exists() or self.best.exists()

    def discard(self) -> None:
        """Remove a folder that `create` has just made."""
        with output_errors(self.path):
            self._clear()
            shutil.rmtree(self.path)

    def _clear(self) -> None:
        """Delete everything in the folder but `run.json`; if this is cut off, `create` still recognises the folder."""
        for item in self.path.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            elif item != self.marker:
                item.unlink()

    def remove_leftovers(self) -> None:
        """Remove unfinished files of killed processes. Hold the folder (`files.lock_folder`) during the call."""
        remove_leftovers(self.path, self.plots)

    def is_run(self) -> bool:
        """Whether `run.json` marks the folder as a run's."""
        try:
            read_json(self.marker, _KIND, dict, ConfigError)
        except ConfigError:
            return False
        return True

    def begin(self, config: TrainConfig, device: str) -> None:
        """Write the settings and `environment.json`. Raises OutputError."""
        write_json(self.environment, environment(device))
        write_run(config, self.path)


def _refuse_deletion(path: Path) -> None:
    """Raise OutputError unless `path` is the folder of a run and does not hold the working folder."""
    if path.is_symlink():
        reason = "it is a link"
    elif not RunFolder(path).is_run():
        reason = "it is not recognisably the folder of a run: it has no run.json of this program"
    elif Path.cwd().resolve().is_relative_to(path.resolve()):
        reason = "the working folder lies in it"
    else:
        return
    raise OutputError(f"--overwrite does not delete {path}: {reason}")
