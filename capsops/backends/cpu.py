"""The compiled CPU backend: tensors to pointers, and a call into `capsops._C`.

Every function fills the outputs that come first among its arguments; the operators in `_ops.py` have checked everything
else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import LOW_PRECISION

try:
    # After torch, so that both share one OpenMP runtime.
    from .. import _C
except ImportError as error:
    _C = None  # type: ignore[assignment]
    _import_error = str(error)

DEVICE_TYPE = "cpu"


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that the kernels were compiled for and that run here, best first."""
    return () if _C is None else tuple(_C.instruction_sets().split())


def use_instruction_set(name: str) -> None:
    """Use the kernels of one instruction set from now on; CAPSOPS_ISA does so from the start.

    "auto", the default: the best one, or the next for votes that would leave half of its vectors idle.

    Raises:
        ValueError: it was not compiled or does not run here.
    """
    if _C is None or not _C.use_instruction_set(name):
        allowed = ", ".join(("auto", *instruction_sets())) if _C else "none, for the extension does not load"
        raise ValueError(f"CAPSOPS_ISA: instruction set {name!r} does not run here; allowed are {allowed}")


if _C is not None and os.environ.get("CAPSOPS_ISA"):
    use_instruction_set(os.environ["CAPSOPS_ISA"])

_DTYPES: dict[torch.dtype, Any] = (
    {}
    if _C is None
    else {
        torch.float32: _C.Dtype.float32,
        torch.float64: _C.Dtype.float64,
        torch.bfloat16: _C.Dtype.bfloat16,
        torch.float16: _C.Dtype.float16,
    }
)


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


def instructions() -> str | None:
    """The instruction set in use, and the others that could be."""
    if _C is None:
        return None
    others = [name for name in instruction_sets() if name != _C.instruction_set()]
    return _C.instruction_set() + (f" (CAPSOPS_ISA can force {' or '.join(others)})" if others else "")


def _check(status: Any, op: str, *tensors: Tensor) -> None:
    if status == _C.Status.ok:
        return
    shapes = ", ".join(str(list(x.shape)) for x in tensors)
    if status == _C.Status.out_of_memory:
        raise MemoryError(f"capsops.{op}: no memory for its work space (shapes {shapes})")
    raise RuntimeError(f"capsops.{op}: not supported for shapes {shapes}, dtype {tensors[0].dtype}")


class _Capsules:
    """u [B, N, K] or [B, N, rows, K], W and mask as a struct of pointers; keeps contiguous copies alive with it."""

    def __init__(self, u: Tensor, weight: Tensor, mask: Tensor | None = None) -> None:
        self.tensors = u, weight, mask = u.contiguous(), weight.contiguous(), _contiguous(mask)
        B, N, *_ = shape = u.shape
        K, J, D = weight.shape[-3:]
        rows = shape[2] if len(shape) == 4 else 1
        stride = K * J * D if weight.dim() == 4 else 0
        threads = torch.get_num_threads()
        self.struct = _C.Capsules(
            u.data_ptr(), weight.data_ptr(), _pointer(mask), B, N, K, J, D, rows, stride, _DTYPES[u.dtype], threads
        )


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _pointer(x: Tensor | None) -> int:
    """The address of a tensor; 0 for none."""
    return 0 if x is None else x.data_ptr()


def _accumulation(x: Tensor | None) -> Tensor | None:
    """A small operand, in the dtype that sums are kept in."""
    if x is None:
        return None
    return (x.float() if x.dtype in LOW_PRECISION else x).contiguous()


def _scratch(out: Tensor) -> Tensor:
    """Where a kernel writes a small output: out itself, or memory of the accumulation dtype to be copied from."""
    return torch.empty_like(out, dtype=torch.float32) if out.dtype in LOW_PRECISION else out


def _copy_back(outputs: Sequence[Tensor], scratch: Sequence[Tensor]) -> None:
    for out, written in zip(outputs, scratch, strict=True):
        if written is not out:
            out.copy_(written)


def _addresses(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[int]:
    return [g.data_ptr() if want else 0 for g, want in zip(gradients, wanted, strict=True)]


def squash(v: Tensor, s: Tensor, kind: str) -> None:
    s = s.contiguous()
    dim = s.shape[-1]
    rows = s.numel() // max(dim, 1)
    kind_ = getattr(_C.SquashKind, kind)
    status = _C.squash(s.data_ptr(), v.data_ptr(), rows, dim, kind_, _DTYPES[s.dtype], torch.get_num_threads())
    _check(status, "squash", s)


def squash_backward(g_s: Tensor, g_v: Tensor, s: Tensor, kind: str) -> None:
    g_v, s = g_v.contiguous(), s.contiguous()
    dim = s.shape[-1]
    rows = s.numel() // max(dim, 1)
    kind_ = getattr(_C.SquashKind, kind)
    threads = torch.get_num_threads()
    status = _C.squash_backward(
        g_v.data_ptr(), s.data_ptr(), g_s.data_ptr(), rows, dim, kind_, _DTYPES[s.dtype], threads
    )
    _check(status, "squash_backward", s)


def affine_votes(votes: Tensor, u: Tensor, weight: Tensor) -> None:
    capsules = _Capsules(u, weight)
    _check(_C.affine_votes(capsules.struct, votes.data_ptr()), "affine_votes", u, weight)


def affine_votes_backward(
    g_u: Tensor, g_weight: Tensor, g_votes: Tensor, u: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> None:
    capsules = _Capsules(u, weight)
    g_votes = g_votes.contiguous()
    status = _C.affine_votes_backward(capsules.struct, g_votes.data_ptr(), *_addresses((g_u, g_weight), wanted))
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
    _copy_back((v,), (v_,))


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
        *_addresses(targets, wanted),
    )
    _check(status, "attention_routing_backward", u, weight)
    _copy_back(outputs, targets)


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
    _copy_back((v,), (v_,))


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
        *_addresses(targets, wanted),
    )
    _check(status, "dynamic_routing_backward", u, weight)
    _copy_back((g_bias,), (g_bias_,))


