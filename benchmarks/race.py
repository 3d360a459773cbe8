"""Forms of one routing timed side by side: interleaved, in one process, on random inputs that no cache holds.

The forms first run once each, and what they compute is compared with capsops. Then the eager forms are raced against
each other over a few rounds, and so are the compiled ones; the winners, capsops and the published form run many rounds.
In a round each finalist has one call. What takes seconds is cut short: large shapes first thin the eager field at a
sixteenth of the capsules, a form of more than a second is judged by its first call, and for a peer that takes longer
than a finalist's time that call is the only one. A call never finds its inputs in a cache: as many sets of inputs as
fill the last-level cache twice are taken in turn.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from . import forms, gate, worker
from .forms import Form
from .machine import last_level_cache
from .shapes import Case

OK, OUT_OF_MEMORY, TOO_SLOW, FAILED = "ok", "out of memory", "too slow", "failed"
CAPSOPS, PUBLISHED, BEST_EAGER, BEST_COMPILED = "capsops", "published", "best eager", "best compiled"
RACED = "raced"  # and lost

# A form this many times slower than the best of its kind in its first call is not raced further.
_HOPELESS = 2.0
# Seconds from which a form's first call tells how quick it is.
_SURE = 0.5
# Weights of more numbers than this are raced at a sixteenth first.
_LARGE = 1 << 25
_THINNED = 16
_HOPELESS_THINNED = 1.5


@dataclass(frozen=True)
class Budget:
    """Seconds: for a form in the race, for a finalist, and after which a silent process is given up."""

    race: float = 0.5
    final: float = 4.0
    limit: float = 150.0
    compile: bool = True


@dataclass
class Timing:
    """A form's seconds per call, of each round; without any if it could not be measured. N: of the measured shape."""

    form: str
    role: str
    N: int
    seconds: list[float] = field(default_factory=list)
    status: str = OK
    reason: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def run(case: Case, direction: str, budget: Budget) -> list[Timing]:
    """All forms at a case, in one process; without those that end it, in another.

    Raises GateError, MeasurementError.
    """
    out: dict[str, Timing] = {}
    while True:
        timings: list[Timing] = []
        current = ""
        try:
            for event in worker.events(contest, case, direction, budget, sorted(out), limit=budget.limit):
                if isinstance(event, Timing):
                    timings.append(event)
                else:
                    current = event
        except (worker.OutOfMemory, worker.TooSlow) as end:
            status = OUT_OF_MEMORY if isinstance(end, worker.OutOfMemory) else TOO_SLOW
            if current in ("", CAPSOPS) or current in out:
                raise worker.MeasurementError(f"{case}, {direction}: {current or 'the inputs'}: {status}") from None
            role = PUBLISHED if current == PUBLISHED else RACED
            reason = f"no result within {budget.limit:.0f} s" if status == TOO_SLOW else "the process was killed"
            out[current] = Timing(current, role, case.shape.N, status=status, reason=reason)
        else:
            return [*timings, *out.values()]


class Pool:
    """Sets of inputs that fill the last-level cache twice, each in every order of the weight that is asked for."""

    def __init__(self, case: Case) -> None:
        size = 4 * (case.shape.u_numbers + case.shape.weight_numbers)
        self._sets = [case.inputs(seed) for seed in range(max(1, min(256, math.ceil(2 * last_level_cache() / size))))]
        self._stored: dict[tuple[int, str], Tensor] = {}
        self._turn = itertools.cycle(range(len(self._sets)))

    def first(self, form: Form) -> dict[str, Tensor]:
        """Always the same set, on which forms can be compared."""
        return self._get(form, 0)

    def next(self, form: Form) -> dict[str, Tensor]:
        """The next set in turn."""
        return self._get(form, next(self._turn))

    def keep(self, finalists: Iterable[Form]) -> None:
        """Let go of the orders of the weight that nobody needs any more."""
        layouts = {form.layout for form in finalists}
        self._stored = {key: x for key, x in self._stored.items() if key[1] in layouts}

    def _get(self, form: Form, index: int) -> dict[str, Tensor]:
        inputs = self._sets[index]
        if form.layout == "NKJD":
            return inputs
        key = index, form.layout
        if key not in self._stored:
            self._stored[key] = form.stored(inputs["weight"])
        return {**inputs, "weight": self._stored[key]}


