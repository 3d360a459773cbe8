"""Every operator, declared once: schema, shape checks, outputs and gradient.

An operator `capsops::name` is a row here: its schema; a function of the same arguments that checks them and allocates
the outputs (on real tensors it allocates what a backend then fills, on fake ones it is the shape rule that
torch.compile uses); and, for those a user calls, a `torch.autograd.Function` outside, whose backward is an operator
too.

Symbols: B batch, N input capsules, K their dimension, J output capsules, D their dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends
from .dtypes import FLOATING, accumulation_dtype

SQUASH_KINDS = ("sabour", "efficient")

_LIBRARY = torch.library.Library("capsops", "DEF")

Outputs = Callable[..., "Tensor | tuple[Tensor, ...]"]


def _operator(schema: str) -> Callable[[Outputs], Outputs]:
    """Declare the operator `schema`; the decorated function checks its arguments and allocates its outputs."""
    name = schema[: schema.index("(")]

    def declare(outputs: Outputs) -> Outputs:
        def run(*args: Any) -> Tensor | tuple[Tensor, ...]:
            out = outputs(*args)
            first = next(a for a in args if isinstance(a, Tensor))
            backend = backends.compiled(name, first)
            getattr(backend, name)(*(out if isinstance(out, tuple) else (out,)), *args)
            return out

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"capsops::{name}", outputs, lib=_LIBRARY)
        return outputs

    return declare


# ---- checks --------------------------------------------------------------------------------------


def _fail(op: str, what: str) -> None:
    raise ValueError(f"{op}: {what}")


def _shape(x: Tensor) -> str:
    return f"[{', '.join([str(n) for n in x.shape])}]"


def check_tensor(op: str, name: str, x: object) -> None:
    """Raise TypeError unless x is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} is a {type(x).__name__}; it must be a torch.Tensor")


def check_floating(op: str, **tensors: Tensor) -> None:
    """All of one floating dtype, on one device, and strided."""
    first: tuple[str, Tensor] | None = None
    for name, x in tensors.items():
        if x.layout != torch.strided:
            _fail(op, f"{name} has layout {x.layout}; it must be a dense (strided) tensor")
        if x.dtype not in FLOATING:
            _fail(op, f"{name} has dtype {x.dtype}; allowed are float32, float64, bfloat16 and float16")
        if first is None:
            first = (name, x)
            continue
        if x.dtype != first[1].dtype:
            _fail(op, f"{name} has dtype {x.dtype}, but {first[0]} has {first[1].dtype}; they must be the same")
        if x.device != first[1].device:
            _fail(op, f"{name} is on {x.device}, but {first[0]} is on {first[1].device}; they must be on one device")


def _check_shape(op: str, name: str, x: Tensor, axes: str, *sizes: int) -> None:
    if x.dim() != len(sizes) or any(n != m for n, m in zip(x.shape, sizes, strict=True)):
        wanted = ", ".join([str(n) for n in sizes])
        _fail(op, f"{name} has shape {_shape(x)}; expected [{axes}] = [{wanted}]")


def check_votes(op: str, u: Tensor, weight: Tensor, mask: Tensor | None = None) -> tuple[int, int, int, int, int]:
    """Check the operands of the votes û = u W and return B, N, K, J, D."""
    check_floating(op, u=u, weight=weight)
    if u.dim() != 3:
        _fail(op, f"u has shape {_shape(u)}; expected 3 dimensions, [B, N, K]")
    if weight.dim() not in (3, 4):
        _fail(op, f"weight has shape {_shape(weight)}; expected [N, K, J, D], or [K, J, D] to share it")
    B, N, K = u.shape
    J, D = weight.shape[-2:]
    if weight.dim() == 4 and (weight.shape[0] != N or weight.shape[1] != K):
        _fail(op, f"weight has shape {_shape(weight)}, but u is [B, N, K] = {_shape(u)}; expected [{N}, {K}, J, D]")
    if weight.dim() == 3 and weight.shape[0] != K:
        _fail(op, f"weight has shape {_shape(weight)}, but u is [B, N, K] = {_shape(u)}; expected [{K}, J, D]")
    for name, n in (("K", K), ("J", J), ("D", D)):
        if n == 0:
            _fail(op, f"{name} is 0 (u {_shape(u)}, weight {_shape(weight)}); capsules need at least one dimension")
    if mask is not None:
        if mask.layout != torch.strided:
            _fail(op, f"mask has layout {mask.layout}; it must be a dense (strided) tensor")
        if mask.dtype != torch.bool:
            _fail(op, f"mask has dtype {mask.dtype}; it must be bool (True = the capsule is there)")
        if mask.device != u.device:
            _fail(op, f"mask is on {mask.device}, but u is on {u.device}")
        _check_shape(op, "mask", mask, "B, N", B, N)
    return B, N, K, J, D


