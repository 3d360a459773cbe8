"""Errors of a regression."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cardiocaps.metrics.samples import as_vector


@dataclass(frozen=True)
class RegressionReport:
    """Errors in the unit of the target, over the `n` samples that have a target.

    Attributes:
        mae: mean absolute error of the predictions.
        rmse: root mean square error of the predictions.
        r2: coefficient of determination of the predictions.
        constant_mae: mean absolute error of predicting `constant` for every sample.
        constant_rmse: root mean square error of predicting `constant` for every sample.
        undefined: the reason for each value that is NaN.
    """

    n: int
    mae: float
    rmse: float
    r2: float
    constant: float
    constant_mae: float
    constant_rmse: float
    undefined: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for `write_json`."""
        return asdict(self)


def regression_report(prediction: ArrayLike, target: ArrayLike, constant: float = math.nan) -> RegressionReport:
    """Mean absolute error, root mean squared error and R² of predictions.

    Args:
        prediction: [n], finite.
        target: [n]; NaN where it is missing.
        constant: a constant prediction to compare with, the mean of the training targets; NaN: none. (R² compares with
            the mean of `target` itself.)

    Raises:
        ValueError: lengths differ, or a prediction is not finite.
    """
    predicted, truth = as_vector(prediction, "prediction"), as_vector(target, "target")
    if not np.isfinite(predicted).all():
        raise ValueError(f"prediction is {predicted[~np.isfinite(predicted)][0]}; expected finite values")
    measured = ~np.isnan(truth)
    predicted, truth = predicted[measured], truth[measured]
    errors = ("mae", "rmse", "r2", "constant_mae", "constant_rmse")
    if truth.size == 0:
        undefined = dict.fromkeys(errors, "no sample has a target")
        return RegressionReport(n=0, constant=constant, undefined=undefined, **dict.fromkeys(errors, math.nan))
    undefined = dict.fromkeys(errors[3:], "no training sample has a target") if math.isnan(constant) else {}
    same = bool((truth == truth[0]).all())
    if same:
        undefined["r2"] = "the targets do not vary"
    error, of_constant = predicted - truth, constant - truth
    spread = float(np.square(truth - truth.mean()).sum())
    return RegressionReport(
        n=int(truth.size),
        mae=float(np.abs(error).mean()),
        rmse=math.sqrt(float(np.square(error).mean())),
        r2=math.nan if same else 1 - float(np.square(error).sum()) / spread,
        constant=constant,
        constant_mae=float(np.abs(of_constant).mean()),
        constant_rmse=math.sqrt(float(np.square(of_constant).mean())),
        undefined=undefined,
    )
