"""Windows on a grid, and EM routing between grids, written as loops."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

Place = tuple[int, ...]
"""Of a capsule on a grid: its type, then a coordinate for each axis."""


def windows_on(
    grid: Sequence[int],
    types: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[list[tuple[int, Place]]]:
    """For each position, the capsules of its window that lie on the grid: number in the window, and place."""
    axes = range(len(grid))
    ends = [grid[x] + 2 * padding[x] - dilation[x] * (kernel_size[x] - 1) for x in axes]
    found = []
    for corner in product(*[range(0, ends[x], stride[x]) for x in axes]):
        window = []
        for n, (*place, kind) in enumerate(product(*[range(k) for k in kernel_size], range(types))):
            at = [corner[x] + place[x] * dilation[x] - padding[x] for x in axes]
            if all(0 <= at[x] < grid[x] for x in axes):
                window.append((n, (kind, *at)))
        found.append(window)
    return found


def overlapping(windows: int, N: int) -> Tensor:
    """`places` of `capsops.em_routing`, for windows that overlap by half; one place of seven is that of no capsule."""
    step = max(N // 2, 1)
    found: list[list[int]] = [[] for _ in range((windows - 1) * step + N if N else 0)]
    for place in range(windows * N):
        if place % 7 != 3:
            found[place // N * step + place % N].append(place)
    return torch.tensor([x + [-1] * (3 - len(x)) for x in found], dtype=torch.int64).view(-1, 3)


def em_over_positions(
    votes: Sequence[dict[Place, Tensor]],
    activation: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    temperatures: Sequence[float],
    *,
    renormalise: bool = False,
    information: float = 1,
) -> list[tuple[Tensor, Tensor]]:
    """EM routing of one item where the output capsules of all positions compete (Hinton et al. 2018).

    Args:
        votes: for each position, those of the capsules in its window [J, …].
        activation: [types, *grid].
        beta_u: [J].
        beta_a: [J].
        temperatures: λ of each iteration.
        renormalise: see `capsops.em_routing`.
        information: a factor of the cost.

    Returns:
        for each position the means [J, …] and the activations [J].
    """
    epsilon, J = 1e-8, len(beta_u)
    shape = next(iter(votes[0].values())).shape
    votes = [{at: vote.flatten(1) for at, vote in window.items()} for window in votes]
    logits = [{at: torch.zeros(J, dtype=beta_u.dtype) for at in window} for window in votes]
    for iteration, temperature in enumerate(temperatures):
        r: list[dict[Place, Tensor]] = [{} for _ in votes]
        for at in {at for window in votes for at in window}:
            rivals = [p for p, window in enumerate(votes) if at in window]
            shares = torch.cat([logits[p][at] for p in rivals]).softmax(dim=0).split(J)
            for p, share in zip(rivals, shares, strict=True):
                r[p][at] = share
        means, variances, outputs = [], [], []
        for p, window in enumerate(votes):
            w = {at: r[p][at] * activation[at] for at in window}
            if renormalise:
                w = {at: x / (activation[at] + epsilon) for at, x in w.items()}
            total = torch.stack(list(w.values())).sum(dim=0)
            weighted = [w[at][:, None] * vote for at, vote in window.items()]
            means.append(sum(weighted) / (total + epsilon)[:, None])
            squares = [w[at][:, None] * (vote - means[p]) ** 2 for at, vote in window.items()]
            variances.append(sum(squares) / (total + epsilon)[:, None] + epsilon)
            cost = information * total * (beta_u[:, None] + variances[p].sqrt().log()).sum(dim=1)
            outputs.append(torch.sigmoid(temperature * (beta_a - cost)))
        if iteration + 1 < len(temperatures):
            for p, window in enumerate(votes):
                for at, vote in window.items():
                    density = -((vote - means[p]) ** 2) / (2 * variances[p]) - variances[p].sqrt().log()
                    logits[p][at] = outputs[p].log() + density.sum(dim=1)
    return [(mean.view(shape), a) for mean, a in zip(means, outputs, strict=True)]
