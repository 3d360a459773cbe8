"""Votes that something else made, in place of input capsules and a weight: every routing takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import capsops
from capsops.backends import reference

from .routings import (
    ATTENTION,
    DYNAMIC_INPUTS,
    DYNAMIC_LOGITS,
    ROUTINGS,
    SHAPES,
    STEP,
    Routing,
    each,
    relative_error,
    run,
    with_votes,
)

by_routing = pytest.mark.parametrize("routing", ROUTINGS, ids=lambda r: r.name)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_batch = pytest.mark.parametrize("B", [3, 16, 35])  # batches that fill vectors and large ones have loops of their own
INSTRUCTIONS = ("auto", *capsops.backends.cpu.instruction_sets()[1:])


@by_routing
@by_shape
def test_agrees_with_the_reference(routing: Routing, shape: tuple[int, ...]) -> None:
    """To the digits of float64 and of float32, on every instruction set."""
    given, arguments = with_votes(routing, shape)
    expected = run(given, arguments, torch.float64, "reference")
    for instructions in INSTRUCTIONS:
        capsops.backends.cpu.use_instruction_set(instructions)
        for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            for x, y in zip(run(given, arguments, dtype, "cpu"), expected, strict=True):
                if routing.em:  # its gradients lose digits where variances collapse: see the next test
                    assert x.isfinite().all()
                else:
                    assert (x - y).abs().max() <= bound * max(1.0, float(y.abs().max()))
    capsops.backends.cpu.use_instruction_set("auto")


@by_routing
@by_batch
@pytest.mark.parametrize("J", [2, 3])
def test_agrees_with_a_weight(routing: Routing, B: int, J: int) -> None:
    """Outputs, the gradients of the small arguments, and through the votes that of u."""
    arguments = routing.arguments((B, 37, 5, J, 7))
    expected = run(routing, arguments, torch.float64, "cpu")

    def through_votes(weight: Tensor, **others: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        votes = reference.affine_votes(others.pop(routing.capsules), weight)
        return routing.call(weight=None, **{routing.capsules: votes}, **others)

    for x, y in zip(run(replace(routing, call=through_votes), arguments, torch.float64, "cpu"), expected, strict=True):
        assert (x - y).abs().max() <= (1e-9 if routing.em else 1e-12) * max(1.0, float(y.abs().max()))


@by_routing
@pytest.mark.parametrize(("B", "dtype"), [(3, torch.bfloat16), (16, torch.bfloat16), (3, torch.float16)], ids=str)
def test_low_precision_is_at_most_twice_as_wrong(routing: Routing, B: int, dtype: torch.dtype) -> None:
    given, arguments = with_votes(routing, (B, 33, 4, 3, 11))
    arguments = {n: x.to(dtype).double() for n, x in arguments.items()}
    exact = run(given, arguments, torch.float64, "reference")
    naive = run(given, arguments, dtype, "reference")
    for x, y, z in zip(run(given, arguments, dtype, "cpu"), naive, exact, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * z.abs().max()
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + rounding + (1e-6 if routing.over_inputs else 1e-12)


@by_routing
@pytest.mark.parametrize(("B", "share"), [(11, 0.6), (16, 0.9), (35, 0.8)], ids=["sparse", "dense", "large"])
def test_mask(routing: Routing, B: int, share: float) -> None:
    """Masked votes may be anything, and have no gradient."""
    given, arguments = with_votes(routing, (B, 67, 5, 3, 6))
    mask = torch.rand(B, 67, generator=torch.Generator().manual_seed(5)) < share
    mask[2], mask[:, 5] = False, False
    for name in {routing.capsules, "activation", "logits"} & set(arguments):
        arguments[name][~mask] = float("nan")
    expected = run(given, arguments, torch.float64, "reference", mask=mask)
    got = run(given, arguments, torch.float64, "cpu", mask=mask)
    for x, y in zip(got, expected, strict=True):
        assert relative_error(x, y) < (1e-9 if routing.em else 1e-12)
    gradients = dict(zip(arguments, got[routing.outputs :], strict=True))
    assert (gradients[routing.capsules][~mask] == 0).all()
    assert (gradients[routing.capsules][mask] != 0).any()


@pytest.mark.parametrize("routing", [r for r in ROUTINGS if not r.detached], ids=lambda r: r.name)
@by_batch
def test_gradcheck(routing: Routing, B: int) -> None:
    given, arguments = with_votes(routing, (B, 4, 2, 3, 3))
    leaves = tuple(x.requires_grad_() for x in arguments.values())
    with capsops.use_backend("cpu"):
        assert torch.autograd.gradcheck(
            lambda *x: given.call(**dict(zip(arguments, x, strict=True))), leaves, fast_mode=True
        )


@by_routing
@by_batch
def test_bitwise_the_same_for_any_number_of_threads_and_strides(routing: Routing, B: int) -> None:
    given, arguments = with_votes(routing, (B, 700, 3, 2, 16))
    name, threads = routing.capsules, torch.get_num_threads()
    expected = run(given, arguments, torch.float32, "cpu")
    # As a convolution leaves them, components before positions.
    strided = arguments[name].movedim(1, -1).contiguous().movedim(-1, 1)
    assert not strided.is_contiguous()
    try:
        torch.set_num_threads(1 if threads > 1 else 3)
        got = run(given, {**arguments, name: strided}, torch.float32, "cpu")
    finally:
        torch.set_num_threads(threads)
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@by_routing
@pytest.mark.parametrize("shape", [(0, 5, 3, 2, 4), (2, 0, 3, 2, 4)], ids=["no-batch", "no-capsules"])
def test_empty(routing: Routing, shape: tuple[int, ...]) -> None:
    given, arguments = with_votes(routing, shape)
    expected = run(given, arguments, torch.float64, "reference")
    for x, y in zip(run(given, arguments, torch.float64, "cpu"), expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "routing", [ATTENTION, DYNAMIC_LOGITS, DYNAMIC_INPUTS, STEP, *ROUTINGS[-2:]], ids=lambda r: r.name
)
def test_vmap_and_compile(routing: Routing) -> None:
    given, arguments = with_votes(routing, (4, 6, 3, 2, 5))
    per_item = {n: (0 if x.dim() > 1 and x.shape[0] == 4 else None) for n, x in arguments.items()}
    expected = each(given.call(**arguments))

    def one(*values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        items = zip(arguments, values, per_item.values(), strict=True)
        out = given.call(**{n: x if dim is None else x[None] for n, x, dim in items})
        return tuple(x[0] for x in out) if isinstance(out, tuple) else out[0]

    mapped = torch.func.vmap(one, in_dims=tuple(per_item.values()))(*arguments.values())
    torch.testing.assert_close(each(mapped), expected)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **x: given.call(**x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(each(compiled(**arguments)), expected, rtol=0, atol=0)


def test_opcheck() -> None:
    votes, state, mask = torch.randn(2, 7, 4, 5), torch.randn(2, 4, 5), torch.rand(2, 7) < 0.7
    ops = torch.ops.capsops
    torch.library.opcheck(
        ops.dynamic_routing.default, (votes.requires_grad_(), None, None, mask, 3, True, False, "sabour")
    )
    torch.library.opcheck(
        ops.dynamic_routing_backward.default,
        (
            state,
            torch.randn(3, 2, 4, 5),
            votes.detach(),
            None,
            None,
            mask,
            3,
            False,
            False,
            "sabour",
            [True, False, False],
        ),
    )


def test_the_loops_of_the_procedure() -> None:
    """Sabour et al. 2017, procedure 1, from votes with a tanh on them."""
    B, N, J, D = 2, 5, 3, 4
    votes = torch.randn(B, N, J, D, dtype=torch.float64).tanh()
    for b in range(B):
        logits = torch.zeros(N, J, dtype=torch.float64)
        for _ in range(3):
            v = []
            for j in range(J):
                s = sum(logits[i].softmax(0)[j] * votes[b, i, j] for i in range(N))
                n = s.norm()
                v.append(n**2 / (1 + n**2) * s / n)
            logits = logits + torch.stack([torch.stack([votes[b, i, j] @ v[j] for j in range(J)]) for i in range(N)])
        torch.testing.assert_close(capsops.dynamic_routing(votes, None, 3)[b], torch.stack(v))


@by_routing
def test_coupling_coefficients(routing: Routing) -> None:
    """As with a weight."""
    kind = next(k for k in ("self-attention", "attention", "dynamic", "step", "em") if routing.name.startswith(k))
    arguments = routing.arguments((2, 9, 3, 4, 5))
    options = {"axis": "input"} if routing.over_inputs else {}
    u, weight = arguments.pop(routing.capsules), arguments.pop("weight")
    expected = capsops.coupling_coefficients(kind, u, weight, **arguments, **options)
    votes = reference.affine_votes(u, weight)
    torch.testing.assert_close(
        capsops.coupling_coefficients(kind, votes, None, **arguments, **options), expected, rtol=1e-6, atol=1e-9
    )


def test_flops() -> None:
    """No product makes the votes: agreements, weighted sums and terms of the gradient are left."""
    votes = torch.randn(2, 7, 3, 5, requires_grad=True)
    contraction = 2 * votes.numel()
    with FlopCounterMode(display=False) as mode:
        out = capsops.dynamic_routing(votes, None, 3)
    assert mode.get_total_flops() == 4 * contraction
    with FlopCounterMode(display=False) as mode:
        out.sum().backward()
    assert mode.get_total_flops() == (2 * 3 + 9) * contraction


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: capsops.dynamic_routing(v[0], None), r"u has shape \[7, 3, 5\] and weight is None; expected votes"),
        (lambda v: capsops.dynamic_routing(v, v), r"u has shape \[2, 7, 3, 5\]; expected 3 .* or weight None"),
        (lambda v: capsops.dynamic_routing(v, torch.zeros(5, 3, 5)), "expected 3 dimensions"),
        (lambda v: capsops.routing_step(v[:, :, 0], None, v[:, 0]), "expected votes, 4 dimensions"),
        (lambda v: capsops.attention_routing(v[0, 0], None, v[0, 0]), "expected votes, 4 dimensions"),
        (lambda v: capsops.self_attention_routing(v[None], None), "expected votes, 4 dimensions"),
        (
            lambda v: capsops.em_routing(v[0], v[:, :, 0, 0], None, v[0, 0, :, 0], v[0, 0, :, 0]),
            r"pose has shape \[7, 3, 5\] and weight is None; expected votes, 4 or 5 dimensions",
        ),
        (lambda v: capsops.dynamic_routing(v[:, :, :0], None), r"J is 0 \(u \[2, 7, 0, 5\]\)"),
        (lambda v: capsops.dynamic_routing(v[..., :0], None), "D is 0"),
        (lambda v: capsops.dynamic_routing(v, None, bias=v[0, 0, 0]), r"bias has shape \[5\]; expected \[J, D\] = "),
        (lambda v: capsops.dynamic_routing(v, None, bias=v[0, 0].double()), "bias has dtype torch.float64"),
        (lambda v: capsops.dynamic_routing(v, None, mask=torch.ones(2, 8, dtype=torch.bool)), r"mask has shape"),
        (lambda v: capsops.dynamic_routing(v, None, logits=v[0]), r"logits has shape \[7, 3, 5\]; expected \[N, J\]"),
        (lambda v: capsops.dynamic_routing(v, None, 0), "iterations is 0"),
        (lambda v: capsops.coupling_coefficients("dynamic", v[0], None), "expected votes, 4 dimensions"),
    ],
)
def test_bad_input(backend: str, call: Callable[[Tensor], Tensor], message: str) -> None:
    with capsops.use_backend(backend), pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 7, 3, 5))


def test_only_routings_take_votes() -> None:
    with pytest.raises(TypeError, match="weight is a NoneType; expected a"):
        capsops.affine_votes(torch.zeros(2, 7, 4), None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="weight is a list; expected a"):
        capsops.dynamic_routing(torch.zeros(2, 7, 3, 5), [1.0])  # type: ignore[arg-type]
