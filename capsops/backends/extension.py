"""Calls the kernels of the extension `capsops._C`, on the CPU and on NVIDIA GPUs: tensors become pointers and sizes.

The operators in `capsops.ops` have checked all tensors. A kernel runs on the device of its tensors.
"""

from __future__ import annotations

import importlib.util
import math
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..dtypes import LOW_PRECISION
from ._feature_maps import Grid


def _why_missing(error: ImportError) -> str:
    """Say why the extension cannot be imported."""
    if importlib.util.find_spec("capsops._C"):
        reason = f"the extension capsops._C does not load ({error})"
    elif others := sorted(path.name for path in Path(__file__).parents[1].glob("_C.*.so")):
        expected = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        reason = f"there is no extension {expected}, only for another Python or platform: {', '.join(others)}"
    else:
        reason = (
            "there is no extension capsops._C: capsops was installed with CAPSOPS_EXTENSION=0 or without a C++ compiler"
        )
    return f"{reason}; install capsops again, with this Python"


try:
    # Imported after torch, so that both share one OpenMP runtime.
    from .. import _C as _C

    MISSING: str | None = None
    """Why there is no extension."""
except ImportError as error:
    _C = None  # type: ignore[assignment]
    MISSING = _why_missing(error)

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


OPERATORS: dict[str, frozenset[str]] = {}
"""The operators that have kernels, for "cpu" and "cuda": the forward and the backward one."""
if _C is not None:
    for _backend in ("cpu", "cuda"):
        _names = set(_C.operators(_backend))
        OPERATORS[_backend] = frozenset(
            name
            for name in _names
            if {name.removesuffix("_backward"), name.removesuffix("_backward") + "_backward"} <= _names
        )


def gpu_code() -> str | None:
    """The code for GPUs in the extension, by compute capability, as in "80, 90, PTX of 90"; None if there is none."""
    if _C is None or _C.cuda_architectures is None:
        return None
    forms = _C.cuda_architectures.split()
    return ", ".join(x if x.isdigit() else f"PTX of {x.removesuffix('-virtual')}" for x in forms)


def built() -> str | None:
    """What built the extension, for which GPUs and why for those, or None if it was not built."""
    if _C is None:
        return None
    code = gpu_code()
    gpus = f"CUDA kernels: {code}" if code else "no CUDA kernels"
    return f"built by {_C.compiler}; {gpus} ({_C.cuda_reason})"


# ---- the call of a kernel ------------------------------------------------------------------------


def call_kernel(op: str, operands: Sequence[Tensor], *args: Any, notes: dict[str, Any] | None = None) -> None:
    """Call a kernel on the device of its operands.

    Args:
        op: the name of the operator.
        operands: the tensors whose shapes an error message should contain.
        args: what the kernel takes after the execution context.
        notes: where the size of the workspace is kept for the next call with arguments like these.
    """
    kernel = getattr(_C, op)
    if operands[0].is_cpu:
        # Python runs its signal handlers only in its main thread.
        obeys_signals = threading.get_ident() == threading.main_thread().ident
        status = kernel(_on_cpu(torch.get_num_threads(), obeys_signals), *args)
    else:
        status = _call_on_gpu(kernel, operands[0].device, args, {} if notes is None else notes)
    if status != _OK:
        _raise(status, op, operands)


_on_cpu = None if _C is None else cache(_C.ExecutionContext)
_OK = None if _C is None else _C.Status.ok


def _call_on_gpu(kernel: Any, device: torch.device, args: Sequence[Any], notes: dict[str, Any]) -> Any:
    """Launch on the current stream of the device, in a workspace that torch allocates."""
    index = device.index
    # These two functions of torch take a tenth of the time of torch.cuda.device and torch.cuda.current_stream.
    if torch._C._cuda_getDevice() != index:
        with torch.cuda.device(device):
            return _call_on_gpu(kernel, device, args, notes)
    size = notes.get("workspace")
    if size is None:
        query = _C.WorkspaceQuery(index)
        status = kernel(query, *args)
        if status != _OK:
            return status
        size = notes["workspace"] = query.bytes
    # The workspace is freed on return, before the kernels end. That is safe: the allocator gives its memory only to
    # work that comes later in the same stream.
    workspace = torch.empty(size, dtype=torch.uint8, device=device) if size else None
    stream = torch._C._cuda_getCurrentRawStream(index)
    return kernel(_C.ExecutionContext(index, stream, _address(workspace)), *args)


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


