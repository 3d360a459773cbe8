"""What a routing does with s (`squash`), weights of the input capsules, and couplings with a gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import capsops

from .routings import (
    ATTENTION,
    ATTENTION_WEIGHTS,
    DYNAMIC_INPUTS,
    DYNAMIC_LOGITS,
    SELF_ATTENTION_WEIGHTS,
    STEP_INPUTS,
    Routing,
    relative_error,
    run,
)

# The routings of a layer that take weights of the input capsules.
WEIGHED = ("attention", "dynamic", "self-attention")
SQUASHES = ("sabour", "efficient", "none", "layer_norm")
INSTRUCTIONS = ("auto", *capsops.backends.cpu.instruction_sets()[1:])
# Batches with components and with batch items in the lanes, whose votes stay in registers, and not.
SHAPES = [(3, 37, 5, 2, 16), (17, 11, 3, 4, 5)]
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_attention = pytest.mark.parametrize("routing", [ATTENTION_WEIGHTS, SELF_ATTENTION_WEIGHTS], ids=lambda r: r.name)
by_axis = pytest.mark.parametrize("axis", ["output", "input"])


def _random(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(len(shape) + sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def _squash_by_hand(s: Any, kind: str) -> Tensor:
    n = s.norm()
    if kind == "sabour":
        return n**2 / (1 + n**2) * s / n
    if kind == "efficient":
        return (1 - torch.exp(-n)) * s / n
    if kind == "none":
        return s
    mean = s.sum() / len(s)
    return (s - mean) / (((s - mean) ** 2).sum() / len(s) + 1e-5).sqrt()


def _route_by_hand(
    u: Tensor,
    votes: Callable[[Tensor, int, int], Tensor],
    J: int,
    kind: str,
    logits: Tensor,
    weights: Tensor,
    axis: str = "output",
) -> tuple[Tensor, Tensor]:
    """v [J, D] and the last couplings [N, J] of one item u [N, K]: procedure 1 of Sabour et al. 2017 as loops."""
    N, b = len(u), logits
    for _ in range(3):
        c = torch.zeros(N, J, dtype=u.dtype)
        for i in range(N):
            for j in range(J):
                rivals = b[i] if axis == "output" else b[:, j]
                c[i, j] = torch.exp(b[i, j]) / sum(torch.exp(x) for x in rivals)
        v = torch.stack(
            [_squash_by_hand(sum(weights[i] * c[i, j] * votes(u[i], i, j) for i in range(N)), kind) for j in range(J)]
        )
        b = b + torch.stack([torch.stack([votes(u[i], i, j) @ v[j] for j in range(J)]) for i in range(N)])
    return v, c


@pytest.mark.parametrize("kind", SQUASHES)
@by_axis
def test_the_loops_of_the_formula(kind: str, axis: str) -> None:
    u, W, logits, weights = _random(2, 4, 3), _random(4, 3, 2, 5), _random(2, 4, 2), _random(2, 4)
    options: dict[str, Any] = {"logits": logits, "axis": axis, "squash": kind, "input_weight": weights}
    v = capsops.dynamic_routing(u, W, 3, **options)
    c = capsops.coupling_coefficients("dynamic", u, W, **options)
    for b in range(2):
        expected = _route_by_hand(u[b], lambda x, i, j: x @ W[i, :, j], 2, kind, logits[b], weights[b], axis)
        torch.testing.assert_close(v[b], expected[0])
        torch.testing.assert_close(c[b], expected[1])


def test_layer_norm_is_that_of_torch() -> None:
    u, W, mix = _random(3, 7, 4), _random(7, 4, 3, 6), _random(3, 3)
    with_none = capsops.attention_routing(u, W, mix, squash="none")
    expected = torch.nn.functional.layer_norm(with_none, (6,))
    torch.testing.assert_close(capsops.attention_routing(u, W, mix, squash="layer_norm"), expected)
    for length in (0.0, 1e30):  # no spread, and squares that overflow
        leaf = torch.full((1, 1, 2, 4), length, requires_grad=True)
        v = capsops.dynamic_routing(leaf, None, squash="layer_norm")
        (g,) = torch.autograd.grad(v.sum(), leaf)
        assert v.isfinite().all() and g.isfinite().all()


def _with(routing: Routing, **options: Any) -> Routing:
    def call(**arguments: Any) -> Tensor:
        return capsops.dynamic_routing(**arguments, **options)

    return replace(routing, call=call)


@by_shape
@pytest.mark.parametrize("kind", SQUASHES[1:])
def test_squash_agrees_with_the_reference(shape: tuple[int, ...], kind: str) -> None:
    """On every instruction set, with the gradient through all iterations and through the last alone."""
    attention = replace(ATTENTION, call=partial(capsops.attention_routing, squash=kind))
    cases: list[tuple[Routing, dict[str, Tensor]]] = [(attention, ATTENTION.arguments(shape))]
    B, N, _, J, _ = shape
    for detach in (False, True):
        for axis in ("output", "input"):
            cases.append((_with(DYNAMIC_INPUTS, squash=kind, axis=axis, detach=detach), ATTENTION.arguments(shape)))
    mask = _random(B, N) < 0.7
    for routing, arguments in cases:
        if routing is not attention:
            arguments = {n: arguments[n] for n in ("u", "weight")} | {"bias": _random(J, shape[4])}
        expected = run(routing, arguments, torch.float64, "reference", mask=mask)
        for instructions in INSTRUCTIONS:
            capsops.backends.cpu.use_instruction_set(instructions)
            for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 2e-3)):
                for x, y in zip(run(routing, arguments, dtype, "cpu", mask=mask), expected, strict=True):
                    assert relative_error(x, y) < bound
        capsops.backends.cpu.use_instruction_set("auto")


def _weighed(shape: tuple[int, ...], routing: Routing) -> dict[str, Tensor]:
    return routing.arguments(shape) | {"input_weight": _random(*shape[:2])}


@by_shape
@pytest.mark.parametrize(
    ("routing", "logits"),
    [
        *itertools.product([DYNAMIC_LOGITS, DYNAMIC_INPUTS, STEP_INPUTS], [True, False]),
        (ATTENTION_WEIGHTS, False),
        (SELF_ATTENTION_WEIGHTS, False),
    ],
    ids=lambda x: x.name if isinstance(x, Routing) else "logits" if x else "no-logits",
)
def test_input_weight_agrees_with_the_reference(shape: tuple[int, ...], routing: Routing, logits: bool) -> None:
    """Weights may be 0 or negative; those of masked capsules may be anything and have no gradient."""
    arguments = _weighed(shape, routing)
    arguments["input_weight"][0, 0] = 0
    if logits:
        arguments["logits"][0, 1] = -torch.inf
    else:
        arguments.pop("logits", None)
    mask = _random(*shape[:2]) < 0.7
    arguments["input_weight"][~mask] = float("nan")
    calls = [routing]
    if routing in (DYNAMIC_LOGITS, DYNAMIC_INPUTS):
        axis = "input" if routing.over_inputs else "output"
        calls.append(_with(routing, iterations=3, axis=axis, detach=True))
    for call in calls:
        detached = call is not routing and logits
        inputs = {n: x for n, x in arguments.items() if not (detached and n == "logits")}
        fixed = {"mask": mask} | ({"logits": arguments["logits"]} if detached else {})
        expected = run(call, inputs, torch.float64, "reference", **fixed)
        for instructions in INSTRUCTIONS:
            capsops.backends.cpu.use_instruction_set(instructions)
            got = run(call, inputs, torch.float64, "cpu", **fixed)
            for x, y in zip(got, expected, strict=True):
                assert relative_error(x, y) < 1e-12
            g = dict(zip(inputs, got[1:], strict=True))["input_weight"]
            assert (g[~mask] == 0).all()
            assert (g[mask] != 0).any()
        capsops.backends.cpu.use_instruction_set("auto")


@by_axis
@pytest.mark.parametrize("B", [2, 16])
def test_gradcheck(axis: str, B: int) -> None:
    leaves = tuple(x.requires_grad_() for x in (_random(B, 4, 2), _random(4, 2, 2, 3), _random(B, 4, 2), _random(B, 4)))

    def call(u: Tensor, W: Tensor, logits: Tensor, w: Tensor) -> Tensor:
        return capsops.dynamic_routing(u, W, 2, logits=logits, input_weight=w, axis=axis, squash="layer_norm")

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    c = partial(capsops.coupling_coefficients, "dynamic", differentiable=True, axis=axis, squash="none")
    assert torch.autograd.gradcheck(lambda u, W, b, w: c(u, W, logits=b, input_weight=w), leaves, fast_mode=True)


def test_a_weight_of_one_changes_nothing() -> None:
    u, W, ones = _random(3, 7, 4), _random(7, 4, 3, 5), torch.ones(3, 7, dtype=torch.float64)
    torch.testing.assert_close(
        capsops.dynamic_routing(u, W, input_weight=ones), capsops.dynamic_routing(u, W), rtol=1e-12, atol=1e-12
    )


@by_shape
@by_attention
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weights_do_not_change_the_couplings(shape: tuple[int, ...], routing: Routing, backend: str) -> None:
    """s is linear in the weights: ones leave it as it is, a NaN reaches its batch item alone, 0 takes the term away."""
    kind = routing.name.split("-weights")[0].removesuffix("-prior")
    function = capsops.attention_routing if kind == "attention" else capsops.self_attention_routing
    arguments = routing.arguments(shape)
    w = arguments.pop("input_weight")
    couplings = capsops.coupling_coefficients(kind, **arguments)
    assert torch.equal(capsops.coupling_coefficients(kind, **arguments, input_weight=w), couplings)
    with capsops.use_backend(backend):
        plain = function(**arguments)
        torch.testing.assert_close(function(**arguments, input_weight=torch.ones_like(w)), plain)
        v = function(**arguments, input_weight=w)
        wrong = w.clone()
        wrong[1, 3] = float("nan")
        out = function(**arguments, input_weight=wrong)
        assert out[1].isnan().all()
        rest = torch.arange(shape[0]) != 1
        torch.testing.assert_close(out[rest], v[rest], rtol=0, atol=0)
        if kind == "attention":  # in self-attention a capsule without weight is still in the sum of all votes
            assert (function(**arguments, input_weight=torch.zeros_like(w)) == 0).all()
            w[:, 2] = 0
            mask = torch.ones(shape[:2], dtype=torch.bool)
            mask[:, 2] = False
            expected = function(**arguments, input_weight=w, mask=mask)
            torch.testing.assert_close(function(**arguments, input_weight=w), expected)


def test_input_weight_under_vmap() -> None:
    u, W, w = torch.randn(5, 7, 4), torch.randn(7, 4, 3, 6), torch.randn(5, 7)
    expected = capsops.dynamic_routing(u, W, input_weight=w)
    mapped = torch.func.vmap(lambda x, y: capsops.dynamic_routing(x[None], W, input_weight=y[None])[0])(u, w)
    torch.testing.assert_close(mapped, expected)


@pytest.mark.parametrize("routing", ["attention", "dynamic", "self-attention", "em", "step"])
def test_couplings_with_a_gradient(routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same couplings, with the exact gradient, in one chunk and in several; without a call for it there is none."""
    from capsops.ops import coupling_coefficients

    u, W = _random(2, 9, 3).requires_grad_(), _random(9, 3, 2, 4).requires_grad_()
    choices: dict[str, dict[str, Any]] = {
        "attention": {"attn_weight": _random(2, 2)},
        "dynamic": {"axis": "input", "mask": _random(2, 9) < 0.7},
        "self-attention": {"prior": _random(9, 2)},
        "em": {"activation": _random(2, 9).sigmoid(), "beta_u": _random(2), "beta_a": _random(2)},
        "step": {"state": _random(2, 2, 4), "logits": torch.where(_random(9, 2) > 1, -torch.inf, _random(9, 2))},
    }
    small = choices[routing]
    call: Any = partial(capsops.coupling_coefficients, routing, u, W, **small)
    assert not call().requires_grad
    c = call(differentiable=True)
    torch.testing.assert_close(c, call())
    entropy = -torch.xlogy(c.clamp_min(0), c.clamp_min(1e-30)).sum()
    expected = torch.autograd.grad(entropy, (u, W))
    assert torch.autograd.gradcheck(
        lambda x: capsops.coupling_coefficients(routing, x, W.detach(), **small, differentiable=True),
        (u,),
        fast_mode=True,
    )
    monkeypatch.setattr(coupling_coefficients, "_CHUNK", 2 * 2 * 4 * 2)
    c = call(differentiable=True)
    entropy = -torch.xlogy(c.clamp_min(0), c.clamp_min(1e-30)).sum()
    torch.testing.assert_close(torch.autograd.grad(entropy, (u, W)), expected)


