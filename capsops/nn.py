"""Capsule layers as torch modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import functional
from ._ops import SQUASH_KINDS
from .couplings import coupling_coefficients
from .functional import LAYOUTS

ROUTINGS = ("attention", "dynamic", "uniform")


def _at_least_one(layer: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{layer}: {name} is {value!r}; it must be an integer of at least 1")


def _one_of(layer: str, name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{layer}: {name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


class PrimaryCapsules(nn.Module):
    """A convolution whose output is read as capsules, and squashed (Sabour et al. 2017, section 4).

    Args:
        in_channels: channels of the image or feature map.
        types: capsule types; the convolution has types · dim channels.
        dim: K, the dimension of a capsule.
        kernel_size, stride, padding: of the convolution.
        layout: "channels": the components of a capsule are neighbouring channels at one location. "legacy": they are
            `dim` neighbouring pixels of one channel, as a plain reshape of [B, C, H, W] gives (published CardioCaps).
        squash: "sabour" or "efficient".

    Shape: [B, in_channels, H, W] -> [B, N, K] with N = types · H' · W'. In layout "channels" the capsules run over
    types, then rows, then columns.
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
        _at_least_one("PrimaryCapsules", in_channels=in_channels, types=types, dim=dim)
        _one_of("PrimaryCapsules", "layout", layout, LAYOUTS)
        _one_of("PrimaryCapsules", "squash", squash, SQUASH_KINDS)
        self.types, self.dim, self.layout, self.squash = types, dim, layout, squash
        self.conv = nn.Conv2d(in_channels, types * dim, kernel_size, stride, padding, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError(f"PrimaryCapsules: x has shape {list(x.shape)}; expected [B, in_channels, H, W]")
        features = self.conv(x)
        B, _, height, width = features.shape
        pixels = height * width
        if self.layout == "channels":
            u = features.reshape(B, self.types, self.dim, pixels).transpose(2, 3)
        else:
            if pixels % self.dim:
                raise ValueError(
                    f"PrimaryCapsules: layout 'legacy' cuts the {pixels} pixels of a channel into capsules of "
                    f"{self.dim}; {pixels} must be a multiple of {self.dim}"
                )
            u = features
        return functional.squash(u.reshape(B, self.types * pixels, self.dim), kind=self.squash)

    def extra_repr(self) -> str:
        return f"types={self.types}, dim={self.dim}, layout={self.layout!r}, squash={self.squash!r}"


class CapsuleLayer(nn.Module):
    """Affine votes and routing from every input capsule to every output capsule, without holding the votes.

    Args:
        in_capsules: N. in_dim: K. out_capsules: J. out_dim: D.
        routing: "attention" (CardioCaps, eq. 4), "dynamic" (Sabour et al. 2017) or "uniform" (all couplings equal).
        iterations: of dynamic routing.
        bias: attention: the bias of the 1×1 convolution; otherwise a bias [J, D] inside the squash.
        leaky, detach: of dynamic routing only; see `capsops.dynamic_routing`.
        shared: one matrix [K, J, D] for all input capsules; N may then vary from call to call.

    Parameters: weight [N, K, J, D] (or [K, J, D]); attn_weight [J, J] and attn_bias [J]; or bias [J, D].

    Shape: u [B, N, K] (and mask, bool [B, N]) -> v [B, J, D].
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
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"in_capsules": in_capsules, "in_dim": in_dim, "out_capsules": out_capsules, "out_dim": out_dim}
        _at_least_one("CapsuleLayer", **sizes, iterations=iterations)
        _one_of("CapsuleLayer", "routing", routing, ROUTINGS)
        for name, flag in (("leaky", leaky), ("detach", detach)):
            if flag and routing != "dynamic":
                raise ValueError(f"CapsuleLayer: {name} belongs to routing 'dynamic'; routing is {routing!r}")
        self.in_capsules, self.in_dim, self.out_capsules, self.out_dim = in_capsules, in_dim, out_capsules, out_dim
        self.routing, self.iterations = routing, 1 if routing == "uniform" else iterations
        self.leaky, self.detach, self.shared = leaky, detach, shared

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        matrix = (in_dim, out_capsules, out_dim)
        self.weight = parameter(*matrix) if shared else parameter(in_capsules, *matrix)
        attention = routing == "attention"
        self.attn_weight = parameter(out_capsules, out_capsules) if attention else None
        self.attn_bias = parameter(out_capsules) if attention and bias else None
        self.bias = parameter(out_capsules, out_dim) if not attention and bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Matrices such that input capsules of length 1 in random directions, routed uniformly, give ‖s‖ ≈ 1.

        That is where the squash is neither flat nor saturated: σ = J / √(N D), or 0.18 for the MNIST network of Sabour
        et al. 2017. A shared matrix adds up coherently at worst, hence σ = J / √(N D) there too. The 1×1 convolution
        starts as `torch.nn.Conv2d` does, the bias at 0.
        """
        nn.init.normal_(self.weight, std=self.out_capsules / math.sqrt(self.in_capsules * self.out_dim))
        bound = 1 / math.sqrt(self.out_capsules)
        for convolution in (self.attn_weight, self.attn_bias):
            if convolution is not None:
                nn.init.uniform_(convolution, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.attn_weight is not None:
            return functional.attention_routing(u, self.weight, self.attn_weight, self.attn_bias, mask=mask)
        return functional.dynamic_routing(
            u, self.weight, self.iterations, bias=self.bias, leaky=self.leaky, detach=self.detach, mask=mask
        )

    def coupling_coefficients(self, u: Tensor, mask: Tensor | None = None) -> Tensor:
        """c [B, N, J] (attention: [B, N, J, D]) for these input capsules; see `capsops.coupling_coefficients`."""
        return coupling_coefficients(
            self.routing,
            u,
            self.weight,
            self.attn_weight,
            self.attn_bias,
            iterations=self.iterations,
            bias=self.bias,
            leaky=self.leaky,
            mask=mask,
        )

    def extra_repr(self) -> str:
        parts = [
            f"in_capsules={self.in_capsules}, in_dim={self.in_dim}",
            f"out_capsules={self.out_capsules}, out_dim={self.out_dim}, routing={self.routing!r}",
        ]
        if self.routing == "dynamic":
            parts.append(f"iterations={self.iterations}, leaky={self.leaky}, detach={self.detach}")
        if self.attn_bias is None and self.bias is None:
            parts.append("bias=False")
        if self.shared:
            parts.append("shared=True")
        return ", ".join(parts)


def convert_weight(weight: Tensor, layout: str = "JNDK") -> Tensor:
    """Transformation matrices of another implementation as [N, K, J, D], contiguous.

    Args:
        weight: four dimensions, besides leading or trailing ones of size 1 (as in [1, J, N, D, K]).
        layout: the meaning of its dimensions, a permutation of "JNDK" (output capsules, input capsules, output
            dimension, input dimension); "JNDK" is the common one.

    Raises:
        ValueError: a layout that is no such permutation, or a weight that does not have four dimensions.
    """
    if sorted(layout) != sorted("JNDK"):
        raise ValueError(f"convert_weight: layout is {layout!r}; it must be a permutation of 'JNDK'")
    shape, extra = list(weight.shape), weight.dim() - 4
    # Every way to leave out ones at both ends so that four dimensions are left.
    ways = [first for first in range(extra + 1) if all(n == 1 for n in (*shape[:first], *shape[first + 4 :]))]
    if len(ways) != 1:
        reason = "it could be read in several ways" if ways else "expected four dimensions"
        raise ValueError(f"convert_weight: weight has shape {shape}; {reason}, {layout}")
    squeezed = weight.reshape(shape[ways[0] : ways[0] + 4])
    return squeezed.permute(*(layout.index(axis) for axis in "NKJD")).contiguous()
