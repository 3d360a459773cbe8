"""Calls the kernels of the extension `capsops._C`, on the CPU and on NVIDIA GPUs: tensors become pointers and sizes.

The operators in `capsops.ops` have checked all tensors. A kernel runs on the device of its tensors.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..dtypes import LOW_PRECISION
from ._features import Grid

try:
    # Imported after torch, so that both share one OpenMP runtime.
    from .. import _C as _C

    MISSING: str | None = None
    """Why there is no extension."""
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


# ---- the call of a kernel ------------------------------------------------------------------------


def call_kernel(op: str, operands: Sequence[Tensor], *args: Any) -> None:
    """Call a kernel on the device of its operands.

    Args:
        op: the name of the operator.
        operands: the tensors whose shapes an error message should contain.
        args: what the kernel takes after the execution context.
    """
    device = operands[0].device
    kernel = getattr(_C, op)
    if device.type == "cpu":
        # Python runs its signal handlers only in its main thread.
        obeys_signals = threading.get_ident() == threading.main_thread().ident
        status = kernel(_C.Place(torch.get_num_threads(), obeys_signals), *args)
    else:
        status = _call_on_gpu(kernel, device, *args)
    if status != _C.Status.ok:
        _raise(status, op, operands)


def _call_on_gpu(kernel: Any, device: torch.device, *args: Any) -> Any:
    """Launch on the current stream of the device, in a workspace that torch allocates."""
    with torch.cuda.device(device):
        query = _C.Counting(device.index)
        status = kernel(query, *args)
        if status != _C.Status.ok:
            return status
        # The workspace is freed on return, before the kernels end. That is safe: the allocator gives its memory only
        # to work that comes later in the same stream.
        workspace = torch.empty(query.bytes, dtype=torch.uint8, device=device)
        stream = torch.cuda.current_stream().cuda_stream
        return kernel(_C.Place(device.index, stream, workspace.data_ptr()), *args)


def _raise(status: Any, op: str, operands: Sequence[Tensor]) -> NoReturn:
    shapes = ", ".join(str(list(x.shape)) for x in operands)
    if status == _C.Status.out_of_memory:
        raise MemoryError(f"capsops.{op}: no memory for the workspace (shapes {shapes})")
    where = f"shapes {shapes}, {operands[0].dtype} on {operands[0].device}"
    if status == _C.Status.launch_failed:
        raise RuntimeError(f"capsops.{op}: a kernel could not be launched ({where}): {_C.cuda_error()}")
    if status == _C.Status.invalid_argument:
        raise ValueError(f"capsops.{op}: the kernel does not take an argument of this size or value ({where})")
    raise RuntimeError(f"capsops.{op}: no kernel for {where}")


# ---- operands ------------------------------------------------------------------------------------


class Capsules:
    """u [B, N, K] or [B, N, P, K], W and the mask as one struct of pointers; keeps contiguous copies alive with it.

    Args:
        gradient: whether the kernel writes a gradient of W.
    """

    def __init__(self, u: Tensor, weight: Tensor, mask: Tensor | None = None, gradient: bool = False) -> None:
        contiguous = weight.is_contiguous()
        if not contiguous:
            weight = _readable(weight, gradient)
        self.tensors = u, weight, mask = u.contiguous(), weight, None if mask is None else mask.contiguous()
        B, N, *_ = shape = u.shape
        K, J, D = weight.shape[-3:]
        rows = shape[2] if len(shape) == 4 else 1
        stride = 0 if weight.dim() == 3 else K * J * D if contiguous else weight.stride(0)
        self.struct = _C.Capsules(
            u.data_ptr(), weight.data_ptr(), _address(mask), B, N, K, J, D, rows, stride, DTYPES[u.dtype]
        )
        if not contiguous:
            if not _has_contiguous_matrices(weight):
                self.struct.set_strides(*weight.stride()[-3:])
            # Autograd wants a gradient with the shape of the expanded tensor.
            self.struct.own_gradients = gradient and weight.dim() == 4 and stride == 0


def _has_contiguous_matrices(weight: Tensor) -> bool:
    """Whether the matrix [K, J, D] of each input capsule is contiguous."""
    return weight.is_contiguous() if weight.dim() == 3 else weight[:1].is_contiguous()


def _readable(weight: Tensor, gradient: bool) -> Tensor:
    """W in strides that a kernel can read: without a copy where it was expanded (strides of 0), else contiguous."""
    if not any(stride == 0 and size > 1 for stride, size in zip(weight.stride(), weight.shape, strict=True)):
        return weight.contiguous()
    if weight.device.type == "cpu":
        return weight
    # GPU kernels read contiguous matrices. All input capsules may read the same one, unless each has a gradient.
    if weight.dim() == 4 and weight.stride(0) == 0 and not gradient:
        return weight if _has_contiguous_matrices(weight) else weight[:1].contiguous().expand(weight.shape)
    return weight.contiguous()


def _address(x: Tensor | None) -> int:
    """The address of a tensor; null for None."""
    return 0 if x is None else x.data_ptr()


def _accumulated(x: Tensor | None) -> Tensor | None:
    """A small operand in the accumulation dtype, contiguous."""
    if x is None:
        return None
    return (x.float() if x.dtype in LOW_PRECISION else x).contiguous()


def _scratch(out: Tensor | None) -> Tensor | None:
    """Where a kernel writes a small output: out itself, or memory of the accumulation dtype to copy from."""
    return out if out is None or out.dtype not in LOW_PRECISION else torch.empty_like(out, dtype=torch.float32)


# ---- the operators -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """What the kernel of an operator takes, in this order; names of tensors and options as in the operator's schema."""

    u: str  # the capsules; with weight and mask they are one struct
    small: Sequence[str]  # small operands, in the accumulation dtype
    options: Sequence[str]  # what is no tensor
    saved: Sequence[str]  # what forward saved and the gradients that arrive, in the accumulation dtype
    stored: Sequence[str]  # tensors as large as the capsules, matrices or votes, in the dtype of the capsules
    outputs: Sequence[str]  # small outputs, written in the accumulation dtype and then rounded


