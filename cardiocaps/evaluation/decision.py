"""The threshold of a run's decisions and the mean of its training targets, kept in `decision.json`.

A run keeps both when it is evaluated on other data. A threshold that is chosen on the test data would make the
decisions look better than they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiocaps.errors import CheckpointError
from cardiocaps.evaluation.predictions import UNITS, Predictions
from cardiocaps.metrics import THRESHOLD, decision_threshold
from cardiocaps.runtime.files import read_json, write_json

if TYPE_CHECKING:
    from cardiocaps.data.datamodule import EchoDataModule

_KIND = "cardiocaps decision"
_RULE = "the largest Youden index (sensitivity + specificity - 1) of the run's validation split"


@dataclass(frozen=True)
class Decision:
    """Abnormal where the probability is above `threshold`."""

    threshold: float
    unit: str  # what was counted to choose it: "video" or "frame"
    rule: str  # how it was chosen
    weights: str  # digest of the network that it was chosen for; "" if the same file holds the classifier
    target_mean: float = math.nan  # of the regression targets in training; NaN if there is none

    @classmethod
    def choose(cls, validation: Predictions, unit: str, weights: str = "", target_mean: float = math.nan) -> Decision:
        """The threshold with the largest Youden index on validation; 0.5 if that has one class only."""
        threshold, reason = decision_threshold(*validation.samples(unit)[:2])
        return cls(threshold, unit, f"0.5, for {reason}" if reason else _RULE, weights, target_mean)

    @classmethod
    def unknown(cls, unit: str, weights: str) -> Decision:
        """The decision if the run has none for its network, and its validation split is not available."""
        return cls(THRESHOLD, unit, "0.5, for the run's folder has no threshold for this network", weights)

    @property
    def is_chosen(self) -> bool:
        return self.rule == _RULE

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; NaN becomes None there."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Decision:
        """The inverse of `as_dict`. Raises TypeError or ValueError for other values."""
        found = cls(**content)
        if not 0 <= found.threshold <= 1 or found.unit not in UNITS:
            raise ValueError(
                f"threshold and unit are {found.threshold!r} and {found.unit!r}; expected a number from 0 to 1, and "
                f"one of {', '.join(UNITS)}"
            )
        return replace(found, target_mean=math.nan) if found.target_mean is None else found


def write_decision(path: Path, decision: Decision) -> None:
    """Raises OutputError."""
    write_json(path, {"kind": _KIND, **decision.as_dict()})


def read_decision(path: Path, weights: str) -> Decision | None:
    """The decision of a run; None if it has none for these weights (training may have gone on since).

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    found = read_json(path, _KIND, Decision.from_dict, CheckpointError)
    return found if found.weights == weights else None


def training_mean(data: EchoDataModule) -> float:
    """Mean of the regression target over the training clips; NaN if it was measured in none."""
    mean = data.train_target_mean()
    return math.nan if mean is None else mean
