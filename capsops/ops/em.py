"""EM routing of matrix capsules (Hinton et al. 2018, procedure 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..dtypes import accumulation_dtype
from ._checks import (
    Sizes,
    check_flag,
    check_floating,
    check_iterations,
    check_number,
    check_shape,
    check_votes,
    fail,
    of_every_capsule,
    shape_of,
)
from ._declare import Differentiable, Output
from ._flops import Shape, pass_flops
from .coupling_coefficients import Couplings, Votes, check_given, explains, widened


def check(
    op: str,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    *temperatures: Sequence[float],
) -> Sizes:
    """Check the arguments of EM routing and return B, N, K, J, D; without temperatures, only the tensors."""
    sizes = _check_besides_activation(op, pose, activation, weight, beta_u, beta_a, mask, *temperatures)
    check_shape(op, "activation", activation, "B, N", *sizes[:2])
    return sizes


def _check_besides_activation(
    op: str,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    mask: Tensor | None,
    *temperatures: Sequence[float],
) -> Sizes:
    """As `check`, but the activation has any shape."""
    names = "pose activation weight beta_u beta_a"
    check_floating(op, names, pose, activation, weight, beta_u, beta_a)
    if weight is None and pose.dim() not in (4, 5):
        votes = "[B, N, J, D] or [B, N, J, P, D]"
        fail(op, f"pose has shape {shape_of(pose)} and weight is None; expected votes, 4 or 5 dimensions, {votes}")
    if weight is not None and pose.dim() not in (3, 4):
        fail(op, f"pose has shape {shape_of(pose)}; expected 3 or 4 dimensions, [B, N, K] or [B, N, P, K]")
    sizes = check_votes(op, pose, weight, mask, "pose")
    J = sizes[3]
    if pose.dim() == (4 if weight is not None else 5) and pose.shape[-2] == 0:
        fail(op, f"P is 0 (pose {shape_of(pose)}); expected at least 1")
    check_shape(op, "beta_u", beta_u, "J", J)
    check_shape(op, "beta_a", beta_a, "J", J)
    for values in temperatures:
        if not values:
            fail(op, "inverse_temperatures is []; expected at least one number, one for each iteration")
        for value in values:
            if not 0 <= value < math.inf:
                fail(op, f"inverse_temperatures has {value!r}; expected finite numbers of at least 0")
    return sizes


def _check_over_positions(
    op: str,
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    places: Tensor,
    mask: Tensor | None,
    *temperatures: Sequence[float],
) -> Sizes:
    """Check the arguments of EM routing over positions and return B, N, K, J, D; the kernel checks the places."""
    least, axes = (4, "[B, M, N, (P,) K]") if weight is not None else (5, "[B, M, N, J, (P,) D]")
    if pose.dim() not in (least, least + 1) or pose.shape[1] == 0:
        fail(op, f"pose has shape {shape_of(pose)}; expected {least} or {least + 1} dimensions, {axes} with M > 0")
    B, M, N = pose.shape[:3]
    if mask is not None:
        check_shape(op, "mask", mask, "B, M, N", B, M, N)
    if places.dtype != torch.int64 or places.dim() != 2 or places.layout != torch.strided:
        found = f"{places.dtype}, {shape_of(places)}, {places.layout}"
        fail(op, f"places is {found}; expected torch.int64, [G, W], {torch.strided}")
    if places.device != pose.device:
        fail(op, f"places is on {places.device}; expected {pose.device}, the device of pose")
    check_shape(op, "activation", activation, "B, G", B, places.shape[0])
    # One window of every item has the same sizes.
    of_window = None if mask is None else mask[:, 0]
    return _check_besides_activation(op, pose[:, 0], activation, weight, beta_u, beta_a, of_window, *temperatures)


def _outputs(op: str, pose: Tensor, *others: Any) -> list[Output]:
    B, _, _, J, D = check(op, pose, *others)
    return _outputs_for("B", (B,), J, D, pose, others)


def _outputs_over_positions(op: str, pose: Tensor, *others: Any) -> list[Output]:
    B, _, _, J, D = _check_over_positions(op, pose, *others)
    return _outputs_for("B, M", (B, pose.shape[1]), J, D, pose, others)


def _outputs_for(
    axes: str, batch: tuple[int, ...], J: int, D: int, pose: Tensor, others: Sequence[Any]
) -> list[Output]:
    """The outputs; axes: the names of those in batch, B or B and M."""
    weight = others[1]
    iterations, wide = len(others[-1]), accumulation_dtype(pose.dtype)
    first = len(batch) + (2 if weight is None else 1)
    vote = (*pose.shape[first:-1], D)
    H = math.prod(vote)
    # Saved for each output capsule: the mean [H], its rounding error [H], the variance [H], Σ_i w_i and the logit.
    state = f"iterations, {axes}, J, 3H + 2", (iterations, *batch, J, 3 * H + 2), wide
    return [(f"{axes}, J, (P,) D", (*batch, J, *vote), pose.dtype), (f"{axes}, J", (*batch, J), pose.dtype), state]


def _flops(
    pose: Shape,
    activation: Shape,
    weight: Shape | None,
    beta_u: Shape,
    beta_a: Shape,
    mask: Shape | None,
    inverse_temperatures: Sequence[float],
) -> int:
    part, iterations = pass_flops(pose, weight), len(inverse_temperatures)
    # The sums of w û and w û², in a pass for each iteration and two for the first, which knows no mean yet; logits of
    # the later iterations. A second pass that an iteration takes because its means moved far is not counted.
    return (iterations + 1) * (part.votes + 2 * part.contraction) + (iterations - 1) * part.contraction


def _gradient_flops(
    g_mean: Shape,
    g_activation: Shape,
    state: Shape,
    pose: Shape,
    activation: Shape,
    weight: Shape | None,
    beta_u: Shape,
    beta_a: Shape,
    mask: Shape | None,
    inverse_temperatures: Sequence[float],
    wanted: Sequence[bool],
) -> int:
    part, iterations = pass_flops(pose, weight), len(inverse_temperatures)
    g_pose, g_activation_in, g_weight, *_ = wanted
    # A pass for each later iteration: its logits, the quadratic form e (two), the sums of δ û and δ û².
    flops = (iterations - 1) * (part.votes + 5 * part.contraction)
    if g_pose or g_activation_in or g_weight:
        # For each iteration e and two terms of its M-step; for the later ones also logits and the term of their E-step.
        flops += part.gradients(4 * iterations + 2 * (iterations - 1), g_pose, g_weight)
    return flops


_BATCH = {"pose": 0, "activation": 0, "mask": 0, "mean": 0, "activation_out": 0, "state": 1, "activation_in": 0}

_em_routing = Differentiable(
    "em_routing(Tensor pose, Tensor activation, Tensor? weight, Tensor beta_u, Tensor beta_a, Tensor? mask,"
    " float[] inverse_temperatures) -> (Tensor mean, Tensor activation_out, Tensor state)",
    "em_routing_backward(Tensor g_mean, Tensor g_activation, Tensor state, Tensor pose, Tensor activation,"
    " Tensor? weight, Tensor beta_u, Tensor beta_a, Tensor? mask, float[] inverse_temperatures, bool[5] wanted)"
    " -> (Tensor g_pose, Tensor g_activation_in, Tensor g_weight, Tensor g_beta_u, Tensor g_beta_a)",
    _outputs,
    results=2,
    batch=_BATCH,
    flops=_flops,
    gradient_flops=_gradient_flops,
)


def _windows_as_items(pose: Shape) -> Shape:
    """[B, M, N, …] -> [B · M, N, …]."""
    return pose[0] * pose[1], *pose[2:]


def _flops_over_positions(
    pose: Shape,
    activation: Shape,
    weight: Shape | None,
    beta_u: Shape,
    beta_a: Shape,
    places: Shape,
    mask: Shape | None,
    inverse_temperatures: Sequence[float],
) -> int:
    pose = _windows_as_items(pose)
    flops = _flops(pose, activation, weight, beta_u, beta_a, mask, inverse_temperatures)
    part = pass_flops(pose, weight)
    # Each iteration but the first takes a pass more, for its logits.
    return flops + (len(inverse_temperatures) - 1) * (part.votes + part.contraction)


def _gradient_flops_over_positions(
    g_mean: Shape,
    g_activation: Shape,
    state: Shape,
    pose: Shape,
    activation: Shape,
    weight: Shape | None,
    beta_u: Shape,
    beta_a: Shape,
    places: Shape,
    mask: Shape | None,
    inverse_temperatures: Sequence[float],
    wanted: Sequence[bool],
) -> int:
    pose = _windows_as_items(pose)
    flops = _gradient_flops(
        g_mean, g_activation, state, pose, activation, weight, beta_u, beta_a, mask, inverse_temperatures, wanted
    )
    part = pass_flops(pose, weight)
    # Each iteration but the first takes a pass more, for its logits and e.
    return flops + (len(inverse_temperatures) - 1) * (part.votes + 3 * part.contraction)


_em_routing_over_positions = Differentiable(
    "em_routing_over_positions(Tensor pose, Tensor activation, Tensor? weight, Tensor beta_u, Tensor beta_a,"
    " Tensor places, Tensor? mask, float[] inverse_temperatures)"
    " -> (Tensor mean, Tensor activation_out, Tensor state)",
    "em_routing_over_positions_backward(Tensor g_mean, Tensor g_activation, Tensor state, Tensor pose,"
    " Tensor activation, Tensor? weight, Tensor beta_u, Tensor beta_a, Tensor places, Tensor? mask,"
    " float[] inverse_temperatures, bool[5] wanted)"
    " -> (Tensor g_pose, Tensor g_activation_in, Tensor g_weight, Tensor g_beta_u, Tensor g_beta_a)",
    _outputs_over_positions,
    results=2,
    batch=_BATCH,
    flops=_flops_over_positions,
    gradient_flops=_gradient_flops_over_positions,
)


def em_routing(
    pose: Tensor,
    activation: Tensor,
    weight: Tensor | None,
    beta_u: Tensor,
    beta_a: Tensor,
    iterations: int = 3,
    *,
    inverse_temperature: float | Sequence[float] = 0.01,
    renormalise: bool = False,
    mask: Tensor | None = None,
    places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """EM routing of matrix capsules (Hinton et al. 2018, procedure 1); its gradient is exact through all iterations.

    With `places` the capsules are those of the M windows of a grid, and windows may share a capsule. The output
    capsules of all windows that contain an input capsule then compete for it, as in sections 3 and 5 of the paper:
    its responsibilities add up to 1 over all of them. `capsops.nn.ConvCapsules` makes the windows.

    Args:
        pose: input capsules [B, N, K], or matrices [B, N, P, K]; a vote is the product of one with W_ij [K, D].
            Without a weight the votes [B, N, J, D] or [B, N, J, P, D], which something else made.
        activation: [B, N], between 0 and 1.
        weight: transformation matrices [N, K, J, D]; [T, K, J, D] for T types of input capsules, N / T of each in a
            row, as in the class capsules of the paper; [K, J, D] to share them; None if pose is the votes.
        beta_u: [J], the cost of leaving a vote undescribed by the output capsule.
        beta_a: [J], the cost of activating the output capsule.
        iterations: at least 1.
        inverse_temperature: λ of every iteration, a sequence of that many numbers; or one number f for the schedule
            of the published implementations, λ_t = f (1 − 0.95^(t+1)) with t = 0 … iterations − 1.
        renormalise: normalise the products of responsibility and activation over the output capsules again, as some
            implementations do: in effect every activation above 0 becomes 1.
        mask: bool [B, N], True where there is a capsule. A batch item without any gives pose 0 and activation
            logistic(λ beta_a).
        places: int64 [G, W], for windows: where each of the G capsules of the grid lies in them, n + N · window, or -1
            where it lies in less than W windows. A place that no capsule has takes no part. The pose and the mask then
            have an axis M of windows after B, [B, M, N, …], and the activation is that of the grid, [B, G].

    Returns:
        pose [B, J, D] or [B, J, P, D], and activation [B, J]; of windows [B, M, J, …] and [B, M, J].

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: wrong shapes, dtypes, devices, iterations or temperatures; on the CPU also places that do not exist,
            or that two capsules have. Elsewhere these give wrong numbers.
        MemoryError: no memory for the workspace.
    """
    op = "em_routing"
    check_all: Callable[..., Sizes] = check if places is None else _check_over_positions
    if places is None:
        routing = _em_routing
        pose, activation, weight, *others = routing.settle(pose, activation, weight, beta_u, beta_a, mask)
        of_window = pose
    else:
        routing = _em_routing_over_positions
        pose, activation, weight, *others = routing.settle(pose, activation, weight, beta_u, beta_a, places, mask)
        of_window = pose[:, 0] if pose.dim() > 3 and pose.shape[1] else pose
    tensors = (pose, activation, of_every_capsule(of_window, weight), *others)
    temperatures = inverse_temperatures(op, inverse_temperature, iterations)
    check_flag(op, "renormalise", renormalise)
    if renormalise:
        check_all(op, *tensors)
        pose, activation, *others, mask = tensors
        if mask is not None and places is None:
            activation = torch.where(mask, activation, 0)
        tensors = (pose, renormalised(activation), *others, mask)
    return routing(*tensors, temperatures)


def inverse_temperatures(op: str, inverse_temperature: float | Sequence[float], iterations: int) -> tuple[float, ...]:
    """λ of every iteration: the numbers given, or for one number f the schedule f (1 − 0.95^(t+1)).

    Raises:
        ValueError: iterations is not a number of iterations, or the numbers are not finite, below 0, or not one for
            each iteration.
    """
    check_iterations(op, iterations)
    name = "inverse_temperature"
    if isinstance(inverse_temperature, Sequence) and not isinstance(inverse_temperature, str):
        values = list(inverse_temperature)
        if len(values) != iterations:
            fail(op, f"{name} has {len(values)} numbers; expected {iterations}, one for each iteration")
    else:
        check_number(op, name, inverse_temperature)
        values = [inverse_temperature * (1 - 0.95 ** (t + 1)) for t in range(iterations)]
    for value in values:
        check_number(op, name, value)
        if value < 0:
            fail(op, f"{name} is {inverse_temperature!r}; expected nothing below 0")
    return tuple([float(value) for value in values])


def renormalised(activation: Tensor) -> Tensor:
    """a / (a + ε), because r a / (Σ_j r a + ε) is r times that: Σ_j r = 1. Written so that the derivative is exact."""
    a = activation.to(accumulation_dtype(activation.dtype))
    return (1 - reference.EM_EPSILON / (a + reference.EM_EPSILON)).to(activation.dtype)


@explains("em")
def _couplings(
    op: str,
    votes: Votes,
    activation: Tensor | None,
    beta_u: Tensor | None,
    beta_a: Tensor | None,
    iterations: int,
    inverse_temperature: float | Sequence[float],
    renormalise: bool,
    **_: Any,
) -> tuple[tuple[int, ...], Couplings]:
    """The responsibilities [B, N, J] of the last iteration."""
    check_given(op, "EM routing", activation=activation, beta_u=beta_u, beta_a=beta_a)
    temperatures = inverse_temperatures(op, inverse_temperature, iterations)
    check_flag(op, "renormalise", renormalise)
    tensors: Any = activation, votes.weight, beta_u, beta_a, votes.mask
    B, N, _K, J, _D = check(op, votes.u, *tensors)
    a, cost, bonus = widened(activation, beta_u, beta_a)
    if votes.mask is not None:
        a = torch.where(votes.mask, a, 0)
    if renormalise:
        a = renormalised(a)
    # Each iteration but the last takes two passes: one for the mean, then one for the variance about it.
    zero = votes.zero()
    couplings = _responsibilities(None)
    for inverse in temperatures[:-1]:
        mean, variance, support = _m_step(votes, couplings, a, zero)
        logit = inverse * (bonus - reference.em_cost(support, variance, cost))
        couplings = _responsibilities((mean, variance, torch.nn.functional.logsigmoid(logit)))
    return (B, N, J), couplings


def _responsibilities(gaussians: tuple[Tensor, Tensor, Tensor] | None) -> Couplings:
    """r [B, n, J] by mean, variance and log activation; equal ones where there are none yet."""

    def couplings(part: slice, some: Tensor) -> Tensor:
        if gaussians is None:
            return torch.full_like(some[..., 0], 1 / some.shape[2])
        return reference.em_responsibilities(some, *gaussians)

    return couplings


def _m_step(votes: Votes, couplings: Couplings, a: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The mean [B, J, H] and the variance of the votes, and Σ_i r_ij a_i [B, J]."""

    def moments(part: slice, some: Tensor) -> Tensor:
        w = couplings(part, some) * a[:, part, None]
        return torch.cat([torch.einsum("bnj,bnjh->bjh", w, some), w.sum(dim=1)[:, :, None]], dim=2)

    sums = votes.total(moments, torch.cat([zero, zero[:, :, :1]], dim=2))
    support = sums[:, :, -1]
    mean = sums[:, :, :-1] / (support + reference.EM_EPSILON)[:, :, None]

    def deviations(part: slice, some: Tensor) -> Tensor:
        w = couplings(part, some) * a[:, part, None]
        return torch.einsum("bnj,bnjh->bjh", w, (some - mean[:, None]).square())

    spread = votes.total(deviations, zero)
    return mean, spread / (support + reference.EM_EPSILON)[:, :, None] + reference.EM_EPSILON, support
