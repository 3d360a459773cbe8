"""The same cases and forms through pytest-benchmark, at sizes that take two minutes: `python -m pytest benchmarks`.

capsops, the published form and the eager forms that are usually the best ones. The gate runs before each timing.
"""

from __future__ import annotations

from functools import cache

import pytest

from . import forms, gate
from .forms import Form
from .race import Pool
from .shapes import CASES, DIRECTIONS, Case

# The published forms need gigabytes and seconds at the full number of capsules.
_LARGEST_VOTES = 1 << 22
_FORMS = ("capsops", "published", "bmm, broadcast", "broadcast, broadcast")


def _sized(case: Case) -> Case:
    shape = case.shape
    return case.at(max(1, min(shape.N, shape.N * _LARGEST_VOTES // shape.vote_numbers)))


_CASES = {str(case): _sized(case) for case in CASES if not case.ladder}


@cache
def _checked(name: str) -> dict[str, Form]:
    case = _CASES[name]
    candidates = [form for form in forms.contestants(case) if form.name in _FORMS]
    gate.check(case, candidates)
    return {form.name: form for form in candidates}


@pytest.mark.parametrize("form", _FORMS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("name", _CASES)
def test_routing(benchmark, name: str, direction: str, form: str) -> None:
    contestant, case = _checked(name)[form], _CASES[name]
    pool, gradients = Pool(case), case.output_gradients()
    benchmark.group = f"{case}, {case.shape}, {direction}"

    def fresh() -> tuple[tuple[object, ...], dict[str, object]]:
        return (contestant, pool.next(contestant), direction, gradients), {}

    benchmark.pedantic(gate.call, setup=fresh, rounds=5, warmup_rounds=1)