def check_attention(
    op: str, u: Tensor, weight: Tensor, attn_weight: Tensor, attn_bias: Tensor | None, mask: Tensor | None
) -> tuple[int, int, int, int, int]:
    """Check the arguments of attention routing and return B, N, K, J, D."""
    sizes = check_votes(op, u, weight, mask)
    J = sizes[3]
    check_floating(op, u=u, attn_weight=attn_weight)
    _check_shape(op, "attn_weight", attn_weight, "J, J", J, J)
    if attn_bias is not None:
        check_floating(op, u=u, attn_bias=attn_bias)
        _check_shape(op, "attn_bias", attn_bias, "J", J)
    return sizes


def check_dynamic(
    op: str, u: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, iterations: int
) -> tuple[int, int, int, int, int]:
    """Check the arguments of dynamic routing and return B, N, K, J, D."""
    sizes = check_votes(op, u, weight, mask)
    J, D = sizes[3:]
    if bias is not None:
        check_floating(op, u=u, bias=bias)
        _check_shape(op, "bias", bias, "J, D", J, D)
    check_iterations(op, iterations)
    return sizes


def check_iterations(op: str, iterations: object) -> None:
    """Raise ValueError unless this is a number of iterations that a kernel can be told."""
    if isinstance(iterations, bool) or not isinstance(iterations, int) or not 1 <= iterations < 2**31:
        _fail(op, f"iterations is {iterations!r}; it must be an integer of at least 1 (and below 2³¹)")


def check_flags(op: str, **flags: object) -> None:
    """Raise ValueError for an option that is not a bool."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            _fail(op, f"{name} is {flag!r}; it must be True or False")


def _check_saved(op: str, u: Tensor, g_v: Tensor, s: Tensor, axes: str, *sizes: int) -> None:
    """The gradient that arrives [B, J, D], and the sums that forward saved, [*sizes] in the accumulation dtype."""
    check_floating(op, u=u, g_v=g_v)
    _check_shape(op, "g_v", g_v, "B, J, D", *sizes[-3:])
    _check_shape(op, "s", s, axes, *sizes)
    if s.dtype != accumulation_dtype(u.dtype) or s.device != u.device:
        _fail(op, f"s is {s.dtype} on {s.device}; expected {accumulation_dtype(u.dtype)} on {u.device}")


def check_squash(op: str, s: Tensor, kind: str, **same_shape: Tensor) -> None:
    """Check the arguments of squash; tensors in same_shape must have the shape of s."""
    check_floating(op, s=s, **same_shape)
    if s.dim() == 0:
        _fail(op, "s has no dimension; expected at least one, along which the length is taken")
    if kind not in SQUASH_KINDS:
        _fail(op, f"kind is {kind!r}; allowed are {', '.join(map(repr, SQUASH_KINDS))}")
    for name, x in same_shape.items():
        _check_shape(op, name, x, "as s", *s.shape)


def _gradients(wanted: Sequence[bool], *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for the gradients that somebody asked for, and tensors of no elements for the others."""
    first = next(x for x in tensors if x is not None)
    return tuple(
        x.new_empty(x.shape) if want and x is not None else first.new_empty(0)
        for want, x in zip(wanted, tensors, strict=True)
    )


def _returned(wanted: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor | None]:
    return [g if want else None for want, g in zip(wanted, gradients, strict=True)]


class _NoSecondDerivative(torch.autograd.Function):
    """A gradient, as it is, that raises an error when it is differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "capsops: the compiled kernels cannot be differentiated twice; "
            '`with capsops.use_backend("reference"):` around the forward pass can'
        )


def _once_differentiable(
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Callable[..., tuple[Tensor | None, ...]]:
    """A backward whose gradients raise an error when they are differentiated.

    torch's own decorator of that name looks at the gradient that arrives alone; but a gradient depends on the saved
    inputs too, and of a sum of outputs on nothing else.
    """

    def run(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return backward(ctx, g)
        with torch.no_grad():
            gradients = backward(ctx, g)
        depends_on = [x for x in (g, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(x if x is None else _NoSecondDerivative.apply(x, *depends_on) for x in gradients)

    return run


# ---- squash --------------------------------------------------------------------------------------


@_operator("squash(Tensor s, str kind) -> Tensor")
def _squash(s: Tensor, kind: str) -> Tensor:
    check_squash("squash", s, kind)
    return s.new_empty(s.shape)


@_operator("squash_backward(Tensor g_v, Tensor s, str kind) -> Tensor")
def _squash_backward(g_v: Tensor, s: Tensor, kind: str) -> Tensor:
    check_squash("squash_backward", s, kind, g_v=g_v)
    return s.new_empty(s.shape)


class Squash(torch.autograd.Function):
    """v = squash(s) along the last dimension."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(s)
        ctx.kind = kind
        return torch.ops.capsops.squash(s, kind)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, g_v: Tensor) -> tuple[Tensor, None]:
        (s,) = ctx.saved_tensors
        return torch.ops.capsops.squash_backward(g_v, s, ctx.kind), None


# ---- affine votes --------------------------------------------------------------------------------


