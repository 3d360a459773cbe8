"""squash: values, gradients, and the limits of the number range."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

import capsops
from capsops.backends import COMPILED, cpu

from .routings import device_of

by_kind = pytest.mark.parametrize("kind", ["sabour", "efficient"])
by_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


# The instruction sets of the CPU, and the backends. Without a GPU Triton runs in its interpreter.
EVERYWHERE = [f"cpu {name}" for name in cpu.instruction_sets()] + ["reference"]
EVERYWHERE += [b for b in ("cuda", "triton") if COMPILED[b].why_not("squash", device_of(b), torch.float32) is None]


@pytest.fixture(params=EVERYWHERE)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Force a backend, and return the device for its tensors."""
    backend, _, instructions = request.param.partition(" ")
    if instructions:
        cpu.use_instruction_set(instructions)
    with capsops.use_backend(backend):
        yield device_of(backend)
    cpu.use_instruction_set("auto")


def exact(s: torch.Tensor, kind: str) -> torch.Tensor:
    """The formula as in the papers, in float64; the lengths must be neither 0 nor too large for it."""
    s = s.double()
    n = s.norm(dim=-1, keepdim=True)
    return s * (n / (1 + n**2) if kind == "sabour" else (1 - torch.exp(-n)) / n)


@by_kind
@by_backend
@pytest.mark.parametrize("dim", [1, 2, 8, 17])
def test_values(kind: str, backend: str, dim: int) -> None:
    s = torch.randn(3, 5, dim, dtype=torch.float64) * torch.logspace(-2, 1.5, 5, dtype=torch.float64)[:, None]
    with capsops.use_backend(backend):
        torch.testing.assert_close(capsops.squash(s, kind=kind), exact(s, kind), rtol=1e-12, atol=0)
        single = capsops.squash(s.float(), kind=kind)
        torch.testing.assert_close(single.double(), exact(s.float(), kind), rtol=1e-5, atol=0)


def test_by_hand() -> None:
    torch.testing.assert_close(capsops.squash(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 4.0]) * 5 / 26)
    f = (1 - math.exp(-5)) / 5
    torch.testing.assert_close(capsops.squash(torch.tensor([3.0, 4.0]), kind="efficient"), torch.tensor([3.0, 4.0]) * f)


@by_kind
@by_backend
@pytest.mark.parametrize("scale", [1e-6, 5e-4, 0.3, 3.0, 40.0])
def test_gradcheck(kind: str, backend: str, scale: float) -> None:
    s = torch.randn(4, 6, dtype=torch.float64) * scale
    eps = 1e-7 * min(1.0, scale) if scale < 1e-3 else 1e-6
    with capsops.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x: capsops.squash(x, kind=kind), (s.requires_grad_(),), eps=eps, atol=1e-6, rtol=1e-4
        )


