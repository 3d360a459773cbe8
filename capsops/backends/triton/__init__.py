"""The Triton backend: for GPUs without the compiled extension, and for GPUs that are not NVIDIA's.

Triton compiles a kernel for the GPU when it first runs, and again for every new shape, but not for new B and N. With
TRITON_INTERPRET=1 the kernels run on the CPU, slowly: for tests.

A function for each operator, with the argument names of its schema, fills the outputs, which come first; a gradient
that is not wanted is None. Between the passes over the votes plain PyTorch does the rest, on [B, J, D] numbers.

Besides its operands and results an operator allocates at most 32 MB and 24 tensors [B, J, D] of the accumulation dtype,
for any number of input capsules and of iterations; for EM routing these tensors are [B, J, 2 P·D + 1], with couplings
over the input capsules [B, J, D + 2]. EM routing over positions also allocates tensors [B, M, N], two of them for each
of the iterations that are kept together, and two [B, G, W]. For more than
`_MOST_MIXED` output capsules attention routing also allocates sums of the size of its parameters and a shared matrix.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from ...dtypes import FLOATING, accumulation_dtype
from .. import reference
from .._compiling import constant_when_compiled
from .._feature_maps import Grid
from . import wide_attention
from .gaussians import Gaussians, e_step_backward, m_step, m_step_backward

DEVICE_TYPE = "cuda"
DEVICE_TYPES = ("cuda", "xpu")

# How many numbers a tile of votes has, and how many warps a program of that size.
_TILE, _WARPS = 2048, 4
# Limits for a pass: the number of programs, which depends on the shape alone so that sums have one order; the bytes of
# their partial sums, if there are several programs; and the bytes of partial sums that are added up at a time.
_PROGRAMS, _PARTIAL_BYTES, _SUMMED_BYTES = 2048, 16_000_000, 8_000_000
# A gradient through all iterations keeps the states of several iterations together: this many bytes, or this many
# iterations if that is more.
_STATE_BYTES, _LEAST_ITERATIONS = 6_000_000, 4
# The largest number of elements of a Triton tensor.
_MOST_NUMBERS = 1 << 20
# The longest row that one program squashes; PyTorch squashes longer rows.
_MOST_COMPONENTS = 1 << 15
# The most output capsules that attention routing mixes in the registers of one program.
_MOST_MIXED = 64


@cache
@constant_when_compiled
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's kernels run on the CPU, by TRITON_INTERPRET."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run an operator on tensors like these, or None if it can."""
    if not _installed():
        return "Triton is not installed (`pip install triton`, on Linux)"
    if device.type not in DEVICE_TYPES and not (device.type == "cpu" and interpreting()):
        return f"it does not run on {device.type}" + " without TRITON_INTERPRET=1" * (device.type == "cpu")
    if dtype not in FLOATING:
        return f"it does not take {dtype}"
    if not _has(op):
        return f"it has no kernel for {op}"
    return None if device.type == "cpu" else unfit(device)


@constant_when_compiled
def _has(op: str) -> bool:
    """Whether this module has the functions of an operator and of its gradient."""
    forward = op.removesuffix("_backward")
    return forward in globals() and f"{forward}_backward" in globals()


def run(op: str, names: Sequence[str], values: Sequence[Any], notes: dict[str, Any]) -> None:
    """Run an operator: fill its outputs; see `extension.run`."""
    globals()[op](**dict(zip(names, values, strict=True)))


