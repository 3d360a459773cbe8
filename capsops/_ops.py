"""Every operator, declared once: schema, shape checks, outputs, gradient and batch rule.

An operator `capsops::name` is a function here, under its schema. The function takes the operator's arguments, checks
them and allocates the outputs: on real tensors a backend then fills these, on fake tensors they are the shape rule that
torch.compile and torch.export use. The gradient of `name` is the operator `name_backward`; `_autograd.py` ties them
together.

Symbols: B batch, N input capsules, K their dimension, J output capsules, D their dimension; P rows of a capsule that is
a matrix.

Checks run on every call, so each is one cheap condition; what is wrong is found out only on failure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import backends, memory
from ._autograd import differentiable
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
            kernel = getattr(backends.compiled(name, args[0]), name)
            if isinstance(out, tuple):
                kernel(*out, *args)
            else:
                kernel(out, *args)
            return out

        _LIBRARY.define(schema)
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"capsops::{name}", outputs, lib=_LIBRARY)
        return outputs

    return declare


# ---- checks --------------------------------------------------------------------------------------


def _fail(op: str, what: str) -> NoReturn:
    raise ValueError(f"{op}: {what}")


def _shape(x: Tensor) -> str:
    return f"[{', '.join([str(n) for n in x.shape])}]"


def check_tensors(op: str, names: str, required: int, *tensors: object) -> None:
    """Raise TypeError for what is no tensor; what comes after the required ones may be None. names: as in "u mask"."""
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor) and (x is not None or i < required):
            raise TypeError(f"{op}: {names.split()[i]} is a {type(x).__name__}; it must be a torch.Tensor")


def check_floating(op: str, names: str, first: Tensor, *others: Tensor | None) -> None:
    """All of one floating dtype, on one device, and strided. names: as in "u weight bias"; None is passed over."""
    dtype, device = first.dtype, first.device
    good = dtype in FLOATING and first.layout == torch.strided
    for x in others:
        if x is not None and (x.dtype != dtype or x.device != device or x.layout != torch.strided):
            good = False
    if not good:
        _refuse_floating(op, names.split(), first, *others)


def _refuse_floating(op: str, names: Sequence[str], first: Tensor, *others: Tensor | None) -> None:
    for name, x in zip(names, (first, *others), strict=False):
        if x is None:
            continue
        if x.layout != torch.strided:
            _fail(op, f"{name} has layout {x.layout}; it must be a dense (strided) tensor")
        if x.dtype not in FLOATING:
            _fail(op, f"{name} has dtype {x.dtype}; allowed are float32, float64, bfloat16 and float16")
        if x.dtype != first.dtype:
            _fail(op, f"{name} has dtype {x.dtype}, but {names[0]} has {first.dtype}; they must be the same")
        if x.device != first.device:
            _fail(op, f"{name} is on {x.device}, but {names[0]} is on {first.device}; they must be on one device")


def _check_shape(op: str, name: str, x: Tensor, axes: str, *sizes: int) -> None:
    if x.shape != sizes:
        wanted = ", ".join([str(n) for n in sizes])
        _fail(op, f"{name} has shape {_shape(x)}; expected [{axes}] = [{wanted}]")


def check_votes(
    op: str, u: Tensor, weight: Tensor, mask: Tensor | None = None, name: str = "u"
) -> tuple[int, int, int, int, int]:
    """Check the shapes of the operands of the votes û = u W, besides rows of u, and return B, N, K, J, D."""
    sizes, matrices = u.shape, weight.shape
    B, N, K = sizes[0], sizes[1], sizes[-1]
    if matrices[:-2] != ((N, K) if len(matrices) == 4 else (K,)):
        if len(matrices) not in (3, 4):
            _fail(op, f"weight has shape {_shape(weight)}; expected [N, K, J, D], or [K, J, D] to share it")
        axes = "[B, N, K]" if len(sizes) == 3 else "[B, N, P, K]"
        wanted = f"[{N}, {K}, J, D]" if len(matrices) == 4 else f"[{K}, J, D]"
        _fail(op, f"weight has shape {_shape(weight)}, but {name} is {axes} = {_shape(u)}; expected {wanted}")
    J, D = matrices[-2], matrices[-1]
    if K == 0 or J == 0 or D == 0:
        empty = "K" if K == 0 else "J" if J == 0 else "D"
        _fail(op, f"{empty} is 0 ({name} {_shape(u)}, weight {_shape(weight)}); capsules need at least one dimension")
    if mask is not None and (
        mask.dtype != torch.bool or mask.shape != (B, N) or mask.device != u.device or mask.layout != torch.strided
    ):
        if mask.layout != torch.strided:
            _fail(op, f"mask has layout {mask.layout}; it must be a dense (strided) tensor")
        if mask.dtype != torch.bool:
            _fail(op, f"mask has dtype {mask.dtype}; it must be bool (True = the capsule is there)")
        if mask.device != u.device:
            _fail(op, f"mask is on {mask.device}, but {name} is on {u.device}")
        _check_shape(op, "mask", mask, "B, N", B, N)
    return B, N, K, J, D


def _check_vectors(op: str, u: Tensor) -> None:
    if u.dim() != 3:
        _fail(op, f"u has shape {_shape(u)}; expected 3 dimensions, [B, N, K]")


def check_affine_votes(op: str, u: Tensor, weight: Tensor) -> tuple[int, int, int, int, int]:
    """Check the arguments of affine_votes and return B, N, K, J, D."""
    check_floating(op, "u weight", u, weight)
    _check_vectors(op, u)
    return check_votes(op, u, weight)


def check_attention(
    op: str, u: Tensor, weight: Tensor, attn_weight: Tensor, attn_bias: Tensor | None, mask: Tensor | None
) -> tuple[int, int, int, int, int]:
    """Check the arguments of attention routing and return B, N, K, J, D."""
    check_floating(op, "u weight attn_weight attn_bias", u, weight, attn_weight, attn_bias)
    _check_vectors(op, u)
    sizes = check_votes(op, u, weight, mask)
    J = sizes[3]
    _check_shape(op, "attn_weight", attn_weight, "J, J", J, J)
    if attn_bias is not None:
        _check_shape(op, "attn_bias", attn_bias, "J", J)
    return sizes


def check_dynamic(
    op: str, u: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, iterations: int
) -> tuple[int, int, int, int, int]:
    """Check the arguments of dynamic routing and return B, N, K, J, D."""
    check_floating(op, "u weight bias", u, weight, bias)
    _check_vectors(op, u)
    sizes = check_votes(op, u, weight, mask)
    if bias is not None:
        _check_shape(op, "bias", bias, "J, D", sizes[3], sizes[4])
    check_iterations(op, iterations)
    return sizes


def check_self_attention(
    op: str, u: Tensor, weight: Tensor, prior: Tensor | None, mask: Tensor | None
) -> tuple[int, int, int, int, int]:
    """Check the arguments of self-attention routing, besides the scale, and return B, N, K, J, D."""
    check_floating(op, "u weight prior", u, weight, prior)
    _check_vectors(op, u)
    sizes = check_votes(op, u, weight, mask)
    if prior is not None:
        _check_shape(op, "prior", prior, "N, J", sizes[1], sizes[3])
    return sizes


def check_em(
    op: str,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
) -> tuple[int, int, int, int, int]:
    """Check the arguments of EM routing, besides the temperatures, and return B, N, K, J, D."""
    names = "pose activation weight beta_u beta_a"
    check_floating(op, names, pose, activation, weight, beta_u, beta_a)
    if pose.dim() not in (3, 4):
        _fail(op, f"pose has shape {_shape(pose)}; expected 3 or 4 dimensions, [B, N, K] or [B, N, P, K]")
    sizes = check_votes(op, pose, weight, mask, "pose")
    B, N, _, J, _ = sizes
    if pose.dim() == 4 and pose.shape[2] == 0:
        _fail(op, f"P is 0 (pose {_shape(pose)}); capsules need at least one dimension")
    _check_shape(op, "activation", activation, "B, N", B, N)
    _check_shape(op, "beta_u", beta_u, "J", J)
    _check_shape(op, "beta_a", beta_a, "J", J)
    return sizes


def check_iterations(op: str, iterations: object) -> None:
    """Raise ValueError unless this is a number of iterations that a kernel can be told."""
    if isinstance(iterations, bool) or not isinstance(iterations, int) or not 1 <= iterations < 2**31:
        _fail(op, f"iterations is {iterations!r}; it must be an integer of at least 1 (and below 2³¹)")


def check_flag(op: str, name: str, flag: object) -> None:
    """Raise ValueError for an option that is not a bool."""
    if not isinstance(flag, bool):
        _fail(op, f"{name} is {flag!r}; it must be True or False")


def check_number(op: str, name: str, value: object) -> None:
    """Raise ValueError unless this is a finite number."""
    numbers = int | float | torch.SymInt | torch.SymFloat
    if isinstance(value, bool) or not isinstance(value, numbers) or not -math.inf < value < math.inf:
        _fail(op, f"{name} is {value!r}; it must be a finite number")


def _check_temperatures(op: str, values: Sequence[float]) -> None:
    """λ of every iteration, for an operator that is called directly."""
    if not values:
        _fail(op, "inverse_temperatures is []; expected at least one number, one for each iteration")
    for value in values:
        if not 0 <= value < math.inf:
            _fail(op, f"inverse_temperatures has {value!r}; expected finite numbers of at least 0")


def inverse_temperatures(op: str, inverse_temperature: float | Sequence[float], iterations: int) -> list[float]:
    """λ of every iteration: what is given, or for one number f the schedule f (1 − 0.95^(t+1)).

    Raises:
        ValueError: no number of iterations; numbers that are not finite or below 0, or not one for each iteration.
    """
    check_iterations(op, iterations)
    name = "inverse_temperature"
    if isinstance(inverse_temperature, Sequence) and not isinstance(inverse_temperature, str):
        values = list(inverse_temperature)
        if len(values) != iterations:
            _fail(op, f"{name} has {len(values)} numbers, but iterations is {iterations}; expected one for each")
    else:
        check_number(op, name, inverse_temperature)
        values = [inverse_temperature * (1 - 0.95 ** (t + 1)) for t in range(iterations)]
    for value in values:
        check_number(op, name, value)
        if value < 0:
            _fail(op, f"{name} is {inverse_temperature!r}; it must not be negative")
    return [float(value) for value in values]


def _check_gradient(op: str, name: str, g: Tensor, u: Tensor, axes: str, *sizes: int) -> None:
    """The gradient that arrives, [*sizes] and otherwise as u."""
    check_floating(op, f"u {name}", u, g)
    _check_shape(op, name, g, axes, *sizes)


def _check_saved(op: str, name: str, x: Tensor, u: Tensor, axes: str, *sizes: int) -> None:
    """What forward saved, [*sizes] in the accumulation dtype of u."""
    _check_shape(op, name, x, axes, *sizes)
    dtype = accumulation_dtype(u.dtype)
    if x.dtype != dtype or x.device != u.device or x.layout != torch.strided:
        _fail(op, f"{name} is {x.dtype} on {x.device}, {x.layout}; expected {dtype} on {u.device}, {torch.strided}")


def _check_kind(op: str, name: str, kind: str) -> None:
    if kind not in SQUASH_KINDS:
        _fail(op, f"{name} is {kind!r}; allowed are {', '.join(map(repr, SQUASH_KINDS))}")


def check_squash(op: str, s: Tensor, kind: str) -> None:
    """Check the arguments of squash."""
    check_floating(op, "s", s)
    if s.dim() == 0:
        _fail(op, "s has no dimension; expected at least one, along which the length is taken")
    _check_kind(op, "kind", kind)


def check_primary(op: str, features: Tensor, types: int, kind: str) -> tuple[int, int, int]:
    """Check the arguments of primary_capsules and return B, N, K."""
    check_floating(op, "features", features)
    if features.dim() != 4:
        _fail(op, f"features has shape {_shape(features)}; expected 4 dimensions, [B, C, H, W]")
    if isinstance(types, bool) or not isinstance(types, int) or types < 1:
        _fail(op, f"types is {types!r}; it must be an integer of at least 1")
    _check_kind(op, "squash", kind)
    B, C, height, width = features.shape
    K, pixels = C // types, height * width
    if C == 0 or C % types != 0:
        _fail(op, f"features has shape {_shape(features)}; its {C} channels must be a multiple of types, {types}")
    return B, types * pixels, K


def _gradients(op: str, wanted: Sequence[bool], first: Tensor, **others: Tensor | None) -> tuple[Tensor, ...]:
    """Memory for the gradients that are wanted, and tensors of no elements for the others."""
    if len(wanted) != 1 + len(others):
        _fail(op, f"wanted has {len(wanted)} values; expected {1 + len(others)}, one for each gradient")
    gradients = [memory.empty_like(first) if wanted[0] else first.new_empty(0)]
    for (name, x), want in zip(others.items(), wanted[1:], strict=True):
        if want and x is None:
            _fail(op, f"wanted asks for the gradient of {name}, which is None; expected a tensor")
        gradients.append(memory.empty_like(x) if want and x is not None else first.new_empty(0))
    return tuple(gradients)


# ---- squash --------------------------------------------------------------------------------------


@_operator("squash(Tensor s, str kind) -> Tensor v")
def _squash(s: Tensor, kind: str) -> Tensor:
    check_squash("squash", s, kind)
    return s.new_empty(s.shape)


@_operator("squash_backward(Tensor g_v, Tensor s, str kind) -> Tensor g_s")
def _squash_backward(g_v: Tensor, s: Tensor, kind: str) -> Tensor:
    check_squash("squash_backward", s, kind)
    check_floating("squash_backward", "s g_v", s, g_v)
    _check_shape("squash_backward", "g_v", g_v, "as s", *s.shape)
    return s.new_empty(s.shape)


squash = differentiable(_LIBRARY, "squash", results=1, batch=None)


# ---- primary capsules ----------------------------------------------------------------------------


@_operator("primary_capsules(Tensor features, int types, bool legacy, str kind) -> Tensor u")
def _primary_capsules(features: Tensor, types: int, legacy: bool, kind: str) -> Tensor:
    return features.new_empty(check_primary("primary_capsules", features, types, kind))


@_operator(
    "primary_capsules_backward(Tensor g_u, Tensor features, int types, bool legacy, str kind) -> Tensor g_features"
)
def _primary_capsules_backward(g_u: Tensor, features: Tensor, types: int, legacy: bool, kind: str) -> Tensor:
    op = "primary_capsules_backward"
    sizes = check_primary(op, features, types, kind)
    check_floating(op, "features g_u", features, g_u)
    _check_shape(op, "g_u", g_u, "B, N, K", *sizes)
    # The layout of the features, for the convolution behind wants its gradient as it gave its output.
    last = not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last)
    return torch.empty_like(features, memory_format=torch.channels_last if last else torch.contiguous_format)


primary_capsules = differentiable(_LIBRARY, "primary_capsules", results=1, batch={"features": 0, "u": 0})


# ---- affine votes --------------------------------------------------------------------------------


@_operator("affine_votes(Tensor u, Tensor weight) -> Tensor votes")
def _affine_votes(u: Tensor, weight: Tensor) -> Tensor:
    B, N, _, J, D = check_affine_votes("affine_votes", u, weight)
    return u.new_empty(B, N, J, D)


@_operator(
    "affine_votes_backward(Tensor g_votes, Tensor u, Tensor weight, bool[2] wanted) -> (Tensor g_u, Tensor g_weight)"
)
def _affine_votes_backward(g_votes: Tensor, u: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    B, N, _, J, D = check_affine_votes("affine_votes_backward", u, weight)
    _check_gradient("affine_votes_backward", "g_votes", g_votes, u, "B, N, J, D", B, N, J, D)
    return _gradients("affine_votes_backward", wanted, u, weight=weight)


affine_votes = differentiable(_LIBRARY, "affine_votes", results=1, batch={"u": 0, "votes": 0})


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
    " Tensor? mask, bool[4] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_attn_weight, Tensor g_attn_bias)"
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
    _check_gradient(op, "g_v", g_v, u, "B, J, D", B, J, D)
    _check_saved(op, "s", s, u, "B, J, D", B, J, D)
    return _gradients(op, wanted, u, weight=weight, attn_weight=attn_weight, attn_bias=attn_bias)


attention_routing = differentiable(_LIBRARY, "attention_routing", results=1, batch={"u": 0, "mask": 0, "v": 0, "s": 0})


# ---- dynamic routing -----------------------------------------------------------------------------


@_operator(
    "dynamic_routing(Tensor u, Tensor weight, Tensor? bias, Tensor? mask, int iterations, bool leaky, bool detach)"
    " -> (Tensor v, Tensor s)"
)
def _dynamic_routing(
    u: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, iterations: int, leaky: bool, detach: bool
) -> tuple[Tensor, Tensor]:
    # detach changes nothing but the gradient.
    B, _, _, J, D = check_dynamic("dynamic_routing", u, weight, bias, mask, iterations)
    return u.new_empty(B, J, D), u.new_empty(iterations, B, J, D, dtype=accumulation_dtype(u.dtype))


@_operator(
    "dynamic_routing_backward(Tensor g_v, Tensor s, Tensor u, Tensor weight, Tensor? bias, Tensor? mask,"
    " int iterations, bool leaky, bool detach, bool[3] wanted)"
    " -> (Tensor g_u, Tensor g_weight, Tensor g_bias)"
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
    _check_gradient(op, "g_v", g_v, u, "B, J, D", B, J, D)
    _check_saved(op, "s", s, u, "iterations, B, J, D", iterations, B, J, D)
    return _gradients(op, wanted, u, weight=weight, bias=bias)


dynamic_routing = differentiable(_LIBRARY, "dynamic_routing", results=1, batch={"u": 0, "mask": 0, "v": 0, "s": 1})


# ---- self-attention routing ----------------------------------------------------------------------


@_operator(
    "self_attention_routing(Tensor u, Tensor weight, Tensor? prior, Tensor? mask, float scale)"
    " -> (Tensor v, Tensor total, Tensor s)"
)
def _self_attention_routing(
    u: Tensor, weight: Tensor, prior: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, _, J, D = check_self_attention("self_attention_routing", u, weight, prior, mask)
    check_number("self_attention_routing", "scale", scale)
    wide = accumulation_dtype(u.dtype)
    return u.new_empty(B, J, D), u.new_empty(B, J, D, dtype=wide), u.new_empty(B, J, D, dtype=wide)


@_operator(
    "self_attention_routing_backward(Tensor g_v, Tensor total, Tensor s, Tensor u, Tensor weight, Tensor? prior,"
    " Tensor? mask, float scale, bool[3] wanted) -> (Tensor g_u, Tensor g_weight, Tensor g_prior)"
)
def _self_attention_routing_backward(
    g_v: Tensor,
    total: Tensor,
    s: Tensor,
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None,
    mask: Tensor | None,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    op = "self_attention_routing_backward"
    B, _, _, J, D = check_self_attention(op, u, weight, prior, mask)
    check_number(op, "scale", scale)
    _check_gradient(op, "g_v", g_v, u, "B, J, D", B, J, D)
    _check_saved(op, "total", total, u, "B, J, D", B, J, D)
    _check_saved(op, "s", s, u, "B, J, D", B, J, D)
    return _gradients(op, wanted, u, weight=weight, prior=prior)


self_attention_routing = differentiable(
    _LIBRARY, "self_attention_routing", results=1, batch={"u": 0, "mask": 0, "v": 0, "total": 0, "s": 0}
)


# ---- EM routing ----------------------------------------------------------------------------------


@_operator(
    "em_routing(Tensor pose, Tensor activation, Tensor weight, Tensor beta_u, Tensor beta_a, Tensor? mask,"
    " float[] inverse_temperatures) -> (Tensor mean, Tensor activation_out, Tensor state)"
)
def _em_routing(
    pose: Tensor,
    activation: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    B, _, _, J, D = check_em("em_routing", pose, activation, weight, beta_u, beta_a, mask)
    _check_temperatures("em_routing", inverse_temperatures)
    vote, state = _em_shapes(pose, D)
    wide = accumulation_dtype(pose.dtype)
    return (
        pose.new_empty(B, J, *vote),
        pose.new_empty(B, J),
        pose.new_empty(len(inverse_temperatures), B, J, state, dtype=wide),
    )


def _em_shapes(pose: Tensor, D: int) -> tuple[tuple[int, ...], int]:
    """The shape of a vote, [D] or [P, D], and how many numbers an iteration leaves of an output capsule.

    With H = P · D they are μ [H], σ² [H], Σ_i w_i and the logit z.
    """
    if pose.dim() == 3:
        return (D,), 3 * D + 2
    return (pose.shape[2], D), 3 * pose.shape[2] * D + 2


@_operator(
    "em_routing_backward(Tensor g_mean, Tensor g_activation, Tensor state, Tensor pose, Tensor activation,"
    " Tensor weight, Tensor beta_u, Tensor beta_a, Tensor? mask, float[] inverse_temperatures, bool[5] wanted)"
    " -> (Tensor g_pose, Tensor g_activation_in, Tensor g_weight, Tensor g_beta_u, Tensor g_beta_a)"
)
def _em_routing_backward(
    g_mean: Tensor,
    g_activation: Tensor,
    state: Tensor,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    inverse_temperatures: Sequence[float],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    op = "em_routing_backward"
    B, _, _, J, D = check_em(op, pose, activation, weight, beta_u, beta_a, mask)
    _check_temperatures(op, inverse_temperatures)
    vote, state_size = _em_shapes(pose, D)
    _check_gradient(op, "g_mean", g_mean, pose, "B, J, (P,) D", B, J, *vote)
    _check_gradient(op, "g_activation", g_activation, pose, "B, J", B, J)
    R = len(inverse_temperatures)
    _check_saved(op, "state", state, pose, "iterations, B, J, 3H + 2", R, B, J, state_size)
    return _gradients(op, wanted, pose, activation=activation, weight=weight, beta_u=beta_u, beta_a=beta_a)


em_routing = differentiable(
    _LIBRARY,
    "em_routing",
    results=2,
    batch={"pose": 0, "activation": 0, "mask": 0, "mean": 0, "activation_out": 0, "state": 1, "activation_in": 0},
)
