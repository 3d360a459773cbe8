"""The CUDA and the Triton backend against the reference in float64.

On a GPU both run the whole matrix of shapes. Without one Triton's interpreter runs small shapes, cut into tiles and
programs small enough that there are several of each; tests/core then tests the CUDA kernels.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import capsops
from capsops.backends import COMPILED, triton

from .routings import (
    DYNAMIC_INPUTS,
    DYNAMIC_LOGITS,
    LOGITS,
    OPERATORS,
    OVER_POSITIONS,
    ROUTINGS,
    SHAPES,
    STEP,
    STEP_INPUTS,
    Routing,
    device_of,
    each,
    relative_error,
    run,
    with_votes,
)

GPU = torch.cuda.is_available()
BACKENDS = [
    name for name in ("cuda", "triton") if COMPILED[name].why_not("squash", device_of(name), torch.float32) is None
]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton does not run here")
# Several programs, several tiles along both axes with the last ones incomplete, and padding along every axis.
SMALL = [(1, 1, 1, 1, 1), (2, 5, 3, 3, 5), (3, 7, 2, 2, 4), (5, 3, 2, 9, 1)]

ALL = [*OPERATORS, *OVER_POSITIONS]

# The interpreter is slow, so only these run all tests; the others differ in options, which one shape tests.
FEW = (
    "attention",
    "attention-weights",
    "dynamic3",
    "dynamic2-leaky-bias",
    "step",
    "step-logits-inputs",
    "self-attention-prior",
    "self-attention-prior-weights",
    "em3",
    "em3-positions",
    "votes",
)

# These have a test of their own, which without a GPU is the only one for all but one of them.
WITH_LOGITS = [DYNAMIC_LOGITS, DYNAMIC_INPUTS, LOGITS, STEP_INPUTS]

by_backend = pytest.mark.parametrize("backend", BACKENDS)
by_some = pytest.mark.parametrize("routing", [r for r in ALL if GPU or r.name in FEW], ids=lambda r: r.name)
by_sharing = pytest.mark.parametrize("shared", [False, True], ids=["matrices", "shared"])
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")


pytestmark = pytest.mark.skipif(not BACKENDS, reason="there is neither a GPU nor Triton")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(triton, "_TILE", 64)
        monkeypatch.setattr(triton, "_PROGRAMS", 3)
        monkeypatch.setattr(triton, "_SUMMED_BYTES", 100)
        # Of three iterations the last two are emitted together, and then the first.
        monkeypatch.setattr(triton, "_STATE_BYTES", 0)
        monkeypatch.setattr(triton, "_LEAST_ITERATIONS", 2)


def _agrees(
    backend: str, routing: Routing, got: list[torch.Tensor], naive: list[torch.Tensor], exact: list[torch.Tensor]
) -> None:
    """Require an error below 2e-5, or below some times that of plain PyTorch in the same precision if that is more.

    The variances of EM routing amplify rounding. The sums of its CUDA kernels have an order further from PyTorch's.
    """
    times = 10 if routing.em and backend == "cuda" else 4
    for x, plain, y in zip(got, naive, exact, strict=True):
        if y.abs().max() > 1e-3:
            assert relative_error(x, y) < max(2e-5, times * relative_error(plain, y))
        else:  # the gradient vanishes: there is one output capsule, or an activation is saturated
            assert (x - y).abs().max() < 2e-5


def _same(backend: str, x: torch.Tensor, y: torch.Tensor) -> None:
    """Require the same bits of one call and another that gets its operands elsewhere or wants fewer gradients.

    Triton compiles such a call by itself, into code that may round otherwise.
    """
    if backend == "triton" and GPU:
        assert (x - y).abs().max() <= 1e-4 * y.abs().max() + 1e-6
    else:
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@by_backend
@pytest.mark.parametrize(
    ("routing", "shape"),
    [(r, shape) for r in ALL for shape in SHAPES]
    if GPU
    else [(r, shape) for r in ALL for shape in SMALL if r.name in FEW or (shape == SMALL[1] and r not in WITH_LOGITS)],
    ids=lambda x: getattr(x, "name", str(x)),
)
@by_sharing
def test_agrees_with_the_reference(backend: str, routing: Routing, shape: tuple[int, ...], shared: bool) -> None:
    arguments = routing.arguments(shape, shared=shared)
    exact = run(routing, arguments, torch.float64, "reference")
    naive = run(routing, arguments, torch.float32, "reference")
    _agrees(backend, routing, run(routing, arguments, torch.float32, backend), naive, exact)


@by_backend
@by_some
@by_sharing
def test_mask(backend: str, routing: Routing, shared: bool) -> None:
    if routing.name == "votes":
        pytest.skip("votes have no mask")
    shape = (9, 67, 5, 3, 6) if GPU else (3, 5, 2, 3, 3)
    arguments = routing.arguments(shape, shared=shared)
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(5)) < 0.6
    mask[2] = False
    for name in {routing.capsules, "activation", "logits", "input_weight"} & set(arguments):
        arguments[name][~mask] = float("nan")  # masked values may be anything
    exact = run(routing, arguments, torch.float64, "reference", mask=mask)
    naive = run(routing, arguments, torch.float32, "reference", mask=mask)
    got = run(routing, arguments, torch.float32, backend, mask=mask)
    _agrees(backend, routing, got, naive, exact)
    gradients = dict(zip(arguments, got[routing.outputs :], strict=True))
    for name in {routing.capsules, "activation", "logits", "input_weight"} & set(arguments):
        assert (gradients[name][~mask] == 0).all(), "no gradient where there is no capsule"
        assert (gradients[name][mask] != 0).any()


by_logits = pytest.mark.parametrize("routing", WITH_LOGITS, ids=lambda r: r.name)


@by_backend
@by_logits
def test_logits_and_weights_of_input_capsules(backend: str, routing: Routing) -> None:
    """−∞ removes pairs: also all of an input capsule, and all of an output capsule of an item."""
    shape = B, N, *_ = (2, 5, 1, 3, 2)
    generator = torch.Generator().manual_seed(7)
    arguments = routing.arguments(shape)
    logits = arguments["logits"]
    logits[torch.rand(logits.shape, generator=generator) < 0.3] = -torch.inf
    logits[0, 2], logits[1, :, 1] = -torch.inf, -torch.inf
    arguments["input_weight"] = torch.randn(B, N, generator=generator, dtype=torch.float64)
    exact = run(routing, arguments, torch.float64, "reference")
    got = run(routing, arguments, torch.float64, backend)
    for x, y in zip(got, exact, strict=True):
        assert relative_error(x, y) < 1e-12
    assert (dict(zip(arguments, got[1:], strict=True))["logits"][logits == -torch.inf] == 0).all()
    # The weights without logits, and logits that all items share, which have no gradient with detach.
    weights = {n: x for n, x in arguments.items() if n != "logits"}
    options: dict[str, Any] = {"detach": True, "iterations": 2} if "dynamic" in routing.name else {}
    options["axis"] = "input" if routing.over_inputs else "output"
    function = capsops.dynamic_routing if "dynamic" in routing.name else capsops.routing_step
    call = replace(routing, call=partial(function, **options))
    for fixed in ({}, {"logits": logits[0].clone()}):
        exact = run(call, weights, torch.float64, "reference", **fixed)
        for x, y in zip(run(call, weights, torch.float64, backend, **fixed), exact, strict=True):
            assert relative_error(x, y) < 1e-12


@by_backend
@by_logits
def test_infinite_logits_are_seen(backend: str, routing: Routing) -> None:
    """+∞ and NaN make their batch item NaN, or with the softmax over the input capsules their output capsule."""
    for value in (float("inf"), float("nan")):
        arguments = {n: x.to(device_of(backend)) for n, x in routing.arguments((2, 5, 1, 3, 2)).items()}
        arguments["logits"][1, 3, 1] = value
        with capsops.use_backend(backend):
            v = routing.call(**arguments)
        finite = torch.ones(2, 3, dtype=torch.bool)
        finite[1, 1 if routing.over_inputs else slice(None)] = False
        assert torch.equal(v.isfinite().all(dim=2).cpu(), finite)
        assert v[~finite].isnan().all()


@pytest.mark.parametrize(
    "routing",
    [r for r in [*ROUTINGS, *OVER_POSITIONS] if GPU or r.name in {*FEW, "em2-rows4-renormalise"} - {"dynamic3", "em3"}],
    ids=lambda r: r.name,
)
@needs_triton
def test_triton_takes_votes(routing: Routing) -> None:
    """Votes that something else made, with a mask."""
    given, arguments = with_votes(routing, (2, 5, 1, 3, 2))
    mask = torch.rand(2, 5, generator=torch.Generator().manual_seed(5)) < 0.7
    arguments[routing.capsules][~mask] = float("nan")
    exact = run(given, arguments, torch.float64, "reference", mask=mask)
    for got, expected in zip(run(given, arguments, torch.float64, "triton", mask=mask), exact, strict=True):
        assert relative_error(got, expected) < (1e-10 if routing.em else 1e-12)


@pytest.mark.parametrize("routing", [DYNAMIC_LOGITS, STEP, STEP_INPUTS], ids=lambda r: r.name)
@needs_triton
def test_triton_takes_one_vote_for_all_output_capsules(routing: Routing) -> None:
    given, arguments = with_votes(routing, (2, 5, 1, 3, 2))
    arguments["u"] = arguments["u"][:, :, :1]
    exact = run(given, arguments, torch.float64, "reference")
    for got, expected in zip(run(given, arguments, torch.float64, "triton"), exact, strict=True):
        assert relative_error(got, expected) < 1e-12


@by_backend
@pytest.mark.parametrize("few", [0, 1 << 30], ids=["loop", "repeated"])
def test_one_matrix(backend: str, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight [K, D]: a loop of steps, or on a GPU a weight that is repeated."""
    monkeypatch.setattr("capsops.ops.dynamic._FEW_PRODUCTS", few)
    u, weight, logits = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(5, 3)
    expected = capsops.dynamic_routing(u, weight, 2, logits=logits)
    with capsops.use_backend(backend):
        v = capsops.dynamic_routing(
            *(x.to(device_of(backend)) for x in (u, weight)), 2, logits=logits.to(device_of(backend))
        )
    torch.testing.assert_close(v.cpu(), expected)


