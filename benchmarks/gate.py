"""The correctness gate: a form that does not compute the routing gets no number.

At a reduced N of every case, each form in float32 against the reference in float64: outputs and gradients of all
inputs. At the measured shape each form, and now the compiled ones too, against capsops, when first called (`race`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

import capsops

from . import forms
from .device import CPU, Device
from .forms import Form
from .program import BenchmarkError
from .shapes import BOTH, FORWARD, Case

# Largest error relative to the largest number expected: of capsops, whose sums do not drift; of the PyTorch forms, some
# of which add up a million numbers that cancel, one after the other (a convolution's gradient of its bias); and of
# those at the measured shape, a hundred times as long.
TOLERANCE = 1e-4
TOLERANCE_FORMS = 1e-3
TOLERANCE_SIDE_BY_SIDE = 1e-2
# In bfloat16 and float16, whose numbers have 8 and 11 bits.
TOLERANCE_LOW = 3e-2


class GateError(BenchmarkError):
    """A form is wrong. No number is reported."""

    exit_code = 1


def call(form: Form, inputs: dict[str, Tensor], direction: str, gradients: Sequence[Tensor]) -> list[Tensor]:
    """The outputs (forward), or the gradients of all inputs that have one (forward + backward)."""
    with capsops.use_backend(form.backend) if form.backend else nullcontext():
        if direction == FORWARD:
            with torch.no_grad():
                return list(form.function(**inputs))
        leaves = [x for x in inputs.values() if x.requires_grad]
        return list(torch.autograd.grad(form.function(**inputs), leaves, gradients))


def comparable(form: Form, inputs: dict[str, Tensor], results: list[Tensor], direction: str) -> list[Tensor]:
    """Results with the weight's gradient in the common order."""
    if direction == FORWARD or "weight" not in inputs:
        return results
    at = [name for name, x in inputs.items() if x.requires_grad].index("weight")
    return [form.restored(x) if i == at else x for i, x in enumerate(results)]


def error(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The largest error, relative to the largest number of its tensor; infinite for a NaN or a wrong shape."""
    worst = 0.0
    for x, y in zip(got, expected, strict=True):
        if x.shape != y.shape:
            return float("inf")
        if y.numel() == 0:
            continue
        x, y = x.detach(), y.detach()
        difference = (x.to(y.dtype) - y).abs_().max() / y.abs().max().clamp(min=1e-30)
        worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


def check(case: Case, candidates: Iterable[Form] | None = None, device: Device = CPU) -> dict[str, float]:
    """The error of every form but the compiled ones at a reduced N. Raises GateError naming all that are wrong."""
    case, where = case.reduced(), device.type
    if candidates is None:
        found = forms.contestants(case, device.backends(case))
        candidates = [form for form in found if form.kind != "compiled"]
    oracle = forms.reference(case)
    drawn = case.inputs(device=where)
    wide = {
        n: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for n, x in drawn.items()
    }
    gradients = case.output_gradients(device=where)
    expected = {d: call(oracle, wide, d, [g.double() for g in gradients]) for d in (FORWARD, BOTH)}
    if not all(bool(x.any()) for results in expected.values() for x in results):
        raise GateError(f"gate: {case}: the reference gives only zeros, which would prove nothing")
    errors = {}
    for form in candidates:
        inputs = form.arranged(drawn)
        try:
            errors[form.name] = max(
                error(
                    comparable(form, inputs, call(form, inputs, direction, gradients), direction), expected[direction]
                )
                for direction in (FORWARD, BOTH)
            )
        except Exception as failure:
            if not device.on_gpu:
                raise
            # A form that raises an error is left out later, when it is timed, and its error is reported. A form that
            # makes the GPU unusable fails the gate.
            if not device.recover():
                raise GateError(f"gate: {case} at {case.shape}: {form.name} fails: {failure}"[:500]) from None
    # EM routing divides by variances: in float32 the reference itself is off by 2e-4 in a gradient.
    strict = TOLERANCE_FORMS if case.routing.name == "em" else TOLERANCE
    strict, loose = (strict, TOLERANCE_FORMS) if case.dtype == "float32" else (TOLERANCE_LOW, TOLERANCE_LOW)
    wrong = {n: e for n, e in errors.items() if not e < (strict if n.startswith("capsops") else loose)}
    if wrong:
        listed = ", ".join(f"{name} (error {e:.1e})" for name, e in wrong.items())
        raise GateError(f"gate: {case} at {case.shape}: against the float64 reference wrong: {listed}")
    return errors


def distinct(cases: Sequence[Case]) -> list[Case]:
    """The rungs of the ladder differ only in size: of each routing the lowest stands for all."""
    seen: dict[tuple[object, str, str], Case] = {}
    for case in cases:
        seen.setdefault((case.ladder or case.shape.name, case.routing.name, case.dtype), case)
    return list(seen.values())


def check_all(cases: Sequence[Case], device: Device = CPU) -> Iterator[str]:
    """Yields each case's name before it is checked. Raises GateError, after the last one, naming all that is wrong."""
    device.prepare()
    failures = []
    for case in cases:
        yield str(case)
        try:
            check(case, device=device)
        except GateError as failure:
            failures.append(str(failure).removeprefix("gate: "))
    if failures:
        raise GateError("gate: " + "; ".join(failures))