def _aligned(u_address: int, weight_address: int) -> bool:
    """Whether u and W lie at multiples of 16 bytes. Otherwise a kernel for GPUs may take another workspace."""
    return not (u_address | weight_address) & 15


def _small_operand(x: Tensor) -> Tensor:
    """A small operand as kernels read it: contiguous, and on a GPU at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.is_cuda and x.data_ptr() & 15 else x


class Capsules:
    """u [B, N, K] or [B, N, P, K], W and the mask as one struct of pointers; keeps contiguous copies alive with it.

    Without W u is the votes, [B, N, J, D] or [B, N, J, P, D], or [B, N, 1, D] for all J output capsules.

    Args:
        gradient: whether the kernel writes a gradient of W.
        J: how many output capsules get votes that are given; by default as many as there are votes.
    """

    def __init__(
        self,
        u: Tensor,
        weight: Tensor | None,
        mask: Tensor | None = None,
        gradient: bool = False,
        J: int | None = None,
    ) -> None:
        self.tensors: tuple[Tensor | None, ...]
        if weight is None:
            self.tensors = u, _, mask = u.contiguous(), None, None if mask is None else mask.contiguous()
            self.struct = _C.Capsules(u.data_ptr(), 0, _address(mask), *_sizes(u, None))
            _give_votes(self.struct, J)
            return
        contiguous = weight.is_contiguous()
        if not contiguous:
            weight = _readable(weight, gradient)
        self.tensors = u, weight, mask = u.contiguous(), weight, None if mask is None else mask.contiguous()
        self.struct = _C.Capsules(u.data_ptr(), weight.data_ptr(), _address(mask), *_sizes(u, weight))
        if not contiguous:
            if not _has_contiguous_matrices(weight):
                self.struct.set_strides(*weight.stride()[-3:])
            # Autograd wants a gradient with the shape of the expanded tensor.
            self.struct.own_gradients = gradient and weight.dim() == 4 and weight.stride(0) == 0


def _give_votes(struct: Any, J: int | None) -> None:
    """Say that the u of a struct is votes; see `Capsules`."""
    struct.votes_given = True
    if J is not None and J != struct.J:
        struct.one_vote, struct.J = True, J


def _sizes(u: Tensor, weight: Tensor | None) -> tuple[Any, ...]:
    """What the struct of u and W holds after the addresses: B, N, K, J, D, P, the stride of W along N, the dtype."""
    if weight is None:
        B, N, J, *vote = u.shape
        return B, N, 1, J, math.prod(vote), 1, 0, DTYPES[u.dtype]
    B, N, *_ = shape = u.shape
    K, J, D = weight.shape[-3:]
    rows = shape[2] if len(shape) == 4 else 1
    stride = 0 if weight.dim() == 3 else K * J * D if weight.is_contiguous() else weight.stride(0)
    return B, N, K, J, D, rows, stride, DTYPES[u.dtype]


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


# ---- the operators -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """What the kernel of an operator takes, in this order: names of tensors and options in the operator's schema."""

    u: str = "u"  # the capsules; with weight and mask they are one struct
    small: str = ""  # small operands, in the accumulation dtype
    options: str = ""  # arguments that are not tensors
    saved: str = ""  # what forward saved and the gradients that arrive, in the accumulation dtype
    stored: str = ""  # tensors as large as the capsules, matrices or votes, in their own dtype
    outputs: str = ""  # small outputs, written in the accumulation dtype and then rounded
    sizes: str = ""  # sizes of tensors, after the options; as in "places.0", the size along axis 0
    folded: bool = False  # whether the capsules have two axes in place of B, which the kernel takes as one