@by_backend
@by_some
def test_float64(backend: str, routing: Routing) -> None:
    """The error is small enough for gradcheck."""
    arguments = routing.arguments((2, 5, 3, 3, 5) if GPU else (2, 3, 2, 2, 3))
    exact = run(routing, arguments, torch.float64, "reference")
    for got, expected in zip(run(routing, arguments, torch.float64, backend), exact, strict=True):
        assert relative_error(got, expected) < (1e-10 if routing.em else 1e-12)


@by_backend
@pytest.mark.parametrize(
    ("routing", "dtype"),
    [
        (routing, dtype)
        for routing in ALL
        for dtype in (torch.bfloat16, torch.float16)
        # The kernels treat both alike; the interpreter takes longest for these two routings. It cuts off digits where a
        # GPU rounds, so of EM routing over positions it runs the one whose iterations are not added in pieces here.
        if GPU
        or (
            (routing.name in FEW and (dtype == torch.bfloat16 or routing.name not in ("dynamic3", "em3")))
            and routing.name != "em3-positions"
        )
        or routing.name.startswith("em2-positions")
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_low_precision_is_at_most_twice_as_wrong(backend: str, routing: Routing, dtype: torch.dtype) -> None:
    for shape in SHAPES if GPU else [(2, 5, 3, 3, 5)]:
        arguments = {n: x.to(dtype).double() for n, x in routing.arguments(shape).items()}
        exact = run(routing, arguments, torch.float64, "reference")
        naive = run(routing, arguments, dtype, "reference")
        for got, plain, expected in zip(run(routing, arguments, dtype, backend), naive, exact, strict=True):
            rounding = torch.finfo(dtype).eps / 2 * expected.abs().max()
            error = (plain - expected).abs().max()
            # The kernels add up in float32, in which a gradient may vanish up to rounding only.
            vanishes = 1e-12 if expected.any() else 1e-6
            assert (got - expected).abs().max() <= 2 * error + rounding + vanishes


@by_backend
@by_some
@by_sharing
@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 4), (2, 0, 3, 2, 4)], ids=["no-batch", "no-capsules"])
def test_empty(backend: str, routing: Routing, shared: bool, shape: tuple[int, ...]) -> None:
    arguments = routing.arguments(shape, shared=shared)
    expected = run(routing, arguments, torch.float64, "reference")
    for got, y in zip(run(routing, arguments, torch.float64, backend), expected, strict=True):
        torch.testing.assert_close(got, y)


