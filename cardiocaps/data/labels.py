"""What counts as abnormal, and the two regression targets.

Thresholds as in the code published with CardioCaps (which compares LVID with "> 4" in one place and "≥ 4" in
another; here ≥ everywhere). They are a research label rule, not a diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from cardiocaps.errors import ConfigError

THRESHOLDS: Mapping[str, float] = MappingProxyType(
    {
        "IVSd": 1.1,
        "IVSs": 1.1,
        "LVPWd": 1.1,
        "LVPWs": 1.1,
        "LVIDd": 5.6,
        "LVIDs": 5.6,
        "LVID": 4.0,
        "RVDd": 2.3,
    }
)
"""Measurement -> smallest abnormal value in cm."""

CALCS = tuple(THRESHOLDS)


def check_thresholds(thresholds: Mapping[str, float]) -> None:
    """Raise ConfigError unless every measurement has a positive threshold in cm (infinity: never abnormal).

    To change one, pass ``{**THRESHOLDS, "IVSd": 1.2}``.
    """
    if set(thresholds) != set(CALCS):
        raise ConfigError(f"thresholds must name {', '.join(CALCS)}, got {', '.join(sorted(thresholds)) or 'none'}")
    for calc, cm in thresholds.items():
        if not cm > 0:
            raise ConfigError(f"thresholds[{calc}] must be above 0 cm, got {cm}")


def abnormal(calc: str, cm: float, thresholds: Mapping[str, float] = THRESHOLDS) -> bool:
    """Whether a measurement of ``cm`` reaches its threshold.

    Raises:
        ConfigError: ``calc`` has no threshold.
    """
    if calc not in thresholds:
        raise ConfigError(f"calc must be one of {', '.join(thresholds)}, got {calc!r}")
    return cm >= thresholds[calc]


def width_target(measurements: Mapping[str, float]) -> float:
    """The ventricle's width in cm: LVIDd, else LVID, else NaN."""
    return measurements.get("LVIDd", measurements.get("LVID", math.nan))


def teichholz_ef(lvidd: float, lvids: float) -> float:
    """Ejection fraction in percent from two diameters in cm, V = 7 D³ / (2.4 + D) (Teichholz et al. 1976).

    NaN where a diameter is missing (NaN) or not positive, or where the systolic one is the larger.
    """
    if not 0 < lvids <= lvidd:
        return math.nan
    diastole, systole = (7 * d**3 / (2.4 + d) for d in (lvidd, lvids))
    return 100 * (diastole - systole) / diastole
