"""Capsules with EM routing, whose input capsules are all connected to all output capsules."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import functional
from ..ops import em
from ..ops._checks import check_flag, of_every_capsule
from ..ops._declare import settle
from .layer import Matrices


class EMCapsules(Matrices):
    """Affine votes and EM routing (Hinton et al. 2018) from every input capsule to every output capsule.

    A capsule is a pose and an activation. The pose is a vector, or a matrix of any number of rows P: the layer is the
    same, because each row of a vote is a row of the pose times the same matrix [K, D].

    Args:
        in_capsules: N.
        in_dim: K, the columns of a pose that is a matrix.
        out_capsules: J.
        out_dim: D, the columns of an output pose that is a matrix.
        iterations: at least 1.
        inverse_temperature: λ; see `capsops.em_routing`.
        renormalise: see `capsops.em_routing`.
        shared: use one matrix [K, J, D] for all input capsules; N may then vary from call to call.
        types: use one matrix for each of T types of input capsules, of which N / T in a row are of the same type, as
            `PrimaryCapsules` orders them.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: parameter [N, K, J, D], [K, J, D] if shared, or [T, K, J, D] by type.
        beta_u: parameter [J].
        beta_a: parameter [J].

    Shape: pose [B, N, K] and activation [B, N] (and mask, bool [B, N]) -> pose [B, J, D] and activation [B, J];
    for matrices pose [B, N, P, K] -> [B, J, P, D].

    Raises:
        TypeError: an input is not a tensor.
        ValueError: wrong sizes or temperatures; an input of a wrong shape, dtype or device.
        MemoryError: no memory for the workspace.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        iterations: int = 3,
        inverse_temperature: float | Sequence[float] = 0.01,
        renormalise: bool = False,
        shared: bool = False,
        types: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _layer: str = "EMCapsules",
    ) -> None:
        super().__init__(_layer, in_capsules, in_dim, out_capsules, out_dim, iterations, shared, device, dtype, types)
        em.inverse_temperatures(_layer, inverse_temperature, iterations)
        check_flag(_layer, "renormalise", renormalise)
        self.inverse_temperature, self.renormalise = inverse_temperature, renormalise
        self.beta_u = nn.Parameter(torch.empty(out_capsules, device=device, dtype=dtype))
        self.beta_a = nn.Parameter(torch.empty(out_capsules, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the matrices with σ = 1 / √K, so that votes have the variance of the poses, and both β with 0.

        The paper gives no initial values. The responsibilities do not depend on σ, because a vote is measured in
        standard deviations of the votes. The logit of an activation does: it is λ N / J times the cost of a vote, about
        D (β_u + ln σ_vote). Between thousands of input capsules and few output capsules it leaves the range of the
        logistic function for any σ; choose `inverse_temperature` in proportion to J / N there.
        """
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_dim))
        nn.init.zeros_(self.beta_u)
        nn.init.zeros_(self.beta_a)

    def forward(self, pose: Tensor, activation: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._call(lambda: self._route(pose, activation, mask), pose, activation, mask)

    def _route(
        self, pose: Tensor, activation: Tensor, mask: Tensor | None = None, places: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`capsops.em_routing` with the parameters and the options of the layer."""
        return functional.em_routing(
            pose,
            activation,
            self.weight,
            self.beta_u,
            self.beta_a,
            self.iterations,
            inverse_temperature=self.inverse_temperature,
            renormalise=self.renormalise,
            mask=mask,
            places=places,
        )

    def coupling_coefficients(self, pose: Tensor, activation: Tensor, mask: Tensor | None = None) -> Tensor:
        """The responsibilities [B, N, J] of the last iteration; see `capsops.coupling_coefficients`."""

        def explain() -> Tensor:
            return functional.coupling_coefficients(
                "em",
                pose,
                self.weight,
                activation=activation,
                beta_u=self.beta_u,
                beta_a=self.beta_a,
                iterations=self.iterations,
                inverse_temperature=self.inverse_temperature,
                renormalise=self.renormalise,
                mask=mask,
            )

        return self._call(explain, pose, activation, mask)

    def _refuse(self, pose: Tensor, activation: Tensor, mask: Tensor | None) -> None:
        names = "pose activation weight beta_u beta_a mask?"
        tensors = settle(self._layer, names, pose, activation, self.weight, self.beta_u, self.beta_a, mask)
        self._check_capsules("pose", tensors[0], "[B, N, (P,) K]")
        pose, activation, weight, *others = tensors
        em.check(self._layer, pose, activation, of_every_capsule(pose, weight), *others)

    def extra_repr(self) -> str:
        return (
            f"{self._sizes()}, iterations={self.iterations}, "
            f"inverse_temperature={self.inverse_temperature}" + ", renormalise=True" * self.renormalise
        ) + ", shared=True" * self.shared