@by_backend
@by_some
def test_only_what_is_asked_for_is_computed(backend: str, routing: Routing) -> None:
    arguments = routing.arguments((2, 3, 2, 3, 3) if GPU else (1, 2, 1, 2, 2))
    everything = dict(zip(arguments, run(routing, arguments, torch.float32, backend)[routing.outputs :], strict=True))
    for name in arguments:
        leaves = {n: x.to(device_of(backend), torch.float32).requires_grad_(n == name) for n, x in arguments.items()}
        generator = torch.Generator().manual_seed(1)
        with capsops.use_backend(backend):
            out = each(routing.call(**leaves))
            g = [torch.randn(x.shape, generator=generator, dtype=torch.float64).bfloat16().to(x) for x in out]  # as run
            torch.autograd.backward(out, g)
        for n, x in leaves.items():
            assert (x.grad is None) == (n != name)
        _same(backend, leaves[name].grad.double().cpu(), everything[name])


@by_backend
@by_some
def test_strided_and_misaligned_inputs(backend: str, routing: Routing) -> None:
    device = device_of(backend)
    shape = (3, 5, 4, 3, 8) if GPU else (2, 3, 2, 2, 3)  # on a GPU with votes of whole vectors
    arguments = {n: x.to(device, torch.float32) for n, x in routing.arguments(shape).items()}
    strided = {n: x.transpose(0, -1).contiguous().transpose(0, -1) for n, x in arguments.items()}
    shifted = {n: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for n, x in arguments.items()}
    # Also one operand alone: the others may be read by whole vectors then.
    alone = [{**arguments, n: x} for n, x in shifted.items()]
    with capsops.use_backend(backend):
        results = [each(routing.call(**a)) for a in (arguments, strided, shifted, *alone)]
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            _same(backend, x, y)


