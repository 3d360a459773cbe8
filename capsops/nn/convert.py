"""Weights of other implementations."""

from __future__ import annotations

from torch import Tensor

from ..ops._checks import check_tensors, fail


def convert_weight(weight: Tensor, layout: str = "JNDK") -> Tensor:
    """Transformation matrices of another implementation as [N, K, J, D], contiguous.

    Args:
        weight: four dimensions, and any leading or trailing dimensions of size 1 (as in [1, J, N, D, K]).
        layout: the meaning of its dimensions, a permutation of "JNDK" (output capsules, input capsules, output
            dimension, input dimension); "JNDK" is the common one.

    Raises:
        TypeError: weight is not a tensor.
        ValueError: layout is not such a permutation, or weight does not have four dimensions.
    """
    check_tensors("convert_weight", "weight", weight)
    if not isinstance(layout, str) or sorted(layout) != sorted("JNDK"):
        fail("convert_weight", f"layout is {layout!r}; expected a permutation of 'JNDK'")
    shape, extra = list(weight.shape), weight.dim() - 4
    # All ways to drop dimensions of size 1 at both ends so that four dimensions are left.
    ways = [first for first in range(extra + 1) if all(n == 1 for n in (*shape[:first], *shape[first + 4 :]))]
    if len(ways) != 1:
        wanted = "only one way to drop sizes of 1 that leaves" if ways else "four dimensions,"
        fail("convert_weight", f"weight has shape {shape}; expected {wanted} {layout}")
    squeezed = weight.reshape(shape[ways[0] : ways[0] + 4])
    return squeezed.permute(*(layout.index(axis) for axis in "NKJD")).contiguous()
