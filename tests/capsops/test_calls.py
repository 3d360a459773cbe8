"""What an operator remembers of a call holds for calls with the same shapes, strides, dtypes and options alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import capsops
from capsops.ops import _declare, dynamic

B, N, K, J, D = 2, 5, 3, 4, 2
OPERATOR = dynamic._dynamic_routing.operator


def _operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(B, N, K, dtype=dtype).requires_grad_(), torch.randn(N, K, J, D, dtype=dtype).requires_grad_()


def _call(u: Tensor, weight: Tensor, g: Tensor | None = None) -> tuple[Tensor, ...]:
    """v and the gradients of u and weight."""
    v = capsops.dynamic_routing(u, weight)
    return v, *torch.autograd.grad(v, (u, weight), torch.ones_like(v) if g is None else g)


def _compare(u: Tensor, weight: Tensor, g: Tensor | None = None) -> None:
    """With the reference."""
    with capsops.use_backend("reference"):
        expected = _call(u, weight, g)
    torch.testing.assert_close(_call(u, weight, g), expected)


def test_arguments_with_other_strides_after_contiguous_ones() -> None:
    u, weight = _operands()
    for _ in range(2):
        _compare(u, weight)
        _compare(u.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(), weight)
        _compare(u, weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_())
        _compare(u, weight[:1].detach().expand_as(weight).requires_grad_())
        _compare(u, weight, torch.randn((), dtype=u.dtype).expand(B, J, D))
        _compare(u, weight, torch.randn(D, J, B, dtype=u.dtype).permute(2, 1, 0))
    # The same strides, at an address that is not a multiple of 16.
    _compare(torch.randn(B * N * K + 1, dtype=u.dtype)[1:].view(B, N, K).requires_grad_(), weight)
    assert [x.dtype for x in _call(*_operands(torch.float32))] == [torch.float32] * 3


def test_wrong_arguments_are_refused_after_right_ones() -> None:
    u, weight = _operands()
    _call(u, weight)
    with pytest.raises(ValueError, match="weight has shape"):
        _call(u, weight[1:])
    with pytest.raises(ValueError, match="weight has dtype"):
        _call(u, weight.float())
    with pytest.raises(ValueError, match="weight has layout"):
        _call(u, weight.detach().to_sparse())
    capsops.dynamic_routing(u, weight, 1)
    with pytest.raises(ValueError, match="iterations is True"):
        capsops.dynamic_routing(u, weight, True)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_arguments_are_refused_after_expanded_ones() -> None:
    """Some sparse tensors have the strides of expanded ones, which are 0."""
    u, weight = _operands()
    v = capsops.dynamic_routing(u, weight)
    v.sum().backward(retain_graph=True)
    with pytest.raises(ValueError, match="g_v has layout"):
        v.backward(torch.ones_like(v).to_sparse())
    expanded = torch.ones((), dtype=u.dtype).expand(B, N, K)
    capsops.dynamic_routing(expanded, weight)
    for sparse in (expanded.to_sparse(), expanded.to_sparse_csr()):
        with pytest.raises(ValueError, match="u has layout"):
            capsops.dynamic_routing(sparse, weight)


@contextmanager
def _unpacked_as(dtype: torch.dtype) -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x.to(dtype)):
        yield


def test_the_gradient_checks_what_hooks_made_of_saved_tensors() -> None:
    u, weight = _operands()
    _call(u, weight)
    with _unpacked_as(torch.float32):
        v = capsops.dynamic_routing(u, weight)
    with pytest.raises(
        ValueError, match=r"dynamic_routing_backward: g_v has dtype torch.float64; expected torch.float32"
    ):
        v.sum().backward()


def test_a_tensor_that_was_changed_after_forward_has_no_gradient() -> None:
    u, weight = _operands()
    for _ in range(2):
        v = capsops.dynamic_routing(u, weight)
        with torch.no_grad():
            weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            v.sum().backward()


def test_only_some_calls_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_declare, "_MOST_CALLS", 3)
    weight = _operands()[1].detach()
    for batch in range(1, 9):
        u = torch.randn(batch, N, K, dtype=weight.dtype)
        for _ in range(2):
            assert capsops.dynamic_routing(u, weight).shape == (batch, J, D)
        assert 1 <= len(OPERATOR.calls) <= 3


def test_a_forced_backend_is_asked_again() -> None:
    u, weight = _operands()
    v = capsops.dynamic_routing(u, weight)
    with capsops.use_backend("reference"):
        assert type(capsops.dynamic_routing(u, weight).grad_fn) is not type(v.grad_fn)
    with capsops.use_backend("cuda"), pytest.raises(capsops.BackendError, match="the forced backend cannot run"):
        capsops.dynamic_routing(u, weight)
    assert type(capsops.dynamic_routing(u, weight).grad_fn) is type(v.grad_fn)
