"""The compiled CPU backend: tensors to pointers, and a call into `capsops._C`.

Every function fills the outputs that come first among its arguments; the operators in `_ops.py` have checked everything
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import accumulation_dtype

try:
    # After torch, so that both share one OpenMP runtime.
    from .. import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)

DEVICE_TYPE = "cpu"

_DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def why_not(device_type: str, dtype: torch.dtype) -> str | None:
    """Why this backend cannot take tensors like these, or None if it can."""
    if _C is None:
        return f"the extension capsops._C does not load ({_import_error}); `pip install -e .` builds it"
    if device_type != DEVICE_TYPE:
        return f"it does not run on {device_type}"
    if dtype not in _DTYPES:
        return f"it does not take {dtype}"
    return None


def built() -> str | None:
    """What built the extension and for which GPUs, or None if it was not built."""
    if _C is None:
        return None
    gpus = f"CUDA kernels for {_C.cuda_architectures}" if _C.cuda_architectures else "without CUDA kernels"
    return f"built by {_C.compiler}, {gpus}"


def _check(status: Any, op: str, *tensors: Tensor) -> None:
    if status == _C.Status.ok:
        return
    shapes = ", ".join(str(list(x.shape)) for x in tensors)
    if status == _C.Status.out_of_memory:
        raise MemoryError(f"capsops.{op}: no memory for its work space (shapes {shapes})")
    raise RuntimeError(f"capsops.{op}: not supported for shapes {shapes}, dtype {tensors[0].dtype}")


def _dtype(x: Tensor) -> Any:
    return getattr(_C.Dtype, _DTYPES[x.dtype])


class _Capsules:
    """u, W and mask as a struct of pointers; keeps contiguous copies alive as long as the struct."""

    def __init__(self, u: Tensor, weight: Tensor, mask: Tensor | None = None) -> None:
        self.tensors = u, weight, mask = u.contiguous(), weight.contiguous(), _contiguous(mask)
        B, N, K = u.shape
        J, D = weight.shape[-2:]
        self.struct = _C.Capsules(
            u=u.data_ptr(),
            weight=weight.data_ptr(),
            mask=_pointer(mask),
            B=B,
            N=N,
            K=K,
            J=J,
            D=D,
            weight_stride=K * J * D if weight.dim() == 4 else 0,
            dtype=_dtype(u),
            threads=torch.get_num_threads(),
        )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointer(x: Tensor | None) -> int:
    """The address of a tensor; 0 for none and for a gradient that nobody wants (no elements)."""
    return 0 if x is None else x.data_ptr()


def _accumulation(x: Tensor | None) -> Tensor | None:
    """A small operand, in the dtype that sums are kept in."""
    return None if x is None else x.to(accumulation_dtype(x.dtype)).contiguous()


def _scratch(out: Tensor) -> Tensor:
    """Where a kernel writes a small output: out itself, or memory of the accumulation dtype to be copied from."""
    dtype = accumulation_dtype(out.dtype)
    return out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)


def squash(v: Tensor, s: Tensor, kind: str) -> None:
    s = s.contiguous()
    dim = s.shape[-1]
    rows = s.numel() // max(dim, 1)
    kind_ = getattr(_C.SquashKind, kind)
    status = _C.squash(s.data_ptr(), v.data_ptr(), rows, dim, kind_, _dtype(s), torch.get_num_threads())
    _check(status, "squash", s)


def squash_backward(g_s: Tensor, g_v: Tensor, s: Tensor, kind: str) -> None:
    g_v, s = g_v.contiguous(), s.contiguous()
    dim = s.shape[-1]
    rows = s.numel() // max(dim, 1)
    kind_ = getattr(_C.SquashKind, kind)
    threads = torch.get_num_threads()
    status = _C.squash_backward(g_v.data_ptr(), s.data_ptr(), g_s.data_ptr(), rows, dim, kind_, _dtype(s), threads)
    _check(status, "squash_backward", s)


def affine_votes(votes: Tensor, u: Tensor, weight: Tensor) -> None:
    capsules = _Capsules(u, weight)
    _check(_C.affine_votes(capsules.struct, votes.data_ptr()), "affine_votes", u, weight)


def affine_votes_backward(
    g_u: Tensor, g_weight: Tensor, g_votes: Tensor, u: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> None:
    capsules = _Capsules(u, weight)
    g_votes = g_votes.contiguous()
    status = _C.affine_votes_backward(
        capsules.struct, g_votes.data_ptr(), *(_pointer(g) * w for g, w in zip((g_u, g_weight), wanted, strict=True))
    )
    _check(status, "affine_votes_backward", u, weight)


def attention_routing(
    v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    mask: Tensor | None,
) -> None:
    capsules = _Capsules(u, weight, mask)
    attn_weight_, attn_bias_, v_ = _accumulation(attn_weight), _accumulation(attn_bias), _scratch(v)
    status = _C.attention_routing(
        capsules.struct, _pointer(attn_weight_), _pointer(attn_bias_), v_.data_ptr(), s.data_ptr()
    )
    _check(status, "attention_routing", u, weight)
    if v_ is not v:
        v.copy_(v_)


def attention_routing_backward(
    g_u: Tensor,
    g_weight: Tensor,
    g_attn_weight: Tensor,
    g_attn_bias: Tensor,
    g_v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    mask: Tensor | None,
    wanted: Sequence[bool],
) -> None:
    capsules = _Capsules(u, weight, mask)
    attn_weight_, attn_bias_, g_v_ = _accumulation(attn_weight), _accumulation(attn_bias), _accumulation(g_v)
    s = s.contiguous()
    outputs = (g_u, g_weight, g_attn_weight, g_attn_bias)
    targets = (g_u, g_weight, _scratch(g_attn_weight), _scratch(g_attn_bias))
    status = _C.attention_routing_backward(
        capsules.struct,
        _pointer(attn_weight_),
        _pointer(attn_bias_),
        s.data_ptr(),
        _pointer(g_v_),
        *(_pointer(target) * want for target, want in zip(targets, wanted, strict=True)),
    )
    _check(status, "attention_routing_backward", u, weight)
    for out, target in zip(outputs, targets, strict=True):
        if target is not out:
            out.copy_(target)


def dynamic_routing(
    v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
) -> None:
    capsules = _Capsules(u, weight, mask)
    bias_, v_ = _accumulation(bias), _scratch(v)
    status = _C.dynamic_routing(capsules.struct, _pointer(bias_), iterations, leaky, v_.data_ptr(), s.data_ptr())
    _check(status, "dynamic_routing", u, weight)
    if v_ is not v:
        v.copy_(v_)


def dynamic_routing_backward(
    g_u: Tensor,
    g_weight: Tensor,
    g_bias: Tensor,
    g_v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    wanted: Sequence[bool],
) -> None:
    capsules = _Capsules(u, weight, mask)
    g_v_, g_bias_, s = _accumulation(g_v), _scratch(g_bias), s.contiguous()
    targets = (g_u, g_weight, g_bias_)
    status = _C.dynamic_routing_backward(
        capsules.struct,
        iterations,
        leaky,
        detach,
        s.data_ptr(),
        _pointer(g_v_),
        *(_pointer(target) * want for target, want in zip(targets, wanted, strict=True)),
    )
    _check(status, "dynamic_routing_backward", u, weight)
    if g_bias_ is not g_bias:
        g_bias.copy_(g_bias_)
