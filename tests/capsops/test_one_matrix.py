"""One matrix [K, D] for all capsules (MIND), and votes [B, N, 1, D] that are the same for all output capsules."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import capsops
from capsops.backends import reference

# Odd sizes; votes of several vectors with more output capsules than one step takes; a batch that fills vectors.
SHAPES = [(1, 1, 2, 3, 1), (3, 23, 4, 5, 11), (17, 9, 8, 2, 40)]
INSTRUCTIONS = ("auto", *capsops.backends.cpu.instruction_sets()[1:])
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_axis = pytest.mark.parametrize("axis", ["output", "input"])
Arguments = dict[str, Tensor]


def _arguments(shape: tuple[int, ...]) -> Arguments:
    B, N, K, J, D = shape
    g = torch.Generator().manual_seed(sum(shape))
    sizes = {"u": (B, N, K), "weight": (K, D), "logits": (B, N, J), "bias": (J, D), "input_weight": (B, N)}
    return {n: torch.randn(*size, generator=g, dtype=torch.float64) for n, size in sizes.items()}


def _run(call: Any, arguments: Arguments, dtype: torch.dtype = torch.float64, backend: str = "cpu") -> list[Tensor]:
    leaves = {n: x.to(dtype).requires_grad_() for n, x in arguments.items()}
    with capsops.use_backend(backend):
        out = call(**leaves)
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    gradients = torch.autograd.grad(out, list(leaves.values()), g, allow_unused=True)
    return [x.detach().double() for x in (out, *gradients) if x is not None]


def _agree(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for x, y in zip(got, expected, strict=True):
        assert (x - y).abs().max() <= bound * max(1.0, float(y.abs().max()))


@by_shape
@by_axis
@pytest.mark.parametrize("detach", [False, True])
def test_agrees_with_matrices_that_are_expanded(shape: tuple[int, ...], axis: str, detach: bool) -> None:
    """The votes stored for every pair, on the reference."""
    J = shape[3]
    arguments = _arguments(shape)
    mask = arguments["u"][:, :, 0] < 0.8
    logits = arguments["logits"]
    logits[0, 0, 1:] = -torch.inf
    arguments["u"][~mask] = float("nan")
    if detach:  # then the logits have no gradient
        del arguments["logits"]

    def route(weight: Tensor, expanded: bool, **others: Any) -> Tensor:
        matrices = weight[:, None].expand(-1, J, -1) if expanded else weight
        given: dict[str, Any] = {"logits": logits} | others
        return capsops.dynamic_routing(weight=matrices, axis=axis, detach=detach, mask=mask, **given)

    expected = _run(partial(route, expanded=True), arguments, backend="reference")
    _agree(_run(partial(route, expanded=False), arguments, backend="reference"), expected, 1e-12)
    for instructions in INSTRUCTIONS:
        capsops.backends.cpu.use_instruction_set(instructions)
        _agree(_run(partial(route, expanded=False), arguments), expected, 1e-12)
    capsops.backends.cpu.use_instruction_set("auto")


@by_shape
@by_axis
def test_votes_that_are_the_same_for_all_output_capsules(shape: tuple[int, ...], axis: str) -> None:
    """Against votes stored J times: routing with and without detach, a step with and without logits."""
    B, N, _, J, D = shape
    arguments = _arguments(shape)
    votes = torch.randn(B, N, 1, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask = votes[:, :, 0, 0] < 0.8
    logits, state = arguments["logits"], torch.randn(B, J, D, dtype=torch.float64)

    def routed(u: Tensor, logits: Tensor, **options: Any) -> Tensor:
        return capsops.dynamic_routing(u, None, logits=logits.to(u.dtype), axis=axis, mask=mask, **options)

    def step(u: Tensor, state: Tensor, logits: Tensor | None = None) -> Tensor:
        return capsops.routing_step(u, None, state, logits, axis=axis, mask=mask)

    for call, inputs in (
        (routed, {"u": votes, "logits": logits}),
        (partial(routed, detach=True, logits=logits), {"u": votes}),
        (step, {"u": votes, "state": state, "logits": logits}),
        (step, {"u": votes, "state": state}),
    ):
        expected = _run(lambda u, call=call, **x: call(u=u.expand(B, N, J, D), **x), inputs, backend="reference")
        _agree(_run(call, inputs, backend="reference"), expected, 1e-12)
        for instructions in INSTRUCTIONS:
            capsops.backends.cpu.use_instruction_set(instructions)
            _agree(_run(call, inputs), expected, 1e-12)
            _agree(_run(call, inputs, torch.float32), expected, 1e-4)
        capsops.backends.cpu.use_instruction_set("auto")


@by_axis
def test_the_loops_of_mind(axis: str) -> None:
    """Li et al. 2019, algorithm 1: one bilinear map, random logits, a mask of the user's items."""
    arguments = _arguments((2, 5, 4, 3, 6))
    u, W, logits = arguments["u"], arguments["weight"], arguments["logits"]
    mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    got = capsops.dynamic_routing(u, W, 3, logits=logits, axis=axis, mask=mask)
    for x in range(2):
        present, b = [i for i in range(5) if mask[x, i]], logits[x]
        for _ in range(3):
            v = []
            for j in range(3):
                s = torch.zeros(6, dtype=torch.float64)
                for i in present:
                    rivals = b[i] if axis == "output" else b[present, j]
                    s = s + torch.exp(b[i, j]) / torch.exp(rivals).sum() * (u[x, i] @ W)
                v.append(s.norm() / (1 + s.norm() ** 2) * s)
            b = b + torch.stack([torch.stack([u[x, i] @ W @ v[j] for j in range(3)]) for i in range(5)])
        torch.testing.assert_close(got[x], torch.stack(v))


