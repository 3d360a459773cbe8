"""squash: v = f(‖s‖) s along the last dimension."""

from __future__ import annotations

from torch import Tensor

from ..backends import reference
from ._checks import check_choice, check_floating, fail
from ._declare import Differentiable, Output
from ._flops import elementwise

SQUASH_KINDS = ("sabour", "efficient")
ROUTING_SQUASHES = (*SQUASH_KINDS, "none", "layer_norm")
"""What a routing may do with s: squash it, nothing, or layer normalisation."""


def _outputs(op: str, s: Tensor, kind: str) -> list[Output]:
    check_floating(op, "s", s)
    if s.dim() == 0:
        fail(op, "s has 0 dimensions; expected at least 1, along which the length is taken")
    check_choice(op, "kind", kind, SQUASH_KINDS)
    return [("as s", s.shape, s.dtype)]


_squash = Differentiable(
    "squash(Tensor s, str kind) -> Tensor v",
    "squash_backward(Tensor g_v, Tensor s, str kind) -> Tensor g_s",
    _outputs,
    batch=None,
    flops=elementwise,
    gradient_flops=elementwise,
)


def squash(s: Tensor, dim: int = -1, kind: str = "sabour") -> Tensor:
    """Shrink vectors to a length below 1, keeping their direction.

    Args:
        s: any shape with at least one dimension.
        dim: the dimension that holds the vectors' components.
        kind: "sabour": n²/(1+n²) · s/n with n = ‖s‖ (Sabour et al. 2017, eq. 1); "efficient": (1 − e^{−n}) · s/n
            (Mazzia et al. 2021, eq. 4).

    Returns:
        v, with the shape and dtype of s. Finite, with a finite gradient, for every finite s, including 0.

    Raises:
        TypeError: s is not a tensor.
        ValueError: a wrong dtype, dim or kind.
    """
    (s,) = _squash.settle(s)
    check_choice("squash", "kind", kind, SQUASH_KINDS)
    dims = s.dim()
    if isinstance(dim, bool) or not isinstance(dim, int) or (dims and not -dims <= dim < dims):
        fail("squash", f"dim is {dim!r}; expected {-dims} … {dims - 1}, because s has {dims} dimensions")
    if dims == 0 or dim in (-1, dims - 1):
        return _squash(s, kind)
    return _squash(s.movedim(dim, -1), kind).movedim(-1, dim)


def squash_routed(s: Tensor, kind: str) -> Tensor:
    """What a routing makes of s: one of ROUTING_SQUASHES."""
    return squash(s, kind=kind) if kind in SQUASH_KINDS else reference.squash(s, kind)
