"""The bindings, called with invalid arguments that no operator passes: they return a status and never crash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from capsops.backends import extension

_C = extension._C
X = torch.zeros(4096)  # the memory that every pointer points to
P = X.data_ptr()
PLACES = torch.arange(3)  # [3, 1]: those of the input capsules, in one window
F32 = _C.Dtype.float32
SABOUR = _C.SquashKind.sabour
CONTEXT = _C.ExecutionContext(1)
# B, N, K, J, D and rows.
SIZES = (2, 3, 2, 2, 4, 1)


def capsules(u: int = P, weight: int = P, sizes: tuple[int, ...] = SIZES, stride: int = 16) -> Any:
    return _C.Capsules(u, weight, 0, *sizes, stride, F32)


def calls(c: Any, context: Any = CONTEXT, iterations: int = 2, p: int = P) -> dict[str, Callable[[], Any]]:
    """A call of every operator on capsules; p: the address of its other operands."""
    lambdas = [0.5] * min(iterations, 2)
    windows, places = (1, 3, 1), p and PLACES.data_ptr()
    return {
        "affine_votes": lambda: _C.affine_votes(context, c, p),
        "affine_votes_backward": lambda: _C.affine_votes_backward(context, c, p, 0, 0),
        "attention_routing": lambda: _C.attention_routing(context, c, p, 0, 0, SABOUR, p, p),
        "attention_routing_backward": lambda: _C.attention_routing_backward(
            context, c, p, 0, 0, SABOUR, p, p, 0, 0, 0, 0, 0
        ),
        "dynamic_routing": lambda: _C.dynamic_routing(context, c, 0, iterations, False, SABOUR, p, p),
        "dynamic_routing_backward": lambda: _C.dynamic_routing_backward(
            context, c, iterations, False, False, SABOUR, p, p, 0, 0, 0
        ),
        "routing_step": lambda: _C.routing_step(context, c, p, p),
        "routing_step_backward": lambda: _C.routing_step_backward(context, c, p, p, 0, 0, 0),
        "routing_step_with_logits": lambda: _C.routing_step_with_logits(context, c, p, 0, 0, p),
        "routing_step_with_logits_backward": lambda: _C.routing_step_with_logits_backward(
            context, c, p, 0, 0, p, 0, 0, 0, 0, 0
        ),
        "dynamic_routing_with_logits": lambda: _C.dynamic_routing_with_logits(
            context, c, 0, 0, 0, iterations, False, SABOUR, p, p
        ),
        "dynamic_routing_with_logits_backward": lambda: _C.dynamic_routing_with_logits_backward(
            context, c, 0, 0, iterations, False, False, SABOUR, p, p, 0, 0, 0, 0, 0
        ),
        "dynamic_routing_over_inputs": lambda: _C.dynamic_routing_over_inputs(
            context, c, 0, 0, 0, iterations, SABOUR, p, p, p
        ),
        "dynamic_routing_over_inputs_backward": lambda: _C.dynamic_routing_over_inputs_backward(
            context, c, 0, 0, 0, iterations, False, SABOUR, p, p, p, 0, 0, 0, 0, 0
        ),
        "routing_step_over_inputs": lambda: _C.routing_step_over_inputs(context, c, p, 0, 0, p, p, p),
        "routing_step_over_inputs_backward": lambda: _C.routing_step_over_inputs_backward(
            context, c, p, 0, 0, p, p, p, 0, 0, 0, 0, 0
        ),
        "self_attention_routing": lambda: _C.self_attention_routing(context, c, 0, 0, 1.0, p, p, p),
        "self_attention_routing_backward": lambda: _C.self_attention_routing_backward(
            context, c, 0, 0, 1.0, p, p, p, 0, 0, 0, 0
        ),
        "em_routing": lambda: _C.em_routing(context, c, p, p, p, lambdas, p, p, p),
        "em_routing_backward": lambda: _C.em_routing_backward(context, c, p, p, lambdas, p, p, p, 0, 0, 0, 0, 0),
        "em_routing_over_positions": lambda: _C.em_routing_over_positions(
            context, c, p, p, p, lambdas, *windows, places, p, p, p
        ),
        "em_routing_over_positions_backward": lambda: _C.em_routing_over_positions_backward(
            context, c, p, p, lambdas, *windows, p, p, p, places, 0, 0, 0, 0, 0
        ),
    }


def check_refused(call: Callable[[], Any]) -> None:
    before = X.clone()
    assert call() == _C.Status.invalid_argument
    assert torch.equal(X, before), "it wrote"


by_operator = pytest.mark.parametrize("op", list(calls(None)))


@by_operator
def test_valid_arguments_run(op: str) -> None:
    X.zero_()
    assert calls(capsules())[op]() == _C.Status.ok
    X.zero_()


@by_operator
@pytest.mark.parametrize("axis", range(6))
@pytest.mark.parametrize("size", [-1, 2**31, 2**62])
def test_sizes(op: str, axis: int, size: int) -> None:
    sizes = (*SIZES[:axis], size, *SIZES[axis + 1 :])
    # With 2**31 alone all products of the sizes would still fit into 64 bits, and the memory would have to exist.
    if size == 2**31:
        sizes = tuple(2**31 if n == size else 2**20 for n in sizes)
    check_refused(calls(capsules(sizes=sizes, stride=0))[op])


@by_operator
@pytest.mark.parametrize("axis", [2, 3, 4, 5])
def test_no_components(op: str, axis: int) -> None:
    check_refused(calls(capsules(sizes=(*SIZES[:axis], 0, *SIZES[axis + 1 :])))[op])


@by_operator
def test_pointers_strides_and_threads(op: str) -> None:
    check_refused(calls(capsules(u=0))[op])
    check_refused(calls(capsules(weight=0))[op])
    check_refused(calls(capsules(stride=15))[op])
    check_refused(calls(capsules(stride=-16))[op])
    check_refused(calls(capsules(), p=0)[op])
    strided = capsules()
    strided.set_strides(8, -4, 1)
    check_refused(calls(strided)[op])
    for threads in (0, -1, 2**30):
        check_refused(calls(capsules(), context=_C.ExecutionContext(threads))[op])


@pytest.mark.parametrize(
    ("windows", "places"),
    [
        ((0, 3, 1), [0, 1, 2]),
        ((3, 3, 1), [0, 1, 2]),  # does not divide B
        ((1, -1, 1), [0, 1, 2]),
        ((1, 3, -1), [0, 1, 2]),
        ((1, 2**40, 2**40), [0, 1, 2]),
        ((1, 3, 1), None),
        ((1, 3, 1), [0, 1, 3]),  # no such place
        ((1, 3, 1), [0, 1, -2]),
        ((2, 3, 1), [0, 6, 2]),
        ((1, 3, 1), [0, 1, 1]),  # of two capsules
    ],
)
def test_windows(windows: tuple[int, int, int], places: list[int] | None) -> None:
    c, given = capsules(), None if places is None else torch.tensor(places)
    address = 0 if given is None else given.data_ptr()
    check_refused(lambda: _C.em_routing_over_positions(CONTEXT, c, P, P, P, [0.5], *windows, address, P, P, P))
    check_refused(
        lambda: _C.em_routing_over_positions_backward(
            CONTEXT, c, P, P, [0.5], *windows, P, P, P, address, P, P, P, P, P
        )
    )


@pytest.mark.parametrize("op", ["dynamic_routing", "dynamic_routing_backward", "em_routing", "em_routing_backward"])
def test_iterations(op: str) -> None:
    check_refused(calls(capsules(), iterations=0)[op])
    if op.startswith("dynamic"):
        for iterations in (-1, 2**48, 2**62):
            check_refused(calls(capsules(), iterations=iterations)[op])
        with pytest.raises(TypeError):
            calls(capsules(), iterations=2**63)[op]()


def test_more_work_space_than_there_is() -> None:
    """2³⁰ iterations once overflowed an int."""
    c = capsules(sizes=(2, 3, 2, 64, 64, 1), stride=0)
    for op in ("dynamic_routing_backward",):
        assert calls(c, iterations=2**30)[op]() == _C.Status.out_of_memory


def test_squash() -> None:
    for rows, dim in ((-1, 4), (4, -1), (2**40, 2**40), (2**62, 2)):
        check_refused(lambda rows=rows, dim=dim: _C.squash(CONTEXT, P, P, rows, dim, SABOUR, F32))
        check_refused(lambda rows=rows, dim=dim: _C.squash_backward(CONTEXT, P, P, P, rows, dim, SABOUR, F32))
    check_refused(lambda: _C.squash(CONTEXT, 0, P, 1, 4, SABOUR, F32))
    check_refused(lambda: _C.squash_backward(CONTEXT, P, P, 0, 1, 4, SABOUR, F32))
    check_refused(lambda: _C.squash(_C.ExecutionContext(0), P, P, 1, 4, SABOUR, F32))


def test_primary_capsules() -> None:
    good = (2, 3, 4, 2, 24, 8, 1, 4)
    assert _C.primary_capsules(CONTEXT, _C.PrimaryCapsules(*good, SABOUR, F32), P, P) == _C.Status.ok
    X.zero_()
    for axis in range(8):
        for size in (-1, 2**62):
            p = _C.PrimaryCapsules(*good[:axis], size, *good[axis + 1 :], SABOUR, F32)
            check_refused(lambda p=p: _C.primary_capsules(CONTEXT, p, P, P))
            check_refused(lambda p=p: _C.primary_capsules_backward(CONTEXT, p, P, P, P))
    check_refused(lambda: _C.primary_capsules(CONTEXT, _C.PrimaryCapsules(*good, SABOUR, F32), P, 0))


def test_probes() -> None:
    for bytes_, threads in ((0, 1), (-1, 1), (2**62, 1), (4096, 0)):
        with pytest.raises(ValueError, match="size and threads"):
            _C.measure_read(bytes_, threads)
    with pytest.raises(ValueError, match="size and threads"):
        _C.measure_fma(0)


def test_python_says_which_operator() -> None:
    with pytest.raises(ValueError, match=r"capsops\.squash: the kernel does not take an argument"):
        extension.call_kernel("squash", (X,), P, P, -1, 4, SABOUR, F32)


@pytest.mark.skipif(_C.cuda_architectures is not None, reason="CUDA has a kernel for every operator")
def test_an_extension_without_cuda_kernels_says_so() -> None:
    with pytest.raises(ValueError, match="without CUDA kernels"):
        calls(capsules(), _C.ExecutionContext(0, 0, 0))["routing_step"]()
