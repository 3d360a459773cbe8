"""The rule that decides about a claim: holds, does not hold, or cannot be told.

A claim is a list of contrasts: differences that are above a bound, 0 unless said, if the claim is true. The rule was
written before any result:

* Each contrast has a two-sided p for other test videos and seeds: Student's t of `metrics.comparison` (of times:
  Welch's t over seeds).
* A contrast that says nothing, as a network that does not rank at all cannot fall, is left out.
* For the claim: every contrast is above its bound. The p is the largest of all contrasts (intersection-union test), 1
  if one of them lies on the other side.
* Against it: some contrast is below its bound. The p is the least of those on that side, times the number of contrasts
  (Bonferroni).
* The smaller of both p is the claim's, corrected by Holm over all claims that were measured. Below 5 % the claim holds,
  or does not, by the side that gave the p. Else it cannot be told, as where a contrast was not measured.

With few videos and seeds a difference that is there can be missed; "cannot be told" is not "equal".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cardiocaps.metrics.comparison import Difference, holm

LEVEL = 0.05


class Verdict(StrEnum):
    HOLDS = "holds"
    NOT = "does not hold"
    UNKNOWN = "cannot be told"


class NotMeasured(Exception):
    """A contrast cannot be computed, so its claim cannot be told; the text says why."""


class LeftOut(NotMeasured):
    """A contrast says nothing about its claim, which is judged without it; the text says why."""


@dataclass(frozen=True)
class Missing:
    """Why a contrast has no difference, and whether its claim is judged without it."""

    reason: str
    is_left_out: bool = False


@dataclass(frozen=True)
class Contrast:
    """A difference that is above `least` if the claim is true.

    Attributes:
        text: what is subtracted from what.
        measure: computes it; raises NotMeasured.
        least: the bound, with which the p of `measure` compares.
    """

    text: str
    measure: Callable[[], Difference]
    least: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        name: short, for the CSV.
        text: what is claimed, in our words.
        quote: a few of the paper's words.
        place: where they stand.
        contrasts: all of them are above their bounds if the claim is true.
    """

    name: str
    text: str
    quote: str
    place: str
    contrasts: tuple[Contrast, ...]


@dataclass(frozen=True)
class Judged:
    """A claim with its verdict.

    Attributes:
        found: of each contrast its difference, or why there is none.
        p: of the claim before the correction; NaN if a contrast was not measured, or if all are left out.
        p_corrected: by Holm over the claims.
    """

    claim: Claim
    found: tuple[Difference | Missing, ...]
    p: float
    p_corrected: float
    verdict: Verdict


def judge(claims: Sequence[Claim]) -> list[Judged]:
    """Measure all contrasts and decide by the rule."""
    found = [tuple(_measured(contrast) for contrast in claim.contrasts) for claim in claims]
    sides = [
        _p_of([(x, c.least) for x, c in zip(values, claim.contrasts, strict=True)])
        for claim, values in zip(claims, found, strict=True)
    ]
    corrected = holm([p for p, _ in sides])
    return [
        Judged(claim, values, p, known, side if known < LEVEL else Verdict.UNKNOWN)
        for claim, values, (p, side), known in zip(claims, found, sides, corrected, strict=True)
    ]


def _measured(contrast: Contrast) -> Difference | Missing:
    try:
        found = contrast.measure()
    except NotMeasured as error:
        return Missing(str(error), isinstance(error, LeftOut))
    if math.isnan(found.value):
        return Missing("undefined for a seed")
    return found if not math.isnan(found.p) else Missing("no p without resamples or several seeds")


def _p_of(values: Sequence[tuple[Difference | Missing, float]]) -> tuple[float, Verdict]:
    """The p of a claim and the side that it is of; NaN if a contrast was not measured, or if all are left out."""
    known = [(x, least) for x, least in values if isinstance(x, Difference)]
    if not known or any(isinstance(x, Missing) and not x.is_left_out for x, _ in values):
        return math.nan, Verdict.UNKNOWN
    holds = max(x.p if x.value > least else 1.0 for x, least in known)
    against = min(1.0, len(known) * min(x.p if x.value < least else 1.0 for x, least in known))
    return (holds, Verdict.HOLDS) if holds <= against else (against, Verdict.NOT)
