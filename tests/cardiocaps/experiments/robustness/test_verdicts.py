"""The rule of the verdicts, on invented differences."""

from __future__ import annotations

import math

import pytest

from cardiocaps.experiments.robustness.verdicts import (
    Claim,
    Contrast,
    Judged,
    LeftOut,
    Missing,
    NotMeasured,
    Verdict,
    judge,
)
from cardiocaps.metrics.comparison import Difference

Given = Difference | str | LeftOut


def _claim(*values: Given, least: float = 0.0) -> Claim:
    def contrast(value: Given) -> Contrast:
        def measure() -> Difference:
            if isinstance(value, str):
                raise NotMeasured(value)
            if isinstance(value, LeftOut):
                raise value
            return value

        return Contrast("one minus other", measure, least)

    return Claim("name", "text", "quote", "place", tuple(map(contrast, values)))


def _judged(*values: Given, least: float = 0.0) -> Judged:
    (found,) = judge([_claim(*values, least=least)])
    return found


UP, DOWN, UNSURE = (
    Difference(0.1, 0.05, 0.15, 0.002),
    Difference(-0.1, -0.15, -0.05, 0.002),
    Difference(0.1, -1, 1, 0.3),
)


@pytest.mark.parametrize(
    ("values", "verdict", "p"),
    [
        ([UP], Verdict.HOLDS, 0.002),
        ([DOWN], Verdict.NOT, 0.002),
        ([UNSURE], Verdict.UNKNOWN, 0.3),
        ([UP, UP, UP], Verdict.HOLDS, 0.002),  # no correction within a claim: all of them must be above
        ([UP, UNSURE], Verdict.UNKNOWN, 0.3),
        ([UP, UNSURE, DOWN], Verdict.NOT, 0.006),  # one of three is below: Bonferroni
        ([Difference(-0.1, -0.2, -0.01, 0.03), UP], Verdict.UNKNOWN, 0.06),
        ([Difference(0.0, -0.1, 0.1, 1.0)], Verdict.UNKNOWN, 1.0),
    ],
)
def test_the_rule(values: list[Given], verdict: Verdict, p: float) -> None:
    found = _judged(*values)
    assert (found.verdict, found.p, found.p_corrected) == (verdict, pytest.approx(p), pytest.approx(p))


def test_a_bound_takes_the_place_of_zero() -> None:
    slightly_worse = Difference(-0.005, -0.012, 0.002, 0.002)
    assert _judged(slightly_worse, least=-0.02).verdict == Verdict.HOLDS
    assert _judged(slightly_worse).verdict == Verdict.NOT
    assert _judged(Difference(-0.05, -0.06, -0.04, 0.002), least=-0.02).verdict == Verdict.NOT


@pytest.mark.parametrize("missing", ["has no results", Difference(math.nan), Difference(0.1)])
def test_what_was_not_measured_cannot_be_told(missing: Given) -> None:
    found = _judged(UP, missing)
    assert found.verdict == Verdict.UNKNOWN and math.isnan(found.p) and math.isnan(found.p_corrected)
    assert found.found[0] is UP and isinstance(found.found[1], Missing) and found.found[1].reason


def test_what_says_nothing_is_left_out() -> None:
    nothing = LeftOut("nothing to lose")
    found = _judged(UP, nothing, DOWN)
    assert (found.verdict, found.p) == (Verdict.NOT, pytest.approx(0.004))  # one of two is below
    assert found.found[1] == Missing("nothing to lose", is_left_out=True)
    assert _judged(UP, nothing).verdict == Verdict.HOLDS
    assert math.isnan(_judged(nothing, nothing).p) and math.isnan(_judged(UP, nothing, "has no results").p)


def test_claims_are_corrected_together_and_those_not_measured_do_not_count() -> None:
    weak = Difference(0.1, 0.01, 0.2, 0.02)
    alone = judge([_claim(weak), _claim("missing")])
    assert alone[0].verdict == Verdict.HOLDS and alone[0].p_corrected == pytest.approx(0.02)
    three = judge([_claim(weak), _claim(UP), _claim(UNSURE)])
    assert [x.p_corrected for x in three] == pytest.approx([0.04, 0.006, 0.3])
    assert [x.verdict for x in three] == [Verdict.HOLDS, Verdict.HOLDS, Verdict.UNKNOWN]
    four = judge([_claim(weak), _claim(UNSURE), _claim(UNSURE)])
    assert four[0].p_corrected == pytest.approx(0.06) and four[0].verdict == Verdict.UNKNOWN