def test_couplings_with_a_gradient_keep_no_votes() -> None:
    u, W = torch.randn(2, 200, 4, requires_grad=True), torch.randn(200, 4, 5, 64, requires_grad=True)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        c = capsops.coupling_coefficients("dynamic", u, W, differentiable=True)
    votes = 2 * 200 * 5 * 64
    assert max(kept) < votes
    assert all(g.isfinite().all() for g in torch.autograd.grad(c.square().sum(), (u, W)))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(backend: str) -> None:
    u, W, mix = torch.zeros(2, 7, 4), torch.zeros(7, 4, 3, 5), torch.zeros(3, 3)
    message = "squash is 'relu'; expected one of 'sabour', 'efficient', 'none', 'layer_norm'"
    with capsops.use_backend(backend):
        for call in (
            partial(capsops.dynamic_routing, u, W),
            partial(capsops.dynamic_routing, u, W, axis="input"),
            partial(capsops.attention_routing, u, W, mix),
            partial(capsops.coupling_coefficients, "dynamic", u, W),
            partial(capsops.nn.CapsuleLayer, 7, 4, 3, 5),
        ):
            with pytest.raises(ValueError, match=message):
                call(squash="relu")  # type: ignore[call-arg]
        with pytest.raises(ValueError, match=r"squash: kind is 'none'; expected one of 'sabour', 'efficient'"):
            capsops.squash(u, kind="none")
        with pytest.raises(ValueError, match="CapsuleLayer: squash is 'none'; expected 'sabour', because routing "):
            capsops.nn.CapsuleLayer(7, 4, 3, 5, "self-attention", squash="none")
        for call in (
            partial(capsops.dynamic_routing, u, W),
            partial(capsops.routing_step, u, W, torch.zeros(2, 3, 5)),
            partial(capsops.attention_routing, u, W, torch.zeros(3, 3)),
            partial(capsops.self_attention_routing, u, W),
            partial(capsops.coupling_coefficients, "self-attention", u, W),
            partial(capsops.coupling_coefficients, "attention", u, W, torch.zeros(3, 3)),
            *[partial(capsops.nn.CapsuleLayer(7, 4, 3, 5, kind), u) for kind in WEIGHED],
        ):
            with pytest.raises(ValueError, match=r"input_weight has shape \[7\]; expected \[B, N\] = \[2, 7\]"):
                call(input_weight=torch.zeros(7))  # type: ignore[call-arg]
            with pytest.raises(ValueError, match=r"input_weight has dtype torch.bool; expected float"):
                call(input_weight=torch.zeros(2, 7, dtype=torch.bool))  # type: ignore[call-arg]
            with pytest.raises(TypeError, match="input_weight is a float"):
                call(input_weight=0.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="CapsuleLayer: input_weight is given; expected None, because routing is"):
            capsops.nn.CapsuleLayer(7, 4, 3, 5, "uniform")(u, input_weight=torch.zeros(2, 7))
        with pytest.raises(ValueError, match="differentiable is 1; expected True or False"):
            capsops.coupling_coefficients("dynamic", u, W, differentiable=1)  # type: ignore[arg-type]