def self_attention_routing(
    v: Tensor,
    total: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> None:
    capsules = _Capsules(u, weight, mask)
    prior_, v_ = _accumulation(prior), _scratch(v)
    status = _C.self_attention_routing(
        capsules.struct, _pointer(prior_), scale, v_.data_ptr(), total.data_ptr(), s.data_ptr()
    )
    _check(status, "self_attention_routing", u, weight)
    _copy_back((v,), (v_,))


def self_attention_routing_backward(
    g_u: Tensor,
    g_weight: Tensor,
    g_prior: Tensor,
    g_v: Tensor,
    total: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    mask: Tensor | None,
    scale: float,
    wanted: Sequence[bool],
) -> None:
    capsules = _Capsules(u, weight, mask)
    prior_, g_v_, g_prior_ = _accumulation(prior), _accumulation(g_v), _scratch(g_prior)
    total, s = total.contiguous(), s.contiguous()
    status = _C.self_attention_routing_backward(
        capsules.struct,
        _pointer(prior_),
        scale,
        total.data_ptr(),
        s.data_ptr(),
        _pointer(g_v_),
        *_addresses((g_u, g_weight, g_prior_), wanted),
    )
    _check(status, "self_attention_routing_backward", u, weight)
    _copy_back((g_prior,), (g_prior_,))


def em_routing(
    mean: Tensor,
    out_activation: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
) -> None:
    capsules = _Capsules(pose, weight, mask)
    inputs = (_accumulation(activation), _accumulation(beta_u), _accumulation(beta_a))
    mean_, out_activation_ = _scratch(mean), _scratch(out_activation)
    status = _C.em_routing(
        capsules.struct,
        *map(_pointer, inputs),
        list(inverse_temperatures),
        mean_.data_ptr(),
        out_activation_.data_ptr(),
        state.data_ptr(),
    )
    _check(status, "em_routing", pose, weight)
    _copy_back((mean, out_activation), (mean_, out_activation_))


def em_routing_backward(
    g_pose: Tensor,
    g_activation: Tensor,
    g_weight: Tensor,
    g_beta_u: Tensor,
    g_beta_a: Tensor,
    g_mean: Tensor,
    g_out_activation: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
    wanted: Sequence[bool],
) -> None:
    capsules = _Capsules(pose, weight, mask)
    inputs = (_accumulation(activation), _accumulation(beta_u))
    arrived = (_accumulation(g_mean), _accumulation(g_out_activation))
    state = state.contiguous()
    outputs = (g_pose, g_weight, g_activation, g_beta_u, g_beta_a)
    targets = (g_pose, g_weight, _scratch(g_activation), _scratch(g_beta_u), _scratch(g_beta_a))
    wanted = (wanted[0], wanted[2], wanted[1], wanted[3], wanted[4])
    status = _C.em_routing_backward(
        capsules.struct,
        *map(_pointer, inputs),
        list(inverse_temperatures),
        state.data_ptr(),
        *map(_pointer, arrived),
        *_addresses(targets, wanted),
    )
    _check(status, "em_routing_backward", pose, weight)
    _copy_back(outputs, targets)


def _primary_capsules(features: Tensor, K: int, legacy: bool, kind: str) -> tuple[Any, Tensor]:
    """How features [B, C, H, W] are read as capsules of K components, and the tensor that is so read."""
    B, C, height, width = features.shape
    pixels = height * width
    if features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous():
        channel, pixel = 1, C
    else:
        features = features.contiguous()
        channel, pixel = pixels, 1
    if legacy:
        outer, inner, strides = C, pixels // K, (channel, K * pixel, pixel)
    else:
        outer, inner, strides = C // K, pixels, (K * channel, pixel, channel)
    kind_ = getattr(_C.SquashKind, kind)
    struct = _C.PrimaryCapsules(
        B, outer, inner, K, C * pixels, *strides, kind_, _DTYPES[features.dtype], torch.get_num_threads()
    )
    return struct, features


def primary_capsules(u: Tensor, features: Tensor, types: int, legacy: bool, kind: str) -> None:
    struct, features = _primary_capsules(features, u.shape[2], legacy, kind)
    _check(_C.primary_capsules(struct, features.data_ptr(), u.data_ptr()), "primary_capsules", features)


def primary_capsules_backward(
    g_features: Tensor, g_u: Tensor, features: Tensor, types: int, legacy: bool, kind: str
) -> None:
    struct, read = _primary_capsules(features, g_u.shape[2], legacy, kind)
    # Written with the strides that are read; g_features has them too, unless features had to be copied.
    target = g_features if g_features.stride() == read.stride() else torch.empty_like(read)
    g_u = g_u.contiguous()
    status = _C.primary_capsules_backward(struct, g_u.data_ptr(), read.data_ptr(), target.data_ptr())
    _check(status, "primary_capsules_backward", features)
    if target is not g_features:
        g_features.copy_(target)
