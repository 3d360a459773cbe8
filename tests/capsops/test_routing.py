"""Every routing on the compiled backend against the reference in float64."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import capsops
from tests.forked_python import forked_python

from .routings import (
    DYNAMIC_INPUTS,
    DYNAMIC_LOGITS,
    LOGITS,
    OPERATORS,
    OVER_POSITIONS,
    ROUTINGS,
    SHAPES,
    STEP_INPUTS,
    Arguments,
    Routing,
    each,
    relative_error,
    run,
)

by_operator = pytest.mark.parametrize("routing", [*OPERATORS, *OVER_POSITIONS], ids=lambda r: r.name)
by_routing = pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.name)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_instructions = pytest.mark.parametrize("instructions", capsops.backends.cpu.instruction_sets(), indirect=True)
by_outputs = pytest.mark.parametrize("J", [2, 3])  # two output capsules have loops of their own
by_batch = pytest.mark.parametrize("B", [3, 16])  # a batch that fills vectors has loops of its own
by_logits = pytest.mark.parametrize(
    "routing", [LOGITS, DYNAMIC_LOGITS, STEP_INPUTS, DYNAMIC_INPUTS], ids=lambda r: r.name
)
# The small arguments with a number for each input capsule, or for each pair.
OF_CAPSULES = ("activation", "logits", "input_weight")
by_sharing = pytest.mark.parametrize("shared", [False, True], ids=["matrices", "shared"])


@pytest.fixture
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    capsops.backends.cpu.use_instruction_set(request.param)
    yield request.param
    capsops.backends.cpu.use_instruction_set("auto")


@pytest.mark.usefixtures("instructions")
@by_instructions
@by_operator
@by_shape
@by_sharing
def test_agrees_with_the_reference(routing: Routing, shape: tuple[int, ...], shared: bool) -> None:
    """To 1e-12 in float64 and 1e-5 in float32, or to the effect of the last digit of the inputs if that is more."""
    arguments = routing.arguments(shape, shared=shared)
    exact, sensitivities = _reference(routing, shape, shared)
    for dtype, bound in ((torch.float64, 1e-10 if routing.em else 1e-12), (torch.float32, 1e-5)):
        unavoidable = sensitivities[dtype]
        for got, expected, error in zip(run(routing, arguments, dtype, "cpu"), exact, unavoidable, strict=True):
            # Where the exact gradient is zero (as with one output capsule), so is the gradient of the kernels.
            if expected.abs().max() > (1e-3 if routing.em else 1e-12):
                assert relative_error(got, expected) < max(bound, 10 * error)
            elif routing.em:  # saturated activations: the gradient vanishes, and the reference loses its digits too
                assert (got - expected).abs().max() < 1e-3 * max(bound, 10 * error)
            else:
                assert got.abs().max() < bound


# The instruction set varies fastest, and the reference does not depend on it.
@lru_cache(maxsize=1)
def _reference(
    routing: Routing, shape: tuple[int, ...], shared: bool
) -> tuple[list[torch.Tensor], dict[torch.dtype, list[float]]]:
    """The results of the reference in float64, and by dtype how much the last digit of the inputs changes each."""
    arguments = routing.arguments(shape, shared=shared)
    exact = run(routing, arguments, torch.float64, "reference")
    dtypes = torch.float64, torch.float32
    return exact, {dtype: _sensitivity(routing, arguments, exact, torch.finfo(dtype).eps) for dtype in dtypes}


@pytest.mark.skipif("avx512" not in capsops.backends.cpu.instruction_sets(), reason="needs AVX-512")
@pytest.mark.parametrize(("B", "D", "expected"), [(3, 8, "avx2"), (3, 9, "avx512"), (16, 8, "avx512")])
def test_short_votes_get_shorter_vectors(B: int, D: int, expected: str) -> None:
    routing = next(r for r in ROUTINGS if r.name == "dynamic3")
    arguments = routing.arguments((B, 50, 8, 5, D))
    results = {}
    for instructions in ("auto", "avx2", "avx512"):
        capsops.backends.cpu.use_instruction_set(instructions)
        results[instructions] = run(routing, arguments, torch.float32, "cpu")[0]
    capsops.backends.cpu.use_instruction_set("auto")
    assert not torch.equal(results["avx2"], results["avx512"])  # otherwise the next line would prove nothing
    assert torch.equal(results["auto"], results[expected])


def _sensitivity(routing: Routing, arguments: Arguments, exact: list[torch.Tensor], digit: float) -> list[float]:
    """The relative change of each result of EM routing when the inputs change in the last digit; for other routings 0.

    EM routing divides by variances, which collapse where an output capsule has one vote, and its activations saturate.
    """
    if not routing.em:
        return [0.0] * len(exact)
    changes = [0.0] * len(exact)
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        close = {n: x * (1 + digit * torch.randn(x.shape, generator=g, dtype=x.dtype)) for n, x in arguments.items()}
        results = run(routing, close, torch.float64, "reference")
        changes = [max(c, relative_error(x, y)) for c, x, y in zip(changes, results, exact, strict=True)]
    return changes


@by_operator
@by_shape
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_at_most_twice_as_wrong(routing: Routing, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # The inputs are rounded first, so that both are measured against the same exact answer.
    arguments = {n: x.to(dtype).double() for n, x in routing.arguments(shape).items()}
    exact = run(routing, arguments, torch.float64, "reference")
    naive = run(routing, arguments, dtype, "reference")
    ours = run(routing, arguments, dtype, "cpu")
    for got, reference, expected in zip(ours, naive, exact, strict=True):
        # Rounding the exact result would cost half a unit in the last place.
        rounding = torch.finfo(dtype).eps / 2 * expected.abs().max()
        error = (reference - expected).abs().max()
        # The mean that the gradient of a softmax over the inputs subtracts comes from s, in another order of additions.
        least = 1e-6 if routing.over_inputs else 1e-12
        assert (got - expected).abs().max() <= 2 * error + rounding + least


@pytest.mark.parametrize("routing", [r for r in OPERATORS if not r.detached], ids=lambda r: r.name)
@by_sharing
def test_gradcheck(routing: Routing, shared: bool) -> None:
    arguments = {n: x.requires_grad_() for n, x in routing.arguments((2, 5, 3, 4, 3), shared=shared).items()}

    def call(*values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return routing.call(**dict(zip(arguments, values, strict=True)))

    with capsops.use_backend("cpu"):
        assert torch.autograd.gradcheck(call, tuple(arguments.values()), fast_mode=False)


@by_outputs
@by_batch
def test_a_loop_of_steps_is_dynamic_routing(J: int, B: int) -> None:
    """Values and gradients are those of `dynamic_routing`; the first step compares with a state of 0."""
    routing = next(r for r in ROUTINGS if r.name == "dynamic3")
    arguments = routing.arguments((B, 37, 5, J, 16))

    def loop(u: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        state = u.new_zeros(B, J, 16)
        for _ in range(3):
            v = capsops.squash(capsops.routing_step(u, weight, state))
            state = state + v
        return v

    steps = replace(routing, call=loop)
    torch.testing.assert_close(
        run(steps, arguments, torch.float64, "cpu"),
        run(routing, arguments, torch.float64, "cpu"),
        rtol=1e-10,
        atol=1e-12,
    )


@by_outputs
@by_batch
@by_logits
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_logits_of_every_shape(routing: Routing, J: int, B: int, backend: str) -> None:
    """Logits without a batch are those of every batch item; −∞ removes a pair, or all pairs of an input capsule."""
    arguments = routing.arguments((B, 7, 4, J, 5))
    own = arguments.pop("logits")[0].clone()
    own[1, 0], own[3] = -torch.inf, -torch.inf
    own.requires_grad_()
    with capsops.use_backend(backend):
        results = []
        for given in (own, own[None], own.expand(B, 7, J)):
            out = routing.call(**arguments, logits=given)
            results.append((out.detach(), *torch.autograd.grad(out.sin().sum(), own)))
    for got in results[1:]:
        torch.testing.assert_close(got, results[0])
    out, g = results[0]
    assert (g[own == -torch.inf] == 0).all()
    # With one pair left there is nothing to weigh.
    assert (J == 2 and not routing.over_inputs) == (g[1] == 0).all()
    present = torch.arange(7) != 3
    rest = {n: x for n, x in arguments.items() if n not in ("u", "weight")}
    u, weight = arguments["u"], arguments["weight"]
    without = routing.call(u=u[:, present], weight=weight[present], logits=own[present], **rest)
    torch.testing.assert_close(out, without.detach())
    kind, options = _kind(routing)
    c = capsops.coupling_coefficients(kind, **arguments, logits=own, **options)
    s = torch.einsum("bnj,bnk,nkjd->bjd", c, u, weight)
    torch.testing.assert_close(s if kind == "step" else capsops.squash(s + arguments["bias"]), out)
    assert (c[:, 3] == 0).all()


@by_outputs
@by_batch
@by_logits
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_wrong_logit_makes_its_sums_nan(routing: Routing, J: int, B: int, wrong: float, backend: str) -> None:
    """Those of its batch item, or only that of its output capsule if the couplings add up to 1 over the inputs."""
    arguments = routing.arguments((B, 7, 4, J, 5))
    for j in range(J):
        logits = arguments["logits"].clone()
        logits[1, 2, j] = wrong
        with capsops.use_backend(backend):
            out = routing.call(**{**arguments, "logits": logits})
        wrong_sums = torch.zeros(B, J, dtype=torch.bool)
        wrong_sums[1, j if routing.over_inputs else slice(None)] = True
        assert out[wrong_sums].isnan().all()
        assert out[~wrong_sums].isfinite().all()


@by_outputs
@by_batch
@by_sharing
@pytest.mark.parametrize("leaky", [False, True], ids=["", "leaky"])
def test_logits_with_a_leak_or_detached(J: int, B: int, shared: bool, leaky: bool) -> None:
    """As the reference. Detached couplings are constants, so the gradient of the logits is 0."""
    arguments = DYNAMIC_LOGITS.arguments((B, 7, 4, J, 5), shared=shared)
    arguments["logits"][1, 3] = -torch.inf

    def call(detach: bool, **arguments: torch.Tensor) -> torch.Tensor:
        return capsops.dynamic_routing(**arguments, iterations=3, leaky=leaky, detach=detach)

    without = {n: x for n, x in arguments.items() if n != "logits"}
    for detach in (False, True):
        routing = replace(DYNAMIC_LOGITS, call=partial(call, detach))
        # Detached logits are constants.
        inputs, fixed = (without, {"logits": arguments["logits"]}) if detach else (arguments, {})
        got, expected = (run(routing, inputs, torch.float64, backend, **fixed) for backend in ("cpu", "reference"))
        for x, y in zip(got, expected, strict=True):
            assert relative_error(x, y) < 1e-12
    (g,) = run(
        replace(DYNAMIC_LOGITS, call=partial(call, True, **without)),
        {"logits": arguments["logits"]},
        torch.float64,
        "cpu",
    )[1:]
    assert (g == 0).all()
    zeros = {**arguments, "logits": torch.zeros_like(arguments["logits"])}
    torch.testing.assert_close(call(False, **zeros), call(False, **without))


@by_outputs
@by_batch
@by_sharing
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("detach", [False, True], ids=["", "detached"])
def test_softmax_over_inputs_without_logits(J: int, B: int, shared: bool, masked: bool, detach: bool) -> None:
    """As the reference; the first couplings are equal."""
    arguments = DYNAMIC_INPUTS.arguments((B, 70, 4, J, 5), shared=shared)
    del arguments["logits"]
    mask = torch.rand(B, 70, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[1] = False
    fixed = {"mask": mask} if masked else {}
    for iterations in (1, 3):

        def call(iterations: int = iterations, **arguments: torch.Tensor) -> torch.Tensor:
            return capsops.dynamic_routing(**arguments, iterations=iterations, axis="input", detach=detach)

        routing = replace(DYNAMIC_INPUTS, call=call)
        got, expected = (run(routing, arguments, torch.float64, name, **fixed) for name in ("cpu", "reference"))
        for x, y in zip(got, expected, strict=True):
            assert relative_error(x, y) < 1e-12
    if masked:
        torch.testing.assert_close(got[0][1], capsops.squash(arguments["bias"]))


@by_outputs
@pytest.mark.parametrize("B", [1, 3, 16])
@pytest.mark.usefixtures("instructions")
@by_instructions
def test_softmax_over_inputs_of_logits_far_apart(J: int, B: int) -> None:
    """The sums change their scale again and again, in one block of input capsules and between blocks."""
    N = 700
    arguments = STEP_INPUTS.arguments((B, N, 4, J, 16))
    rising = torch.arange(N)[:, None] - 400.0
    for logits in (rising, -rising, 300 * torch.randn(N, J, generator=torch.Generator().manual_seed(2))):
        arguments["logits"] = logits.double().expand(B, N, J).contiguous()
        exact = run(STEP_INPUTS, arguments, torch.float64, "reference")
        for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            for x, y in zip(run(STEP_INPUTS, arguments, dtype, "cpu"), exact, strict=True):
                # Where one input capsule has nearly all the weight, gradients are the rounding of larger numbers.
                assert (x - y).abs().max() <= bound * max(1.0, float(y.abs().max()))


def test_detached_gradient_takes_the_couplings_as_constants() -> None:
    torch.manual_seed(3)
    u = torch.randn(2, 19, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(19, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    c = capsops.coupling_coefficients("dynamic", u, weight, iterations=3)
    votes = torch.einsum("bnk,nkjd->bnjd", u, weight)
    expected = capsops.squash(torch.einsum("bnj,bnjd->bjd", c, votes))
    got = capsops.dynamic_routing(u, weight, 3, detach=True)
    torch.testing.assert_close(got, expected)
    g = torch.randn_like(got)
    for x, y in zip(
        torch.autograd.grad(got, (u, weight), g), torch.autograd.grad(expected, (u, weight), g), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_detached_and_full_gradients_differ() -> None:
    torch.manual_seed(4)
    u, weight = torch.randn(2, 19, 4, requires_grad=True), torch.randn(19, 4, 3, 5)
    (full,) = torch.autograd.grad(capsops.dynamic_routing(u, weight).sum(), u)
    (detached,) = torch.autograd.grad(capsops.dynamic_routing(u, weight, detach=True).sum(), u)
    assert not torch.allclose(full, detached, rtol=0.05)


@pytest.mark.usefixtures("instructions")
@by_instructions
@pytest.mark.parametrize("routing", [*ROUTINGS, *OVER_POSITIONS], ids=lambda r: r.name)
@by_sharing
@by_outputs
@pytest.mark.parametrize(("B", "share"), [(11, 0.6), (16, 0.9)], ids=["sparse", "dense"])
def test_mask(routing: Routing, shared: bool, J: int, B: int, share: float) -> None:
    arguments, mask, expected = _masked_reference(routing, (B, 67, 5, J, 6), shared, share)
    got = run(routing, arguments, torch.float64, "cpu", mask=mask)
    for x, y in zip(got, expected, strict=True):
        # In EM routing the gradient of a saturated activation vanishes and loses digits.
        assert relative_error(x, y) < (1e-10 if routing.em else 1e-12)
    if "bias" not in routing.name or routing.name.startswith("attention"):
        assert (got[0][2] == 0).all(), "an item without capsules gives 0"
    gradients = dict(zip(arguments, got[routing.outputs :], strict=True))
    for name in {routing.capsules, *OF_CAPSULES} & set(arguments):
        assert (gradients[name][~mask] == 0).all(), "no gradient where there is no capsule"
        assert (gradients[name][mask] != 0).any()


@lru_cache(maxsize=1)
def _masked_reference(
    routing: Routing, shape: tuple[int, ...], shared: bool, share: float
) -> tuple[Arguments, torch.Tensor, list[torch.Tensor]]:
    """Arguments that are NaN where the mask is False, the mask, and the results of the reference."""
    arguments = routing.arguments(shape, shared=shared)
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(5)) < share
    mask[2] = False
    mask[:, 5] = False
    for name in {routing.capsules, *OF_CAPSULES} & set(arguments):
        arguments[name][~mask] = float("nan")  # masked values may be anything
    expected = run(routing, arguments, torch.float64, "reference", mask=mask)
    without = run(routing, {n: x.nan_to_num() for n, x in arguments.items()}, torch.float64, "reference", mask=mask)
    torch.testing.assert_close(expected, without, rtol=0, atol=0)
    return arguments, mask, expected


@by_routing
def test_mask_is_the_same_as_leaving_the_capsules_out(routing: Routing) -> None:
    arguments = routing.arguments((1, 40, 4, 3, 5))
    mask = torch.arange(40) % 3 != 0
    shorter = dict(arguments)
    for name in {routing.capsules, *OF_CAPSULES} & set(arguments):
        shorter[name] = arguments[name][:, mask]
    for name in {"weight", "prior"} & set(arguments):
        shorter[name] = arguments[name][mask]
    torch.testing.assert_close(routing.call(**arguments, mask=mask[None]), routing.call(**shorter))


@by_operator
@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 4), (2, 0, 3, 2, 4)], ids=["no-batch", "no-capsules"])
@by_sharing
def test_empty(routing: Routing, shape: tuple[int, ...], shared: bool) -> None:
    arguments = routing.arguments(shape, shared=shared)
    expected = run(routing, arguments, torch.float64, "reference")
    for got, y in zip(run(routing, arguments, torch.float64, "cpu"), expected, strict=True):
        torch.testing.assert_close(got, y)


@by_operator
def test_strided_and_expanded_inputs(routing: Routing) -> None:
    arguments = routing.arguments((3, 21, 4, 3, 5))
    expected = run(routing, arguments, torch.float32, "cpu")
    odd = {n: x.to(torch.float32).transpose(0, -1).contiguous().transpose(0, -1) for n, x in arguments.items()}
    capsules = routing.capsules
    assert not odd[capsules].is_contiguous()
    for got, y in zip(each(routing.call(**odd)), expected[: routing.outputs], strict=True):
        torch.testing.assert_close(got.double(), y, rtol=0, atol=0)

    rest = {n: x.to(torch.float32) for n, x in arguments.items()}
    one = rest.pop(capsules)[:1]
    expanded = routing.call(**{capsules: one.expand(3, *one.shape[1:])}, **rest)
    repeated = routing.call(**{capsules: one.repeat(3, *[1] * (one.dim() - 1))}, **rest)
    torch.testing.assert_close(expanded, repeated, rtol=0, atol=0)


@by_operator
@by_outputs
@by_batch
@pytest.mark.usefixtures("instructions")
@by_instructions
def test_misaligned_inputs(routing: Routing, J: int, B: int) -> None:
    arguments = {n: x.float() for n, x in routing.arguments((B, 21, 8, J, 16)).items()}
    shifted = {n: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for n, x in arguments.items()}
    assert all(x.is_contiguous() and x.data_ptr() % 16 == 4 for x in shifted.values())
    results = []
    for inputs in (arguments, shifted):
        leaves = [x.detach().requires_grad_() for x in inputs.values()]
        out = each(routing.call(**dict(zip(inputs, leaves, strict=True))))
        results.append([*out, *torch.autograd.grad([x.square().sum() for x in out], leaves)])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@by_operator
def test_gradient_that_arrives_expanded(routing: Routing) -> None:
    arguments = routing.arguments((2, 9, 4, 3, 5))
    u = arguments[routing.capsules].requires_grad_()
    for out in each(routing.call(**arguments)):
        (summed,) = torch.autograd.grad(out.sum(), u, retain_graph=True)  # a gradient of stride 0
        (dense,) = torch.autograd.grad(out, u, torch.ones_like(out), retain_graph=True)
        torch.testing.assert_close(summed, dense, rtol=0, atol=0)
        assert summed.abs().max() > 0


@by_operator
@by_outputs
@by_batch
def test_only_wanted_gradients_are_computed(routing: Routing, J: int, B: int) -> None:
    arguments = routing.arguments((B, 13, 4, J, 5))
    everything = dict(zip(arguments, run(routing, arguments, torch.float64, "cpu")[routing.outputs :], strict=True))
    for name in arguments:
        leaves = {n: x.clone().requires_grad_(n == name) for n, x in arguments.items()}
        out, g = each(routing.call(**leaves)), torch.Generator().manual_seed(1)
        # The numbers of run().
        torch.autograd.backward(out, [torch.randn(x.shape, generator=g, dtype=x.dtype).bfloat16().to(x) for x in out])
        for n, x in leaves.items():
            assert (x.grad is None) == (n != name)
        torch.testing.assert_close(leaves[name].grad, everything[name], rtol=0, atol=0)


@by_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@by_outputs
@by_batch
def test_bitwise_the_same_for_any_number_of_threads(routing: Routing, dtype: torch.dtype, J: int, B: int) -> None:
    arguments = routing.arguments((B, 1031, 8, J, 16))
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7, 2):
            torch.set_num_threads(n)
            results.append(run(routing, arguments, dtype, "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


def test_long_sums_do_not_drift() -> None:
    # 200,000 votes in one direction: a single running sum in float32 would lose four digits.
    N = 200_000
    u = torch.full((1, N, 1), 1.0) + torch.rand(1, N, 1) * 1e-3
    weight = torch.full((1, 2, 4), 1e-5)
    out = capsops.dynamic_routing(u, weight, 1)
    with capsops.use_backend("reference"):
        exact = capsops.dynamic_routing(u.double(), weight.double(), 1)
    assert relative_error(out.double(), exact) < 1e-6


@given(
    B=st.integers(1, 20), N=st.integers(1, 80), K=st.integers(1, 12), J=st.integers(1, 9), D=st.integers(1, 21),
    which=st.integers(0, len(OPERATORS) - 1), shared=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape(B: int, N: int, K: int, J: int, D: int, which: int, shared: bool) -> None:
    routing = OPERATORS[which]
    arguments = routing.arguments((B, N, K, J, D), shared=shared)
    expected = run(routing, arguments, torch.float64, "reference")
    for got, y in zip(run(routing, arguments, torch.float64, "cpu"), expected, strict=True):
        # A variance that collapses to ε makes EM routing sensitive to the last digit of the votes.
        tolerance = 1e-10 if routing.em else 1e-12
        assert (got - y).abs().max() <= tolerance * max(1.0, float(y.abs().max()))


def _kind(routing: Routing) -> tuple[str, dict[str, Any]]:
    """The name of a routing in `coupling_coefficients`, and its options."""
    axis = {"axis": "input"} if routing.over_inputs else {}
    if routing.em:
        given = {"inverse_temperature": routing.inverse_temperature, "renormalise": "renormalise" in routing.name}
        return "em", {"iterations": int(routing.name[2]), **given}
    if routing.name.startswith("dynamic"):
        return "dynamic", {"iterations": int(routing.name[7]), "leaky": "leaky" in routing.name, **axis}
    if routing.name.startswith("step"):
        return "step", axis
    if routing.name.startswith("self-attention"):
        return "self-attention", {"scale": 0.3} if "scale" in routing.name else {}
    return "attention", {}


@by_routing
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_coupling_coefficients_explain_the_output(routing: Routing, backend: str) -> None:
    arguments = routing.arguments((2, 23, 4, 3, 5))
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(1)) < 0.7
    kind, options = _kind(routing)
    u, weight = arguments[routing.capsules], arguments["weight"]
    rest = {n: x for n, x in arguments.items() if n not in (routing.capsules, "weight")}
    c = capsops.coupling_coefficients(kind, u, weight, **rest, **options, mask=mask)
    with capsops.use_backend(backend):
        out = each(routing.call(**arguments, mask=mask))[0]
    if routing.em:
        votes = torch.einsum("bn...k,nkjd->bnj...d", u, weight)
        a = (arguments["activation"] > 0).double() if options["renormalise"] else arguments["activation"]
        w = c * a[:, :, None]
        mean = torch.einsum("bnj,bnj...->bj...", w / w.sum(dim=1, keepdim=True), votes)
        torch.testing.assert_close(mean, out, rtol=1e-6, atol=1e-6)  # they differ by ε
    else:
        votes = torch.einsum("bnk,nkjd->bnjd", u, weight)
        if "input_weight" in arguments:
            votes = votes * arguments["input_weight"][:, :, None, None]
        s = (c * votes if c.dim() == 4 else c[..., None] * votes).sum(dim=1)
        if "bias" in arguments:
            s = s + arguments["bias"]
        if kind != "step":
            s = capsops.squash(s, kind="efficient" if kind == "self-attention" else "sabour")
        torch.testing.assert_close(s, out)
    assert (c[~mask] == 0).all()
    if routing.over_inputs:
        torch.testing.assert_close(c.sum(dim=1), torch.ones_like(c[:, 0]))
        return
    total = c.sum(dim=2)
    if "prior" in arguments:
        total = total - arguments["prior"].sum(dim=1)
    assert (total[mask] < 1).all() if "leaky" in routing.name else torch.allclose(total[mask], torch.ones(()).double())


@by_routing
def test_coupling_coefficients_in_chunks(routing: Routing, monkeypatch: pytest.MonkeyPatch) -> None:
    from capsops.ops import coupling_coefficients

    kind, options = _kind(routing)
    arguments = routing.arguments((2, 50, 4, 3, 5))
    arguments["u"] = arguments.pop(routing.capsules)
    whole = capsops.coupling_coefficients(kind, **arguments, **options)
    monkeypatch.setattr(coupling_coefficients, "_CHUNK", 7 * 2 * 15)
    torch.testing.assert_close(capsops.coupling_coefficients(kind, **arguments, **options), whole)


@pytest.mark.parametrize("kind", ["attention", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_coupling_coefficients_in_low_precision(kind: str, dtype: torch.dtype, scale: float) -> None:
    """The only error is their rounding, even if the votes would overflow, and under autocast."""
    g = torch.Generator().manual_seed(6)
    u = (torch.randn(2, 30, 4, generator=g) * scale).to(dtype)
    weight = (torch.randn(30, 4, 3, 5, generator=g) * scale).to(dtype)
    extra = {"attn_weight": torch.randn(3, 3, generator=g).to(dtype)} if kind == "attention" else {}
    wide = {n: x.double() for n, x in extra.items()}
    exact = capsops.coupling_coefficients(kind, u.double(), weight.double(), **wide)
    got = capsops.coupling_coefficients(kind, u, weight, **extra)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-3 if scale > 1 else 1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = capsops.coupling_coefficients(kind, u, weight, **extra)
    assert autocast.dtype == torch.float32
    torch.testing.assert_close(autocast.double(), exact, rtol=1e-4, atol=1e-3 if scale > 1 else 1e-5)


def test_uniform_couplings() -> None:
    c = capsops.coupling_coefficients("uniform", torch.randn(2, 5, 4), torch.randn(5, 4, 3, 6))
    assert torch.equal(c, torch.full((2, 5, 3), 1 / 3))


def test_the_votes_are_never_held() -> None:
    """The peak memory of a process is far below the 640 MB of the votes, of which the naive form has three copies."""
    script = """
import resource, torch, capsops
u = torch.rand(8, 20000, 8, requires_grad=True)
weight = torch.rand(20000, 8, 10, 100).mul_(0.01).requires_grad_()
for x in (u, weight):
    x.grad = torch.zeros_like(x)
held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
g = torch.autograd.grad(capsops.dynamic_routing(u, weight, 3, detach=False).sum(), (u, weight))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gradients = sum(x.numel() * 4 for x in g) / 1024
print(int(peak - held - gradients))
"""
    run = subprocess.run(
        [*forked_python(), "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert int(run.stdout) < 150 * 1024
