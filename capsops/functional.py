"""The functions a user calls.

Each checks its arguments, picks a backend and is differentiable. Symbols: B batch, N input capsules, K their dimension,
J output capsules, D their dimension; P rows of a capsule that is a matrix.

dtypes: float32, bfloat16 and float16 with sums kept in float32; float64 throughout. All floating arguments of one call
must have the same dtype and device.

Autocast: every function here runs in float32 (inputs of lower precision are cast up, as autocast does for norms and
softmax). The transformation matrices are by far the largest operand: casting them down would cost more than it saves.

Derivatives: `backward`, and of `torch.func` grad, vjp, jacrev and vmap. The compiled backends refuse second derivatives
and forward mode (jvp, jacfwd, hessian) with an error; `use_backend("reference")` has them.

Graphs: torch.compile, torch.export, make_fx and torch.fx.symbolic_trace record the operators, whose gradients are those
of eager calls. torch.onnx.export and torch.jit.trace record the reference instead, for programs without capsops.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.jit._trace import TracerWarning, is_tracing

from . import _ops, backends
from .backends import reference
from .dtypes import LOW_PRECISION, accumulation_dtype

LAYOUTS = ("channels", "legacy")
OPERATORS = (
    "squash",
    "primary_capsules",
    "affine_votes",
    "attention_routing",
    "dynamic_routing",
    "self_attention_routing",
    "em_routing",
)

# torch.jit.trace warns of every comparison of sizes. Ours refuse bad ones; the traced graph holds for every B.
warnings.filterwarnings("ignore", category=TracerWarning, module=r"capsops\.")


def settle(op: str, names: str, required: int, *tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors by the autocast rule. Raises TypeError for what is no tensor; see `_ops.check_tensors`."""
    _ops.check_tensors(op, names, required, *tensors)
    first: Tensor = tensors[0]  # type: ignore[assignment]
    _ops.check_floating(op, names, first)  # before a backend is asked whether it takes its dtype
    device = first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    return tuple([x.float() if x is not None and x.dtype in LOW_PRECISION else x for x in tensors])


def _plain(op: str, x: Tensor) -> bool:
    """Whether the reference runs an operator on tensors like this one.

    It always does where the graph is for another program, which has none of our operators: ONNX and TorchScript.
    """
    if is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()):
        return True
    return backends.select(op, x.device, x.dtype) == "reference"


def float32(x: Tensor) -> torch.autocast:
    """No autocast inside; what should be in float32 already is."""
    return torch.autocast(x.device.type, enabled=False)


def squash(s: Tensor, dim: int = -1, kind: str = "sabour") -> Tensor:
    """Shrink vectors to a length below 1, keeping their direction.

    Args:
        s: any shape with at least one dimension.
        dim: the dimension that holds the vectors' components.
        kind: "sabour": n²/(1+n²) · s/n with n = ‖s‖ (Sabour et al. 2017, eq. 1); "efficient": (1 − e^{−n}) · s/n
            (Mazzia et al. 2021, eq. 4).

    Returns:
        v, of the shape and dtype of s. Finite, with a finite gradient, for every finite s, including 0.

    Raises:
        ValueError: a wrong dtype, dim or kind.
    """
    (s,) = settle("squash", "s", 1, s)
    _ops.check_squash("squash", s, kind)
    if isinstance(dim, bool) or not isinstance(dim, int) or not -s.dim() <= dim < s.dim():
        allowed = f"{-s.dim()} … {s.dim() - 1}"
        raise ValueError(f"squash: dim is {dim!r}; s has {s.dim()} dimensions, so allowed are {allowed}")
    last = dim in (-1, s.dim() - 1)
    x = s if last else s.movedim(dim, -1)
    if _plain("squash", s):
        with float32(s):
            v = reference.squash(x, kind)
    else:
        v = _ops.squash(x, kind)
    return v if last else v.movedim(-1, dim)


