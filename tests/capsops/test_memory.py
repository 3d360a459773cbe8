"""The memory of large gradients is reused once it is free, and never while a tensor uses it."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import capsops
from capsops import memory


@pytest.fixture(autouse=True)
def every_size_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(memory, "LEAST_BYTES", 1)
    capsops.release_memory()
    yield
    capsops.release_memory()


def gradients(weight: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    v = capsops.attention_routing(u, weight, torch.eye(2))
    return torch.autograd.grad(v.square().sum(), (u, weight))


@pytest.fixture
def operands() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    weight, u = torch.randn(20, 8, 2, 16), torch.randn(3, 20, 8)
    return weight.requires_grad_(), u.requires_grad_()


def test_a_freed_gradient_is_where_the_next_one_goes(operands: tuple[Tensor, Tensor]) -> None:
    first = gradients(*operands)
    expected = [g.clone() for g in first]
    addresses = {g.data_ptr() for g in first}
    for g in first:
        g.fill_(torch.nan)
    del g, first
    second = gradients(*operands)
    assert {g.data_ptr() for g in second} == addresses
    for g, e in zip(second, expected, strict=True):
        assert torch.equal(g, e)


def test_a_gradient_in_use_stays_as_it_is(operands: tuple[Tensor, Tensor]) -> None:
    held = gradients(*operands)[1][3:5]  # a view keeps the memory in use
    before = held.clone()
    for _ in range(3):
        gradients(*operands)[1].fill_(torch.nan)
    assert torch.equal(held, before)


def test_gradients_accumulate(operands: tuple[Tensor, Tensor]) -> None:
    weight, u = operands
    once = gradients(weight, u)[1].clone()
    for _ in range(2):
        capsops.attention_routing(u, weight, torch.eye(2)).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * once)
    assert weight.grad.is_contiguous() and not weight.grad._is_view()


def test_an_idle_block_is_freed_after_requests_for_other_sizes() -> None:
    memory.empty_like(torch.zeros(7))
    assert len(memory._idle) == 1
    for _ in range(memory.MOST_PASSED_OVER + 2):
        held = memory.empty_like(torch.zeros(9))
        del held
    assert [len(block) for _, block in memory._idle] == [36]


def test_sizes_that_change_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_most_used_bytes", memory._used_bytes)
    for n in range(1, 40):
        held = memory.empty_like(torch.zeros(100 + n))
        del held
        assert len(memory._idle) == 1  # two blocks would be more than was ever in use
    assert memory._idle_bytes == sum(len(block) for _, block in memory._idle)


def test_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    used = memory._used_bytes

    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="a gradient of 28 bytes"):
        memory.empty_like(torch.zeros(7))
    assert memory._used_bytes == used


def test_release_memory() -> None:
    memory.empty_like(torch.zeros(7))
    capsops.release_memory()
    assert not memory._idle


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_shape_and_dtype(dtype: torch.dtype) -> None:
    x = memory.empty_like(torch.zeros(3, 4, 5, dtype=dtype).transpose(0, 2))
    assert x.shape == (5, 4, 3) and x.dtype == dtype and x.is_contiguous()


def test_the_interpreter_ends_quietly_while_gradients_live() -> None:
    code = """
import torch, capsops
from capsops import memory
memory.LEAST_BYTES = 1
kept = memory.empty_like(torch.zeros(100))
idle = memory.empty_like(torch.zeros(100))
del idle
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""
