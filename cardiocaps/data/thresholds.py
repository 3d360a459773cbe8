"""The thresholds of a label rule: those of a data set, and the user's in their place."""

from __future__ import annotations

from collections.abc import Mapping

from cardiocaps.config.option import did_you_mean
from cardiocaps.errors import ConfigError, printable


def with_given(
    usual: Mapping[str, float], given: Mapping[str, float] | None, bounds: tuple[float, float], unit: str
) -> dict[str, float]:
    """The thresholds of a data set, with those that the user has given in their place.

    Args:
        usual: measurement -> its threshold.
        given: the same, for some of the measurements.
        bounds: the least and the greatest threshold that may be given.
        unit: of the thresholds, for messages.

    Raises:
        ConfigError: `given` has another measurement, or a threshold out of bounds.
    """
    low, high = bounds
    for name, value in (given or {}).items():
        said = f"threshold is {printable(name)}={value:g}"
        if name not in usual:
            names = ", ".join(usual)
            raise ConfigError(
                f"{said}; expected a measurement that labels depend on: {names}{did_you_mean(name, usual)}"
            )
        if not low <= value <= high:
            raise ConfigError(f"{said}; expected from {low:g} to {high:g} {unit}")
    return {**usual, **(given or {})}