_ROWS = {
    "affine_votes": _Row(stored="votes"),
    "affine_votes_backward": _Row(stored="g_votes g_u g_weight"),
    "attention_routing": _Row(small="attn_weight attn_bias input_weight", options="kind", outputs="v s"),
    "attention_routing_backward": _Row(
        small="attn_weight attn_bias input_weight",
        options="kind",
        saved="s g_v",
        stored="g_u g_weight",
        outputs="g_attn_weight g_attn_bias g_input_weight",
    ),
    "dynamic_routing": _Row(small="bias", options="iterations leaky kind", outputs="v s"),
    "dynamic_routing_backward": _Row(
        options="iterations leaky detach kind", saved="s g_v", stored="g_u g_weight", outputs="g_bias"
    ),
    "routing_step": _Row(small="state", outputs="s"),
    "routing_step_backward": _Row(small="state", saved="g_s", stored="g_u g_weight", outputs="g_state"),
    "routing_step_with_logits": _Row(small="state logits input_weight", outputs="s"),
    "routing_step_with_logits_backward": _Row(
        small="state logits input_weight",
        saved="g_s",
        stored="g_u g_weight",
        outputs="g_state g_logits g_input_weight",
    ),
    "dynamic_routing_with_logits": _Row(
        small="logits input_weight bias", options="iterations leaky kind", outputs="v s"
    ),
    "dynamic_routing_with_logits_backward": _Row(
        small="logits input_weight",
        options="iterations leaky detach kind",
        saved="s g_v",
        stored="g_u g_weight",
        outputs="g_logits g_input_weight g_bias",
    ),
    "dynamic_routing_over_inputs": _Row(
        small="logits input_weight bias", options="iterations kind", outputs="v s log_sums"
    ),
    "dynamic_routing_over_inputs_backward": _Row(
        small="logits input_weight bias",
        options="iterations detach kind",
        saved="s log_sums g_v",
        stored="g_u g_weight",
        outputs="g_logits g_input_weight g_bias",
    ),
    "routing_step_over_inputs": _Row(small="state logits input_weight", outputs="s total log_sums"),
    "routing_step_over_inputs_backward": _Row(
        small="state logits input_weight",
        saved="total log_sums g_s",
        stored="g_u g_weight",
        outputs="g_state g_logits g_input_weight",
    ),
    "self_attention_routing": _Row(small="prior input_weight", options="scale", outputs="v total s"),
    "self_attention_routing_backward": _Row(
        small="prior input_weight",
        options="scale",
        saved="total s g_v",
        stored="g_u g_weight",
        outputs="g_prior g_input_weight",
    ),
    "em_routing": _Row(
        "pose", small="activation beta_u beta_a", options="inverse_temperatures", outputs="mean activation_out state"
    ),
    "em_routing_backward": _Row(
        "pose",
        small="activation beta_u",
        options="inverse_temperatures",
        saved="state g_mean g_activation",
        stored="g_pose g_weight",
        outputs="g_activation_in g_beta_u g_beta_a",
    ),
    "em_routing_over_positions": _Row(
        "pose",
        small="activation beta_u beta_a",
        options="inverse_temperatures",
        sizes="pose.1 places.0 places.1",
        stored="places",
        outputs="mean activation_out state",
        folded=True,
    ),
    "em_routing_over_positions_backward": _Row(
        "pose",
        small="activation beta_u",
        options="inverse_temperatures",
        sizes="pose.1 places.0 places.1",
        saved="state g_mean g_activation",
        stored="places g_pose g_weight",
        outputs="g_activation_in g_beta_u g_beta_a",
        folded=True,
    ),
}


class _Plan(NamedTuple):
    """A row, with the names replaced by positions among the outputs and arguments of the operator."""

    u: int
    weight: int
    mask: int | None
    g_weight: int | None
    s: int | None  # a tensor […, J, D] that tells J
    tensors: list[int]  # all that are passed as addresses
    options: list[int]
    before: int  # how many tensors come before the options
    inputs: list[int]  # the tensors that are read in the accumulation dtype
    outputs: list[int]  # those that are written in it
    sizes: list[tuple[int, int]]  # a tensor and its axis
    folded: bool  # as in `_Row`

    def capsules(self, values: Sequence[Any]) -> Tensor:
        """u, or the pose, with one axis B."""
        u: Tensor = values[self.u]
        return u.flatten(0, 1) if self.folded else u