@by_kind
@by_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-20, 1e-4, 1.0, 400.0, 6e4])
def test_finite_everywhere(kind: str, backend: str, dtype: torch.dtype, length: float) -> None:
    s = torch.zeros(2, 16, dtype=dtype)
    s[0, 3] = length
    s[1] = length / 4
    s.requires_grad_()
    with capsops.use_backend(backend):
        v = capsops.squash(s, kind=kind)
        (g,) = torch.autograd.grad(v, s, torch.ones_like(v))
    assert torch.isfinite(v).all()
    assert torch.isfinite(g).all()
    lengths = v.detach().double().norm(dim=-1)
    n = s.detach().double().norm(dim=-1)
    expected = n**2 / (1 + n**2) if kind == "sabour" else -torch.expm1(-n)
    torch.testing.assert_close(lengths, expected, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@by_backend
@pytest.mark.parametrize("length", [1e-38, 1e-30, 1e25, 1e38])
def test_squares_neither_overflow_nor_vanish(backend: str, length: float) -> None:
    s = torch.tensor([[0.6 * length, 0.8 * length]], requires_grad=True)
    with capsops.use_backend(backend):
        v = capsops.squash(s)
        (g,) = torch.autograd.grad(v.sum(), s)
    assert torch.isfinite(v).all()
    assert torch.isfinite(g).all()
    if length > 1:
        torch.testing.assert_close(v, torch.tensor([[0.6, 0.8]]))


def rays(dtype: torch.dtype) -> list[torch.Tensor]:
    """Vectors of the largest numbers of the dtype, whose lengths may overflow it."""
    top = torch.finfo(dtype).max
    equal, one, mixed = [top] * 4, [0.0, -top, 0.0, 0.0], [top, -top / 2, top / 2**20, 0.0]
    three = [top / 4] * 3 + [0.0]
    return [torch.tensor([x, [1.0, 2.0, 0.0, -1.0]], dtype=dtype) for x in (equal, one, mixed, three, [top / 2**5] * 4)]


@by_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_longest_vectors(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """v is the direction of s; the gradient is the part of g_v that is perpendicular to it, divided by the length."""
    for s in rays(dtype):
        leaf, g_v = s.to(device).requires_grad_(), torch.tensor([0.5, 1.0, -2.0, 3.0], dtype=dtype)
        v = capsops.squash(leaf, kind=kind)
        (g,) = torch.autograd.grad(v, leaf, g_v.to(device).expand_as(leaf))
        assert torch.isfinite(v).all()
        assert torch.isfinite(g).all()
        eps = torch.finfo(dtype).eps
        largest = s[0].double().abs().max()
        ratio = s[0].double() / largest
        direction = ratio / ratio.norm()
        torch.testing.assert_close(v[0].cpu().double(), direction, rtol=4 * eps, atol=torch.finfo(dtype).tiny)
        across = g_v.double() - (direction @ g_v.double()) * direction
        # Such small numbers have fewer digits: the error is relative to the largest term, or is the last digit.
        last = 5e-324 if dtype == torch.float64 else torch.finfo(dtype).tiny * eps
        if dtype == torch.bfloat16 and device.type == "cpu" and capsops.info().forced == "triton":
            last = torch.finfo(dtype).tiny  # the interpreter has no smaller numbers
        error = (g[0].cpu().double() - across / ratio.norm() / largest).abs()
        assert (error <= 16 * eps * g_v.abs().max() / largest + 4 * last).all()
        # The other row is not affected.
        torch.testing.assert_close(v[1].cpu().double(), exact(s[1:], kind)[0], rtol=4 * eps, atol=0)


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_million_components(device: torch.device, kind: str, dtype: torch.dtype) -> None:
    """The length is at most 1 up to the rounding of v. Equal components make their sum round in one direction."""
    eps = torch.finfo(dtype).eps
    for component in (0.1, 3e37):
        s = torch.full((1, 1_000_003), component, dtype=dtype)
        leaf = s.to(device).requires_grad_()
        v = capsops.squash(leaf, kind=kind)
        (g,) = torch.autograd.grad(v, leaf, torch.ones_like(v))
        length = float(v.detach().double().square().sum()) ** 0.5  # torch.sum adds pairwise
        n = s[0, 0].item() * s.shape[1] ** 0.5
        expected = n**2 / (1 + n**2) if kind == "sabour" else -math.expm1(-n)
        assert abs(length - expected) <= 4 * eps
        # The gradient along s is d length / dn.
        slope = 2 * n / (1 + n**2) ** 2 if kind == "sabour" else math.exp(-n)
        assert (g.double() - slope).abs().max() <= 16 * eps * max(1 / n, slope)


def test_routings_squash_the_longest_sums(device: torch.device) -> None:
    u, weight = torch.ones(1, 1, 1, device=device), torch.full((1, 1, 1, 4), 3e38, device=device).requires_grad_()
    outputs = [
        capsops.dynamic_routing(u, weight, iterations=1),
        capsops.attention_routing(u, weight, torch.zeros(1, 1, device=device)),
    ]
    if capsops.info().forced != "reference":  # the reference multiplies by the scale last, after the overflow
        outputs.append(capsops.self_attention_routing(u, weight, scale=0.0))
    for v in outputs:
        torch.testing.assert_close(v, torch.full_like(v, 0.5))
        (g,) = torch.autograd.grad(v, weight, torch.tensor([1.0, -1.0, 2.0, 0.0], device=device).expand_as(v))
        assert torch.isfinite(g).all()


@by_kind
def test_gradient_at_zero_is_the_limit(kind: str) -> None:
    s = torch.zeros(3, 4, requires_grad=True)
    g_v = torch.randn(3, 4)
    (g,) = torch.autograd.grad(capsops.squash(s, kind=kind), s, g_v)
    torch.testing.assert_close(g, torch.zeros(3, 4) if kind == "sabour" else g_v)


@by_backend
def test_nan_is_not_hidden(backend: str) -> None:
    s = torch.ones(3, 5)
    s[1, 0], s[2, 4] = float("nan"), float("nan")
    with capsops.use_backend(backend):
        v = capsops.squash(s)
    assert torch.isfinite(v[0]).all()
    assert v[1].isnan().all()
    assert v[2].isnan().all()
    for place in range(3):  # followed by zeros only
        s = torch.zeros(1, 3)
        s[0, place] = float("nan")
        with capsops.use_backend(backend):
            assert capsops.squash(s).isnan().all()


@by_kind
@pytest.mark.parametrize("dim", [0, 1, -1, -3])
def test_any_dimension(kind: str, dim: int) -> None:
    s = torch.randn(4, 5, 6, dtype=torch.float64)
    expected = exact(s.movedim(dim, -1), kind).movedim(-1, dim)
    torch.testing.assert_close(capsops.squash(s, dim=dim, kind=kind), expected)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 0, 2)])
def test_empty(shape: tuple[int, ...]) -> None:
    assert capsops.squash(torch.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_rounds_once(dtype: torch.dtype) -> None:
    s = torch.randn(1000, 8).to(dtype)
    error = (capsops.squash(s).double() - exact(s, "sabour")).abs()
    assert (error <= torch.finfo(dtype).eps * exact(s, "sabour").abs() * 0.51 + 1e-7).all()


def test_every_half_survives_the_round_trip() -> None:
    """The kernels convert all 65,536 numbers of both half types exactly: the vote 1·x is x."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[torch.isfinite(x)]
        votes = capsops.affine_votes(torch.ones(1, len(x), 1, dtype=dtype), x.reshape(-1, 1, 1, 1))
        assert torch.equal(votes.flatten(), x)


def test_float32_rounds_to_the_nearest_half() -> None:
    """Products that lie between two half-precision numbers round as in torch."""
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        for exponent in (-7, -4, 0, 3):
            a = (torch.randn(20_000, generator=g) * 10.0**exponent).to(dtype)
            b = torch.randn(20_000, generator=g).to(dtype)
            votes = capsops.affine_votes(a.reshape(1, -1, 1), b.reshape(-1, 1, 1, 1))
            assert torch.equal(votes.flatten(), (a.float() * b.float()).to(dtype))
