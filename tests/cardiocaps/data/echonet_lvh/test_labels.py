import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cardiocaps.data.echonet_lvh.labels import THRESHOLDS, abnormal, teichholz_ef, width_target


@pytest.mark.parametrize(
    "calc, cm",
    [
        ("IVSd", 1.1),
        ("IVSs", 1.1),
        ("LVPWd", 1.1),
        ("LVPWs", 1.1),
        ("LVIDd", 5.6),
        ("LVIDs", 5.6),
        ("LVID", 4.0),
        ("RVDd", 2.3),
    ],
)
def test_a_measurement_is_abnormal_from_its_threshold_on(calc: str, cm: float) -> None:
    assert abnormal(calc, cm)
    assert not abnormal(calc, math.nextafter(cm, 0))


def test_thresholds_can_be_changed_but_not_in_place() -> None:
    stricter = {**THRESHOLDS, "IVSd": 1.3}
    assert abnormal("IVSd", 1.2) and not abnormal("IVSd", 1.2, stricter)
    assert not abnormal("RVDd", 19.0, {**THRESHOLDS, "RVDd": math.inf})
    with pytest.raises(TypeError):
        THRESHOLDS["IVSd"] = 9.0  # type: ignore[index]


def test_width_is_the_diastolic_diameter_first() -> None:
    assert width_target({"LVIDs": 3.0, "LVID": 4.0, "LVIDd": 5.0}) == 5.0
    assert width_target({"LVIDs": 3.0, "LVID": 4.0}) == 4.0
    assert math.isnan(width_target({"LVIDs": 3.0, "IVSd": 1.0}))


def test_teichholz_against_volumes_worked_by_hand() -> None:
    # D = 5 cm: 7 * 125 / 7.4 = 118.243 ml; D = 3 cm: 7 * 27 / 5.4 = 35 ml; EF = 83.243 / 118.243
    assert teichholz_ef(5.0, 3.0) == pytest.approx(70.4, abs=1e-3)
    assert teichholz_ef(5.0, 5.0) == 0.0


@pytest.mark.parametrize("lvidd, lvids", [(math.nan, 3), (5, math.nan), (3, 5), (0, 0), (-1, -2), (5, -1)])
def test_no_ejection_fraction_without_two_plausible_diameters(lvidd: float, lvids: float) -> None:
    assert math.isnan(teichholz_ef(lvidd, lvids))


@given(st.floats(0.1, 20), st.floats(0.1, 20))
def test_an_ejection_fraction_is_a_share(a: float, b: float) -> None:
    assert 0 <= teichholz_ef(max(a, b), min(a, b)) < 100
