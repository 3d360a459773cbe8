"""The tables of operators say which kernels a backend has."""

from __future__ import annotations

import pytest
import torch

from capsops.backends import extension

_C = extension._C


def test_the_cpu_has_a_kernel_for_every_operator() -> None:
    names = _C.operators("cpu")
    assert len(set(names)) == len(names)
    declared = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("capsops::")]
    assert {f"capsops::{name}" for name in names} == set(declared)
    assert all(callable(getattr(_C, name)) for name in names)


def test_cuda_has_all_of_them_or_none() -> None:
    names = _C.operators("cuda")
    if _C.cuda_architectures is None:
        assert names == []
    else:
        assert names == _C.operators("cpu")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match='operators: backend is "triton"; expected "cpu" or "cuda"'):
        _C.operators("triton")
