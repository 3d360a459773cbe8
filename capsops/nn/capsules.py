"""Capsules whose input capsules are all connected to all output capsules: routing by agreement and its kin."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional, parallel
from ..ops._checks import (
    check_at_least,
    check_axis,
    check_choice,
    check_flag,
    check_floating,
    check_pairs,
    check_votes,
    fail,
    of_every_capsule,
    of_every_item,
)
from ..ops._declare import settle
from ..ops.squash import ROUTING_SQUASHES
from .layer import Matrices

ROUTINGS = ("attention", "dynamic", "uniform", "self-attention")

# Bounds that keep the couplings of the first step soft; see `CapsuleLayer.reset_parameters`.
_LOGIT_DEVIATION, _GROWTH = 1.5, 1.5

_LENGTHS: dict[str, Callable[[float, int], float]] = {
    "sabour": lambda n, D: n**2 / (1 + n**2),
    "efficient": lambda n, D: 1 - math.exp(-n),
    "none": lambda n, D: n,
    "layer_norm": lambda n, D: math.sqrt(D),
}
"""The length of v for an s [D] of length n, by squash."""


class CapsuleLayer(Matrices):
    """Affine votes and routing from every input capsule to every output capsule, without holding the votes.

    Args:
        in_capsules: N.
        in_dim: K.
        out_capsules: J.
        out_dim: D.
        routing: "attention" (CardioCaps, eq. 4), "dynamic" (Sabour et al. 2017), "uniform" (all couplings equal) or
            "self-attention" (Mazzia et al. 2021). `EMCapsules` has EM routing.
        iterations: of dynamic routing.
        bias: for attention the bias of the 1×1 convolution; for self-attention the prior [N, J] of the couplings;
            otherwise a bias [J, D] inside the squash.
        leaky: for dynamic routing only; see `capsops.dynamic_routing`.
        detach: for dynamic routing only; see `capsops.dynamic_routing`.
        axis: for dynamic routing only: "output" or "input"; see `capsops.dynamic_routing`.
        squash: for all routings but self-attention: "sabour", "efficient", "none" or "layer_norm"; see
            `capsops.dynamic_routing`.
        logits: for dynamic routing only: learn initial logits [N, J], which begin at 0; see `capsops.dynamic_routing`.
        shared: use one matrix [K, J, D] for all input capsules; N may then vary from call to call. Self-attention
            routing then has no prior, so bias must be False; and no logits are learned.
        types: use one matrix for each of T types of input capsules, of which N / T in a row are of the same type, as
            `PrimaryCapsules` orders them.
        device: of the parameters.
        dtype: of the parameters.
        process_group: of torch.distributed, over whose ranks the input capsules and their parameters are split
            (`capsops.parallel`). N below is then the number of this rank's capsules in u, weight, prior, logits,
            input_weight and mask. The batch, the other parameters and v are the same on every rank. Not with types or
            leaky.

    Attributes:
        weight: parameter [N, K, J, D], [K, J, D] if shared, or [T, K, J, D] by type.
        attn_weight: parameter [J, J] of attention routing; otherwise None.
        attn_bias: parameter [J] of attention routing with a bias; otherwise None.
        prior: parameter [N, J] of self-attention routing with a bias; otherwise None.
        bias: parameter [J, D] of dynamic and uniform routing with a bias; otherwise None.
        logits: parameter [N, J] of dynamic routing with logits; otherwise None.

    Shape: u [B, N, K] (and mask, bool [B, N]) -> v [B, J, D]. All routings but uniform also take input_weight [B, N],
    and dynamic routing takes logits [N, J], [1, N, J] or [B, N, J], to which the parameter is added.

    Raises:
        TypeError: an input is not a tensor.
        ValueError: wrong sizes, an unknown routing, options that do not belong to it; an input of a wrong shape, dtype
            or device.
        MemoryError: no memory for the workspace.
    """

    def __init__(
        self,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        routing: str = "attention",
        *,
        iterations: int = 3,
        bias: bool = True,
        leaky: bool = False,
        detach: bool = False,
        axis: str = "output",
        squash: str = "sabour",
        logits: bool = False,
        shared: bool = False,
        types: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        process_group: Any = None,
        _layer: str = "CapsuleLayer",
    ) -> None:
        held = None
        if process_group is not None:
            check_at_least(_layer, 1, in_capsules=in_capsules)
            part = parallel.part_of_rank(in_capsules, process_group)
            held = part.stop - part.start
            for name, value in (("types", types), ("leaky", leaky)):
                if value:
                    fail(_layer, f"{name} is {value}; expected none, because process_group is given")
        super().__init__(
            _layer, in_capsules, in_dim, out_capsules, out_dim, iterations, shared, device, dtype, types, held
        )
        check_choice(_layer, "routing", routing, ROUTINGS)
        check_flag(_layer, "bias", bias)
        for name, flag in (("leaky", leaky), ("detach", detach), ("logits", logits)):
            check_flag(_layer, name, flag)
            if flag and routing != "dynamic":
                fail(_layer, f"{name} is True; expected False, because routing is {routing!r} and not 'dynamic'")
        if shared and bias and routing == "self-attention":
            fail(
                _layer,
                "bias is True; expected False, because shared matrices take any number of capsules and the prior of "
                "routing 'self-attention' does not",
            )
        check_axis(_layer, axis, leaky)
        if axis == "input" and routing != "dynamic":
            fail(_layer, f"axis is 'input'; expected 'output', because routing is {routing!r} and not 'dynamic'")
        check_choice(_layer, "squash", squash, ROUTING_SQUASHES)
        if squash != "sabour" and routing == "self-attention":
            fail(_layer, f"squash is {squash!r}; expected 'sabour', because routing {routing!r} has its own squash")
        if logits and (shared or detach):
            reason = (
                "shared matrices take any number of capsules" if shared else "with detach they would get no gradient"
            )
            fail(_layer, f"logits is True; expected False, because {reason}")
        self.routing, self.iterations = routing, 1 if routing == "uniform" else iterations
        self.leaky, self.detach, self.axis, self.squash = leaky, detach, axis, squash
        self.process_group = process_group

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        attention, self_attention = routing == "attention", routing == "self-attention"
        self.attn_weight = parameter(out_capsules, out_capsules) if attention else None
        self.attn_bias = parameter(out_capsules) if attention and bias else None
        self.prior = parameter(self._held, out_capsules) if self_attention and bias else None
        self.bias = parameter(out_capsules, out_dim) if bias and not (attention or self_attention) else None
        self.logits = parameter(self._held, out_capsules) if logits else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the matrices so that couplings start soft, and output capsules neither vanish nor saturate.

        The weights are normal with standard deviation σ, for input capsules of length up to 1 in random directions:

            σ = n J / √(N D)        n is then the length of s where all couplings are 1 / J

        The squash is steepest at n = 1, which uniform routing always uses. But then votes have the length J / √N, and
        with many output capsules the softmax of their logits selects a single one: the others get no votes and no
        gradient. So the other routings use a smaller n where necessary:

        * dynamic, R iterations. After t iterations V is about t f s, with f = n / (1 + n²). While the logits û·V are
          small, the next iteration makes s longer by the factor 1 + t g with g = f σ² M / J. (Σ_i û_i û_iᵀ is σ² M
          along s. M = N + D if each input capsule has its own matrix. Votes of a shared matrix lie in K dimensions,
          those of T types in K T, and M = N + D + N D / (K T).) Over all iterations s grows by the exponent
          g R (R − 1) / 2. It is limited to 1.5 / √ln J, because the largest of J logits decides, and that lies
          √(2 ln J) standard deviations above their mean. So n solves
              n³ / (1 + n²) = 3 N D / (M J R (R − 1) √ln J), and is 1 where the right side is above 1/2
          (for R = 3, D = 16 and N ≫ D: J ≤ 10). That is for the squash "sabour"; with another one n times the length
          that it gives v takes the place of n³ / (1 + n²).
        * self-attention. T = J s is not squashed; g = σ² M / √D is limited to 1.5 / √ln J.
        * attention. The logits have the standard deviation σ / √3, which is limited to 1.5. With a shared matrix a
          logit covaries with the vote that it weighs, in the same way for all input capsules, and s² grows by the
          factor 1 + N σ² / (3 K), with T types 3 K T. The product of this factor and n² is limited to 2.

        With the softmax over the input capsules (axis "input") equal couplings are 1 / N, and N takes the place of J in
        these rules. Couplings then start nearly equal, and the output capsules of many input capsules short: 0.04 for
        N = 1,152 and three iterations.

        With the softmax over the output capsules, for J from 2 to 1,000, N from 16 to 100,000 and lengths of the input
        capsules from 0.3 to 1, the mean of the largest coupling is then below 0.3 (below 0.6 for two output capsules).
        The median length of v is below 0.95 and above 1e-4 (above 1e-3 for input capsules of length 1). With a shared
        matrix, input capsules that all point in one direction give an s that is up to √N times as long.

        The 1×1 convolution starts as `torch.nn.Conv2d` does, bias, logits and prior at 0 (the prior as in Mazzia et al.
        2021).
        """
        own = None
        if self.process_group is not None and not self.shared:
            # Ranks draw different matrices, also where all of them have the same seed.
            own = parallel.generator_of_rank(self.weight.device, self.process_group)
        nn.init.normal_(self.weight, std=initial_deviation(self), generator=own)
        bound = 1 / math.sqrt(self.out_capsules)
        for convolution in (self.attn_weight, self.attn_bias):
            if convolution is not None:
                nn.init.uniform_(convolution, -bound, bound)
        for start in (self.bias, self.logits, self.prior):
            if start is not None:
                nn.init.zeros_(start)
        if self.process_group is not None:
            common = self.weight if self.shared else None
            parallel.copy_of_first_rank([common, self.attn_weight, self.attn_bias], self.process_group)

    def forward(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        logits: Tensor | None = None,
        input_weight: Tensor | None = None,
    ) -> Tensor:
        def route() -> Tensor:
            common: dict[str, Any] = {"input_weight": input_weight, "mask": mask}
            routings: Any = functional
            if self.process_group is not None:
                routings, common["group"] = parallel, self.process_group
            if self.routing == "self-attention":
                return routings.self_attention_routing(u, self.weight, self.prior, **common)
            common["squash"] = self.squash
            if self.attn_weight is not None:
                return routings.attention_routing(u, self.weight, self.attn_weight, self.attn_bias, **common)
            if self.leaky:
                common["leaky"] = True
            return routings.dynamic_routing(
                u,
                self.weight,
                self.iterations,
                logits=self._with_parameter(logits),
                axis=self.axis,
                bias=self.bias,
                detach=self.detach,
                **common,
            )

        self._check_takes(logits, input_weight)
        return self._call(route, u, mask, logits, input_weight)

    def coupling_coefficients(
        self,
        u: Tensor,
        mask: Tensor | None = None,
        logits: Tensor | None = None,
        input_weight: Tensor | None = None,
    ) -> Tensor:
        """c [B, N, J] (attention: [B, N, J, D]) for these input capsules; see `capsops.coupling_coefficients`.

        A layer with a process group has them for attention and uniform routing, where they do not depend on the
        capsules of other ranks.
        """
        if self.process_group is not None and self.routing not in ("attention", "uniform"):
            fail(
                self._layer,
                f"routing is {self.routing!r}; expected 'attention' or 'uniform' for coupling coefficients, because "
                "process_group is given",
            )

        def explain() -> Tensor:
            return functional.coupling_coefficients(
                self.routing,
                u,
                self.weight,
                self.attn_weight,
                self.attn_bias,
                iterations=self.iterations,
                bias=self.bias,
                leaky=self.leaky,
                prior=self.prior,
                logits=self._with_parameter(logits),
                axis=self.axis,
                squash=self.squash,
                input_weight=input_weight,
                mask=mask,
            )

        self._check_takes(logits, input_weight)
        return self._call(explain, u, mask, logits, input_weight)

    def _with_parameter(self, logits: Tensor | None) -> Tensor | None:
        """The given logits plus those that the layer learns."""
        if self.logits is None:
            return logits
        return self.logits if logits is None else self.logits + logits

    def _check_takes(self, logits: Tensor | None, input_weight: Tensor | None) -> None:
        if logits is not None and self.routing != "dynamic":
            reason = f"routing is {self.routing!r} and not 'dynamic'"
            fail(self._layer, f"logits is given; expected None, because {reason}")
        if input_weight is not None and self.routing == "uniform":
            fail(self._layer, "input_weight is given; expected None, because routing is 'uniform'")

    def _refuse(
        self, u: Tensor, mask: Tensor | None, logits: Tensor | None = None, input_weight: Tensor | None = None
    ) -> None:
        layer = self._layer
        u, weight, mask, logits, input_weight = settle(
            layer, "u weight mask? logits? input_weight?", u, self.weight, mask, logits, input_weight
        )
        self._check_capsules("u", u, "[B, N, K]")
        check_floating(layer, "u weight", u, weight)
        check_votes(layer, u, of_every_capsule(u, weight), mask)
        if logits is not None:
            logits = of_every_item(layer, logits, u, self.out_capsules)
        check_pairs(layer, logits, input_weight, u, self.out_capsules)

    def extra_repr(self) -> str:
        parts = [f"{self._sizes()}, routing={self.routing!r}"]
        if self.routing == "dynamic":
            parts.append(f"iterations={self.iterations}, leaky={self.leaky}, detach={self.detach}")
        if self.axis == "input":
            parts.append("axis='input'")
        if self.squash != "sabour":
            parts.append(f"squash={self.squash!r}")
        if self.attn_bias is None and self.bias is None and self.prior is None:
            parts.append("bias=False")
        if self.logits is not None:
            parts.append("logits=True")
        if self.shared:
            parts.append("shared=True")
        if self.process_group is not None:
            parts.append(f"held={self._held}")
        return ", ".join(parts)


