"""affine_votes: û_ij = u_i W_ij, materialised."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._checks import check_floating, check_vectors, check_votes, of_every_capsule
from ._declare import Differentiable, Output
from ._flops import Shape, pass_flops


def _outputs(op: str, u: Tensor, weight: Tensor) -> list[Output]:
    check_floating(op, "u weight", u, weight)
    check_vectors(op, u, weight)
    B, N, _, J, D = check_votes(op, u, weight)
    return [("B, N, J, D", (B, N, J, D), u.dtype)]


def _flops(u: Shape, weight: Shape) -> int:
    return pass_flops(u, weight).votes


def _gradient_flops(g_votes: Shape, u: Shape, weight: Shape, wanted: Sequence[bool]) -> int:
    return sum(wanted) * pass_flops(u, weight).votes


_affine_votes = Differentiable(
    "affine_votes(Tensor u, Tensor weight) -> Tensor votes",
    "affine_votes_backward(Tensor g_votes, Tensor u, Tensor weight, bool[2] wanted) -> (Tensor g_u, Tensor g_weight)",
    _outputs,
    batch={"u": 0, "votes": 0},
    # N, for matrices that are shared (which have no such axis) and that are not; J; D.
    other_axes=({"u": 1, "weight": -4, "votes": 1}, {"weight": -2, "votes": 2}, {"weight": -1, "votes": 3}),
    flops=_flops,
    gradient_flops=_gradient_flops,
)


def affine_votes(u: Tensor, weight: Tensor) -> Tensor:
    """The votes û_ij = u_i W_ij, materialised. For inspection: the routings never hold them.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D]; [T, K, J, D] for T types of input capsules, N / T of each in a
            row; [K, J, D] to share them.

    Returns:
        votes [B, N, J, D].

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes or devices.
    """
    u, weight = _affine_votes.settle(u, weight)
    return _affine_votes(u, of_every_capsule(u, weight))
