"""primary_capsules: the output of a convolution, read as capsules and squashed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ._checks import check_at_least, check_choice, check_floating, fail, shape_of
from ._declare import Differentiable, Output
from ._flops import elementwise
from .squash import SQUASH_KINDS

LAYOUTS = ("channels", "legacy")


def _outputs(op: str, features: Tensor, types: int, legacy: bool, kind: str) -> list[Output]:
    check_floating(op, "features", features)
    if features.dim() != 4:
        fail(op, f"features has shape {shape_of(features)}; expected 4 dimensions, [B, C, H, W]")
    check_at_least(op, 1, types=types)
    check_choice(op, "squash", kind, SQUASH_KINDS)
    B, C, height, width = features.shape
    if C == 0 or C % types != 0:
        fail(op, f"features has shape {shape_of(features)}, {C} channels; expected a multiple of types = {types}")
    return [("B, N, K", (B, types * height * width, C // types), features.dtype)]


def _allocator(features: Tensor) -> Callable[[Tensor], Tensor]:
    """In the memory format of the features: the convolution before them wants its gradient in that of its output."""
    last = not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last)
    return partial(torch.empty_like, memory_format=torch.channels_last if last else torch.contiguous_format)


_primary_capsules = Differentiable(
    "primary_capsules(Tensor features, int types, bool legacy, str kind) -> Tensor u",
    "primary_capsules_backward(Tensor g_u, Tensor features, int types, bool legacy, str kind) -> Tensor g_features",
    _outputs,
    batch={"features": 0, "u": 0},
    flops=elementwise,
    gradient_flops=elementwise,
    empty_gradient=_allocator,
)


def primary_capsules(features: Tensor, types: int, *, layout: str = "channels", squash: str = "sabour") -> Tensor:
    """The output of a convolution read as capsules, and squashed, in one pass (Sabour et al. 2017, section 4).

    Args:
        features: [B, C, H, W], contiguous or channels_last, with C = types · K.
        types: the number of capsule types.
        layout: "channels": the components of a capsule are K neighbouring channels at one location; the capsules run
            over types, then rows, then columns. "legacy": a plain reshape of [B, C, H, W], as in the published
            CardioCaps: the components are K neighbouring pixels of one channel, and where H · W is not a multiple of K,
            a capsule continues in the next channel. (channels_last features are then copied.)
        squash: "sabour" or "efficient", see `squash`.

    Returns:
        u [B, N, K] with N = types · H · W.

    Raises:
        TypeError: features is not a tensor.
        ValueError: a wrong shape or dtype, an unknown layout or squash.
    """
    op = "primary_capsules"
    (features,) = _primary_capsules.settle(features)
    check_at_least(op, 1, types=types)
    check_choice(op, "layout", layout, LAYOUTS)
    check_choice(op, "squash", squash, SQUASH_KINDS)
    return _primary_capsules(features, types, layout == "legacy", squash)
