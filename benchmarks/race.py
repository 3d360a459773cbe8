"""Forms of one routing timed side by side: interleaved, in one process, on random inputs that no cache holds.

The forms first run once each, and what they compute is compared with capsops. Then the eager forms are raced against
each other over a few rounds, and so are the compiled ones; the winners, capsops and the published form run many rounds.
In a round each finalist has one call. What takes seconds is cut short: large shapes first thin the eager field at a
sixteenth of the capsules, a form of more than a second is judged by its first call, and for a peer that takes longer
than a finalist's time that call is the only one. A call never finds its inputs in a cache: as many sets of inputs as
fill the last-level cache twice are taken in turn. On a GPU (`device`) a round is several calls, the field is not
thinned, and a form's memory is measured in the same process.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from . import forms, gate, worker
from .device import CPU, Device
from .forms import Form
from .shapes import Case

OK, OUT_OF_MEMORY, TOO_SLOW, FAILED = "ok", "out of memory", "too slow", "failed"
LEFT_OUT = "left out"  # by a budget of time
CAPSOPS, PUBLISHED, BEST_EAGER, BEST_COMPILED = "capsops", "published", "best eager", "best compiled"
OTHER = "capsops, other backend"  # than the one it chooses
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
    """race, final, limit: seconds for a form in the race, for a finalist, and until a silent process is killed.
    until: after this time, by time.perf_counter, no process is restarted for a form that crashed."""

    race: float = 0.5
    final: float = 4.0
    limit: float = 150.0
    until: float = math.inf
    compile: bool = True


@dataclass
class Timing:
    """A form's seconds per call, of each round; without any if it could not be measured. N: of the measured shape.
    extra: peak bytes beyond inputs and results, where they are measured with the time."""

    form: str
    role: str
    N: int
    seconds: list[float] = field(default_factory=list)
    status: str = OK
    reason: str = ""
    extra: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.seconds) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low, high


def run(
    case: Case, direction: str, budget: Budget, device: Device = CPU, without: Collection[str] = ()
) -> list[Timing]:
    """All forms at a case but those named in `without`, in one process; without those that end it, in another.

    Raises GateError, MeasurementError.
    """
    out: dict[str, Timing] = {}
    where = (device,) if device.on_gpu else ()
    chosen = ""
    while True:
        timings: list[Timing] = []
        current = ""
        excluded = sorted({*out, *without})
        limit = min(budget.limit, max(budget.until - time.perf_counter(), 1.0))
        try:
            for event in worker.events(contest, case, direction, budget, excluded, *where, limit=limit):
                if isinstance(event, Timing):
                    timings.append(event)
                else:
                    current = event
                    chosen = chosen or current
        except (worker.OutOfMemory, worker.TooSlow, worker.Broken) as end:
            reasons = {
                worker.OutOfMemory: (OUT_OF_MEMORY, "the process was killed"),
                worker.TooSlow: (TOO_SLOW, f"no result within {limit:.0f} s"),
            }
            status, reason = reasons.get(type(end), (FAILED, str(end)))
            if current in ("", CAPSOPS) or current in out or time.perf_counter() > budget.until:
                what = status if status != FAILED else reason
                raise worker.MeasurementError(f"{case}, {direction}: {current or 'the inputs'}: {what}") from None
            out[current] = Timing(current, _role(current, chosen), case.shape.N, status=status, reason=reason)
        else:
            return [*timings, *out.values()]


def _role(name: str, chosen: str) -> str:
    """Of a form before the race. chosen: the name of capsops by the backend that it chooses."""
    if name == chosen:
        return CAPSOPS
    return OTHER if name.startswith(CAPSOPS) else PUBLISHED if name == PUBLISHED else RACED


class Pool:
    """Sets of inputs that fill the last-level cache twice, each in every order of the weight that is asked for."""

    def __init__(self, case: Case, device: Device = CPU) -> None:
        size = case.itemsize * (case.shape.u_numbers + case.shape.weight_numbers)
        sets = max(1, min(256, math.ceil(2 * device.cache_bytes() / size)))
        self._sets = [case.inputs(seed, device=device.type) for seed in range(sets)]
        self._stored: dict[tuple[int, str], Tensor] = {}
        self._turn = itertools.cycle(range(len(self._sets)))

    def first(self, form: Form) -> dict[str, Tensor]:
        """Always the same set, on which forms can be compared."""
        return self._get(form, 0)

    def next(self, form: Form) -> dict[str, Tensor]:
        """The next set in turn."""
        return self._get(form, next(self._turn))

    def keep(self, finalists: Iterable[Form]) -> None:
        """Free the orders of the weight that are no longer used."""
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


def contest(
    case: Case, direction: str, budget: Budget, excluded: list[str], device: Device = CPU
) -> Iterator[str | Timing]:
    """Yields the name of each form before it runs for the first time, and a Timing for each.

    Raises GateError; worker.Broken, from a GPU that a form has put out of action.
    """
    prepare(device)
    every = forms.contestants(case, device.backends(case))
    chosen = every[0].name
    field_ = [f for f in every if f.name not in excluded and (budget.compile or f.kind != "compiled")]
    if case.shape.weight_numbers > _LARGE and not device.on_gpu:
        losers = _thin([form for form in field_ if form.kind == "eager"], case, direction)
        yield from losers.values()
        field_ = [form for form in field_ if form.name not in losers]

    pool, gradients = Pool(case, device), case.output_gradients(device=device.type)
    first: dict[str, float] = {}
    extra: dict[str, int | None] = {}

    def call(form: Form) -> Callable[[], list[Tensor]]:
        return partial(gate.call, form, pool.next(form), direction, gradients)

    def calls(form: Form) -> tuple[int, int]:
        """Of a round: those that are timed, and those that lead."""
        seconds = first.get(form.name)
        return (1, 0) if seconds is None else (device.calls(seconds), device.lead(seconds))

    def timed(form: Form) -> float:
        many, lead = calls(form)
        return device.timed([call(form) for _ in range(many + lead)], lead=bool(lead))

    expected: list[Tensor] = []
    for form in field_:
        yield form.name
        inputs = pool.first(form)
        try:
            start = time.perf_counter()
            results = gate.call(form, inputs, direction, gradients)
            device.synchronize()
            seconds = time.perf_counter() - start
            if form.kind == "compiled" or device.on_gpu:  # the first call compiled
                seconds = timed(form)
            if seconds < _SURE:  # where start-up matters
                seconds = min(timed(form) for _ in range(3))
            extra[form.name] = device.extra_bytes(call(form))
            first[form.name] = seconds
        except Exception as error:
            if form.kind == CAPSOPS and not device.on_gpu:
                raise
            status = OUT_OF_MEMORY if worker.is_out_of_memory(error) else FAILED
            reason = "an allocation failed" if status == OUT_OF_MEMORY else f"{type(error).__name__}: {error}"[:500]
            if not device.recover():
                raise worker.Broken(reason) from None
            yield Timing(form.name, _role(form.name, chosen), case.shape.N, [], status, reason)
            continue
        results = gate.comparable(form, inputs, results, direction)
        expected = expected or results
        difference = gate.error(results, expected)
        if not difference < (gate.TOLERANCE_SIDE_BY_SIDE if case.dtype == "float32" else gate.TOLERANCE_LOW):
            raise gate.GateError(f"gate: {case}, {direction}: {form.name} differs from capsops by {difference:.1e}")
        del results
    expected.clear()

    field_ = [form for form in field_ if form.name in first]

    def rounds_of(form: Form, seconds: float, most: int = 200) -> int:
        return _rounds(first[form.name] * sum(calls(form)), seconds, most)

    def timing(form: Form, role: str, seconds: list[float]) -> Timing:
        return Timing(form.name, role, case.shape.N, seconds, extra=extra[form.name])

    finalists = {form: _role(form.name, chosen) for form in field_ if form.kind in (CAPSOPS, PUBLISHED)}
    for kind, role in (("eager", BEST_EAGER), ("compiled", BEST_COMPILED)):
        runners = [form for form in field_ if form.kind == kind]
        if not runners:
            continue
        best = min(first[form.name] for form in runners)
        quick = [form for form in runners if first[form.name] <= _HOPELESS * best]
        rounds = {f: rounds_of(f, budget.race, 20) for f in quick if len(quick) > 1 and first[f.name] < 1}
        raced = _interleaved(rounds, timed)
        timings = {f: timing(f, RACED, raced.get(f) or [first[f.name]]) for f in runners}
        winner = min(quick, key=lambda form: timings[form].median)
        first[winner.name] = timings[winner].median
        finalists[winner] = role
        yield from (timing for form, timing in timings.items() if form is not winner)

    for form in [f for f in finalists if first[f.name] > budget.final and f.kind != CAPSOPS]:
        yield timing(form, finalists.pop(form), [first[form.name]])  # that call is enough
    pool.keep(finalists)
    rounds = {form: rounds_of(form, budget.final) for form in finalists}
    for form, seconds in _interleaved(rounds, timed).items():
        yield timing(form, finalists[form], seconds)


def warm(case: Case, direction: str, names: list[str], device: Device) -> Iterator[str]:
    """Compiles forms and leaves what was compiled in torch's caches on disk, for `contest`. Yields their names."""
    prepare(device)
    for form in forms.contestants(case, device.backends(case)):
        if form.name in names:
            inputs = form.arranged(case.inputs(device=device.type))
            gate.call(form, inputs, direction, case.output_gradients(device=device.type))
            yield form.name


def prepare(device: Device = CPU) -> None:
    """What every measuring process does first."""
    import torch._inductor.config

    device.prepare()
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