@by_backend
@pytest.mark.parametrize("kind", ["sabour", "efficient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_squash(backend: str, kind: str, dtype: torch.dtype) -> None:
    lengths = torch.tensor([0.0, 1e-20, 1e-4, 0.03, 0.99, 1.01, 3.0, 400.0, 6e4], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    s = torch.nn.functional.normalize(torch.randn(9, 5, generator=generator, dtype=torch.float64), dim=-1)
    s = (s * lengths[:, None]).to(dtype)
    results = []
    for name, x in (("reference", s.double()), ("reference", s.clone()), (backend, s.to(device_of(backend)))):
        x = x.requires_grad_()
        with capsops.use_backend(name):
            v = capsops.squash(x, kind=kind)
            (g,) = torch.autograd.grad(v, x, torch.linspace(1, 2, 5, dtype=v.dtype, device=v.device).expand_as(v))
        results.append([v.detach().double().cpu(), g.double().cpu()])
    exact, naive, got = results
    for x, plain, y in zip(got, naive, exact, strict=True):
        # A few units in the last place of the largest component, or twice the error of plain PyTorch.
        largest = y.abs().amax(dim=-1, keepdim=True)
        error = (plain - y).abs().amax(dim=-1, keepdim=True)
        allowed = 2 * error + 16 * torch.finfo(dtype).eps * largest + torch.finfo(dtype).tiny
        assert ((x - y).abs() <= allowed).all()


@by_backend
def test_squash_keeps_nan(backend: str) -> None:
    s = torch.ones(3, 5, device=device_of(backend))
    s[1, 0], s[2, 4] = float("nan"), float("nan")
    with capsops.use_backend(backend):
        v = capsops.squash(s)
    assert torch.isfinite(v[0]).all()
    assert v[1:].isnan().all()


@by_backend
@pytest.mark.parametrize("layout", ["channels", "legacy"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 3, 5, 5, 7), (2, 2, 4, 6, 4), (2, 2, 8, 6, 6)], ids=str)
def test_primary_capsules(backend: str, layout: str, memory: torch.memory_format, shape: tuple[int, ...]) -> None:
    B, types, K, height, width = shape
    features = torch.randn(B, types * K, height, width, dtype=torch.float64)
    g_u = torch.randn(B, types * height * width, K, dtype=torch.float64)
    results = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        leaf = features.to(device_of(name), dtype).to(memory_format=memory).requires_grad_()
        with capsops.use_backend(name):
            u = capsops.primary_capsules(leaf, types, layout=layout)
            (g,) = torch.autograd.grad(u, leaf, g_u.to(u))
        assert name == "reference" or g.stride() == leaf.stride()
        results.append([u.detach().double().cpu(), g.double().cpu()])
    for exact, got in zip(*results, strict=True):
        assert relative_error(got, exact) < 1e-6


@pytest.mark.parametrize("shared", [False, True])
@needs_triton
def test_attention_to_many_output_capsules(shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """More output capsules than Triton mixes in registers, in several tiles."""
    monkeypatch.setattr(triton, "_MOST_MIXED", 4)
    monkeypatch.setattr(triton.wide_attention, "_TILE_BYTES", 1000)
    given = with_votes(OPERATORS[0], (2, 7, 3, 5, 4))
    attention = [r for r in OPERATORS if r.name.startswith("attention")]
    for routing, arguments in (given, *[(r, r.arguments((2, 7, 3, 5, 4), shared=shared)) for r in attention]):
        mask = torch.rand(2, 7, generator=torch.Generator().manual_seed(5)) < 0.6
        for name in {"u", "input_weight"} & set(arguments):
            arguments[name][~mask] = float("nan")
        exact = run(routing, arguments, torch.float64, "reference", mask=mask)
        for got, expected in zip(run(routing, arguments, torch.float64, "triton", mask=mask), exact, strict=True):
            assert relative_error(got, expected) < 1e-12


class _Idle:
    """A kernel that does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *_, **__: None


def _held_at_most(call: Callable[[], object]) -> int:
    """The peak of the bytes that torch allocates during the call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize(
    ("shape", "rows", "shared", "iterations", "dtype"),
    [
        ((128, 1152, 2, 10, 16), 0, False, 40, torch.float32),  # MNIST with a smaller K
        ((128, 1152, 2, 10, 16), 0, False, 10, torch.float64),
        ((1024, 100, 2, 10, 16), 0, False, 10, torch.float32),
        ((2048, 50, 64, 4, 64), 0, True, 6, torch.float32),  # a recommender
        ((4, 256, 2, 512, 8), 0, False, 3, torch.float32),  # many output capsules
        ((64, 288, 2, 32, 4), 4, False, 10, torch.float32),  # matrix capsules
    ],
    ids=str,
)
@needs_triton
def test_memory_of_triton(
    shape: tuple[int, ...],
    rows: int,
    shared: bool,
    iterations: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At most 32 MB and 24 states of the output capsules for any number of iterations. The kernels are stubs."""
    monkeypatch.undo()  # use the tiles and programs of a GPU
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # quicker
    stream, row_kernels = (importlib.import_module(f"capsops.backends.triton.{name}") for name in ("stream", "rows"))
    for name in ("reduce_kernel", "emit_kernel"):
        monkeypatch.setattr(stream, name, _Idle())
    for name in ("squash_kernel", "squash_backward_kernel"):
        monkeypatch.setattr(row_kernels, name, _Idle())
    B, N, K, J, D = shape

    def zeros(*size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    weight = zeros(*((K, J, D) if shared else (N, K, J, D)))
    v, small, prior, mix = zeros(B, J, *[rows] * bool(rows), D), zeros(J), zeros(N, J), zeros(J, J)
    R, no = iterations, False
    if rows:
        u, activation, out, inverse_temperatures = zeros(B, N, rows, K), zeros(B, N), zeros(B, J), [1.0] * R
        state, floats, params = zeros(R, B, J, 3 * rows * D + 2) + 1, 2 * rows * D + 1, 0
        inputs = (u, activation, weight, small, small, None, inverse_temperatures)
        calls = [
            lambda: triton.em_routing(v, out, state, *inputs),
            lambda: triton.em_routing_backward(u, activation, weight, small, small, v, out, state, *inputs),
        ]
    else:
        u, s, total, bias = zeros(B, N, K), zeros(R, B, J, D), zeros(B, J, D), zeros(J, D)
        floats, params = D, J * J * (J > triton._MOST_MIXED)
        logits, input_weight, log_sums = zeros(B, N, J), zeros(B, N), zeros(R, B, J)
        pairs = logits, input_weight
        routed, gradients = (u, weight, *pairs, bias, None, R), (u, weight, *pairs, bias)
        stepped, step_gradients = (u, weight, total, *pairs, None), (u, weight, total, *pairs)
        dynamic = (v, s, u, weight, bias, None, R, no)
        attention = (u, weight, mix, small, input_weight, None, "sabour")
        own, kind = (u, weight, prior, input_weight, None, 1.0), "sabour"
        calls = [
            lambda: triton.dynamic_routing(v, s, *dynamic[2:], no, kind),
            lambda: triton.dynamic_routing_backward(u, weight, bias, *dynamic, False, kind),
            lambda: triton.dynamic_routing_backward(u, weight, bias, *dynamic, True, kind),
            lambda: triton.routing_step(v, u, weight, total, None),
            lambda: triton.routing_step_backward(u, weight, total, v, u, weight, total, None),
            lambda: triton.dynamic_routing_over_inputs(v, s, log_sums, *routed, no, kind),
            lambda: triton.dynamic_routing_over_inputs_backward(*gradients, v, s, log_sums, *routed, no, kind),
            lambda: triton.routing_step_over_inputs(v, total, log_sums[0], *stepped),
            lambda: triton.routing_step_over_inputs_backward(*step_gradients, v, total, log_sums[0], *stepped),
            lambda: triton.attention_routing(v, total, *attention),
            lambda: triton.attention_routing_backward(u, weight, mix, small, input_weight, v, total, *attention),
            lambda: triton.self_attention_routing(v, total, total, *own),
            lambda: triton.self_attention_routing_backward(u, weight, prior, input_weight, v, total, total, *own),
        ]
    allowed = 32_000_000 + 24 * B * J * floats * dtype.itemsize + 3 * 8 * params
    assert [n for n in map(_held_at_most, calls) if n > allowed] == []


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux alone")
def test_triton_compiles_for_gpus() -> None:
    """The kernels compile to machine code; no GPU is needed."""
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "tests.capsops.triton_cubins", "80", "90"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    names = "reduce em_adjoint", "reduce over_inputs", "emit attention", "emit stored"
    kernels = "squash_backward_kernel", *[name.replace(" ", "_kernel ") for name in names]
    for capability, kernel in itertools.product((80, 90), kernels):
        assert f"sm_{capability} {kernel}" in run.stdout


# ---- only on a GPU -----------------------------------------------------------------------------------


needs_cuda = pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the CUDA kernels and a GPU")


@needs_cuda
@pytest.mark.parametrize("routing", [*ROUTINGS, *OVER_POSITIONS], ids=lambda r: r.name)
@pytest.mark.parametrize("shape", [*SHAPES, (4, 9, 3, 300, 8)], ids=str)
def test_given_votes(routing: Routing, shape: tuple[int, ...]) -> None:
    """Also votes that are too large for a block of threads."""
    given, arguments = with_votes(routing, shape)
    mask = torch.rand(shape[:2], generator=torch.Generator().manual_seed(5)) < 0.6
    arguments[routing.capsules][~mask] = float("nan")
    exact = run(given, arguments, torch.float64, "reference", mask=mask)
    naive = run(given, arguments, torch.float32, "reference", mask=mask)
    _agrees("cuda", given, run(given, arguments, torch.float32, "cuda", mask=mask), naive, exact)


@needs_cuda
@pytest.mark.parametrize("J", [4, 300])
def test_one_vote_for_all_output_capsules(J: int) -> None:
    votes, state = torch.randn(33, 50, 1, 64, dtype=torch.float64), torch.randn(33, J, 64, dtype=torch.float64) / 8
    g, results = torch.randn(33, J, 64, dtype=torch.float64), []
    for name in ("reference", "cuda"):
        leaves = [x.to(device_of(name)).requires_grad_() for x in (votes, state)]
        with capsops.use_backend(name):
            s = capsops.routing_step(leaves[0], None, leaves[1])
            results.append([s, *torch.autograd.grad(s, leaves, g.to(s))])
    for expected, got in zip(*results, strict=True):
        assert relative_error(got.detach().cpu(), expected.detach()) < 1e-12


@needs_gpu
@by_backend
@by_some
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_bitwise_the_same_from_run_to_run(backend: str, routing: Routing, dtype: torch.dtype) -> None:
    arguments = routing.arguments((13, 1031, 8, 10, 16))
    first = run(routing, arguments, dtype, backend)
    for _ in range(3):
        for x, y in zip(first, run(routing, arguments, dtype, backend), strict=True):
            assert torch.equal(x, y)


@needs_gpu
@by_backend
def test_on_a_side_stream(backend: str) -> None:
    u, weight = torch.randn(8, 20_000, 8, device="cuda"), torch.randn(20_000, 8, 2, 16, device="cuda")
    with capsops.use_backend(backend):
        expected = capsops.dynamic_routing(u, weight)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            late = u * 2  # computed in this stream only
            got = capsops.dynamic_routing(late / 2, weight)
        stream.synchronize()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@needs_gpu
@by_backend
def test_graph_capture(backend: str) -> None:
    """A training step, captured once and replayed on other data."""
    u = torch.randn(8, 500, 8, device="cuda", requires_grad=True)
    weight = torch.randn(500, 8, 3, 16, device="cuda", requires_grad=True)
    A = torch.randn(3, 3, device="cuda", requires_grad=True)

    def step() -> tuple[torch.Tensor, ...]:
        v = capsops.dynamic_routing(u, weight) + capsops.attention_routing(u, weight, A)
        return v.detach(), *torch.autograd.grad(v.square().sum(), (u, weight, A))

    with capsops.use_backend(backend):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            u.copy_(torch.randn_like(u))
        graph.replay()
        replayed = [x.clone() for x in captured]
        for x, y in zip(replayed, step(), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)


@needs_gpu
@by_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_on_the_second_gpu(backend: str) -> None:
    u, weight = torch.randn(3, 50, 8), torch.randn(50, 8, 3, 16)
    with capsops.use_backend(backend):
        results = [capsops.dynamic_routing(u.to(d), weight.to(d)).cpu() for d in ("cuda:0", "cuda:1")]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@needs_gpu
@by_backend
def test_long_sums_do_not_drift(backend: str) -> None:
    N = 200_000
    u = torch.full((1, N, 1), 1.0) + torch.rand(1, N, 1) * 1e-3
    weight = torch.full((1, 2, 4), 1e-5)
    with capsops.use_backend("reference"):
        exact = capsops.dynamic_routing(u.double(), weight.double(), 1)
    with capsops.use_backend(backend):
        out = capsops.dynamic_routing(u.cuda(), weight.cuda(), 1)
    assert relative_error(out.double().cpu(), exact) < 1e-6


@needs_gpu
def test_the_choice_on_a_gpu() -> None:
    u, weight = torch.randn(2, 5, 3, device="cuda"), torch.randn(5, 3, 2, 4, device="cuda")
    name = capsops.backends.select("dynamic_routing", u.device, u.dtype)
    assert name == BACKENDS[0]
    assert capsops.dynamic_routing(u, weight).device == u.device
    with pytest.raises(ValueError, match="the device of u"):
        capsops.dynamic_routing(u, weight.cpu())


@by_backend
def test_compiled_into_one_graph(backend: str) -> None:
    """The compiler must not trace the choice of a backend, which queries the machine."""
    s = torch.randn(2, 5).to(device_of(backend))
    COMPILED[backend].unfit.cache_clear()
    triton._installed.cache_clear()
    with contextlib.nullcontext() if GPU else capsops.use_backend(backend):
        got = torch.compile(capsops.squash, fullgraph=True, backend="eager")(s)
        torch.testing.assert_close(got, capsops.squash(s))
