"""Whether a video looks like those of the run's data: by the error of the decoder, kept in `familiarity.json`.

The decoder of a capsule network redraws the frame from the class capsule. What it was not trained on it redraws worse.
The error of a new video is ranked among those of the validation videos (a conformal p-value, Vovk et al. 2005): of
videos that come from where the validation videos came from, a share of at most `FALSE_ALARMS` is flagged.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cardiocaps.errors import CheckpointError
from cardiocaps.evaluation.predictions import Predictions
from cardiocaps.metrics import mean_by
from cardiocaps.runtime.files import read_json, write_json

_KIND = "cardiocaps familiarity"

FALSE_ALARMS = 0.05
"""Largest share of flagged videos among those like the validation videos."""


@dataclass(frozen=True)
class Familiarity:
    """The validation videos' errors of reconstruction.

    Attributes:
        weights: digest of the network.
        errors: of each video, the mean over its frames of the mean squared error of a pixel (pixels from 0 to 1); in
            rising order.
    """

    weights: str
    errors: tuple[float, ...]

    def p_value(self, error: float) -> float:
        """(1 + number of validation videos with at least this error) / (1 + number of validation videos)."""
        n = len(self.errors)
        return (1 + n - bisect_left(self.errors, error)) / (1 + n)

    @classmethod
    def of(cls, validation: Predictions, weights: str) -> Familiarity | None:
        """From predictions of the validation split; None if the network has no decoder."""
        if validation.reconstruction_error is None:
            return None
        return cls(weights, tuple(sorted(mean_by(validation.reconstruction_error, validation.clip).tolist())))

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Familiarity:
        """The inverse of `dataclasses.asdict`. Raises TypeError or ValueError for other values."""
        errors = tuple(float(error) for error in content["errors"])
        if not errors or not all(math.isfinite(error) for error in errors) or list(errors) != sorted(errors):
            raise ValueError("errors are not finite numbers in rising order")
        return cls(str(content["weights"]), errors)


def write_familiarity(path: Path, familiarity: Familiarity) -> None:
    """Raises OutputError."""
    write_json(path, {"kind": _KIND, **asdict(familiarity)})


def read_familiarity(path: Path, weights: str) -> Familiarity | None:
    """The familiarity of a run; None if it has none for these weights.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return None
    found = read_json(path, _KIND, Familiarity.from_dict, CheckpointError)
    return found if found.weights == weights else None
