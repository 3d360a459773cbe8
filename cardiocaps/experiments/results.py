"""What a job leaves in its folder: the predictions of two splits as CSV, and `result.json`.

`result.json` is written last: its presence says that the job is finished. It holds the number of rows of each CSV, so
that a table that was cut short is noticed.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cardiocaps.errors import ConfigError
from cardiocaps.evaluation.predictions import UNITS, Predictions, read_predictions, write_predictions
from cardiocaps.metrics import decision_threshold
from cardiocaps.runtime.files import read_json, write_json
from cardiocaps.training.run_folder import RunFolder

_KIND = "cardiocaps result"
_NAME = "result.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class Result:
    """A finished job. Epochs, their times and the peak memory are None for pixel classifiers.

    Raises:
        ValueError: an unknown unit.
    """

    system: str  # its key
    unit: str  # "video", or "frame" where frames of one video are in every split
    device: str  # "cpu", or the GPU's name
    seed: int
    parameters: int | None  # trainable numbers; None for a forest, which has none to count
    epochs: int | None = None  # trained
    best_epoch: int | None = None
    seconds_per_epoch: float | None = None  # median over the epochs
    seconds: float  # of training in all
    peak_memory: int | None = None  # bytes beyond what the process held before the network was built
    at_once: int  # how many jobs ran at a time at most, on one machine or on those of an engine
    threads: int  # of each of them
    validation: Predictions
    test: Predictions

    @property
    def threshold(self) -> tuple[float, str | None]:
        """The threshold that the validation split gives; see `metrics.decision_threshold`."""
        return decision_threshold(*self.validation.samples(self.unit)[:2])

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit is {self.unit!r}; expected one of {', '.join(UNITS)}")


def is_finished(folder: Path) -> bool:
    """Whether the job of this folder has left its result."""
    return (folder / _NAME).is_file()


def write_result(folder: Path, result: Result) -> None:
    """Write the predictions and then `result.json` into an existing folder, each file whole or not at all.

    Raises:
        OutputError: a file cannot be written.
    """
    write_predictions(RunFolder(folder), result.test, result.validation, result.threshold[0])
    splits = {"validation": result.validation, "test": result.test}
    content = {f.name: getattr(result, f.name) for f in fields(Result) if f.name not in splits}
    rows = {name: split.clip.size for name, split in splits.items()}
    write_json(folder / _NAME, {"kind": _KIND, **content, "rows": rows})


def read_result(folder: Path) -> Result:
    """The result in a job's folder.

    Raises:
        ConfigError: a file is missing or damaged; the message names it.
    """
    run = RunFolder(folder)
    tables = {"validation": run.validation_csv, "test": run.predictions_csv}

    def make(content: dict[str, Any]) -> Result:
        rows, splits = content.pop("rows"), {name: read_predictions(table) for name, table in tables.items()}
        for name, split in splits.items():
            n = split.clip.size
            if n != rows[name]:
                raise ConfigError(f"{tables[name]} is damaged: it has {n} rows, {_NAME} says {rows[name]}")
        return Result(**{**content, **splits})

    return read_json(folder / _NAME, _KIND, make, ConfigError)
