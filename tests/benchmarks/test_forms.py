"""The contestants compute the same routing, and the gate sees one that does not."""

from dataclasses import replace

import pytest
import torch

from benchmarks import forms, gate
from benchmarks.shapes import BOTH, CASES, FORWARD, QUICK_CASES, ROUTINGS, Case


@pytest.mark.parametrize("case", gate.distinct(QUICK_CASES), ids=str)
def test_all_forms_agree_with_the_reference(case: Case) -> None:
    errors = gate.check(case)
    assert {"capsops", "published"} < errors.keys()
    assert len(errors) >= 4


def test_a_compiled_form_agrees_with_the_reference() -> None:
    case = next(case for case in QUICK_CASES if case.routing == ROUTINGS["dynamic, detached"] and not case.shape.masked)
    (form,) = [form for form in forms.contestants(case) if form.name == "compiled broadcast, broadcast"]
    (expected,) = forms.reference(case).function(**case.inputs(dtype=torch.float64))
    assert gate.error(gate.call(form, case.inputs(), FORWARD, []), [expected]) < gate.TOLERANCE


@pytest.mark.parametrize("wrong", [lambda v: v * 1.01, torch.detach_copy, lambda v: v * torch.nan])
def test_the_gate_stops_a_wrong_form_and_names_it(wrong) -> None:
    case = QUICK_CASES[0]
    good = forms.contestants(case)[0]

    def function(**inputs: torch.Tensor) -> forms.Outputs:
        (v,) = good.function(**inputs)
        return (wrong(v) if wrong is not torch.detach_copy else v + (inputs["u"] - inputs["u"].detach()).sum(),)

    bad = replace(good, name="bad form", function=function)
    assert gate.check(case, [good])
    with pytest.raises(gate.GateError, match=r"paper, attention at .*bad form"):
        gate.check(case, [good, bad])


@pytest.mark.parametrize("layout", ["NKJD", "NJKD", "JNDK"])
def test_a_stored_weight_is_restored(layout: str) -> None:
    form = forms.Form("", "eager", lambda: (), layout)
    weight = torch.randn(2, 3, 4, 5)
    stored = form.stored(weight)
    assert stored.is_contiguous()
    assert [stored.shape["NKJD".index(a)] for a in "NKJD"] == [
        dict(zip("NKJD", (2, 3, 4, 5), strict=True))[a] for a in layout
    ]
    assert torch.equal(form.restored(stored), weight)


def test_inputs_are_fresh_and_reproducible() -> None:
    for case in gate.distinct(QUICK_CASES):
        first, same, other = case.inputs(), case.inputs(), case.inputs(seed=1)
        for name, x in first.items():
            assert torch.equal(x, same[name])
            assert x.any()
            if name != "mask":
                assert not torch.equal(x, other[name])


def test_directions_give_outputs_and_gradients() -> None:
    case = QUICK_CASES[0]
    form, inputs = forms.contestants(case)[0], case.inputs()
    (v,) = gate.call(form, inputs, FORWARD, case.output_gradients())
    assert not v.requires_grad
    gradients = gate.call(form, inputs, BOTH, case.output_gradients())
    assert [g.shape for g in gradients] == [x.shape for x in inputs.values()]


def test_every_measured_shape_has_a_quick_one() -> None:
    assert {(c.shape.name if not c.ladder else "", c.routing.name) for c in CASES} == {
        (c.shape.name if not c.ladder else "", c.routing.name) for c in QUICK_CASES
    }