def primary_capsules(features: Tensor, types: int, *, layout: str = "channels", squash: str = "sabour") -> Tensor:
    """The output of a convolution read as capsules, and squashed, in one pass (Sabour et al. 2017, section 4).

    Args:
        features: [B, C, H, W], contiguous or channels_last, with C = types · K.
        types: capsule types.
        layout: "channels": the components of a capsule are K neighbouring channels at one location; the capsules run
            over types, then rows, then columns. "legacy": a plain reshape of [B, C, H, W], as in published CardioCaps:
            they are K neighbouring pixels of one channel, and where H · W is no multiple of K, a capsule goes on in the
            next channel. (Features that are channels_last are then copied.)
        squash: "sabour" or "efficient", see `squash`.

    Returns:
        u [B, N, K] with N = types · H · W.

    Raises:
        ValueError: wrong shapes or dtypes, an unknown layout or squash.
    """
    op = "primary_capsules"
    (features,) = settle(op, "features", 1, features)
    if layout not in LAYOUTS:
        raise ValueError(f"{op}: layout is {layout!r}; allowed are {', '.join(map(repr, LAYOUTS))}")
    legacy = layout == "legacy"
    _ops.check_primary(op, features, types, squash)
    if _plain(op, features):
        with float32(features):
            return reference.primary_capsules(features, types, legacy, squash)
    return _ops.primary_capsules(features, types, legacy, squash)


def affine_votes(u: Tensor, weight: Tensor) -> Tensor:
    """The votes û_ij = u_i W_ij, materialised. For inspection: the routings never hold them.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.

    Returns:
        votes [B, N, J, D].

    Raises:
        ValueError: wrong shapes, dtypes or devices.
    """
    u, weight = settle("affine_votes", "u weight", 2, u, weight)
    if _plain("affine_votes", u):
        _ops.check_affine_votes("affine_votes", u, weight)
        with float32(u):
            return reference.affine_votes(u, weight)
    return _ops.affine_votes(u, weight)


def attention_routing(
    u: Tensor, weight: Tensor, attn_weight: Tensor, attn_bias: Tensor | None = None, *, mask: Tensor | None = None
) -> Tensor:
    """Attention routing (CardioCaps, eq. 4): v = squash(Σ_i softmax(conv(û_i)) · û_i) in one pass.

    The convolution is 1×1 over the output capsules, the softmax runs over them, both for each component d alone:
    z_kd = Σ_j attn_weight_kj û_jd + attn_bias_k.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.
        attn_weight: [J, J]. attn_bias: [J].
        mask: bool [B, N], True where there is a capsule. A batch item without any gives 0 and no gradient.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        ValueError: wrong shapes, dtypes or devices. MemoryError: no room for the work space (a few MB).
    """
    op = "attention_routing"
    names = "u weight attn_weight attn_bias mask"
    u, weight, attn_weight, attn_bias, mask = settle(op, names, 3, u, weight, attn_weight, attn_bias, mask)
    if _plain(op, u):
        _ops.check_attention(op, u, weight, attn_weight, attn_bias, mask)
        with float32(u):
            return reference.attention_routing(u, weight, attn_weight, attn_bias, mask)
    return _ops.attention_routing(u, weight, attn_weight, attn_bias, mask)[0]


