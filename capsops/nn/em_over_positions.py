"""EM routing on a grid, where the output capsules of all positions compete (Hinton et al. 2018, sections 3 and 5).

Windows overlap, so an input capsule i lies in the windows of several positions p, at another place of the kernel in
each. Its votes û_ipj for the output capsules j of all these positions compete:

    M-step of (p, j)    w_ipj = r_ipj a_i;  mean, variance, activation as in `capsops.em_routing`
    E-step of i         r_ipj = softmax over (p, j) of  ln a_pj + ln N(û_ipj; mean_pj, variance_pj)

The logits of the first iteration are 0: r is then 1 / (J · number of windows that contain i).

One place of the kernel is taken at a time. There every position has one capsule of each type, and their votes are one
product of matrices. They are forgotten after use, and made again for the gradient (`torch.utils.checkpoint`). Kept
are the logits of r, a number for each vote (H of them are a vote), of every iteration but the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..backends import reference
from ..dtypes import accumulation_dtype
from .grid import Windows


def em_over_positions(
    windows: Windows,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    inverse_temperatures: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """An iteration for each inverse temperature.

    Args:
        windows: on the grid.
        pose: [B, T, *grid, P, K].
        activation: [B, T, *grid]; 0 where there is no capsule.
        weight: [places of the kernel, T, K, J, D].
        beta_u: [J].
        beta_a: [J].
        inverse_temperatures: λ of each iteration.

    Returns:
        pose [B, J, *positions, P, D] and activation [B, J, *positions].
    """
    dtype, dims = pose.dtype, len(windows.kernel_size)
    exact = accumulation_dtype(dtype)
    pose, activation, weight, beta_u, beta_a = (x.to(exact) for x in (pose, activation, weight, beta_u, beta_a))
    (B, T), J = pose.shape[:2], weight.shape[-2]
    positions = windows.positions(pose.shape[2 : 2 + dims])
    places = list(windows.places(positions))
    M = B * math.prod(positions)  # positions in all
    capsules, chances = windows.pad(pose).transpose(0, 1), windows.pad(activation).transpose(0, 1)
    u = [capsules[place].reshape(T, M, *pose.shape[-2:]) for place in places]
    a = [chances[place].reshape(T, M, 1) for place in places]

    def log_sums(logits: Sequence[Tensor]) -> list[Tensor]:
        """Place by place [T, M, 1]: log Σ exp of the logits of a capsule at all positions whose windows contain it."""
        grid = chances.new_full((len(places), *chances.shape), -torch.inf)
        for i, place in enumerate(places):
            grid[i][place] = logits[i].logsumexp(dim=-1).view(T, B, *positions)
        total = grid.logsumexp(dim=0)
        return [total[place].reshape(T, M, 1) for place in places]

    logits = [chances.new_zeros(()).expand(T, M, J)] * len(places)
    for iteration, inverse_temperature in enumerate(inverse_temperatures):
        shares = list(zip(u, weight, logits, log_sums(logits), a, strict=True))
        support, moment = (sum(x) for x in zip(*[_forgetful(_moment, *share) for share in shares], strict=True))
        divisor = (support + reference.EM_EPSILON)[:, None, :, None]
        mean = moment / divisor
        spread = sum(_forgetful(_spread, mean, *share) for share in shares)
        variance = spread / divisor + reference.EM_EPSILON  # [M, P, J, D]
        vectors = variance.transpose(1, 2).flatten(2)
        cost = reference.em_cost(support, vectors, beta_u)
        logit = inverse_temperature * (beta_a - cost)
        if iteration + 1 < len(inverse_temperatures):
            bonus = torch.nn.functional.logsigmoid(logit) - 0.5 * vectors.log().sum(dim=-1)
            distances = [_forgetful(_distance, mean, variance, x, W) for x, W in zip(u, weight, strict=True)]
            # One tensor: small ones between the votes that come and go would keep the allocator from reusing memory.
            logits = list((bonus - torch.stack(distances)).unbind())

    def grid_of(x: Tensor) -> Tensor:
        return x.to(dtype).unflatten(0, (B, *positions)).movedim(1 + dims, 1)

    return grid_of(mean.transpose(1, 2)), grid_of(logit.sigmoid())


def _forgetful(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Call the function, keep nothing but its arguments, and call it again for the gradient."""
    # The transforms of torch.func do not take a checkpoint; there everything is kept.
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return function(*tensors)
    return checkpoint(function, *tensors, use_reentrant=False, preserve_rng_state=False)


def _votes(u: Tensor, weight: Tensor) -> Tensor:
    """u [T, M, P, K] and weight [T, K, J, D] -> [T, M, P, J, D]."""
    return (u.flatten(1, 2) @ weight.flatten(2)).view(*u.shape[:3], *weight.shape[2:])


def _weights(logits: Tensor, log_sum: Tensor, activation: Tensor) -> Tensor:
    """w [T, M, J]."""
    return (logits - log_sum).exp() * activation


def _moment(u: Tensor, weight: Tensor, logits: Tensor, log_sum: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w [M, J] and Σ w û [M, P, J, D] over the types."""
    w = _weights(logits, log_sum, activation)
    return w.sum(dim=0), (w[:, :, None, :, None] * _votes(u, weight)).sum(dim=0)


def _spread(mean: Tensor, u: Tensor, weight: Tensor, logits: Tensor, log_sum: Tensor, activation: Tensor) -> Tensor:
    """Σ w (û − mean)² [M, P, J, D] over the types."""
    w = _weights(logits, log_sum, activation)
    return (w[:, :, None, :, None] * (_votes(u, weight) - mean).square()).sum(dim=0)


def _distance(mean: Tensor, variance: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """Half of Σ_h (û − mean)² / variance, [T, M, J]."""
    return 0.5 * ((_votes(u, weight) - mean).square() / variance).sum(dim=(2, 4))
