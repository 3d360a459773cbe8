"""The calibration of a run's probabilities: fitted on its validation split, kept in `calibration.json`.

A calibrated probability p is right in the mean: of the videos that get p, the share p is abnormal. The map from the
network's probability never falls, so it changes no ranking and no decision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.config import options
from cardiocaps.errors import CheckpointError
from cardiocaps.evaluation.predictions import UNITS, Predictions
from cardiocaps.metrics import Floats, Integers
from cardiocaps.runtime.files import read_json, write_json

_KIND = "cardiocaps calibration"
_LARGEST_SCALE = 100.0
_EDGE = 1e-6  # probabilities nearer to 0 and 1 count as this far away, so that their logits are finite


@dataclass(frozen=True)
class Calibration:
    """A map from the network's probabilities to calibrated ones. Call it.

    Attributes:
        method: "temperature": logistic(scale · logit(p)) (Guo et al. 2017); "isotonic": a rising function, linear
            between its corners (Zadrozny and Elkan 2002); "none": p itself.
        unit: what was counted to fit it: "video" or "frame".
        weights: digest of the network that it was fitted for.
        scale: the inverse of the temperature.
        corners: of the isotonic map, in rising order: (probability, calibrated probability).
        reason: why it is "none" although another method was asked for; else "".
    """

    method: str
    unit: str
    weights: str = ""
    scale: float = 1.0
    corners: tuple[tuple[float, float], ...] = ()
    reason: str = ""

    def __call__(self, probability: ArrayLike) -> Floats:
        """Calibrated probabilities of any shape."""
        p = np.asarray(probability, np.float64)
        if self.method == "isotonic":
            x, y = np.array(self.corners).T
            return np.interp(p, x, y)
        if self.method == "none":
            return p
        return _logistic(self.scale * _logit(p))

    @classmethod
    def fit(cls, method: str, validation: Predictions, unit: str, weights: str = "") -> Calibration:
        """Fit a map on predictions of the validation split; "none" if they have one class only."""
        probability, label, _ = validation.samples(unit)
        positives = int(label.sum())
        if method == "none":
            return cls("none", unit, weights)
        if positives in (0, label.size):
            return cls("none", unit, weights, reason=f"every validation label is {int(label[0])}")
        if method == "isotonic":
            return cls(method, unit, weights, corners=_isotonic(probability, label))
        return cls(method, unit, weights, scale=_best_scale(probability, label))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Calibration:
        """The inverse of `dataclasses.asdict`. Raises TypeError or ValueError for other values."""
        corners = tuple((float(x), float(y)) for x, y in content["corners"])
        found = cls(**{**content, "corners": corners})
        rising = all(a <= b for a, b in pairwise(corners))
        numbers = [found.scale, *(z for corner in corners for z in corner)]
        if (
            found.method not in options()["calibration"].choices
            or found.unit not in UNITS
            or not all(math.isfinite(z) for z in numbers)
            or found.scale < 0
            or not rising
            or (found.method == "isotonic") != bool(corners)
        ):
            raise ValueError("it does not describe a map that never falls")
        return found


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Raises OutputError."""
    write_json(path, {"kind": _KIND, **asdict(calibration)})


def read_calibration(path: Path, weights: str) -> Calibration | None:
    """The calibration of a run; None if it has none for these weights.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    found = read_json(path, _KIND, Calibration.from_dict, CheckpointError)
    return found if found.weights == weights else None


def _isotonic(probability: Floats, label: Integers) -> tuple[tuple[float, float], ...]:
    from sklearn.isotonic import IsotonicRegression

    model = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(probability, label)
    return tuple(zip(model.X_thresholds_.tolist(), model.y_thresholds_.tolist(), strict=True))


def _best_scale(probability: Floats, label: Integers) -> float:
    """The scale of the least cross-entropy.

    The targets are those of Platt (1999), a little inside of 0 and 1: with 0 and 1 a validation split that the network
    separates would give an infinite scale.
    """
    from scipy.optimize import minimize_scalar

    positives = int(label.sum())
    target = np.where(label == 1, (positives + 1) / (positives + 2), 1 / (label.size - positives + 2))
    z = _logit(probability)

    def cross_entropy(scale: float) -> float:
        return float((np.logaddexp(0, scale * z) - target * scale * z).mean())

    return float(minimize_scalar(cross_entropy, bounds=(0, _LARGEST_SCALE), method="bounded").x)


def _logit(probability: Floats) -> Floats:
    p = np.clip(probability, _EDGE, 1 - _EDGE)
    return np.log(p) - np.log1p(-p)


def _logistic(logit: Floats) -> Floats:
    from scipy.special import expit

    values: Floats = expit(logit)
    return values