@_operator("affine_votes(Tensor u, Tensor weight) -> Tensor")
def _affine_votes(u: Tensor, weight: Tensor) -> Tensor:
    B, N, _, J, D = check_votes("affine_votes", u, weight)
    return u.new_empty(B, N, J, D)


@_operator("affine_votes_backward(Tensor g_votes, Tensor u, Tensor weight, bool[2] wanted) -> (Tensor, Tensor)")
def _affine_votes_backward(g_votes: Tensor, u: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    B, N, _, J, D = check_votes("affine_votes_backward", u, weight)
    check_floating("affine_votes_backward", u=u, g_votes=g_votes)
    _check_shape("affine_votes_backward", "g_votes", g_votes, "B, N, J, D", B, N, J, D)
    return _gradients(wanted, u, weight)


class AffineVotes(torch.autograd.Function):
    """û = u W, materialised."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(u, weight)
        return torch.ops.capsops.affine_votes(u, weight)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, g_votes: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:2])
        u, weight = ctx.saved_tensors
        return tuple(_returned(wanted, torch.ops.capsops.affine_votes_backward(g_votes, u, weight, wanted)))


# ---- attention routing ---------------------------------------------------------------------------


@_operator(
    "attention_routing(Tensor u, Tensor weight, Tensor attn_weight, Tensor? attn_bias, Tensor? mask)"
    " -> (Tensor v, Tensor s)"
)
def _attention_routing(
    u: Tensor, weight: Tensor, attn_weight: Tensor, attn_bias: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, _, _, J, D = check_attention("attention_routing", u, weight, attn_weight, attn_bias, mask)
    return u.new_empty(B, J, D), u.new_empty(B, J, D, dtype=accumulation_dtype(u.dtype))


@_operator(
    "attention_routing_backward(Tensor g_v, Tensor s, Tensor u, Tensor weight, Tensor attn_weight, Tensor? attn_bias,"
    " Tensor? mask, bool[4] wanted) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _attention_routing_backward(
    g_v: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    attn_weight: Tensor,
    attn_bias: Tensor | None,
    mask: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    op = "attention_routing_backward"
    B, _, _, J, D = check_attention(op, u, weight, attn_weight, attn_bias, mask)
    _check_saved(op, u, g_v, s, "B, J, D", B, J, D)
    return _gradients(wanted, u, weight, attn_weight, attn_bias)


class AttentionRouting(torch.autograd.Function):
    """v of attention routing; saves the inputs and s [B, J, D]."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, attn_weight: Tensor, attn_bias: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        v, s = torch.ops.capsops.attention_routing(u, weight, attn_weight, attn_bias, mask)
        ctx.save_for_backward(s, u, weight, attn_weight, attn_bias, mask)
        return v

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, g_v: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:4])
        gradients = torch.ops.capsops.attention_routing_backward(g_v, *ctx.saved_tensors, wanted)
        return (*_returned(wanted, gradients), None)


# ---- dynamic routing -----------------------------------------------------------------------------


@_operator(
    "dynamic_routing(Tensor u, Tensor weight, Tensor? bias, Tensor? mask, int iterations, bool leaky)"
    " -> (Tensor v, Tensor s)"
)
def _dynamic_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, iterations: int, leaky: bool
) -> tuple[Tensor, Tensor]:
    B, _, _, J, D = check_dynamic("dynamic_routing", u, weight, bias, mask, iterations)
    return u.new_empty(B, J, D), u.new_empty(iterations, B, J, D, dtype=accumulation_dtype(u.dtype))


@_operator(
    "dynamic_routing_backward(Tensor g_v, Tensor s, Tensor u, Tensor weight, Tensor? bias, Tensor? mask,"
    " int iterations, bool leaky, bool detach, bool[3] wanted) -> (Tensor, Tensor, Tensor)"
)
def _dynamic_routing_backward(
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
) -> tuple[Tensor, ...]:
    op = "dynamic_routing_backward"
    B, _, _, J, D = check_dynamic(op, u, weight, bias, mask, iterations)
    _check_saved(op, u, g_v, s, "iterations, B, J, D", iterations, B, J, D)
    return _gradients(wanted, u, weight, bias)


class DynamicRouting(torch.autograd.Function):
    """v of dynamic routing; saves the inputs and s of every iteration, [iterations, B, J, D]."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        iterations: int,
        leaky: bool,
        detach: bool,
    ) -> Tensor:
        v, s = torch.ops.capsops.dynamic_routing(u, weight, bias, mask, iterations, leaky)
        ctx.save_for_backward(s, u, weight, bias, mask)
        ctx.options = (iterations, leaky, detach)
        return v

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, g_v: Tensor) -> tuple[Tensor | None, ...]:
        wanted = list(ctx.needs_input_grad[:3])
        gradients = torch.ops.capsops.dynamic_routing_backward(g_v, *ctx.saved_tensors, *ctx.options, wanted)
        return (*_returned(wanted, gradients), None, None, None, None)