def contest(case: Case, direction: str, budget: Budget, excluded: list[str]) -> Iterator[str | Timing]:
    """Yields the name of each form before it runs for the first time, and a Timing for each."""
    prepare()
    field_ = [f for f in forms.contestants(case) if f.name not in excluded and (budget.compile or f.kind != "compiled")]
    if case.shape.weight_numbers > _LARGE:
        losers = _thin([form for form in field_ if form.kind == "eager"], case, direction)
        yield from losers.values()
        field_ = [form for form in field_ if form.name not in losers]

    pool, gradients = Pool(case), case.output_gradients()

    def timed(form: Form) -> float:
        inputs = pool.next(form)
        start = time.perf_counter()
        results = gate.call(form, inputs, direction, gradients)
        seconds = time.perf_counter() - start
        del results
        return seconds

    first: dict[str, float] = {}
    expected: list[Tensor] = []
    for form in field_:
        yield form.name
        inputs = pool.first(form)
        try:
            start = time.perf_counter()
            results = gate.call(form, inputs, direction, gradients)
            first[form.name] = time.perf_counter() - start
            if form.kind == "compiled":  # the first call compiled
                first[form.name] = timed(form)
            if first[form.name] < _SURE:  # where start-up matters
                first[form.name] = min(timed(form) for _ in range(3))
        except Exception as error:
            if form.kind == CAPSOPS:
                raise
            status = OUT_OF_MEMORY if worker.is_out_of_memory(error) else FAILED
            reason = "an allocation failed" if status == OUT_OF_MEMORY else f"{type(error).__name__}: {error}"[:500]
            yield Timing(form.name, PUBLISHED if form.kind == PUBLISHED else RACED, case.shape.N, [], status, reason)
            continue
        results = gate.comparable(form, inputs, results, direction)
        expected = expected or results
        difference = gate.error(results, expected)
        if not difference < gate.TOLERANCE_SIDE_BY_SIDE:
            raise gate.GateError(f"gate: {case}, {direction}: {form.name} differs from capsops by {difference:.1e}")
        del results
    expected.clear()

    field_ = [form for form in field_ if form.name in first]
    finalists = {form: form.kind for form in field_ if form.kind in (CAPSOPS, PUBLISHED)}
    for kind, role in (("eager", BEST_EAGER), ("compiled", BEST_COMPILED)):
        runners = [form for form in field_ if form.kind == kind]
        if not runners:
            continue
        best = min(first[form.name] for form in runners)
        quick = [form for form in runners if first[form.name] <= _HOPELESS * best]
        rounds = {f: _rounds(first[f.name], budget.race, 20) for f in quick if len(quick) > 1 and first[f.name] < 1}
        raced = _interleaved(rounds, timed)
        timings = {f: Timing(f.name, RACED, case.shape.N, raced.get(f) or [first[f.name]]) for f in runners}
        winner = min(quick, key=lambda form: timings[form].median)
        first[winner.name] = timings[winner].median
        finalists[winner] = role
        yield from (timing for form, timing in timings.items() if form is not winner)

    for form in [f for f in finalists if first[f.name] > budget.final and f.kind != CAPSOPS]:
        yield Timing(form.name, finalists.pop(form), case.shape.N, [first[form.name]])  # that call is enough
    pool.keep(finalists)
    rounds = {form: _rounds(first[form.name], budget.final) for form in finalists}
    for form, seconds in _interleaved(rounds, timed).items():
        yield Timing(form.name, finalists[form], case.shape.N, seconds)


def prepare() -> None:
    """What every measuring process does first."""
    import torch._inductor.config

    gc.disable()
    torch._inductor.config.compile_threads = 1  # no processes beside this one


def _thin(eager: list[Form], case: Case, direction: str) -> dict[str, Timing]:
    """The forms that are hopeless at a sixteenth of the capsules, with their time scaled up."""
    small = case.at(max(1, case.shape.N // _THINNED))
    pool, gradients = Pool(small), small.output_gradients()
    seconds = {}
    for form in eager:
        calls = []
        for _ in range(3):  # the first warms up
            start = time.perf_counter()
            gate.call(form, pool.next(form), direction, gradients)
            calls.append(time.perf_counter() - start)
        seconds[form.name] = min(calls)
    scale = case.shape.N / small.shape.N
    best = min(seconds.values(), default=0.0)
    return {
        name: Timing(
            name, RACED, small.shape.N, [s * scale], TOO_SLOW, f"{s / best:.1f} times the best at N={small.shape.N:,}"
        )
        for name, s in seconds.items()
        if s > _HOPELESS_THINNED * best
    }


def _rounds(seconds: float, budget: float, most: int = 200) -> int:
    """At least three; of a form that takes long, two or one."""
    if seconds > budget:
        return 1
    if 3 * seconds > budget:
        return 2
    return min(most, int(budget / max(seconds, 1e-9)))


def _interleaved(rounds: dict[Form, int], timed: object) -> dict[Form, list[float]]:
    """Each form as often as it has rounds, spread over all of them. The garbage of Python is collected in between."""
    assert callable(timed)
    seconds: dict[Form, list[float]] = {form: [] for form in rounds}
    most = max(rounds.values(), default=0)
    for i in range(most):
        gc.collect(0)
        for form, n in rounds.items():
            if i * n // most != (i - 1) * n // most or i == 0:
                seconds[form].append(timed(form))
    return seconds