def initial_deviation(layer: CapsuleLayer) -> float:
    """The σ of the matrices that `CapsuleLayer.reset_parameters` derives."""
    N, K, J, D = layer.in_capsules, layer.in_dim, layer.out_capsules, layer.out_dim
    steps = layer.iterations * (layer.iterations - 1) / 2
    rivals = N if layer.axis == "input" else J  # capsules over which the couplings add up to 1
    unit = rivals / math.sqrt(N * D)  # gives s the length 1
    matrices = 1 if layer.shared else layer.types  # that input capsules share
    if layer.routing == "attention":
        most = _LOGIT_DEVIATION * math.sqrt(3)
        if matrices:
            q = N / (3 * K * matrices)
            most = min(most, math.sqrt((math.sqrt(1 + 8 * q / (N * D) * J**2) - 1) / (2 * q)))
        return min(unit, most)
    if rivals == 1 or layer.routing == "uniform" or (layer.routing == "dynamic" and steps == 0):
        return unit
    M = N + D + (N * D / (K * matrices) if matrices else 0)
    growth = _GROWTH / math.sqrt(math.log(rivals))
    if layer.routing == "self-attention":
        return min(unit, math.sqrt(growth * math.sqrt(D) / M))
    wanted = growth * N * D / (M * rivals * steps)
    length = _LENGTHS[layer.squash]
    low, high = 0.0, 1.0
    while wanted < length(1, D) and high - low > 1e-9:  # n times the length of v grows with n
        n = (low + high) / 2
        low, high = (n, high) if n * length(n, D) < wanted else (low, n)
    return high * unit