def dynamic_routing(
    u: Tensor,
    weight: Tensor,
    iterations: int = 3,
    *,
    bias: Tensor | None = None,
    leaky: bool = False,
    detach: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """Routing by agreement (Sabour et al. 2017, procedure 1), one pass an iteration.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.
        iterations: at least 1; with 1 all couplings are equal (uniform routing).
        bias: [J, D], added inside the squash of every iteration.
        leaky: the softmax has one more logit, always 0, whose share goes nowhere.
        detach: the gradient passes only through the last iteration's votes and takes the couplings as constants; by
            default it is exact.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives squash(bias), or 0.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        ValueError: wrong shapes, dtypes, devices or iterations. MemoryError: no room for the work space.
    """
    op = "dynamic_routing"
    u, weight, bias, mask = settle(op, "u weight bias mask", 2, u, weight, bias, mask)
    _ops.check_iterations(op, iterations)
    _ops.check_flag(op, "leaky", leaky)
    _ops.check_flag(op, "detach", detach)
    if _plain(op, u):
        _ops.check_dynamic(op, u, weight, bias, mask, iterations)
        with float32(u):
            return reference.dynamic_routing(u, weight, bias, mask, iterations, leaky, detach)
    return _ops.dynamic_routing(u, weight, bias, mask, iterations, leaky, detach)[0]


def self_attention_routing(
    u: Tensor,
    weight: Tensor,
    prior: Tensor | None = None,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Self-attention routing (Efficient-CapsNet, Mazzia et al. 2021), in two passes.

    T_j = Σ_i û_ij; c_ij = softmax_j(û_ij · T_j · scale) + prior_ij; v_j = squash(Σ_i c_ij û_ij), with the "efficient"
    squash. û_ij · T_j is the row sum of the paper's N×N attention matrix, which is never made.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.
        prior: [N, J], added to the couplings after the softmax.
        scale: of the logits; D**-0.5 by default.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives 0 and no gradient.

    Returns:
        output capsules v [B, J, D], squashed.

    Raises:
        ValueError: wrong shapes, dtypes, devices or scale. MemoryError: no room for the work space.
    """
    op = "self_attention_routing"
    u, weight, prior, mask = settle(op, "u weight prior mask", 2, u, weight, prior, mask)
    plain = _plain(op, u)
    if plain or scale is None:
        D = _ops.check_self_attention(op, u, weight, prior, mask)[-1]
    if scale is None:
        scale = D**-0.5
    else:
        _ops.check_number(op, "scale", scale)
    if plain:
        with float32(u):
            return reference.self_attention_routing(u, weight, prior, mask, scale)
    return _ops.self_attention_routing(u, weight, prior, mask, scale)[0]


def em_routing(
    pose: Tensor,
    activation: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int = 3,
    *,
    inverse_temperature: float | Sequence[float] = 0.01,
    renormalise: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """EM routing of matrix capsules (Hinton et al. 2018, procedure 1); its gradient is exact through all iterations.

    Args:
        pose: input capsules [B, N, K], or matrices [B, N, P, K], of which a vote is the product with W_ij [K, D].
        activation: [B, N], between 0 and 1.
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.
        beta_u: [J], the cost of describing a vote by no output capsule. beta_a: [J], that of activating one.
        iterations: at least 1.
        inverse_temperature: λ of every iteration, a sequence of that many numbers; or one number f for the schedule
            of the published implementations, λ_t = f (1 − 0.95^(t+1)) with t = 0 … iterations − 1.
        renormalise: normalise the products of responsibility and activation over the output capsules again, as some
            implementations do: in effect every activation above 0 becomes 1.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives pose 0 and activation
            logistic(λ beta_a).

    Returns:
        pose [B, J, D] or [B, J, P, D], and activation [B, J].

    Raises:
        ValueError: wrong shapes, dtypes, devices, iterations or temperatures. MemoryError: no room for the work space.
    """
    op = "em_routing"
    names = "pose activation weight beta_u beta_a mask"
    tensors = settle(op, names, 5, pose, activation, weight, beta_u, beta_a, mask)
    pose, activation, weight, beta_u, beta_a, mask = tensors
    temperatures = _ops.inverse_temperatures(op, inverse_temperature, iterations)
    _ops.check_flag(op, "renormalise", renormalise)
    plain = _plain(op, pose)
    if plain or renormalise:
        _ops.check_em(op, *tensors)
    if renormalise:
        activation = renormalised(activation if mask is None else torch.where(mask, activation, 0))
    if plain:
        with float32(pose):
            return reference.em_routing(pose, activation, weight, beta_u, beta_a, mask, temperatures)
    out = _ops.em_routing(pose, activation, weight, beta_u, beta_a, mask, temperatures)
    return out[0], out[1]


def renormalised(activation: Tensor) -> Tensor:
    """r a / (Σ_j r a + ε) is r times a / (a + ε), because Σ_j r = 1. Written so that the small derivative is exact."""
    a = activation.to(accumulation_dtype(activation.dtype))
    return (1 - reference.EM_EPSILON / (a + reference.EM_EPSILON)).to(activation.dtype)


# torch.fx.symbolic_trace records a call of these as one node.
for _name in OPERATORS:
    torch.fx.wrap(_name)