_plans: dict[str, _Plan] = {}


def _plan(op: str, names: Sequence[str]) -> _Plan:
    row = _ROWS[op]
    index = {name: position for position, name in enumerate(names)}
    small, options, saved, stored, outputs = (
        [index[name] for name in field.split()]
        for field in (row.small, row.options, row.saved, row.stored, row.outputs)
    )
    tensors = [*small, *saved, *stored, *outputs]
    s = index.get("s", index.get("g_s"))
    capsules = (index[row.u], index["weight"], index.get("mask"), index.get("g_weight"), s)
    sizes = [(index[name], int(axis)) for name, axis in (size.split(".") for size in row.sizes.split())]
    _plans[op] = _Plan(*capsules, tensors, options, len(small), [*small, *saved], outputs, sizes, row.folded)
    return _plans[op]


class _Contiguous(NamedTuple):
    """What a call takes from the shapes of its operands if all of them are contiguous and need no conversion.

    A position is None where there is no tensor.
    """

    u: int
    weight: int | None
    mask: int | None
    sizes: tuple[Any, ...]  # see `_sizes`
    J: int | None  # see `_outputs`
    tensors: list[int | None]  # all that are passed as addresses
    options: list[Any]  # their values
    before: int  # as in `_Plan`

    @classmethod
    def of(cls, plan: _Plan, values: Sequence[Any]) -> _Contiguous | None:
        """The positions among these values, or None if they are not all contiguous or have to be converted."""
        tensors = [x for x in values if isinstance(x, Tensor)]
        if values[plan.u].dtype in LOW_PRECISION or not all(x.is_contiguous() for x in tensors):
            return None
        weight, mask, *others = (
            None if i is None or values[i] is None else i for i in (plan.weight, plan.mask, *plan.tensors)
        )
        sizes = _sizes(plan.capsules(values), values[plan.weight])
        return cls(plan.u, weight, mask, sizes, _outputs(plan, values), others, _options(plan, values), plan.before)


def _outputs(plan: _Plan, values: Sequence[Any]) -> int | None:
    """J, if u is votes and a tensor tells it."""
    return values[plan.s].shape[-2] if values[plan.weight] is None and plan.s is not None else None


def _options(plan: _Plan, values: Sequence[Any]) -> list[Any]:
    """The options as the kernel takes them, the name of a squash as a number; then sizes of tensors."""
    options = [getattr(_C.SquashKind, x) if isinstance(x := values[i], str) else x for i in plan.options]
    return [*options, *[values[i].shape[axis] for i, axis in plan.sizes]]


def run(op: str, names: Sequence[str], values: Sequence[Any], notes: dict[str, Any]) -> None:
    """Run an operator: fill its outputs.

    Args:
        op: the name of the operator.
        names: of its outputs and then its arguments; always the same for an operator.
        values: the outputs, None for a gradient that is not wanted, and the arguments.
        notes: empty at first; the same for all calls whose values agree in shapes, strides, dtypes, device and which
            of them are None. What was worked out from these is kept here.
    """
    if (known := notes.get("contiguous")) is not None and _run_contiguous(op, known, values, notes):
        return
    if op not in _ROWS:
        _ON_ROWS[op](op, notes, **dict(zip(names, values, strict=True)))
        return
    plan = _plans.get(op) or _plan(op, names)
    notes["contiguous"] = _Contiguous.of(plan, values)
    u, weight = plan.capsules(values), values[plan.weight]
    mask = None if plan.mask is None else values[plan.mask]
    gradient = plan.g_weight is not None and values[plan.g_weight] is not None
    capsules = Capsules(u, weight, mask, gradient, _outputs(plan, values))
    rounded: list[tuple[Tensor, Tensor]] = []
    if u.dtype in LOW_PRECISION:
        values, rounded = _widened(plan, values)
    # This list also keeps copies alive until the kernel has run.
    tensors = [
        None if (x := values[i]) is None else _small_operand(x) if i in plan.inputs else x.contiguous()
        for i in plan.tensors
    ]
    addresses = [0 if x is None else x.data_ptr() for x in tensors]
    options = _options(plan, values)
    operands = (u,) if weight is None else (u, weight)
    args = *addresses[: plan.before], *options, *addresses[plan.before :]
    aligned = _aligned(*[_address(x) for x in capsules.tensors[:2]])
    call_kernel(op, operands, capsules.struct, *args, notes=notes if aligned else None)
    for out, wide in rounded:
        out.copy_(wide)