@cache
@constant_when_compiled
def unfit(device: torch.device) -> str | None:
    """Why Triton does not compile for a GPU, or None if it does."""
    if not getattr(torch, device.type).is_available():
        return "torch sees no GPU"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 5):
        return f"{torch.cuda.get_device_name(device)} is older than what Triton compiles for (compute capability 7.5)"
    return None


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of x the current one, on which Triton launches."""
    return nullcontext() if x.device.type == "cpu" else getattr(torch, x.device.type).device(x.device)


def _padded(n: int) -> int:
    """The next power of two."""
    return 1 << max(n - 1, 0).bit_length()


def _wide(x: Tensor | None) -> Tensor | None:
    """A small operand in the accumulation dtype."""
    return None if x is None else x.to(accumulation_dtype(x.dtype)).contiguous()


def _matrices(weight: Tensor | None, gradient: bool) -> Tensor | None:
    """W, contiguous; [K, J, D] if it was expanded along N and has no gradient of the expanded shape."""
    if weight is None:
        return None
    expanded = weight.dim() == 4 and weight.shape[0] > 1 and weight.stride(0) == 0
    return (weight[0] if expanded and not gradient else weight).contiguous()


def _language(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


# ---- the streaming loops -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stream:
    """Capsules, and how a pass over them is split into tiles and programs."""

    u: Tensor  # [B, N, (P,) K]; without weight the votes, [B, N, J, (P,) D], or [B, N, 1, D] for all output capsules
    weight: Tensor | None  # [N, K, J, D] or [K, J, D]
    mask: Tensor | None  # uint8 [B, N]
    sizes: tuple[int, int, int, int, int, int]  # B, N, P, K, J, D
    tile: dict[str, int]  # NB, BB and the padded sizes JP, PP and DP
    warps: int

    @staticmethod
    def of(
        u: Tensor,
        weight: Tensor | None,
        mask: Tensor | None = None,
        gradient: bool = False,
        outputs: int | None = None,
    ) -> _Stream:
        """See the attributes.

        Args:
            gradient: whether the gradient of W is wanted.
            outputs: J, which votes [B, N, 1, D] do not tell; by default that of W or of the votes.
        """
        B, N, *capsule = u.shape
        if weight is None:
            K, J, D = 1, outputs or capsule[0], capsule[-1]
            rows = capsule[1:-1]
        else:
            K, J, D = weight.shape[-3:]
            rows = capsule[:-1]
        P = rows[0] if rows else 1
        JP, PP, DP = _padded(J), _padded(P), _padded(D)
        row = JP * PP * DP
        if row > _MOST_NUMBERS:
            raise ValueError(
                f"triton: the votes of an input capsule are {row} numbers, {J} output capsules with {P * D} components "
                f"padded to powers of two; expected at most {_MOST_NUMBERS}"
            )
        BB = min(_padded(B), max(_TILE // row, 1))
        NB = min(_padded(N), max(_TILE // (row * BB), 1))
        warps = min(max(row * BB * NB // _TILE, 1) * _WARPS, 16)
        return _Stream(
            u.contiguous(),
            _matrices(weight, gradient),
            None if mask is None else mask.contiguous().view(torch.uint8),
            (B, N, P, K, J, D),
            {"NB": NB, "BB": BB, "JP": JP, "PP": PP, "DP": DP},
            warps,
        )

    @property
    def wide(self) -> torch.dtype:
        return accumulation_dtype(self.u.dtype)

    @property
    def shared(self) -> bool:
        return self.weight is not None and self.weight.dim() == 3

    @property
    def one_vote(self) -> bool:
        """Whether the votes that are given are the same for all of several output capsules."""
        return self.weight is None and self.u.shape[2] != self.sizes[4]

    @property
    def batch_tiles(self) -> int:
        return -(-self.sizes[0] // self.tile["BB"])

    def runs(self, most: int) -> tuple[int, int]:
        """How many input capsules a program takes, and how many programs there are: at most `most`."""
        N, NB = self.sizes[1], self.tile["NB"]
        tiles = -(-N // NB)
        run = max(-(-tiles // most), 1) * NB
        return run, -(-N // run)

    def fitting(self, numbers: int) -> int:
        """How many programs may write this many partial sums each."""
        return max(_PARTIAL_BYTES // max(self.wide.itemsize * numbers, 1), 1)

    def constants(self) -> dict[str, Any]:
        _, _, P, K, J, D = self.sizes
        sizes = {"K": K, "J": J, "D": D, "P": P, **self.tile}
        return {
            **sizes,
            "shared": self.shared,
            "one_vote": self.one_vote,
            "A": _language(self.u.dtype),
            "num_warps": self.warps,
        }

    def reduce(
        self,
        routing: str,
        states: Sequence[Tensor] | Tensor = (),
        *,
        scalars: Sequence[Tensor] | Tensor = (),
        attn_weight: Tensor | None = None,
        attn_bias: Tensor | None = None,
        prior: Tensor | None = None,
        logits: Tensor | None = None,
        input_weight: Tensor | None = None,
        shares: Tensor | None = None,
        means: Tensor | None = None,
        leaky: bool = False,
    ) -> Tensor:
        """Σ_i c_i û_i [B, J, D]; for EM routing Σ_i w (x, x², 1) [B, J, 2 P·D + 1]."""
        partial = self._partial(
            routing, states, scalars=scalars, attn_weight=attn_weight, attn_bias=attn_bias, prior=prior, logits=logits,
            input_weight=input_weight, shares=shares, means=means, leaky=leaky,
        )  # fmt: skip
        return partial[0] if len(partial) == 1 else _summed(partial).to(self.wide)

    def over_inputs(self, state: Tensor, **pairs: Any) -> tuple[Tensor, Tensor]:
        """Σ_i w_i c_ij û_ij [B, J, D] and log Σ_i exp(b_ij) [B, J], with b = û · state + logits and c = softmax_i(b).

        Both are 0 where an output capsule has no pairs. pairs: logits and input_weight.
        """
        partial = self._partial("over_inputs", [state], **pairs)
        if not len(partial):
            return torch.zeros_like(state), torch.zeros_like(state[..., 0])
        # Every program has subtracted a maximum of its own, −∞ where it had no pairs.
        largest = partial[..., -1].amax(dim=0).clamp(min=torch.finfo(self.wide).min)
        partial[..., :-1] *= (partial[..., -1] - largest).exp_()[..., None]
        sums = partial[0] if len(partial) == 1 else _summed(partial).to(self.wide)
        mass = sums[..., -2]
        none = mass == 0
        log_sums = torch.where(none, 0, largest + mass.log())
        return torch.where(none[..., None], 0, sums[..., :-2] / mass[..., None]), log_sums

    def _partial(
        self,
        routing: str,
        states: Sequence[Tensor] | Tensor,
        *,
        scalars: Sequence[Tensor] | Tensor = (),
        attn_weight: Tensor | None = None,
        attn_bias: Tensor | None = None,
        prior: Tensor | None = None,
        logits: Tensor | None = None,
        input_weight: Tensor | None = None,
        shares: Tensor | None = None,
        means: Tensor | None = None,
        leaky: bool = False,
    ) -> Tensor:
        """What each program adds up, [programs, B, J, row]; see `reduce_kernel`."""
        from .stream import reduce_kernel

        B, N, P, _, J, D = self.sizes
        row = 2 * P * D + 1 if routing.startswith("em") else P * D + 2 * (routing == "over_inputs")
        most = min(_PROGRAMS // max(self.batch_tiles, 1), self.fitting(B * J * row))
        run, runs = self.runs(max(most, 1))
        partial = self.u.new_empty(runs, B, J, row, dtype=self.wide)
        if partial.numel():
            logits = _same_for_all_items(logits)
            reduce_kernel[(runs * self.batch_tiles,)](
                self.u, self.weight, self.mask, _stacked(states), _stacked(scalars), attn_weight, attn_bias, prior,
                logits, _contiguous(input_weight), shares, means, partial, B, N, run, **self.constants(),
                same_logits=logits is not None and logits.dim() == 2, routing=routing, leaky=leaky,
            )  # fmt: skip
        return partial

    def pair_sums(
        self, states: Sequence[Tensor] | Tensor, scalars: Sequence[Tensor] | Tensor, with_means: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """For EM routing the largest logit of a pair, −∞ where there is none, Σ_j exp(logit − largest) and Σ_j r e.

        Each [B, N]; the last is None without means.
        """
        from .stream import pair_sums_kernel

        B, N = self.sizes[:2]
        largest, sums = self.u.new_empty(2, B, N, dtype=self.wide)
        means = torch.empty_like(sums) if with_means else None
        run, runs = self.runs(max(_PROGRAMS // max(self.batch_tiles, 1), 1))
        if sums.numel():
            pair_sums_kernel[(runs * self.batch_tiles,)](
                self.u, self.weight, self.mask, _stacked(states), _stacked(scalars), largest, sums, means, B, N, run,
                **self.constants(),
            )  # fmt: skip
        return largest, sums, means

    def emit(
        self,
        routing: str,
        g_u: Tensor | None,
        g_weight: Tensor | None,
        states: Sequence[Tensor] | Tensor = (),
        *,
        scalars: Sequence[Tensor] | Tensor = (),
        iterations: int = 1,
        attn_weight: Tensor | None = None,
        attn_bias: Tensor | None = None,
        prior: Tensor | None = None,
        logits: Tensor | None = None,
        input_weight: Tensor | None = None,
        shares: Tensor | None = None,
        means: Tensor | None = None,
        g_votes: Tensor | None = None,
        g_attn_weight: Tensor | None = None,
        g_attn_bias: Tensor | None = None,
        g_prior: Tensor | None = None,
        g_logits: Tensor | None = None,
        g_input_weight: Tensor | None = None,
        leaky: bool = False,
        detach: bool = False,
        has_addend: bool = False,
        more: bool = False,
    ) -> None:
        """Fill the gradients that are not None; more: add to those of u, W, logits and input_weight instead."""
        from .stream import emit_kernel

        B, N, _, K, J, D = self.sizes
        in_pieces = g_weight is not None and (self.shared or self.batch_tiles > 1)
        matrices = 1 if self.shared else self.tile["NB"]
        params = J * (J + 1) if g_attn_weight is not None or g_attn_bias is not None else 0
        left = matrices * K * J * D * in_pieces + params
        run, programs = self.runs(min(_PROGRAMS, self.fitting(left)))
        if B == 0:
            programs = 0

        def partial(wanted: bool, *size: int) -> Tensor | None:
            return self.u.new_empty(programs, *size, dtype=self.wide) if wanted else None

        sums = partial(in_pieces, matrices, K, J, D)
        own_weight = partial(g_attn_weight is not None, J, J)
        own_bias = partial(g_attn_bias is not None, J)
        if programs:
            logits = _same_for_all_items(logits)
            emit_kernel[(programs,)](
                self.u, self.weight, self.mask, _stacked(states), _stacked(scalars), attn_weight, attn_bias, prior,
                logits, _contiguous(input_weight), shares, means, g_votes, g_u, g_weight, sums, own_weight, own_bias,
                g_prior, g_logits, g_input_weight, B, N, run, iterations, **self.constants(),
                same_logits=logits is not None and logits.dim() == 2, routing=routing, leaky=leaky, detach=detach,
                has_addend=has_addend, more=more,
            )  # fmt: skip
        elif g_weight is not None and not more:
            g_weight.zero_()
        for out, pieces in ((g_attn_weight, own_weight), (g_attn_bias, own_bias)):
            if out is not None and pieces is not None:
                out.copy_(_summed(pieces))
        if g_prior is not None and not programs:
            g_prior.zero_()
        if g_weight is not None and self.shared and sums is not None and programs:
            total = _summed(sums)[0]
            g_weight.copy_(total.add_(g_weight) if more else total)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _same_for_all_items(logits: Tensor | None) -> Tensor | None:
    """Logits [B, N, J], contiguous; [N, J] if they were expanded along B."""
    expanded = logits is not None and logits.shape[0] > 1 and logits.stride(0) == 0
    return _contiguous(logits[0] if expanded and logits is not None else logits)


def _stacked(x: Sequence[Tensor] | Tensor) -> Tensor | None:
    if isinstance(x, Tensor):
        return x
    return torch.stack(tuple(x)) if x else None


def _summed(x: Tensor) -> Tensor:
    """The sum over the first axis in float64; a few rows at a time, because torch.sum copies its operand to float64."""
    rows = max(_SUMMED_BYTES // max(8 * x[:1].numel(), 1), 1)
    total = x[:rows].sum(dim=0, dtype=torch.float64)
    for some in x[rows:].split(rows):
        total += some.sum(dim=0, dtype=torch.float64)
    return total


def _groups(iterations: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Begin and end of groups of iterations, the last group first; nbytes: of the states of one iteration."""
    size = max(_STATE_BYTES // max(nbytes, 1), _LEAST_ITERATIONS)
    for end in range(iterations, 0, -size):
        yield max(end - size, 0), end


# ---- rows ----------------------------------------------------------------------------------------


def _rows(s: Tensor) -> dict[str, Any]:
    dim = s.shape[-1]
    DP = _padded(dim)
    return {"dim": dim, "RB": max(1024 // DP, 1), "DP": DP, "A": _language(s.dtype)}


def _torch_squashes(s: Tensor, kind: str) -> bool:
    """Whether plain PyTorch takes the place of the kernel: for long rows, and for what only routings do with s."""
    return s.shape[-1] > _MOST_COMPONENTS or kind not in ("sabour", "efficient")


def _squash(s: Tensor, v: Tensor, kind: str) -> None:
    from .rows import squash_kernel

    if _torch_squashes(s, kind):
        v.copy_(reference.squash(s, kind))
    elif s.numel():
        sizes, rows = _rows(s), s.numel() // s.shape[-1]
        squash_kernel[(-(-rows // sizes["RB"]),)](s, v, rows, **sizes, sabour=kind == "sabour")


def _squash_backward(g_v: Tensor, s: Tensor, g_s: Tensor, kind: str) -> None:
    from .rows import squash_backward_kernel

    if _torch_squashes(s, kind):
        # torch.autograd.grad would find no graph: the kernel of an operator runs below autograd.
        gradient = torch.func.vjp(lambda x: reference.squash(x, kind), s.detach())[1]
        g_s.copy_(gradient(g_v)[0])
    elif s.numel():
        sizes, rows = _rows(s), s.numel() // s.shape[-1]
        squash_backward_kernel[(-(-rows // sizes["RB"]),)](g_v, s, g_s, rows, **sizes, sabour=kind == "sabour")


def _squashed(s: Tensor, kind: str) -> Tensor:
    v = torch.empty_like(s)
    _squash(s, v, kind)
    return v


def _gradient_of_s(g_v: Tensor, s: Tensor, kind: str) -> Tensor:
    g_s = torch.empty_like(s)
    _squash_backward(g_v.contiguous(), s.contiguous(), g_s, kind)
    return g_s


def squash(v: Tensor, s: Tensor, kind: str) -> None:
    with _on(s):
        _squash(s.contiguous(), v, kind)


def squash_backward(g_s: Tensor, g_v: Tensor, s: Tensor, kind: str) -> None:
    with _on(s):
        _squash_backward(g_v.contiguous(), s.contiguous(), g_s, kind)


def _primary(grid: Grid, kind: str, u: Tensor | None, g_u: Tensor | None, g_features: Tensor | None) -> None:
    from .rows import primary_capsules_kernel

    features, B, outer, inner, K, strides = grid
    if not features.numel():
        return
    KP = _padded(K)
    CB = max(1024 // KP, 1)
    primary_capsules_kernel[(B * outer * -(-inner // CB),)](
        features, u, g_u, g_features, outer, inner, *strides,
        K=K, CB=CB, KP=KP, A=_language(features.dtype), sabour=kind == "sabour",
    )  # fmt: skip


def primary_capsules(u: Tensor, features: Tensor, types: int, legacy: bool, kind: str) -> None:
    with _on(features):
        _primary(Grid.of(features, u.shape[2], legacy), kind, u, None, None)


def primary_capsules_backward(
    g_features: Tensor, g_u: Tensor, features: Tensor, types: int, legacy: bool, kind: str
) -> None:
    with _on(features):
        grid = Grid.of(features, g_u.shape[2], legacy)
        target = grid.gradient(g_features)
        _primary(grid, kind, None, g_u.contiguous(), target)
        if target is not g_features:
            g_features.copy_(target)


def affine_votes(votes: Tensor, u: Tensor, weight: Tensor) -> None:
    from .rows import votes_kernel

    N, K = u.shape[1:]
    JD, size = weight.shape[-2] * weight.shape[-1], votes.numel()
    matrices = _matrices(weight, gradient=False)
    assert matrices is not None
    stride = K * JD if matrices.dim() == 4 else 0
    if size:
        with _on(u):
            votes_kernel[(-(-size // 1024),)](
                u.contiguous(), matrices, votes, N, JD, size, stride, K=K, XB=1024, A=_language(u.dtype)
            )


def affine_votes_backward(
    g_u: Tensor | None, g_weight: Tensor | None, g_votes: Tensor, u: Tensor, weight: Tensor
) -> None:
    with _on(u):
        stream = _Stream.of(u, weight, None, g_weight is not None)
        stream.emit("stored", g_u, g_weight, g_votes=g_votes.contiguous())


# ---- the routings --------------------------------------------------------------------------------


def attention_routing(
    v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
    kind: str,
) -> None:
    A, a = _wide(attn_weight), _wide(attn_bias)
    assert A is not None
    with _on(u):
        if A.shape[0] > _MOST_MIXED:
            wide_attention.forward(s, u, weight, A, a, input_weight, mask)
        else:
            stream = _Stream.of(u, weight, mask)
            s.copy_(stream.reduce("attention", attn_weight=A, attn_bias=a, input_weight=input_weight))
        v.copy_(_squashed(s, kind))


def attention_routing_backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_attn_weight: Tensor | None,
    g_attn_bias: Tensor | None,
    g_input_weight: Tensor | None,
    g_v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
    kind: str,
) -> None:
    A, a = _wide(attn_weight), _wide(attn_bias)
    assert A is not None
    with _on(u):
        g_s = _gradient_of_s(g_v.to(s.dtype), s, kind)
        if A.shape[0] > _MOST_MIXED:
            wide_attention.backward(
                g_u, g_weight, g_attn_weight, g_attn_bias, g_input_weight, g_s, u, weight, A, a, input_weight, mask
            )
            return
        _Stream.of(u, weight, mask, g_weight is not None).emit(
            "attention", g_u, g_weight, [g_s], attn_weight=A, attn_bias=a, input_weight=input_weight,
            g_attn_weight=g_attn_weight, g_attn_bias=g_attn_bias, g_input_weight=g_input_weight,
        )  # fmt: skip


def _route(v: Tensor, s: Tensor, bias: Tensor | None, kind: str, weighted_sum: Callable[[int, Tensor], Tensor]) -> None:
    """The iterations of routing by agreement.

    Args:
        weighted_sum: of iteration t, from V, the sum of the output capsules of the iterations before: Σ_i c_i û_i.
    """
    total = torch.zeros_like(s[0])
    for t in range(len(s)):
        own = weighted_sum(t, total)
        s[t].copy_(own if bias is None else own + bias)
        out = _squashed(s[t], kind)
        total = total + out
    v.copy_(out)


def _route_backward(
    stream: _Stream,
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_bias: Tensor | None,
    g_v: Tensor,
    s: Tensor,
    detach: bool,
    kind: str,
    *,
    leaky: bool = False,
    log_sums: Tensor | None = None,
    bias: Tensor | None = None,
    g_logits: Tensor | None = None,
    g_input_weight: Tensor | None = None,
    **pairs: Any,
) -> None:
    """The gradient of all iterations.

    Args:
        log_sums: [iterations, B, J], if the couplings are over the input capsules; then the bias matters.
        pairs: logits and input_weight.
    """
    iterations = len(s)
    to_v, to_bias = g_v.to(s.dtype), s.new_zeros(s.shape[2:], dtype=torch.float64)
    g_total = torch.zeros_like(s[0])
    last = iterations - 1
    emits = g_u is not None or g_weight is not None or g_input_weight is not None
    if g_logits is not None and detach:
        g_logits.zero_()
        g_logits = None
    each = 2 * s[0].nbytes + (0 if log_sums is None else 2 * log_sums[0].nbytes)
    for begin, end in [(last, iterations)] if detach else _groups(iterations, each):
        # For each of these iterations x, the sum of v before it, and the gradient of s.
        states = s.new_empty(2, end - begin, *s.shape[1:])
        x, g = states
        scalars = None if log_sums is None else s.new_empty(2, end - begin, *s.shape[1:-1])
        total = torch.zeros_like(s[0])
        for t in range(end):
            if t >= begin:
                x[t - begin] = total
            if t < last:
                total = total + _squashed(s[t], kind)
        for t in range(end - 1, begin - 1, -1):
            own = g[t - begin]
            own.copy_(_gradient_of_s(to_v if t == last else g_total, s[t], kind))
            if g_bias is not None:
                to_bias += own.sum(dim=0, dtype=torch.float64)
            if scalars is not None and log_sums is not None:
                scalars[0, t - begin] = log_sums[t]
                scalars[1, t - begin] = _mean(s[t] if bias is None else s[t] - bias, own)
            if t > 0 and not detach:
                own_scalars = () if scalars is None else scalars[:, t - begin].contiguous()
                g_total = g_total + stream.reduce(
                    "adjoint", [x[t - begin], own], scalars=own_scalars, leaky=leaky, **pairs
                )
        if emits or g_logits is not None:
            stream.emit(
                "agreement", g_u, g_weight, states.flatten(0, 1), iterations=end - begin, leaky=leaky, detach=detach,
                more=end < iterations, scalars=() if scalars is None else scalars.flatten(0, 1), g_logits=g_logits,
                g_input_weight=g_input_weight, **pairs,
            )  # fmt: skip
    if g_bias is not None:
        g_bias.copy_(to_bias)


def _mean(s: Tensor, g_s: Tensor) -> Tensor:
    """Σ_i c_ij e_ij [B, J] with e_ij = w_i û_ij · g_s,j: it is s · g_s, with s = Σ_i w_i c_ij û_ij."""
    return (s * g_s).sum(dim=-1)


def dynamic_routing(
    v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    kind: str,
) -> None:
    with _on(u):
        stream = _Stream.of(u, weight, mask)
        J = s.shape[-2]

        def weighted_sum(t: int, V: Tensor) -> Tensor:
            return stream.reduce("agreement", [V], leaky=leaky) if t else stream.reduce("sum") / (J + leaky)

        _route(v, s, bias, kind, weighted_sum)


def dynamic_routing_backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_bias: Tensor | None,
    g_v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    kind: str,
) -> None:
    dynamic_routing_with_logits_backward(
        g_u, g_weight, None, None, g_bias, g_v, s, u, weight, None, None, bias, mask, iterations, leaky, detach, kind
    )


def dynamic_routing_with_logits(
    v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    input_weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    kind: str,
) -> None:
    with _on(u):
        stream = _Stream.of(u, weight, mask, outputs=s.shape[-2])

        def weighted_sum(t: int, V: Tensor) -> Tensor:
            return stream.reduce("agreement", [V], logits=logits, input_weight=input_weight, leaky=leaky)

        _route(v, s, bias, kind, weighted_sum)


def dynamic_routing_with_logits_backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_logits: Tensor | None,
    g_input_weight: Tensor | None,
    g_bias: Tensor | None,
    g_v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    input_weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    leaky: bool,
    detach: bool,
    kind: str,
) -> None:
    with _on(u):
        stream = _Stream.of(u, weight, mask, g_weight is not None, s.shape[-2])
        _route_backward(
            stream, g_u, g_weight, g_bias, g_v, s, detach, kind, leaky=leaky, g_logits=g_logits,
            g_input_weight=g_input_weight, logits=logits, input_weight=input_weight,
        )  # fmt: skip


def dynamic_routing_over_inputs(
    v: Tensor,
    s: Tensor,
    log_sums: Tensor,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    input_weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    detach: bool,
    kind: str,
) -> None:
    with _on(u):
        stream = _Stream.of(u, weight, mask, outputs=s.shape[-2])

        def weighted_sum(t: int, V: Tensor) -> Tensor:
            own, log_sums[t] = stream.over_inputs(V, logits=logits, input_weight=input_weight)
            return own

        _route(v, s, bias, kind, weighted_sum)


def dynamic_routing_over_inputs_backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_logits: Tensor | None,
    g_input_weight: Tensor | None,
    g_bias: Tensor | None,
    g_v: Tensor,
    s: Tensor,
    log_sums: Tensor,
    u: Tensor,
    weight: Tensor | None,
    logits: Tensor | None,
    input_weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    iterations: int,
    detach: bool,
    kind: str,
) -> None:
    with _on(u):
        stream = _Stream.of(u, weight, mask, g_weight is not None, s.shape[-2])
        _route_backward(
            stream, g_u, g_weight, g_bias, g_v, s, detach, kind, log_sums=log_sums, bias=_wide(bias), g_logits=g_logits,
            g_input_weight=g_input_weight, logits=logits, input_weight=input_weight,
        )  # fmt: skip


def _step_backward(
    stream: _Stream,
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_state: Tensor | None,
    V: Tensor,
    g: Tensor,
    scalars: Sequence[Tensor] = (),
    g_logits: Tensor | None = None,
    g_input_weight: Tensor | None = None,
    **pairs: Any,
) -> None:
    """The gradient of one iteration; V and g, the gradient of s, in the accumulation dtype; pairs as above."""
    if g_state is not None:
        g_state.copy_(stream.reduce("adjoint", [V, g], scalars=scalars, **pairs))
    if not (g_u is None and g_weight is None and g_logits is None and g_input_weight is None):
        stream.emit(
            "agreement", g_u, g_weight, [V, g], scalars=scalars, g_logits=g_logits, g_input_weight=g_input_weight,
            **pairs,
        )  # fmt: skip


def routing_step(s: Tensor, u: Tensor, weight: Tensor | None, state: Tensor, mask: Tensor | None) -> None:
    routing_step_with_logits(s, u, weight, state, None, None, mask)


def routing_step_backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_state: Tensor | None,
    g_s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
) -> None:
    routing_step_with_logits_backward(g_u, g_weight, g_state, None, None, g_s, u, weight, state, None, None, mask)


def routing_step_with_logits(
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    logits: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
) -> None:
    V = _wide(state)
    assert V is not None
    with _on(u):
        stream = _Stream.of(u, weight, mask, outputs=V.shape[-2])
        s.copy_(stream.reduce("agreement", [V], logits=logits, input_weight=input_weight))


def routing_step_with_logits_backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_state: Tensor | None,
    g_logits: Tensor | None,
    g_input_weight: Tensor | None,
    g_s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    logits: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
) -> None:
    V, g = _wide(state), _wide(g_s)
    assert V is not None
    assert g is not None
    with _on(u):
        stream = _Stream.of(u, weight, mask, g_weight is not None, V.shape[-2])
        _step_backward(
            stream, g_u, g_weight, g_state, V, g, g_logits=g_logits, g_input_weight=g_input_weight, logits=logits,
            input_weight=input_weight,
        )  # fmt: skip


def routing_step_over_inputs(
    s: Tensor,
    total: Tensor,
    log_sums: Tensor,
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    logits: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
) -> None:
    V = _wide(state)
    assert V is not None
    with _on(u):
        stream = _Stream.of(u, weight, mask, outputs=V.shape[-2])
        own, logs = stream.over_inputs(V, logits=logits, input_weight=input_weight)
        for out, value in ((s, own), (total, own), (log_sums, logs)):
            out.copy_(value)


def routing_step_over_inputs_backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_state: Tensor | None,
    g_logits: Tensor | None,
    g_input_weight: Tensor | None,
    g_s: Tensor,
    total: Tensor,
    log_sums: Tensor,
    u: Tensor,
    weight: Tensor | None,
    state: Tensor,
    logits: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
) -> None:
    V, g = _wide(state), _wide(g_s)
    assert V is not None
    assert g is not None
    with _on(u):
        stream = _Stream.of(u, weight, mask, g_weight is not None, V.shape[-2])
        _step_backward(
            stream, g_u, g_weight, g_state, V, g, [log_sums, _mean(total, g)], g_logits, g_input_weight, logits=logits,
            input_weight=input_weight,
        )  # fmt: skip


def self_attention_routing(
    v: Tensor,
    total: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> None:
    with _on(u):
        stream = _Stream.of(u, weight, mask)
        total.copy_(stream.reduce("sum"))
        s.copy_(stream.reduce("agreement", [total * scale], prior=_wide(prior), input_weight=input_weight))
        v.copy_(_squashed(s, "efficient"))


def self_attention_routing_backward(
    g_u: Tensor | None,
    g_weight: Tensor | None,
    g_prior: Tensor | None,
    g_input_weight: Tensor | None,
    g_v: Tensor,
    total: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor | None,
    prior: Tensor | None,
    input_weight: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> None:
    with _on(u):
        stream = _Stream.of(u, weight, mask, g_weight is not None)
        x, g_s = total * scale, _gradient_of_s(g_v.to(s.dtype), s, "efficient")
        rest = stream.reduce("adjoint", [x, g_s], input_weight=input_weight) * scale
        wide = None if g_prior is None else torch.empty_like(g_prior, dtype=s.dtype)
        stream.emit(
            "agreement", g_u, g_weight, [x, g_s, rest], prior=_wide(prior), input_weight=input_weight, g_prior=wide,
            g_input_weight=g_input_weight, has_addend=True,
        )  # fmt: skip
        if g_prior is not None and wide is not None:
            g_prior.copy_(wide)


@dataclass(frozen=True)
class _Competition:
    """Windows of a grid, whose output capsules compete for an input capsule that lies in several of them.

    Args:
        places: see `capsops.em_routing`.
        sizes: B, M and N, of the pose [B, M, N, …].
    """

    places: Tensor
    sizes: Sequence[int]

    @cached_property
    def _index(self) -> Tensor:
        """[B, G · W], the places; one place more for capsules that lie in fewer windows than others."""
        B, M, N = self.sizes
        there = (self.places >= 0) & (self.places < M * N)
        return torch.where(there, self.places, M * N).flatten().expand(B, -1)

    def of_capsules(self, x: Tensor, absent: float) -> Tensor:
        """[B · M, N] -> [B, G, W]."""
        B, M, N = self.sizes
        of_places = torch.nn.functional.pad(x.view(B, M * N), (0, 1), value=absent)
        return of_places.gather(1, self._index).unflatten(1, self.places.shape)

    def at_places(self, x: Tensor) -> Tensor:
        """[B, G] or [B, G, W] -> [B · M, N]; 0 at a place that no capsule has."""
        B, M, N = self.sizes
        if x.dim() == 2:
            x = x[:, :, None].expand(-1, -1, self.places.shape[1])
        out = x.new_zeros(B, M * N + 1).scatter_(1, self._index, x.flatten(1))
        return out[:, :-1].reshape(B * M, N)

    def shares(self, largest: Tensor, sums: Tensor, means: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """From `_Stream.pair_sums` the share of a window in an input capsule, and Σ r e over all windows."""
        of_windows = self.of_capsules(largest, -torch.inf)
        most = of_windows.amax(dim=2, keepdim=True).clamp_(min=torch.finfo(largest.dtype).min)
        own = (of_windows - most).exp_() * self.of_capsules(sums, 0)
        own /= own.sum(dim=2, keepdim=True).clamp_(min=1)  # the sum is at least 1, or 0 without any capsule
        if means is None:
            return self.at_places(own), None
        return self.at_places(own), self.at_places((own * self.of_capsules(means, 0)).sum(dim=2))

    def first_shares(self, mask: Tensor | None, like: Tensor) -> Tensor:
        """The shares of the first iteration, whose logits are 0; like: any tensor of their dtype and device."""
        B, M, N = self.sizes
        largest = like.new_zeros(B * M, N)
        sums = torch.ones_like(largest)
        return self.shares(largest if mask is None else largest.masked_fill_(~mask, -torch.inf), sums, None)[0]


def em_routing(
    mean: Tensor,
    activation_out: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
) -> None:
    _em(mean, activation_out, state, pose, activation, weight, beta_u, beta_a, mask, inverse_temperatures, None)


def em_routing_over_positions(
    mean: Tensor,
    activation_out: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    places: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
) -> None:
    competition = _Competition(places, pose.shape[:3])
    mean, activation_out, mask = _items(mean, activation_out, mask)
    activation = competition.at_places(activation)
    _em(
        mean, activation_out, state.flatten(1, 2), pose.flatten(0, 1), activation, weight, beta_u, beta_a, mask,
        inverse_temperatures, competition,
    )  # fmt: skip


def _items(*tensors: Tensor | None) -> Any:
    """[B, M, …] -> [B · M, …], the windows of all grids."""
    return [None if x is None else x.flatten(0, 1) for x in tensors]


def _em(
    mean: Tensor,
    activation_out: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
    competition: _Competition | None,
) -> None:
    with _on(pose):
        stream = _Stream.of(pose, weight, mask)
        a, cost, bonus = _wide(activation), _wide(beta_u), _wide(beta_a)
        assert cost is not None
        assert bonus is not None
        B, _, P, _, J, D = stream.sizes
        H = P * D
        flat = state.new_zeros(B, J, H)
        before, width, constant, shift = flat, flat, state.new_zeros(B, J), flat
        shares = None if competition is None else competition.first_shares(mask, state)
        for t, inverse_temperature in enumerate(inverse_temperatures):
            if competition is not None and t > 0:
                shares, _ = competition.shares(*stream.pair_sums([before, width], [constant], False))
            # Twice, because the sums lose digits where the mean is far from the shift; the second shift is the mean.
            for _ in range(2):
                sums = stream.reduce("em", [before, width, shift], scalars=[constant], input_weight=a, shares=shares)
                g = m_step(sums[..., -1], sums[..., :H], sums[..., H:-1], shift, cost, bonus, inverse_temperature)
                shift = g.mean
            g.save(state[t])
            before, (width, constant) = g.mean, g.e_step()
        mean.copy_(g.mean.reshape(mean.shape))
        activation_out.copy_(g.logit.sigmoid())


def em_routing_backward(
    g_pose: Tensor | None,
    g_activation_in: Tensor | None,
    g_weight: Tensor | None,
    g_beta_u: Tensor | None,
    g_beta_a: Tensor | None,
    g_mean: Tensor,
    g_activation: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
) -> None:
    _em_backward(
        g_pose, g_activation_in, g_weight, g_beta_u, g_beta_a, g_mean, g_activation, state, pose, activation, weight,
        beta_u, mask, inverse_temperatures, None,
    )  # fmt: skip


def em_routing_over_positions_backward(
    g_pose: Tensor | None,
    g_activation_in: Tensor | None,
    g_weight: Tensor | None,
    g_beta_u: Tensor | None,
    g_beta_a: Tensor | None,
    g_mean: Tensor,
    g_activation: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    places: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
) -> None:
    competition = _Competition(places, pose.shape[:3])
    g_pose, g_mean, g_activation, mask = _items(g_pose, g_mean, g_activation, mask)
    of_places = None if g_activation_in is None else state.new_empty(g_mean.shape[0], pose.shape[2])
    _em_backward(
        g_pose, of_places, g_weight, g_beta_u, g_beta_a, g_mean, g_activation, state.flatten(1, 2),
        pose.flatten(0, 1), competition.at_places(activation), weight, beta_u, mask, inverse_temperatures,
        competition,
    )  # fmt: skip
    if g_activation_in is not None and of_places is not None:
        g_activation_in.copy_(competition.of_capsules(of_places, 0).sum(dim=2))


def _em_backward(
    g_pose: Tensor | None,
    g_activation_in: Tensor | None,
    g_weight: Tensor | None,
    g_beta_u: Tensor | None,
    g_beta_a: Tensor | None,
    g_mean: Tensor,
    g_activation: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
    competition: _Competition | None,
) -> None:
    with _on(pose):
        stream = _Stream.of(pose, weight, mask, g_weight is not None)
        a, cost = _wide(activation), _wide(beta_u)
        assert cost is not None
        B, _, P, _, J, D = stream.sizes
        H = P * D
        iterations = len(inverse_temperatures)
        gaussians = [Gaussians.saved(state[t]) for t in range(iterations)]
        zero, zeros = state.new_zeros(B, J), state.new_zeros(B, J, H)
        probability = gaussians[-1].logit.sigmoid()
        to_mean = g_mean.to(state.dtype).reshape(B, J, H)
        to_variance = zeros
        to_logit = g_activation.to(state.dtype) * probability * torch.sigmoid(-gaussians[-1].logit)
        sum_u = sum_a = zero
        wide = None if g_activation_in is None else torch.zeros_like(g_activation_in, dtype=state.dtype)
        for begin, end in _groups(iterations, 5 * zeros.nbytes):
            states, scalars = state.new_empty(end - begin, 5, B, J, H), state.new_empty(end - begin, 2, B, J)
            shares = means = None
            if competition is not None:
                shares, means = state.new_zeros(2, end - begin, *pose.shape[:2])
            for t in range(end - 1, begin - 1, -1):
                g = gaussians[t]
                linear, quadratic, constant, to_beta_u, to_beta_a = m_step_backward(
                    g, to_mean, to_variance, to_logit, cost, inverse_temperatures[t]
                )
                sum_u, sum_a = sum_u + to_beta_u, sum_a + to_beta_a
                before, width, bias = (
                    (zeros, zeros, zero) if t == 0 else (gaussians[t - 1].mean, *gaussians[t - 1].e_step())
                )
                own, own_scalars = states[t - begin], scalars[t - begin]
                torch.stack([before, width, g.mean, linear, quadratic], out=own)
                torch.stack([bias, constant], out=own_scalars)
                own_shares = own_means = None
                if shares is not None and means is not None and competition is not None:
                    own_shares, own_means = shares[t - begin], means[t - begin]
                    if t == 0:
                        own_shares.copy_(competition.first_shares(mask, state))
                    else:
                        found = competition.shares(*stream.pair_sums(own, own_scalars, True))
                        for out, value in zip((own_shares, own_means), found, strict=True):
                            out.copy_(value)
                if t > 0:
                    sums = stream.reduce(
                        "em_adjoint", own, scalars=own_scalars, input_weight=a, shares=own_shares, means=own_means
                    )
                    to_mean, to_variance, to_logit = e_step_backward(
                        gaussians[t - 1], sums[..., -1], sums[..., :H], sums[..., H:-1]
                    )
            if g_pose is not None or g_weight is not None or wide is not None:
                stream.emit(
                    "em", g_pose, g_weight, states.flatten(0, 1), scalars=scalars.flatten(0, 1),
                    iterations=end - begin, input_weight=a, shares=shares, means=means, g_input_weight=wide,
                    more=end < iterations,
                )  # fmt: skip
        for out, value in ((g_beta_u, sum_u), (g_beta_a, sum_a)):
            if out is not None:
                out.copy_(value.sum(dim=0, dtype=torch.float64))
        if g_activation_in is not None and wide is not None:
            g_activation_in.copy_(wide)
