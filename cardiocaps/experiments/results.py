"""What a job leaves in its folder: the predictions of two splits as CSV, and `result.json`.

`result.json` is written last: its presence says that the job is finished. It holds the number of rows of each CSV, so
that a table that was cut short is noticed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from cardiocaps.errors import ConfigError
from cardiocaps.evaluation.predictions import UNITS, Predictions, read_predictions, write_predictions
from cardiocaps.metrics import decision_threshold
from cardiocaps.runtime.files import write_json
from cardiocaps.training.run_folder import RunFolder

_KIND = "cardiocaps result"
_NAME = "result.json"
_FIELDS: Mapping[str, tuple[type, ...]] = {  # of result.json: the types that a value may have
    "system": (str,),
    "unit": (str,),
    "device": (str,),
    "seed": (int,),
    "parameters": (int, NoneType),
    "epochs": (int, NoneType),
    "best_epoch": (int, NoneType),
    "seconds_per_epoch": (float, int, NoneType),
    "seconds": (float, int),
    "peak_memory": (int, NoneType),
    "at_once": (int,),
    "threads": (int,),
}


@dataclass(frozen=True, eq=False)
class Result:
    """A finished job.

    Raises:
        ValueError: an unknown unit.
    """

    system: str  # its key
    seed: int
    unit: str  # "video", or "frame" where frames of one video are in every split
    validation: Predictions
    test: Predictions
    parameters: int | None  # trainable numbers; None for a forest, which has none to count
    epochs: int | None  # trained
    best_epoch: int | None
    seconds_per_epoch: float | None  # median over the epochs; None for pixel classifiers
    seconds: float  # of training in all
    peak_memory: int | None  # bytes beyond what the process held before the network was built
    device: str  # "cpu", or the GPU's name
    at_once: int  # how many jobs shared the machine
    threads: int  # of each of them

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
    fields = {name: getattr(result, name) for name in _FIELDS}
    rows = {"validation": result.validation.label.size, "test": result.test.label.size}
    write_json(folder / _NAME, {"kind": _KIND, **fields, "rows": rows})


def read_result(folder: Path) -> Result:
    """The result in a job's folder.

    Raises:
        ConfigError: a file is missing or damaged; the message names it.
    """
    path, run = folder / _NAME, RunFolder(folder)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: it is not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ConfigError(f"{path} was not written by cardiocaps.experiments")
    for name, types in _FIELDS.items():
        if name not in content or type(content[name]) not in types:
            raise ConfigError(f"{path} is damaged: {name} is {content.get(name)!r}")
    fields: dict[str, Any] = {name: content[name] for name in _FIELDS}
    rows = content.get("rows")
    for split, table in (("validation", run.validation_csv), ("test", run.predictions_csv)):
        if not isinstance(rows, dict) or type(rows.get(split)) is not int:
            raise ConfigError(f"{path} is damaged: it does not say how many rows the splits have")
        fields[split] = read_predictions(table)
        found = fields[split].label.size
        if found != rows[split]:
            raise ConfigError(f"{table} is damaged: it has {found} rows, {_NAME} says {rows[split]}")
    try:
        return Result(**fields)
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error
