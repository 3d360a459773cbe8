"""primary_capsules on the compiled backend against the reference: layouts, strides, gradients, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import capsops

from .routings import relative_error

# B, types, K, H, W: ones; primes; one more than a vector width; MNIST (its pixels are not a multiple of K); an image of
# many pixels; capsules longer than a channel.
SHAPES = [(1, 1, 1, 1, 1), (2, 3, 5, 5, 7), (3, 2, 17, 4, 17), (2, 32, 8, 6, 6), (1, 2, 8, 64, 65), (2, 3, 8, 1, 3)]

by_layout = pytest.mark.parametrize("layout", ["channels", "legacy"])
by_kind = pytest.mark.parametrize("kind", ["sabour", "efficient"])
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
by_format = pytest.mark.parametrize(
    "memory", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)


def _features(shape: tuple[int, ...]) -> Tensor:
    B, types, K, height, width = shape
    g = torch.Generator().manual_seed(2)
    return torch.randn(B, types * K, height, width, generator=g, dtype=torch.float64)


def _run(features: Tensor, types: int, layout: str, kind: str, backend: str) -> tuple[Tensor, Tensor]:
    """The capsules, and the gradient of the features for a fixed random gradient of the capsules."""
    leaf = features.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with capsops.use_backend(backend):
        u = capsops.primary_capsules(leaf, types, layout=layout, squash=kind)
        g = torch.randn(u.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(u.dtype)
        (gradient,) = torch.autograd.grad(u, leaf, g)
    assert u.dtype == gradient.dtype == features.dtype
    return u.detach(), gradient


@by_shape
@by_layout
@by_kind
@by_format
def test_agrees_with_the_reference(shape: tuple[int, ...], layout: str, kind: str, memory: torch.memory_format) -> None:
    features, types = _features(shape).to(memory_format=memory), shape[1]
    exact = _run(features, types, layout, kind, "reference")
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        got = _run(features.to(dtype), types, layout, kind, "cpu")
        for x, y in zip(got, exact, strict=True):
            assert relative_error(x.double(), y) < bound
        assert got[0].is_contiguous()
        assert got[1].stride() == features.stride()  # a convolution wants its gradient in the strides of its output


@by_format
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_legacy_is_a_plain_reshape(backend: str, memory: torch.memory_format) -> None:
    """Also if the 6 × 6 pixels of a channel are not a multiple of K = 8 and a capsule continues in the next channel."""
    features = _features((2, 32, 8, 6, 6))
    expected = capsops.squash(features.reshape(2, 1152, 8))
    with capsops.use_backend(backend):
        got = capsops.primary_capsules(features.to(memory_format=memory), 32, layout="legacy")
    torch.testing.assert_close(got, expected)
    layer = capsops.nn.PrimaryCapsules(4, types=32, dim=8, layout="legacy")
    with capsops.use_backend(backend):
        image = torch.randn(2, 4, 20, 20, generator=torch.Generator().manual_seed(0)).to(memory_format=memory)
        torch.testing.assert_close(layer(image), capsops.squash(layer.conv(image).reshape(2, 1152, 8)))


@by_layout
@by_kind
@by_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_rounds_once(layout: str, kind: str, memory: torch.memory_format, dtype: torch.dtype) -> None:
    features = _features((2, 3, 4, 4, 9)).to(dtype).to(memory_format=memory)
    exact = _run(features.double(), 3, layout, kind, "reference")
    naive = _run(features, 3, layout, kind, "reference")
    for got, reference, expected in zip(_run(features, 3, layout, kind, "cpu"), naive, exact, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * expected.abs().max()
        assert (got.double() - expected).abs().max() <= 2 * (reference.double() - expected).abs().max() + rounding


@by_layout
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_other_strides(layout: str, backend: str) -> None:
    """A slice of a larger map, a map with rows and columns exchanged, one map for a whole batch."""
    whole = _features((3, 3, 4, 8, 10))
    for odd in (
        whole[:, :, 1:7, 2:10],
        whole[:, ::3].transpose(2, 3)[:, :, :8],
        whole[:1].expand(3, -1, -1, -1),
        whole.to(memory_format=torch.channels_last)[:, 1:5, :4],
    ):
        types = odd.shape[1] // 4
        got = _run(odd, types, layout, "sabour", backend)
        for x, y in zip(got, _run(odd.contiguous(), types, layout, "sabour", "reference"), strict=True):
            torch.testing.assert_close(x, y)
        # In its own strides: `_run` copies the features.
        with capsops.use_backend(backend):
            torch.testing.assert_close(capsops.primary_capsules(odd, types, layout=layout), got[0])


@by_layout
@by_kind
@by_format
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("width", [4, 5])
def test_gradcheck(layout: str, kind: str, memory: torch.memory_format, backend: str, width: int) -> None:
    features = _features((2, 2, 3, 2, width)).to(memory_format=memory).requires_grad_()
    with capsops.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda x: capsops.primary_capsules(x, 2, layout=layout, squash=kind), (features,), fast_mode=False
        )


@by_layout
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 3, 4), (2, 2, 3, 0, 4)], ids=["no-batch", "no-pixels"])
def test_empty(layout: str, backend: str, shape: tuple[int, ...]) -> None:
    u, gradient = _run(_features(shape), 2, layout, "sabour", backend)
    assert u.shape == (shape[0], 2 * shape[3] * 4, 3)
    assert gradient.shape == (shape[0], 6, shape[3], 4)


@by_layout
@by_format
def test_bitwise_the_same_for_any_number_of_threads(layout: str, memory: torch.memory_format) -> None:
    features = _features((3, 5, 8, 16, 24)).float().to(memory_format=memory)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            results.append(_run(features, 5, layout, "sabour", "cpu"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@by_layout
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_squares_neither_overflow_nor_vanish(layout: str, backend: str) -> None:
    for scale in (0.0, 1e-30, 1e30):
        features = (_features((1, 2, 4, 2, 4)).float() * scale).requires_grad_()
        with capsops.use_backend(backend):
            u = capsops.primary_capsules(features, 2, layout=layout)
            (g,) = torch.autograd.grad(u.sum(), features)
        assert torch.isfinite(u).all()
        assert torch.isfinite(g).all()


def test_double_backward_is_refused_by_the_kernels() -> None:
    features = _features((1, 2, 3, 2, 2)).requires_grad_()
    (g,) = torch.autograd.grad(capsops.primary_capsules(features, 2).sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        g.sum().backward()
    with capsops.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x: capsops.primary_capsules(x, 2), (features,))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_autocast_runs_in_float32(backend: str) -> None:
    features = _features((2, 2, 3, 3, 4)).bfloat16().requires_grad_()
    with capsops.use_backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            u = capsops.primary_capsules(features, 2)
        assert torch.equal(u, capsops.primary_capsules(features.float(), 2))
    u.sum().backward()
    assert features.grad is not None
    assert features.grad.dtype == torch.bfloat16


@by_layout
@by_format
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph(layout: str, memory: torch.memory_format, dynamic: bool) -> None:
    torch._dynamo.reset()
    features = _features((2, 2, 4, 3, 3)).float().to(memory_format=memory)

    def call(x: Tensor) -> Tensor:
        return capsops.primary_capsules(x, 2, layout=layout)

    results = []
    for f in (call, torch.compile(call, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        leaf = features.clone(memory_format=torch.preserve_format).requires_grad_()
        f(leaf).square().sum().backward()
        results.append(leaf.grad)
    torch.testing.assert_close(results[1], results[0])