@by_axis
def test_a_step(axis: str) -> None:
    arguments = _arguments((3, 11, 4, 5, 6))
    del arguments["bias"]
    arguments["state"] = torch.randn(3, 5, 6, dtype=torch.float64)

    def step(weight: Tensor, expanded: bool, **others: Tensor) -> Tensor:
        matrices = weight[:, None].expand(-1, 5, -1) if expanded else weight
        return capsops.routing_step(weight=matrices, axis=axis, **others)

    expected = _run(partial(step, expanded=True), arguments, backend="reference")
    _agree(_run(partial(step, expanded=False), arguments), expected, 1e-12)


@by_axis
def test_gradcheck(axis: str) -> None:
    arguments = _arguments((2, 4, 3, 2, 3))
    leaves = tuple(x.requires_grad_() for x in arguments.values())

    def call(*values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(arguments, values, strict=True))
        return capsops.dynamic_routing(**given, iterations=2, axis=axis, squash="none")

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype: torch.dtype) -> None:
    arguments = {n: x.to(dtype).double() for n, x in _arguments((3, 33, 4, 3, 11)).items()}
    got = _run(capsops.dynamic_routing, arguments, dtype)
    _agree(got, _run(capsops.dynamic_routing, arguments), 20 * torch.finfo(dtype).eps)


def test_bitwise_the_same_for_any_number_of_threads() -> None:
    arguments, threads = _arguments((16, 700, 4, 3, 16)), torch.get_num_threads()
    votes = reference.affine_votes(arguments["u"], arguments["weight"][:, None]).float()
    given = {"u": votes, "logits": arguments["logits"]}
    call = partial(capsops.dynamic_routing, weight=None)
    expected = _run(call, given, torch.float32)
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        got = _run(call, given, torch.float32)
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


def test_vmap_compile_and_empty() -> None:
    arguments = {n: x.float() for n, x in _arguments((4, 6, 3, 2, 5)).items() if n != "bias"}
    u, W, logits, w = arguments.values()
    expected = capsops.dynamic_routing(u, W, logits=logits, input_weight=w)
    mapped = torch.func.vmap(
        lambda x, b, y: capsops.dynamic_routing(x[None], W, logits=b[None], input_weight=y[None])[0]
    )(u, logits, w)
    torch.testing.assert_close(mapped, expected)
    torch._dynamo.reset()
    compiled = torch.compile(capsops.dynamic_routing, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(u, W, logits=logits, input_weight=w), expected)
    assert capsops.dynamic_routing(u[:0], W, logits=logits[:0]).shape == (0, 2, 5)
    assert (capsops.dynamic_routing(u[:, :0], W, logits=logits[:, :0]) == 0).all()


def test_coupling_coefficients() -> None:
    arguments = _arguments((2, 7, 3, 4, 5))
    u, W, logits = (arguments[n] for n in ("u", "weight", "logits"))
    c = capsops.coupling_coefficients("dynamic", u, W, logits=logits)
    s = torch.einsum("bnj,bnk,kd->bjd", c, u, W)
    torch.testing.assert_close(capsops.squash(s), capsops.dynamic_routing(u, W, logits=logits))
    state = torch.randn(2, 4, 5, dtype=torch.float64)
    c = capsops.coupling_coefficients("step", u, W, state=state)
    torch.testing.assert_close(torch.einsum("bnj,bnk,kd->bjd", c, u, W), capsops.routing_step(u, W, state))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"logits is None and weight has shape \[4, 5\]; expected logits \[B, N, J\], \[1, N, J\] or"),
        (
            {"logits": torch.zeros(2, 7, 3), "weight": torch.zeros(3, 5)},
            r"weight has shape \[3, 5\]; expected \[4, D\]",
        ),
        ({"logits": torch.zeros(2, 7, 3), "leaky": True}, "leaky is True; expected False"),
        ({"logits": torch.zeros(2, 6, 3)}, r"logits has shape \[2, 6, 3\]; expected \[N, J\] = \[7, 3\]"),
        (
            {"logits": torch.zeros(7, 3), "bias": torch.zeros(4, 5)},
            r"bias has shape \[4, 5\]; expected \[J, D\] = \[3, 5\]",
        ),
        ({"logits": torch.zeros(7, 3), "axis": "both"}, "axis is 'both'"),
        ({"logits": torch.zeros(7, 3), "squash": "relu"}, "squash is 'relu'"),
        ({"logits": torch.zeros(7, 0)}, "J is 0"),
    ],
)
def test_bad_input(backend: str, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"u": torch.zeros(2, 7, 4), "weight": torch.zeros(4, 5)}
    with capsops.use_backend(backend), pytest.raises(ValueError, match=message):
        capsops.dynamic_routing(**(given | options))


def test_bad_input_of_a_step() -> None:
    u, W = torch.zeros(2, 7, 4), torch.zeros(4, 5)
    with pytest.raises(
        ValueError, match=r"routing_step: state has shape \[2, 3, 4\]; expected \[B, J, D\] = \[2, 3, 5\]"
    ):
        capsops.routing_step(u, W, torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"routing_step: weight has shape \[3, 5\]; expected \[4, D\]"):
        capsops.routing_step(u, W[:3], torch.zeros(2, 3, 5))
