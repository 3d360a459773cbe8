"""Capsule layers as torch modules."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from . import functional
from .ops import em
from .ops._checks import (
    check_at_least,
    check_axis,
    check_choice,
    check_flag,
    check_floating,
    check_iterations,
    check_tensors,
    check_votes,
    fail,
    of_every_item,
    refuse_scripting,
)
from .ops._declare import settle
from .ops.primary_capsules import LAYOUTS
from .ops.squash import SQUASH_KINDS

ROUTINGS = ("attention", "dynamic", "uniform", "self-attention")

# Bounds that keep the couplings of the first step soft; see `CapsuleLayer.reset_parameters`.
_LOGIT_DEVIATION, _GROWTH = 1.5, 1.5


def _check_window(layer: str, kernel_size: int, padding: int, height: int, width: int) -> None:
    """Require a grid that is at least as large as the kernel."""
    most = min(height, width) + 2 * padding
    if kernel_size > most:
        fail(
            layer,
            f"kernel_size is {kernel_size}; expected at most {most}, because the grid is {height} × {width} with "
            f"padding {padding}",
        )


class _Layer(nn.Module):
    """The base of all layers."""

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script before it compiles a module that has this layer."""
        refuse_scripting(type(self).__name__)


class PrimaryCapsules(_Layer):
    """A convolution whose output is read as capsules, and squashed (Sabour et al. 2017, section 4).

    Args:
        in_channels: channels of the image or feature map.
        types: capsule types; the convolution has types · dim channels.
        dim: K, the dimension of a capsule.
        kernel_size: of the convolution, in both directions.
        stride: of the convolution, in both directions.
        padding: of the convolution, at all edges.
        layout: "channels": the components of a capsule are neighbouring channels at one location. "legacy": a plain
            reshape of [B, C, H, W], as in the published CardioCaps: the components are `dim` neighbouring pixels of one
            channel, and where H' · W' is not a multiple of `dim`, a capsule continues in the next channel.
        squash: "sabour" or "efficient"; see `capsops.squash`.
        device: of the parameters.
        dtype: of the parameters.

    Shape: [B, in_channels, H, W] -> [B, N, K] with N = types · H' · W'. In layout "channels" the capsules run over
    types, then rows, then columns.

    Raises:
        TypeError: the image is not a tensor.
        ValueError: wrong sizes, an unknown layout or squash; an image of a wrong shape, dtype or device, or smaller
            than the kernel.
    """

    def __init__(
        self,
        in_channels: int,
        types: int,
        dim: int,
        kernel_size: int = 9,
        stride: int = 2,
        padding: int = 0,
        *,
        layout: str = "channels",
        squash: str = "sabour",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_at_least("PrimaryCapsules", 1, in_channels=in_channels, types=types, dim=dim)
        check_at_least("PrimaryCapsules", 1, kernel_size=kernel_size, stride=stride)
        check_at_least("PrimaryCapsules", 0, padding=padding)
        check_choice("PrimaryCapsules", "layout", layout, LAYOUTS)
        check_choice("PrimaryCapsules", "squash", squash, SQUASH_KINDS)
        self.types, self.dim, self.layout, self.squash = types, dim, layout, squash
        self.conv = nn.Conv2d(in_channels, types * dim, kernel_size, stride, padding, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        layer, conv = "PrimaryCapsules", self.conv
        if not isinstance(x, torch.fx.Proxy):  # the placeholder of torch.fx, which has no shape
            check_tensors(layer, "x", x)
            if x.dim() != 4 or x.shape[1] != conv.in_channels:
                fail(
                    layer,
                    f"x has shape {list(x.shape)}; expected [B, in_channels, H, W] with in_channels = "
                    f"{conv.in_channels}",
                )
        try:
            features = conv(x)
        except RuntimeError:  # whose message does not name the layer
            _check_window(layer, conv.kernel_size[0], int(conv.padding[0]), *x.shape[2:])
            check_floating(layer, "x weight", x, conv.weight)
            raise
        return functional.primary_capsules(features, self.types, layout=self.layout, squash=self.squash)

    def extra_repr(self) -> str:
        return f"types={self.types}, dim={self.dim}, layout={self.layout!r}, squash={self.squash!r}"


class _Matrices(_Layer):
    """The base of layers from N input capsules to J output capsules: their sizes and transformation matrices.

    layer: the name of the layer in error messages, that of the class which the user made.
    """

    def __init__(
        self,
        layer: str,
        in_capsules: int,
        in_dim: int,
        out_capsules: int,
        out_dim: int,
        iterations: int,
        shared: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        sizes = {"in_capsules": in_capsules, "in_dim": in_dim, "out_capsules": out_capsules, "out_dim": out_dim}
        check_at_least(layer, 1, **sizes)
        check_iterations(layer, iterations)
        check_flag(layer, "shared", shared)
        self._layer = layer
        self.in_capsules, self.in_dim, self.out_capsules, self.out_dim = in_capsules, in_dim, out_capsules, out_dim
        self.iterations, self.shared = iterations, shared
        matrix = (in_dim, out_capsules, out_dim)
        size = matrix if shared else (in_capsules, *matrix)
        self.weight = nn.Parameter(torch.empty(size, device=device, dtype=dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep the matrices contiguous under `model.to(memory_format=torch.channels_last)`.

        That call means images, but it changes every parameter of four dimensions; matrices in that order would be
        copied at every call.
        """
        super()._apply(fn, recurse)
        for x in (self.weight, self.weight.grad):
            if x is not None:
                x.data = x.data.contiguous()
        return self

    def _call(self, routing: Callable[[], Any], *inputs: Tensor | None) -> Any:
        """Call a routing; if it refuses the inputs, raise an error in the terms of the layer, not of the function."""
        try:
            return routing()
        except (TypeError, ValueError):
            self._refuse(*inputs)
            raise

    def _refuse(self, *inputs: Any) -> None:
        """Raise for inputs that the layer cannot take; only called after a routing has failed."""
        raise NotImplementedError

    def _check_capsules(self, name: str, x: Tensor, axes: str) -> None:
        """Require capsules of a shape that the matrices take."""
        wrong_number = not self.shared and x.shape[1:2] != (self.in_capsules,)
        if x.dim() not in (3, axes.count(",") + 1) or x.shape[-1] != self.in_dim or wrong_number:
            wanted = f"K = {self.in_dim}" if self.shared else f"N = {self.in_capsules} and K = {self.in_dim}"
            fail(self._layer, f"{name} has shape {list(x.shape)}; expected {axes} with {wanted}")


class CapsuleLayer(_Matrices):
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
        logits: for dynamic routing only: learn initial logits [N, J], which begin at 0; see `capsops.dynamic_routing`.
        shared: use one matrix [K, J, D] for all input capsules; N may then vary from call to call. Self-attention
            routing then has no prior, so bias must be False; and no logits are learned.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: parameter [N, K, J, D], or [K, J, D] if shared.
        attn_weight: parameter [J, J] of attention routing; otherwise None.
        attn_bias: parameter [J] of attention routing with a bias; otherwise None.
        prior: parameter [N, J] of self-attention routing with a bias; otherwise None.
        bias: parameter [J, D] of dynamic and uniform routing with a bias; otherwise None.
        logits: parameter [N, J] of dynamic routing with logits; otherwise None.

    Shape: u [B, N, K] (and mask, bool [B, N]) -> v [B, J, D]. Dynamic routing also takes logits [N, J], [1, N, J] or
    [B, N, J], to which the parameter is added.

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
        logits: bool = False,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _layer: str = "CapsuleLayer",
    ) -> None:
        super().__init__(_layer, in_capsules, in_dim, out_capsules, out_dim, iterations, shared, device, dtype)
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
        if logits and (shared or detach):
            reason = (
                "shared matrices take any number of capsules" if shared else "with detach they would get no gradient"
            )
            fail(_layer, f"logits is True; expected False, because {reason}")
        self.routing, self.iterations = routing, 1 if routing == "uniform" else iterations
        self.leaky, self.detach, self.axis = leaky, detach, axis

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        attention, self_attention = routing == "attention", routing == "self-attention"
        self.attn_weight = parameter(out_capsules, out_capsules) if attention else None
        self.attn_bias = parameter(out_capsules) if attention and bias else None
        self.prior = parameter(in_capsules, out_capsules) if self_attention and bias else None
        self.bias = parameter(out_capsules, out_dim) if bias and not (attention or self_attention) else None
        self.logits = parameter(in_capsules, out_capsules) if logits else None
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
          along s. M = N + D if each input capsule has its own matrix. Votes of a shared matrix lie in K dimensions, and
          M = N + D + N D / K.) Over all iterations s grows by the exponent g R (R − 1) / 2. It is limited to
          1.5 / √ln J, because the largest of J logits decides, and that lies √(2 ln J) standard deviations above their
          mean. So n solves
              n³ / (1 + n²) = 3 N D / (M J R (R − 1) √ln J), and is 1 where the right side is above 1/2
          (for R = 3, D = 16 and N ≫ D: J ≤ 10).
        * self-attention. T = J s is not squashed; g = σ² M / √D is limited to 1.5 / √ln J.
        * attention. The logits have the standard deviation σ / √3, which is limited to 1.5. With a shared matrix a
          logit covaries with the vote that it weighs, in the same way for all input capsules, and s² grows by the
          factor 1 + N σ² / (3 K). The product of this factor and n² is limited to 2.

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
        nn.init.normal_(self.weight, std=_initial_deviation(self))
        bound = 1 / math.sqrt(self.out_capsules)
        for convolution in (self.attn_weight, self.attn_bias):
            if convolution is not None:
                nn.init.uniform_(convolution, -bound, bound)
        for start in (self.bias, self.logits, self.prior):
            if start is not None:
                nn.init.zeros_(start)

    def forward(self, u: Tensor, mask: Tensor | None = None, logits: Tensor | None = None) -> Tensor:
        def route() -> Tensor:
            if self.routing == "self-attention":
                return functional.self_attention_routing(u, self.weight, self.prior, mask=mask)
            if self.attn_weight is not None:
                return functional.attention_routing(u, self.weight, self.attn_weight, self.attn_bias, mask=mask)
            return functional.dynamic_routing(
                u,
                self.weight,
                self.iterations,
                logits=self._with_parameter(logits),
                axis=self.axis,
                bias=self.bias,
                leaky=self.leaky,
                detach=self.detach,
                mask=mask,
            )

        self._check_takes_logits(logits)
        return self._call(route, u, mask, logits)

    def coupling_coefficients(self, u: Tensor, mask: Tensor | None = None, logits: Tensor | None = None) -> Tensor:
        """c [B, N, J] (attention: [B, N, J, D]) for these input capsules; see `capsops.coupling_coefficients`."""

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
                mask=mask,
            )

        self._check_takes_logits(logits)
        return self._call(explain, u, mask, logits)

    def _with_parameter(self, logits: Tensor | None) -> Tensor | None:
        """The given logits plus those that the layer learns."""
        if self.logits is None:
            return logits
        return self.logits if logits is None else self.logits + logits

    def _check_takes_logits(self, logits: Tensor | None) -> None:
        if logits is not None and self.routing != "dynamic":
            fail(self._layer, f"logits are given; expected None, because routing is {self.routing!r} and not 'dynamic'")

    def _refuse(self, u: Tensor, mask: Tensor | None, logits: Tensor | None) -> None:
        layer = self._layer
        u, weight, mask, logits = settle(layer, "u weight mask? logits?", u, self.weight, mask, logits)
        self._check_capsules("u", u, "[B, N, K]")
        check_floating(layer, "u weight", u, weight)
        check_votes(layer, u, weight, mask)
        if logits is not None:
            of_every_item(layer, logits, u, weight)

    def extra_repr(self) -> str:
        parts = [
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}",
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}, routing={self.routing!r}",
        ]
        if self.routing == "dynamic":
            parts.append(f"iterations={self.iterations}, leaky={self.leaky}, detach={self.detach}")
        if self.axis == "input":
            parts.append("axis='input'")
        if self.attn_bias is None and self.bias is None and self.prior is None:
            parts.append("bias=False")
        if self.logits is not None:
            parts.append("logits=True")
        if self.shared:
            parts.append("shared=True")
        return ", ".join(parts)


def _initial_deviation(layer: CapsuleLayer) -> float:
    """The σ of the matrices that `CapsuleLayer.reset_parameters` derives."""
    N, K, J, D = layer.in_capsules, layer.in_dim, layer.out_capsules, layer.out_dim
    steps = layer.iterations * (layer.iterations - 1) / 2
    rivals = N if layer.axis == "input" else J  # capsules over which the couplings add up to 1
    unit = rivals / math.sqrt(N * D)  # gives s the length 1
    if layer.routing == "attention":
        most = _LOGIT_DEVIATION * math.sqrt(3)
        if layer.shared:
            q = N / (3 * K)
            most = min(most, math.sqrt((math.sqrt(1 + 8 * q / (N * D) * J**2) - 1) / (2 * q)))
        return min(unit, most)
    if rivals == 1 or layer.routing == "uniform" or (layer.routing == "dynamic" and steps == 0):
        return unit
    M = N + D + (N * D / K if layer.shared else 0)
    growth = _GROWTH / math.sqrt(math.log(rivals))
    if layer.routing == "self-attention":
        return min(unit, math.sqrt(growth * math.sqrt(D) / M))
    wanted = growth * N * D / (M * rivals * steps)
    low, high = 0.0, 1.0
    while wanted < 0.5 and high - low > 1e-9:  # n³ / (1 + n²) grows with n
        n = (low + high) / 2
        low, high = (n, high) if n**3 / (1 + n**2) < wanted else (low, n)
    return high * unit


class EMCapsules(_Matrices):
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
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        weight: parameter [N, K, J, D], or [K, J, D] if shared.
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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        _layer: str = "EMCapsules",
    ) -> None:
        super().__init__(_layer, in_capsules, in_dim, out_capsules, out_dim, iterations, shared, device, dtype)
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
        def route() -> tuple[Tensor, Tensor]:
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
            )

        return self._call(route, pose, activation, mask)

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
        em.check(self._layer, *tensors)

    def extra_repr(self) -> str:
        return (
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}, "
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}, iterations={self.iterations}, "
            f"inverse_temperature={self.inverse_temperature}" + ", renormalise=True" * self.renormalise
        ) + ", shared=True" * self.shared


class ConvCapsules(_Layer):
    """Capsules on a grid, routed from local receptive fields with matrices that all positions share.

    As in the convolutional capsule layers of Hinton et al. 2018, an output position routes the capsules of the
    kernel_size × kernel_size window below it, N = kernel_size² · in_types of them. Positions in the padding hold no
    capsule: they are left out of the routing instead of being capsules of pose 0.

    Every position is an item of the batch of an ordinary routing. So the votes are never held, but the poses of the
    receptive fields are: (kernel_size / stride)² copies of the input.

    Args:
        in_types: the number of capsule types at a position.
        in_dim: K.
        out_types: J.
        out_dim: D.
        kernel_size: of the receptive fields, in both directions.
        stride: between receptive fields, in both directions.
        padding: of the grid, at all edges.
        routing: one of `CapsuleLayer`, or "em".
        options: further keyword arguments of the layer that routes: `CapsuleLayer` or, for "em", `EMCapsules`.

    Attributes:
        capsules: the layer that routes. Its input capsules run over the rows of the window, then the columns, then the
            types.

    Shape: u [B, in_types, H, W, K] -> v [B, out_types, H', W', D] with H' = (H + 2 padding − kernel_size) // stride + 1
    and W' alike. EM: pose [B, in_types, H, W, K] or [B, in_types, H, W, P, K] and activation [B, in_types, H, W] ->
    pose [B, out_types, H', W', D] or [B, out_types, H', W', P, D] and activation [B, out_types, H', W']. With a mask,
    bool [B, in_types, H, W], True where there is a capsule.

    Raises:
        TypeError: an input is not a tensor, or the routing does not have an option.
        ValueError: wrong sizes, an unknown routing; an input of a wrong shape, dtype or device, or smaller than a
            window.
        MemoryError: no memory for the workspace.
    """

    def __init__(
        self,
        in_types: int,
        in_dim: int,
        out_types: int,
        out_dim: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int = 0,
        routing: str = "dynamic",
        **options: Any,
    ) -> None:
        super().__init__()
        check_at_least("ConvCapsules", 1, in_types=in_types, in_dim=in_dim, out_types=out_types, out_dim=out_dim)
        check_at_least("ConvCapsules", 1, kernel_size=kernel_size, stride=stride)
        check_at_least("ConvCapsules", 0, padding=padding)
        check_choice("ConvCapsules", "routing", routing, (*ROUTINGS, "em"))
        self.in_types, self.in_dim, self.out_types, self.out_dim = in_types, in_dim, out_types, out_dim
        self.kernel_size, self.stride, self.padding, self.routing = kernel_size, stride, padding, routing
        sizes = (kernel_size**2 * in_types, in_dim, out_types, out_dim)
        kind = EMCapsules if routing == "em" else CapsuleLayer
        _check_options("ConvCapsules", routing, kind, options)
        if routing == "em":
            self.capsules: EMCapsules | CapsuleLayer = EMCapsules(*sizes, **options, _layer="ConvCapsules")
        else:
            self.capsules = CapsuleLayer(*sizes, routing, **options, _layer="ConvCapsules")

    def forward(
        self, pose: Tensor, activation: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        B, rows, columns = self._check(pose, activation, mask)
        present = self._present(pose, mask)
        if activation is None:
            return self._grid(self.capsules(self._receptive_fields(pose), present), B, rows, columns)
        out = self.capsules(self._receptive_fields(pose), self._receptive_fields(activation), present)
        return self._grid(out[0], B, rows, columns), self._grid(out[1], B, rows, columns)

    def _check(self, pose: Tensor, activation: Tensor | None, mask: Tensor | None) -> tuple[int, int, int]:
        """Check the inputs and return B, H' and W'."""
        layer, em = "ConvCapsules", self.routing == "em"
        check_tensors(layer, "pose activation? mask?", pose, activation, mask)
        dims, last = ((5, 6), "[B, in_types, H, W, (P,) K]") if em else ((5,), "[B, in_types, H, W, K]")
        if pose.dim() not in dims or pose.shape[1] != self.in_types or pose.shape[-1] != self.in_dim:
            fail(
                layer,
                f"pose has shape {list(pose.shape)}; expected {last} with in_types = {self.in_types} and "
                f"K = {self.in_dim}",
            )
        if em != (activation is not None):
            found, wanted = ("None", "a tensor") if em else ("a tensor", "None")
            fail(layer, f"activation is {found}; expected {wanted}, because routing is {self.routing!r}")
        for name, x in (("activation", activation), ("mask", mask)):
            if x is not None and x.shape != pose.shape[:4]:
                fail(
                    layer,
                    f"{name} has shape {list(x.shape)}; expected [B, in_types, H, W] = {list(pose.shape[:4])}",
                )
        tensors = settle(layer, "pose weight activation?", pose, self.capsules.weight, activation)
        check_floating(layer, "pose weight activation", *tensors)
        if mask is not None and (mask.dtype != torch.bool or mask.device != pose.device):
            fail(
                layer,
                f"mask is {mask.dtype} on {mask.device}; expected torch.bool (True where there is a capsule) on "
                f"{pose.device}, the device of pose",
            )
        B, _, height, width = pose.shape[:4]
        _check_window(layer, self.kernel_size, self.padding, height, width)
        rows, columns = ((n + 2 * self.padding - self.kernel_size) // self.stride + 1 for n in (height, width))
        return B, rows, columns

    def _present(self, pose: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask of the receptive fields [B · H' · W', N]; None if all of their positions hold capsules."""
        if mask is None and self.padding == 0:
            return None
        if mask is None:
            mask = pose.new_ones((), dtype=torch.bool).expand(pose.shape[:4])
        return self._receptive_fields(mask)

    def _receptive_fields(self, x: Tensor) -> Tensor:
        """[B, T, H, W, …] -> [B · H' · W', N, …]: a strided view, which is copied once, in the order of the routing."""
        further = x.dim() - 4
        if self.padding:
            p = self.padding
            x = nn.functional.pad(x, (0, 0) * further + (p, p, p, p))
        windows = x.unfold(2, self.kernel_size, self.stride).unfold(3, self.kernel_size, self.stride)
        # [B, T, H', W', …, row, column] -> [B, H', W', row, column, T, …]
        last = 4 + further
        windows = windows.permute(0, 2, 3, last, last + 1, 1, *range(4, last))
        return windows.flatten(3, 5).flatten(0, 2)

    def _grid(self, x: Tensor, B: int, rows: int, columns: int) -> Tensor:
        """[B · H' · W', J, …] -> [B, J, H', W', …], a view."""
        return x.unflatten(0, (B, rows, columns)).movedim(3, 1)

    def extra_repr(self) -> str:
        return (
            f"in_types={self.in_types}, out_types={self.out_types}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}"
        )


def _check_options(layer: str, routing: str, kind: type[nn.Module], options: dict[str, Any]) -> None:
    """Require options that are keyword arguments of the layer that routes."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and not p.name.startswith("_")]
    for name in options:
        if name not in allowed:
            raise TypeError(
                f"{layer}: option is {name!r}; expected one of {', '.join(allowed)} for routing {routing!r}"
            )


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