def _row(
    u: str = "u", small: str = "", options: str = "", saved: str = "", stored: str = "", outputs: str = ""
) -> _Row:
    return _Row(u, *(names.split() for names in (small, options, saved, stored, outputs)))


_ROWS = {
    "affine_votes": _row(stored="votes"),
    "affine_votes_backward": _row(stored="g_votes g_u g_weight"),
    "attention_routing": _row(small="attn_weight attn_bias", outputs="v s"),
    "attention_routing_backward": _row(
        small="attn_weight attn_bias", saved="s g_v", stored="g_u g_weight", outputs="g_attn_weight g_attn_bias"
    ),
    "dynamic_routing": _row(small="bias", options="iterations leaky", outputs="v s"),
    "dynamic_routing_backward": _row(
        options="iterations leaky detach", saved="s g_v", stored="g_u g_weight", outputs="g_bias"
    ),
    "self_attention_routing": _row(small="prior", options="scale", outputs="v total s"),
    "self_attention_routing_backward": _row(
        small="prior", options="scale", saved="total s g_v", stored="g_u g_weight", outputs="g_prior"
    ),
    "em_routing": _row(
        "pose", small="activation beta_u beta_a", options="inverse_temperatures", outputs="mean activation_out state"
    ),
    "em_routing_backward": _row(
        "pose",
        small="activation beta_u",
        options="inverse_temperatures",
        saved="state g_mean g_activation",
        stored="g_pose g_weight",
        outputs="g_activation_in g_beta_u g_beta_a",
    ),
}


def run(op: str, outputs: Mapping[str, Tensor | None], inputs: Mapping[str, Any]) -> None:
    """Run an operator: fill its outputs, by name; None stands for a gradient that is not wanted."""
    row = _ROWS.get(op)
    if row is None:
        _ON_ROWS[op](op, outputs, inputs)
        return
    tensors = {**inputs, **outputs}
    u, weight = tensors[row.u], tensors["weight"]
    capsules = Capsules(u, weight, tensors.get("mask"), tensors.get("g_weight") is not None)
    # These lists also keep copies alive until the kernel has run.
    small = [_accumulated(tensors[name]) for name in row.small]
    saved = [_accumulated(tensors[name]) for name in row.saved]
    stored = [None if (x := tensors[name]) is None else x.contiguous() for name in row.stored]
    written = [_scratch(tensors[name]) for name in row.outputs]
    call_kernel(
        op,
        (u, weight),
        capsules.struct,
        *[_address(x) for x in small],
        *[tensors[name] for name in row.options],
        *[_address(x) for x in (*saved, *stored, *written)],
    )
    for name, x in zip(row.outputs, written, strict=True):
        if x is not None and x is not tensors[name]:
            tensors[name].copy_(x)


def _squash(op: str, outputs: Mapping[str, Tensor | None], inputs: Mapping[str, Any]) -> None:
    tensors = [x.contiguous() for x in (*inputs.values(), *outputs.values()) if isinstance(x, Tensor)]
    s = inputs["s"]
    dim = s.shape[-1]
    rows, kind = s.numel() // max(dim, 1), getattr(_C.SquashKind, inputs["kind"])
    call_kernel(op, (s,), *[x.data_ptr() for x in tensors], rows, dim, kind, DTYPES[s.dtype])


def _struct(grid: Grid, kind: str) -> Any:
    dtype = DTYPES[grid.features.dtype]
    return _C.PrimaryCapsules(*grid[1:-1], *grid.strides, getattr(_C.SquashKind, kind), dtype)


def _primary_capsules(op: str, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    u, features = outputs["u"], inputs["features"]
    grid = Grid.of(features, u.shape[2], inputs["legacy"])
    call_kernel(op, (features,), _struct(grid, inputs["kind"]), grid.features.data_ptr(), u.data_ptr())


def _primary_capsules_backward(op: str, outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    g_features, g_u, features = outputs["g_features"], inputs["g_u"].contiguous(), inputs["features"]
    grid = Grid.of(features, g_u.shape[2], inputs["legacy"])
    target = grid.gradient(g_features)
    addresses = g_u.data_ptr(), grid.features.data_ptr(), target.data_ptr()
    call_kernel(op, (features,), _struct(grid, inputs["kind"]), *addresses)
    if target is not g_features:
        g_features.copy_(target)


_ON_ROWS: dict[str, Callable[..., None]] = {
    "squash": _squash,
    "squash_backward": _squash,
    "primary_capsules": _primary_capsules,
    "primary_capsules_backward": _primary_capsules_backward,
}
