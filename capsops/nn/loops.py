"""Routings that are loops of `routing_step`: each step compares the votes with the output of the step before.

The votes are streamed in every step, and gradients are exact through all steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..ops._checks import check_at_least, check_floating, check_iterations, check_shape, check_votes, fail
from ..ops._declare import settle
from .layer import Layer, Matrices


class _Steps(Matrices):
    """The base of layers that repeat one step."""

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        v = self.step(u, mask=mask)
        for _ in range(self.iterations - 1):
            v = self.step(u, v, mask)
        return v

    def step(self, u: Tensor, v: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """One iteration.

        Args:
            u: input capsules, as for the layer.
            v: output capsules of the iteration before, of the shape of the result. None: the first iteration, with
                equal couplings.
            mask: bool [B, N], True where there is a capsule.
        """

        self._check(u, v, mask)
        rows, D = self._vote()
        capsules, weight = u, None
        if rows:  # a row of a vote is a row of the capsule times the matrix
            by_row = functional.affine_votes(u.transpose(1, 2).flatten(0, 1), self.weight)
            capsules = by_row.unflatten(0, (u.shape[0], *rows)).movedim(1, 3).flatten(3)
        else:
            weight = self.weight
        if v is None:
            state = capsules.new_zeros(u.shape[0], self.out_capsules, math.prod(rows) * D)
        else:
            state = self._state(v).flatten(2)
        s = functional.routing_step(capsules, weight, state, mask=mask)
        return self._output(s.unflatten(2, (*rows, D)))

    def _vote(self) -> tuple[tuple[int, ...], int]:
        """The rows of a vote that is a matrix, or nothing; and D."""
        return (), self.out_dim

    def _state(self, v: Tensor) -> Tensor:
        """With what the votes are compared, from the output capsules of the iteration before."""
        raise NotImplementedError

    def _output(self, s: Tensor) -> Tensor:
        """The output capsules, from the weighted sums of the votes."""
        raise NotImplementedError

    def _check(self, u: Tensor, v: Tensor | None, mask: Tensor | None) -> None:
        layer, rows = self._layer, self._vote()[0]
        u, weight, v, mask = settle(layer, "u weight v? mask?", u, self.weight, v, mask)
        self._check_capsules("u", u, f"[B, N, {''.join([f'{n}, ' for n in rows])}K]", rows)
        check_floating(layer, "u weight v", u, weight, v)
        check_votes(layer, u, weight, mask)
        if v is not None:
            axes = "B, J, P, D" if rows else "B, J, D"
            check_shape(layer, "v", v, axes, u.shape[0], self.out_capsules, *rows, self.out_dim)

    def extra_repr(self) -> str:
        return f"{self._sizes()}, iterations={self.iterations}" + ", shared=True" * self.shared


class InvertedAttentionCapsules(_Steps):
    """Affine votes and inverted dot-product attention routing (Tsai et al. 2020).

    v = LayerNorm(Σ_i c_ij û_ij) with c = softmax over the output capsules of û_ij · v_j / √D, v of the iteration
    before. The output capsules compete for the attention of an input capsule; there is no squash. `ConcurrentCapsules`
    routes several of these layers at once.

    Args:
        in_capsules: N.
        in_dim: K.
        out_capsules: J.
        out_dim: D.
        iterations: all of them, the first with equal couplings included.
        rows: P, if capsules are matrices: [B, N, P, K] become [B, J, P, D]. LayerNorm and 1 / √(P D) are then those of
            all P · D numbers, and the votes are held.
        shared: use one matrix [K, J, D] for all input capsules; N may then vary from call to call.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: parameter [N, K, J, D], or [K, J, D] if shared.
        norm: the LayerNorm, with parameters weight and bias [D], or [P, D].

    Shape: u [B, N, K] (and mask, bool [B, N]) -> v [B, J, D].

    Raises:
        TypeError: an input is not a tensor.
        ValueError: wrong sizes; an input of a wrong shape, dtype or device.
        MemoryError: no memory for the workspace.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        iterations: int = 2,
        rows: int | None = None,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _layer: str = "InvertedAttentionCapsules",
    ) -> None:
        super().__init__(_layer, in_capsules, in_dim, out_capsules, out_dim, iterations, shared, device, dtype)
        if rows is not None:
            check_at_least(_layer, 1, rows=rows)
        self.rows = rows
        self.norm = nn.LayerNorm((*self._vote()[0], out_dim), device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the matrices with σ = √(J / (N K)), as the published implementation does."""
        nn.init.normal_(self.weight, std=math.sqrt(self.out_capsules / (self.in_capsules * self.in_dim)))
        self.norm.reset_parameters()

    def _vote(self) -> tuple[tuple[int, ...], int]:
        return (() if self.rows is None else (self.rows,)), self.out_dim

    def _state(self, v: Tensor) -> Tensor:
        return v / math.sqrt((self.rows or 1) * self.out_dim)

    def _output(self, s: Tensor) -> Tensor:
        return self.norm(s)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", rows={self.rows}" if self.rows is not None else "")


class KMeansCapsules(_Steps):
    """Affine votes and k-means routing (the Keras layer bojone/Capsule).

    The output capsules are soft cluster centres of the votes: s = Σ_i c_ij û_ij with c = softmax over the output
    capsules of û_ij · s_j / ‖s_j‖, s of the iteration before. At the end v = ‖s‖ s / (1/2 + ‖s‖²). Unlike in dynamic
    routing the logits are not added up.

    Args:
        in_capsules: N.
        in_dim: K.
        out_capsules: J.
        out_dim: D.
        iterations: all of them, the first with equal couplings included.
        shared: use one matrix [K, J, D] for all input capsules; N may then vary from call to call.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: parameter [N, K, J, D], or [K, J, D] if shared.

    Shape: u [B, N, K] (and mask, bool [B, N]) -> v [B, J, D].

    Raises:
        TypeError: an input is not a tensor.
        ValueError: wrong sizes; an input of a wrong shape, dtype or device.
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
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _layer: str = "KMeansCapsules",
    ) -> None:
        super().__init__(_layer, in_capsules, in_dim, out_capsules, out_dim, iterations, shared, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the matrices so that s has the length 1 where all couplings are 1 / J, but with σ ≤ 1.

        σ is the standard deviation of a logit, for input capsules of length 1: couplings start soft.
        """
        unit = self.out_capsules / math.sqrt(self.in_capsules * self.out_dim)
        nn.init.normal_(self.weight, std=min(unit, 1.0))

    def _state(self, v: Tensor) -> Tensor:
        return nn.functional.normalize(v, dim=-1)  # the direction of s: the squash keeps it

    def _output(self, s: Tensor) -> Tensor:
        return functional.squash(math.sqrt(2) * s)  # which is ‖s‖ s / (1/2 + ‖s‖²)


class ConcurrentCapsules(Layer):
    """Layers on top of each other that are routed at once (Tsai et al. 2020, procedure 2).

    First each layer takes one step after the layer below it, with equal couplings. In each further iteration every
    layer takes a step from the output of the iteration before, its own and that of the layer below. So the capsules of
    a layer know of those above them after a few iterations, and the layers of an iteration do not wait for each other.
    `torch.nn.Sequential` of the layers routes one layer to its end before the next.

    Args:
        layers: from the lowest to the highest: `InvertedAttentionCapsules`, `KMeansCapsules`, or `ConvCapsules` with
            one of these routings. Their own number of iterations is not used. Above a grid [B, T, H, W, K] a layer that
            is not on a grid takes its T · H · W capsules.
        iterations: all of them, the first included.

    Shape: u as for the lowest layer -> v of the highest layer.

    Raises:
        TypeError: a layer cannot take single steps.
        ValueError: no layers, or a wrong number of iterations.
    """

    def __init__(self, layers: Sequence[nn.Module], iterations: int = 2) -> None:
        super().__init__()
        if not layers:
            fail("ConcurrentCapsules", "layers is empty; expected at least one layer")
        for x in layers:
            if not callable(getattr(x, "step", None)):
                raise TypeError(
                    f"ConcurrentCapsules: layer is a {type(x).__name__}; expected one that has a method `step`"
                )
        check_iterations("ConcurrentCapsules", iterations)
        self.layers, self.iterations = nn.ModuleList(layers), iterations

    def forward(self, u: Tensor) -> Tensor:
        outputs = [u]
        for layer in self.layers:
            outputs.append(_step(layer, outputs[-1]))
        for _ in range(self.iterations - 1):
            steps = zip(self.layers, outputs, outputs[1:], strict=False)
            outputs = [u, *[_step(layer, below, own) for layer, below, own in steps]]
        return outputs[-1]

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}"


def _step(layer: Any, u: Tensor, v: Tensor | None = None) -> Tensor:
    """One step of a layer. One that is not on a grid takes the capsules of a grid one after another."""
    if isinstance(layer, _Steps):
        wanted = 3 + len(layer._vote()[0])
        if u.dim() > wanted:
            u = u.flatten(1, 1 + u.dim() - wanted)
    return layer.step(u, v)


class SelfRoutingCapsules(Matrices):
    """Affine votes and self-routing (Hahn et al. 2019): every input capsule decides by itself where it goes.

    r_ij = softmax over the output capsules of u_i R_ij + b_ij;  activation_j = Σ_i a_i r_ij / Σ_i a_i;
    pose_j = Σ_i a_i r_ij û_ij / Σ_i a_i r_ij. There is no agreement and there are no iterations.

    Args:
        in_capsules: N.
        in_dim: K.
        out_capsules: J.
        out_dim: D.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: parameter [N, K, J, D], of the votes.
        routing_weight: parameter [N, K, J].
        routing_bias: parameter [N, J].

    Shape: pose [B, N, K] and activation [B, N] above 0 (and mask, bool [B, N]) -> pose [B, J, D] and activation [B, J].
    An activation of 0 counts as the smallest number above it.

    Raises:
        TypeError: an input is not a tensor.
        ValueError: wrong sizes; an input of a wrong shape, dtype or device.
        MemoryError: no memory for the workspace.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _layer: str = "SelfRoutingCapsules",
    ) -> None:
        super().__init__(_layer, in_capsules, in_dim, out_capsules, out_dim, 1, False, device, dtype)
        self.routing_weight = nn.Parameter(torch.empty(in_capsules, in_dim, out_capsules, device=device, dtype=dtype))
        self.routing_bias = nn.Parameter(torch.empty(in_capsules, out_capsules, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the matrices with σ = 1 / √K, so that votes have the variance of the poses; the routing with 0."""
        nn.init.normal_(self.weight, std=1 / math.sqrt(self.in_dim))
        nn.init.zeros_(self.routing_weight)
        nn.init.zeros_(self.routing_bias)

    def forward(self, pose: Tensor, activation: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layer = self._layer
        names = "pose activation weight routing_weight routing_bias"
        parameters = self.weight, self.routing_weight, self.routing_bias
        *tensors, mask = settle(layer, f"{names} mask?", pose, activation, *parameters, mask)
        pose, activation, weight, routing_weight, routing_bias = tensors
        self._check_capsules("pose", pose, "[B, N, K]")
        check_floating(layer, names, *tensors)
        check_votes(layer, pose, weight, mask, "pose")
        check_shape(layer, "activation", activation, "B, N", *pose.shape[:2])
        tiny = torch.finfo(activation.dtype).tiny
        a = activation.clamp_min(tiny)
        if mask is not None:
            a = a.masked_fill(~mask, 0)
            pose = pose.masked_fill(~mask[:, :, None], 0)
        with functional.float32(pose):
            log_r = (torch.einsum("bnk,nkj->bnj", pose, routing_weight) + routing_bias).log_softmax(dim=2)
            # The shares of an output capsule in its input capsules are a softmax over these, of log (a r).
            logits = log_r + a.clamp_min(tiny).log()[:, :, None]
            state = pose.new_zeros(pose.shape[0], self.out_capsules, self.out_dim)
            out = functional.routing_step(pose, weight, state, logits, axis="input", mask=mask)
            total = a.sum(dim=1, keepdim=True).clamp_min(tiny)
            return out, torch.einsum("bn,bnj->bj", a, log_r.exp()) / total

    def extra_repr(self) -> str:
        return self._sizes()
