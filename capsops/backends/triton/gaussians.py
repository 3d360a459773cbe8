"""The Gaussians of EM routing between the passes over the votes, in plain PyTorch on tensors of at most [B, J, H].

The mathematics is that of csrc/math/em.h (Hinton et al. 2018, procedure 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference import EM_EPSILON


@dataclass(frozen=True)
class Gaussians:
    """The Gaussians that one iteration fits, one for each output capsule."""

    mean: Tensor  # [B, J, H]
    rounding_error: Tensor  # [B, J, H], of the mean: the exact mean is the sum of both
    variance: Tensor  # [B, J, H]
    mass: Tensor  # [B, J], Σ_i w_i
    logit: Tensor  # [B, J], of the activation

    @staticmethod
    def saved(state: Tensor) -> Gaussians:
        """Read them from a state [B, J, 3H + 2]."""
        H = (state.shape[-1] - 2) // 3
        return Gaussians(*state[..., :-2].split(H, dim=-1), *state[..., -2:].unbind(-1))

    def save(self, state: Tensor) -> None:
        """Write them to a state [B, J, 3H + 2]."""
        scalars = torch.stack([self.mass, self.logit], dim=-1)
        torch.cat([self.mean, self.rounding_error, self.variance, scalars], dim=-1, out=state)

    def e_step(self) -> tuple[Tensor, Tensor]:
        """quadratic [B, J, H] and constant [B, J]: the E-step has logits constant + Σ_h quadratic_h (û − mean)²."""
        constant = torch.nn.functional.logsigmoid(self.logit) - self.variance.log().sum(dim=-1) / 2
        return -0.5 / self.variance, constant


def m_step(
    mass: Tensor,
    first: Tensor,
    second: Tensor,
    shift: Tensor,
    beta_u: Tensor,
    beta_a: Tensor,
    inverse_temperature: float,
) -> Gaussians:
    """The M-step from the sums over the input capsules of w (1, x, x²), with x = û − shift."""
    H = shift.shape[-1]
    inverse = 1 / (mass + EM_EPSILON)[..., None]
    moved = (first - EM_EPSILON * shift) * inverse
    mean = shift + moved
    squares = (second - moved * (2 * first - moved * mass[..., None])).clamp(min=0)
    variance = squares * inverse + EM_EPSILON
    logit = inverse_temperature * (beta_a - mass * (H * beta_u + variance.log().sum(dim=-1) / 2))
    return Gaussians(mean, (shift - mean) + moved, variance, mass, logit)


def m_step_backward(
    g: Gaussians, g_mean: Tensor, g_variance: Tensor, g_logit: Tensor, beta_u: Tensor, inverse_temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradient of the M-step.

    The gradient of the weight of a vote is constant + Σ_h (linear_h x + quadratic_h x²), with x = û − mean.

    Returns:
        linear and quadratic [B, J, H], constant [B, J], and the gradients of beta_u and beta_a, [B, J] each.
    """
    H = g.mean.shape[-1]
    inverse = 1 / (g.mass + EM_EPSILON)[..., None]
    g_cost = -inverse_temperature * g_logit
    g_variance = g_variance + (g_cost * g.mass)[..., None] / (2 * g.variance)
    quadratic = g_variance * inverse
    # Σ w (û − μ)² depends on μ, because ε makes the weights sum to a little less than 1.
    slope = (g_mean - 2 * quadratic * EM_EPSILON * g.mean) * inverse
    linear = slope - 2 * quadratic * g.rounding_error
    g_mass = -(quadratic * (g.variance - EM_EPSILON - g.rounding_error.square()) + slope * g.rounding_error).sum(dim=-1)
    constant = g_mass + g_cost * (H * beta_u + g.variance.log().sum(dim=-1) / 2)
    return linear, quadratic, constant, g_cost * H * g.mass, inverse_temperature * g_logit


def e_step_backward(g: Gaussians, mass: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of mean, variance and logit from the sums over the input capsules of δ (1, x, x²), x = û − mean."""
    inverse = 1 / g.variance
    g_variance = (second * inverse - mass[..., None]) * inverse / 2
    return first * inverse, g_variance, mass * torch.sigmoid(-g.logit)
