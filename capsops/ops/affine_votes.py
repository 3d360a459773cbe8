"""affine_votes: û_ij = u_i W_ij, materialised."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ._checks import Sizes, check_floating, check_gradient, check_vectors, check_votes
from ._declare import Differentiable, empty_gradients, operator


def check(op: str, u: Tensor, weight: Tensor) -> Sizes:
    """Check the arguments of affine_votes and return B, N, K, J, D."""
    check_floating(op, "u weight", u, weight)
    check_vectors(op, u)
    return check_votes(op, u, weight)


@operator("affine_votes(Tensor u, Tensor weight) -> Tensor votes")
def _outputs(u: Tensor, weight: Tensor) -> Tensor:
    B, N, _, J, D = check("affine_votes", u, weight)
    return u.new_empty(B, N, J, D)


@operator(
    "affine_votes_backward(Tensor g_votes, Tensor u, Tensor weight, bool[2] wanted) -> (Tensor g_u, Tensor g_weight)"
)
def _gradients(g_votes: Tensor, u: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, ...]:
    op = "affine_votes_backward"
    B, N, _, J, D = check(op, u, weight)
    check_gradient(op, "g_votes", g_votes, u, "B, N, J, D", B, N, J, D)
    return empty_gradients(op, wanted, u, weight=weight)


_affine_votes = Differentiable("affine_votes", check, results=1, batch={"u": 0, "votes": 0})


def affine_votes(u: Tensor, weight: Tensor) -> Tensor:
    """The votes û_ij = u_i W_ij, materialised. For inspection: the routings never hold them.

    Args:
        u: input capsules [B, N, K].
        weight: transformation matrices [N, K, J, D], or [K, J, D] to share them.

    Returns:
        votes [B, N, J, D].

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes or devices.
    """
    return _affine_votes(*_affine_votes.settle(u, weight))