def test_a_layer_takes_weights_of_the_input_capsules() -> None:
    layer = capsops.nn.CapsuleLayer(7, 4, 3, 5, "dynamic")
    u, w = torch.randn(2, 7, 4), torch.randn(2, 7)
    expected = capsops.dynamic_routing(u, layer.weight, bias=layer.bias, input_weight=w)
    assert torch.equal(layer(u, input_weight=w), expected)
    couplings = layer.coupling_coefficients(u, input_weight=w)
    assert not torch.equal(couplings, layer.coupling_coefficients(u))
    attention = capsops.nn.CapsuleLayer(7, 4, 3, 5, "attention", squash="none")
    parameters = attention.weight, attention.attn_weight, attention.attn_bias
    assert torch.equal(
        attention(u, input_weight=w), capsops.attention_routing(u, *parameters, squash="none", input_weight=w)
    )
    layer = capsops.nn.CapsuleLayer(7, 4, 3, 5, "self-attention")
    expected = capsops.self_attention_routing(u, layer.weight, layer.prior, input_weight=w)
    assert torch.equal(layer(u, input_weight=w), expected)
    for x in (attention, layer):
        assert torch.equal(x.coupling_coefficients(u, input_weight=w), x.coupling_coefficients(u))


@pytest.mark.parametrize("kind", SQUASHES[1:])
def test_a_layer(kind: str) -> None:
    layer = capsops.nn.CapsuleLayer(36, 4, 5, 6, "dynamic", squash=kind)
    assert f"squash={kind!r}" in repr(layer)
    u = torch.nn.functional.normalize(torch.randn(8, 36, 4), dim=-1)
    v = layer(u)
    torch.testing.assert_close(v, capsops.dynamic_routing(u, layer.weight, 3, bias=layer.bias, squash=kind))
    v.sum().backward()
    assert layer.coupling_coefficients(u).amax(dim=2).mean() < 0.5  # couplings start soft
