"""The operators of the extension `capsops._C`, on the CPU and on GPUs: tensors to pointers, and a call.

Every function fills the outputs that come first among its arguments; the operators in `capsops.ops` have checked everything
else. Where it runs is where its tensors are.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..dtypes import LOW_PRECISION

__all__ = [
    "affine_votes",
    "affine_votes_backward",
    "attention_routing",
    "attention_routing_backward",
    "dynamic_routing",
    "dynamic_routing_backward",
    "em_routing",
    "em_routing_backward",
    "primary_capsules",
    "primary_capsules_backward",
    "self_attention_routing",
    "self_attention_routing_backward",
    "squash",
    "squash_backward",
]

try:
    # After torch, so that both share one OpenMP runtime.
    from .. import _C as _C

    # Why there is no extension.
    MISSING: str | None = None
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING = f"the extension capsops._C does not load ({error}); `pip install -e .` builds it"

DTYPES: dict[torch.dtype, Any] = (
    {}
    if _C is None
    else {
        torch.float32: _C.Dtype.float32,
        torch.float64: _C.Dtype.float64,
        torch.bfloat16: _C.Dtype.bfloat16,
        torch.float16: _C.Dtype.float16,
    }
)


def built() -> str | None:
    """What built the extension and for which GPUs, or None if it was not built."""
    if _C is None:
        return None
    gpus = f"CUDA kernels for {_C.cuda_architectures}" if _C.cuda_architectures else "without CUDA kernels"
    return f"built by {_C.compiler}, {gpus}"


def _run(op: str, operands: Sequence[Tensor], *args: Any) -> None:
    """Call a kernel where its operands are: `operands` are those whose shapes an error should name."""
    device = operands[0].device
    kernel = getattr(_C, op)
    if device.type == "cpu":
        # Python runs its signal handlers in its main thread alone.
        obeys_signals = threading.get_ident() == threading.main_thread().ident
        status = kernel(_C.Place(torch.get_num_threads(), obeys_signals), *args)
    else:
        status = _run_on_gpu(kernel, device, *args)
    if status != _C.Status.ok:
        _raise(status, op, operands)


def _run_on_gpu(kernel: Any, device: torch.device, *args: Any) -> Any:
    """Launch on the current stream of the device, in a workspace that torch allocates."""
    with torch.cuda.device(device):
        counting = _C.Counting(device.index)
        status = kernel(counting, *args)
        if status != _C.Status.ok:
            return status
        # Freed when this returns, before the kernels have ended: the allocator hands it only to what comes after them.
        workspace = torch.empty(counting.bytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream().cuda_stream
        return kernel(_C.Place(device.index, stream, workspace.data_ptr()), *args)


def _raise(status: Any, op: str, operands: Sequence[Tensor]) -> NoReturn:
    shapes = ", ".join(str(list(x.shape)) for x in operands)
    if status == _C.Status.out_of_memory:
        raise MemoryError(f"capsops.{op}: no memory for its work space (shapes {shapes})")
    where = f"shapes {shapes}, {operands[0].dtype} on {operands[0].device}"
    if status == _C.Status.launch_failed:
        raise RuntimeError(f"capsops.{op}: a kernel could not be launched ({where}): {_C.cuda_error()}")
    if status == _C.Status.invalid_argument:
        raise ValueError(f"capsops.{op}: an argument is outside of what its kernel takes ({where})")
    raise RuntimeError(f"capsops.{op}: not supported for {where}")


class _Capsules:
    """u [B, N, K] or [B, N, rows, K], W and mask as a struct of pointers; keeps contiguous copies alive with it.

    Args:
        gradient: whether the kernel writes a gradient of W.
    """

    def __init__(self, u: Tensor, weight: Tensor, mask: Tensor | None = None, gradient: bool = False) -> None:
        contiguous = weight.is_contiguous()
        if not contiguous:
            weight = _uncopied(weight, gradient)
        self.tensors = u, weight, mask = u.contiguous(), weight, _contiguous(mask)
        B, N, *_ = shape = u.shape
        K, J, D = weight.shape[-3:]
        rows = shape[2] if len(shape) == 4 else 1
        stride = 0 if weight.dim() == 3 else K * J * D if contiguous else weight.stride(0)
        self.struct = _C.Capsules(
            u.data_ptr(), weight.data_ptr(), _pointer(mask), B, N, K, J, D, rows, stride, DTYPES[u.dtype]
        )
        if not contiguous:
            if not _holds_matrices(weight):
                self.struct.set_strides(*weight.stride()[-3:])
            # Autograd wants a gradient of the expanded tensor's shape.
            self.struct.own_gradients = gradient and weight.dim() == 4 and stride == 0


def _holds_matrices(weight: Tensor) -> bool:
    """Whether the matrix of an input capsule, [K, J, D], is contiguous."""
    return weight.is_contiguous() if weight.dim() == 3 else weight[:1].is_contiguous()


def _uncopied(weight: Tensor, gradient: bool) -> Tensor:
    """W as a kernel can read it: without a copy where it was expanded, by strides of 0; else contiguous."""
    if not any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        return weight.contiguous()
    if weight.device.type == "cpu":
        return weight
    # The kernels for GPUs read contiguous matrices. All input capsules may have the same, but then it has one gradient.
    if weight.dim() == 4 and weight.stride(0) == 0 and not gradient:
        return weight if _holds_matrices(weight) else weight[:1].contiguous().expand(weight.shape)
    return weight.contiguous()


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
    _run("squash", (s,), s.data_ptr(), v.data_ptr(), rows, dim, kind_, DTYPES[s.dtype])


def squash_backward(g_s: Tensor, g_v: Tensor, s: Tensor, kind: str) -> None:
    g_v, s = g_v.contiguous(), s.contiguous()
    dim = s.shape[-1]
    rows = s.numel() // max(dim, 1)
    kind_ = getattr(_C.SquashKind, kind)
    _run("squash_backward", (s,), g_v.data_ptr(), s.data_ptr(), g_s.data_ptr(), rows, dim, kind_, DTYPES[s.dtype])


def affine_votes(votes: Tensor, u: Tensor, weight: Tensor) -> None:
    capsules = _Capsules(u, weight)
    _run("affine_votes", (u, weight), capsules.struct, votes.data_ptr())


def affine_votes_backward(
    g_u: Tensor, g_weight: Tensor, g_votes: Tensor, u: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> None:
    capsules = _Capsules(u, weight, None, wanted[1])
    g_votes = g_votes.contiguous()
    _run(
        "affine_votes_backward", (u, weight), capsules.struct, g_votes.data_ptr(), *_addresses((g_u, g_weight), wanted)
    )


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
    _run(
        "attention_routing",
        (u, weight),
        capsules.struct,
        _pointer(attn_weight_),
        _pointer(attn_bias_),
        v_.data_ptr(),
        s.data_ptr(),
    )
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
    capsules = _Capsules(u, weight, mask, wanted[1])
    attn_weight_, attn_bias_, g_v_ = _accumulation(attn_weight), _accumulation(attn_bias), _accumulation(g_v)
    s = s.contiguous()
    outputs = (g_u, g_weight, g_attn_weight, g_attn_bias)
    targets = (g_u, g_weight, _scratch(g_attn_weight), _scratch(g_attn_bias))
    _run(
        "attention_routing_backward",
        (u, weight),
        capsules.struct,
        _pointer(attn_weight_),
        _pointer(attn_bias_),
        s.data_ptr(),
        _pointer(g_v_),
        *_addresses(targets, wanted),
    )
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
    detach: bool,
) -> None:
    capsules = _Capsules(u, weight, mask)
    bias_, v_ = _accumulation(bias), _scratch(v)
    _run(
        "dynamic_routing", (u, weight), capsules.struct, _pointer(bias_), iterations, leaky, v_.data_ptr(), s.data_ptr()
    )
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
    capsules = _Capsules(u, weight, mask, wanted[1])
    g_v_, g_bias_, s = _accumulation(g_v), _scratch(g_bias), s.contiguous()
    targets = (g_u, g_weight, g_bias_)
    _run(
        "dynamic_routing_backward",
        (u, weight),
        capsules.struct,
        iterations,
        leaky,
        detach,
        s.data_ptr(),
        _pointer(g_v_),
        *_addresses(targets, wanted),
    )
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
    _run(
        "self_attention_routing",
        (u, weight),
        capsules.struct,
        _pointer(prior_),
        scale,
        v_.data_ptr(),
        total.data_ptr(),
        s.data_ptr(),
    )
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
    capsules = _Capsules(u, weight, mask, wanted[1])
    prior_, g_v_, g_prior_ = _accumulation(prior), _accumulation(g_v), _scratch(g_prior)
    total, s = total.contiguous(), s.contiguous()
    _run(
        "self_attention_routing_backward",
        (u, weight),
        capsules.struct,
        _pointer(prior_),
        scale,
        total.data_ptr(),
        s.data_ptr(),
        _pointer(g_v_),
        *_addresses((g_u, g_weight, g_prior_), wanted),
    )
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
    _run(
        "em_routing",
        (pose, weight),
        capsules.struct,
        *map(_pointer, inputs),
        list(inverse_temperatures),
        mean_.data_ptr(),
        out_activation_.data_ptr(),
        state.data_ptr(),
    )
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
    capsules = _Capsules(pose, weight, mask, wanted[2])
    inputs = (_accumulation(activation), _accumulation(beta_u))
    arrived = (_accumulation(g_mean), _accumulation(g_out_activation))
    state = state.contiguous()
    outputs = (g_pose, g_weight, g_activation, g_beta_u, g_beta_a)
    targets = (g_pose, g_weight, _scratch(g_activation), _scratch(g_beta_u), _scratch(g_beta_a))
    wanted = (wanted[0], wanted[2], wanted[1], wanted[3], wanted[4])
    _run(
        "em_routing_backward",
        (pose, weight),
        capsules.struct,
        *map(_pointer, inputs),
        list(inverse_temperatures),
        state.data_ptr(),
        *map(_pointer, arrived),
        *_addresses(targets, wanted),
    )
    _copy_back(outputs, targets)


def _primary_capsules(features: Tensor, K: int, legacy: bool, kind: str) -> tuple[Any, Tensor]:
    """How features [B, C, H, W] are read as capsules of K components, and the tensor that is so read."""
    B, C, height, width = features.shape
    pixels = height * width
    last = features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous()
    if last and not (legacy and pixels % K):
        channel, pixel = 1, C
    else:
        features = features.contiguous()
        channel, pixel = pixels, 1
    if legacy and pixels % K:  # capsules that go on in the next channel
        outer, inner, strides = 1, C * pixels // K, (0, K, 1)
    elif legacy:
        outer, inner, strides = C, pixels // K, (channel, K * pixel, pixel)
    else:
        outer, inner, strides = C // K, pixels, (K * channel, pixel, channel)
    kind_ = getattr(_C.SquashKind, kind)
    struct = _C.PrimaryCapsules(B, outer, inner, K, C * pixels, *strides, kind_, DTYPES[features.dtype])
    return struct, features


def primary_capsules(u: Tensor, features: Tensor, types: int, legacy: bool, kind: str) -> None:
    struct, features = _primary_capsules(features, u.shape[2], legacy, kind)
    _run("primary_capsules", (features,), struct, features.data_ptr(), u.data_ptr())


def primary_capsules_backward(
    g_features: Tensor, g_u: Tensor, features: Tensor, types: int, legacy: bool, kind: str
) -> None:
    struct, read = _primary_capsules(features, g_u.shape[2], legacy, kind)
    # Written with the strides that are read; g_features has them too, unless features had to be copied.
    target = g_features if g_features.stride() == read.stride() else torch.empty_like(read)
    g_u = g_u.contiguous()
    _run("primary_capsules_backward", (features,), struct, g_u.data_ptr(), read.data_ptr(), target.data_ptr())
    if target is not g_features:
        g_features.copy_(target)