def _run_contiguous(op: str, known: _Contiguous, values: Sequence[Any], notes: dict[str, Any]) -> bool:
    """Run an operator, or return False if a small operand has to be copied."""
    at_u, at_weight, at_mask, sizes, J, tensors, options, before = known
    u, weight = values[at_u], None if at_weight is None else values[at_weight]
    u_address, weight_address = u.data_ptr(), 0 if weight is None else weight.data_ptr()
    capsules = _C.Capsules(u_address, weight_address, 0 if at_mask is None else values[at_mask].data_ptr(), *sizes)
    operands = (u,) if weight is None else (u, weight)
    if weight is None:
        _give_votes(capsules, J)
    args = [0 if i is None else values[i].data_ptr() for i in tensors]
    if u.is_cuda and any(address & 15 for address in args):
        return False
    args[before:before] = options
    call_kernel(op, operands, capsules, *args, notes=notes if _aligned(u_address, weight_address) else None)
    return True


def _widened(plan: _Plan, values: Sequence[Any]) -> tuple[list[Any], list[tuple[Tensor, Tensor]]]:
    """The values with small tensors in the accumulation dtype, and pairs of an output and what to round to it."""
    values, rounded = list(values), []
    for i in plan.inputs:
        values[i] = None if values[i] is None else values[i].float()
    for i in plan.outputs:
        if values[i] is not None and values[i].dtype in LOW_PRECISION:
            rounded.append((values[i], torch.empty_like(values[i], dtype=torch.float32)))
            values[i] = rounded[-1][1]
    return values, rounded


def _squash(op: str, notes: dict[str, Any], kind: str, **tensors: Tensor) -> None:
    s = tensors["s"]
    dim = s.shape[-1]
    rows = s.numel() // max(dim, 1)
    operands = [tensors[name].contiguous() for name in ("g_v", "s", "v", "g_s") if name in tensors]
    options = rows, dim, getattr(_C.SquashKind, kind), DTYPES[s.dtype]
    call_kernel(op, (s,), *[x.data_ptr() for x in operands], *options, notes=notes)


def _struct(grid: Grid, kind: str) -> Any:
    dtype = DTYPES[grid.features.dtype]
    return _C.PrimaryCapsules(*grid[1:-1], *grid.strides, getattr(_C.SquashKind, kind), dtype)


def _primary_capsules(
    op: str, notes: dict[str, Any], u: Tensor, features: Tensor, types: int, legacy: bool, kind: str
) -> None:
    grid = Grid.of(features, u.shape[2], legacy)
    call_kernel(op, (features,), _struct(grid, kind), grid.features.data_ptr(), u.data_ptr(), notes=notes)


def _primary_capsules_backward(
    op: str,
    notes: dict[str, Any],
    g_features: Tensor,
    g_u: Tensor,
    features: Tensor,
    types: int,
    legacy: bool,
    kind: str,
) -> None:
    g_u, grid = g_u.contiguous(), Grid.of(features, g_u.shape[2], legacy)
    target = grid.gradient(g_features)
    addresses = g_u.data_ptr(), grid.features.data_ptr(), target.data_ptr()
    call_kernel(op, (features,), _struct(grid, kind), *addresses, notes=notes)
    if target is not g_features:
        g_features.copy_(target)


_ON_ROWS: dict[str, Callable[..., None]] = {
    "squash": _squash,
    "squash_backward": _squash,
    "primary_capsules": _primary_capsules,
    "primary_capsules_backward": _primary_capsules_backward,
}
