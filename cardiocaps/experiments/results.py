"""What a job leaves in its folder: the predictions of two splits as CSV, by frame and by video, and at last
`result.json`.

The presence of `result.json` says that the job is finished. It holds how many rows the tables have, so that one that
was cut short is noticed.
"""

import csv
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cardiocaps.errors import ConfigError
from cardiocaps.evaluation.predictions import GROUP_KINDS, UNITS, Predictions, write_predictions
from cardiocaps.metrics import decision_threshold
from cardiocaps.runtime.files import write_json
from cardiocaps.training.run_folder import RunFolder

_KIND = "cardiocaps result"
_NAME = "result.json"
_SPLITS = ("validation", "test")
_COLUMNS = ("video", "clip", "label", "probability")
_NUMBERS: dict[str, tuple[type, bool]] = {  # of result.json: its type, and whether it may be missing
    "seed": (int, False),
    "parameters": (int, True),
    "epochs": (int, True),
    "best_epoch": (int, True),
    "seconds_per_epoch": (float, True),
    "seconds": (float, False),
    "peak_memory": (int, True),
    "at_once": (int, False),
    "threads": (int, False),
}
_TEXTS = ("system", "unit", "device")


@dataclass(frozen=True, eq=False)
class Result:
    """A finished job. Raises ValueError for an unknown unit."""

    system: str  # its key
    seed: int
    unit: str  # "video", or "frame" where frames of one video are in every split
    validation: Predictions
    test: Predictions
    parameters: int | None  # trainable numbers; None for what has none to count, such as forests
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
        """Of decisions, chosen on the validation split; see `metrics.decision_threshold`."""
        return decision_threshold(*self.validation.samples(self.unit)[:2])

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"unit: must be one of {', '.join(UNITS)}, is {self.unit!r}")


def is_finished(folder: Path) -> bool:
    """Whether the job of this folder has left its result."""
    return (folder / _NAME).is_file()


def write_result(folder: Path, result: Result) -> None:
    """Write the predictions and then `result.json` into an existing folder, each whole or not at all. Raises
    OutputError."""
    write_predictions(RunFolder(folder), result.test, result.validation, result.threshold[0])
    rows = {split: getattr(result, split).label.size for split in _SPLITS}
    fields = {name: getattr(result, name) for name in (*_TEXTS, *_NUMBERS)}
    write_json(folder / _NAME, {"kind": _KIND, **fields, "rows": rows})


def read_result(folder: Path) -> Result:
    """The result in a job's folder. Raises ConfigError, which names the file, where one is missing or damaged."""
    path = folder / _NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: it is no JSON ({error})") from error
    if not isinstance(content, dict) or content.get("kind") != _KIND:
        raise ConfigError(f"{path} was not written by cardiocaps.experiments")
    fields: dict[str, Any] = {name: _field(content, name, path) for name in (*_TEXTS, *_NUMBERS)}
    rows = content.get("rows")
    if not isinstance(rows, dict) or not all(type(rows.get(split)) is int for split in _SPLITS):
        raise ConfigError(f"{path} is damaged: it does not say how many rows the splits have")
    places = {"validation": RunFolder(folder).validation_csv, "test": RunFolder(folder).predictions_csv}
    fields |= {split: _read_predictions(places[split], rows[split]) for split in _SPLITS}
    try:
        return Result(**fields)
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def _read_predictions(path: Path, rows: int) -> Predictions:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [name for name in _COLUMNS if name not in (reader.fieldnames or ())]
            if missing:
                raise ConfigError(f"{path} is damaged: it has no column {', '.join(missing)}")
            table = list(reader)
        if len(table) != rows:
            raise ConfigError(f"{path} is damaged: it has {len(table)} rows, {_NAME} says {rows}")
        if any(None in row or None in row.values() for row in table):
            raise ConfigError(f"{path} is damaged: not all of its rows have the same number of columns")
        kind = next((kind for kind in GROUP_KINDS if table and kind in table[0]), None)
        return Predictions(
            probability=np.array([float(row["probability"]) for row in table]),
            label=_whole(row["label"] for row in table),
            clip=_whole(row["clip"] for row in table),
            video=tuple(row["video"] for row in table),
            frame=_whole(row["frame"] for row in table) if table and "frame" in table[0] else None,
            patient=_whole(row[kind] for row in table) if kind else None,
            group_kind=kind or GROUP_KINDS[0],
        )
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def _whole(values: Iterable[str]) -> NDArray[np.int64]:
    return np.array([int(value) for value in values], np.int64)


def _field(content: dict[str, Any], name: str, path: Path) -> Any:
    value = content.get(name)
    if name in _TEXTS:
        right = isinstance(value, str)
    else:
        kind, optional = _NUMBERS[name]
        numbers = (int, float) if kind is float else (int,)
        right = (optional and value is None and name in content) or (type(value) in numbers)
    if not right:
        raise ConfigError(f"{path} is damaged: {name} is {value!r}")
    return value
