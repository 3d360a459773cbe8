"""The label rule, the possible range of each measurement, and the two regression targets.

The thresholds are those of the code published with CardioCaps: a value from the threshold on is abnormal. (For LVID
that code writes that below 4 is normal, which is the same; its branch for RVDd stops with an error.) They are a
research label rule, not a diagnosis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

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

WALLS = ("IVSd", "IVSs", "LVPWd", "LVPWs")

LIMITS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        **dict.fromkeys(WALLS, (0.1, 6.0)),
        "LVIDd": (0.5, 12.0),
        "LVIDs": (0.2, 12.0),
        "LVID": (0.2, 12.0),
        "RVDd": (0.2, 10.0),
    }
)
"""Measurement -> the smallest and the largest possible value in cm.

The ranges are wider than the reported extremes, so that no real heart is left out:

* Adults, normal (Lang and coauthors, J Am Soc Echocardiogr 2015;28:1-39, ASE and EACVI): walls 0.6 to 1.0, LVIDd 3.8 to
  5.8, LVIDs 2.2 to 4.0, RV in the parasternal long axis 2.0 to 3.0.
* The thickest walls: 5.5, beside an LVIDd of 3.1 (Maron, Casey, Almquist, Heart 2004;90:24).
* Extreme dilatation begins at an LVIDd of 8.0 (Klodas and coauthors, J Am Coll Cardiol 1996;27:670-677).
* The smallest hearts are those of preterm infants from 0.6 kg on (Abushaban and coauthors, Ann Pediatr Cardiol
  2014;7:180-186).
"""


def abnormal(calc: str, cm: float, thresholds: Mapping[str, float] = THRESHOLDS) -> bool:
    """Whether a measurement of `cm` reaches its threshold."""
    return cm >= thresholds[calc]


def width_target(measurements: Mapping[str, float]) -> float:
    """The ventricle's width in cm: LVIDd, else LVID, else NaN."""
    return measurements.get("LVIDd", measurements.get("LVID", math.nan))


def teichholz_ef(lvidd: float, lvids: float) -> float:
    """Ejection fraction in percent from two diameters in cm, V = 7 D³ / (2.4 + D) (Teichholz et al. 1976).

    NaN if a diameter is NaN or not positive, or if the systolic one is larger than the diastolic one.
    """
    if not 0 < lvids <= lvidd:
        return math.nan
    diastole, systole = (7 * d**3 / (2.4 + d) for d in (lvidd, lvids))
    return 100 * (diastole - systole) / diastole
