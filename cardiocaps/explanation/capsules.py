"""What each primary capsule of CardioCaps sends to a class capsule, as a map on the network's input.

A class capsule is v_j = squash(s_j) with s_j = Σ_i c_ij û_ij, where û_ij is the vote of primary capsule i and c_ij its
coupling coefficient (Sabour et al. 2017, eq. 1 and 2). The squash keeps the direction, so the length of s_j is its
component along v_j, and it is a sum over the primary capsules:

    |s_j| = Σ_i r_ij        with r_ij = c_ij (û_ij · v_j) / |v_j|

r_ij, coupling times agreement, is what capsule i sends. It is negative where a vote points away from v_j. The couplings
of attention routing are per component, so there r_ij = Σ_d c_ijd û_ijd v_jd / |v_j|.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from capsops import affine_votes, coupling_coefficients
from capsops.nn import CapsuleLayer
from cardiocaps.explanation.grid import Grid
from cardiocaps.models.affine import AffineLayer
from cardiocaps.models.cardiocaps import CardioCaps

_CHUNK = 1 << 20
"""How many numbers of the votes are held at a time."""


def contributions(layer: CapsuleLayer, u: Tensor) -> tuple[Tensor, Tensor]:
    """What each input capsule sends to each output capsule.

    The votes, and the couplings of attention routing, which are as many, are made in chunks of input capsules and never
    all held.

    Args:
        layer: with routing "attention", "dynamic" or "uniform", a squash that keeps the direction, and no bias in s.
        u: input capsules [B, N, K], float32 or float64.

    Returns:
        r [B, N, J] and the output capsules v [B, J, D]. Σ_i r_ij is the length of s_j. Where v_j is 0, r_ij is 0.

    Raises:
        ValueError: the layer is of another kind.
    """
    if layer.routing not in ("attention", "dynamic", "uniform"):
        raise ValueError(f"contributions: routing is {layer.routing!r}; expected 'attention', 'dynamic' or 'uniform'")
    if layer.bias is not None or layer.squash == "layer_norm":
        raise ValueError("contributions: layer has a bias in s or squash 'layer_norm'; expected neither")
    B, N, _ = u.shape
    J, D = layer.out_capsules, layer.out_dim
    step = max(1, _CHUNK // max(B * J * D, 1))
    with torch.no_grad():
        v = layer(u)
        input_weight = None
        if isinstance(layer, AffineLayer):
            u, input_weight = layer.operands(u)
        length = v.norm(dim=2, keepdim=True)
        direction = torch.where(length > 0, v / length, 0)
        couplings = None
        if layer.routing != "attention":
            couplings = coupling_coefficients(
                layer.routing,
                u,
                layer.weight,
                iterations=layer.iterations,
                leaky=layer.leaky,
                logits=layer.logits,
                axis=layer.axis,
                squash=layer.squash,
            )
        sent = u.new_empty(B, N, J)
        for first in range(0, N, step):
            part = slice(first, first + step)
            some = u[:, part]
            weight = layer.weight if layer.weight.dim() == 3 else layer.weight[part]
            votes = affine_votes(some, weight)
            if couplings is None:
                c = coupling_coefficients("attention", some, weight, layer.attn_weight, layer.attn_bias)
                sent[:, part] = torch.einsum("bnjd,bnjd,bjd->bnj", c, votes, direction)
            else:
                sent[:, part] = couplings[:, part] * torch.einsum("bnjd,bjd->bnj", votes, direction)
        if input_weight is not None:
            sent *= input_weight[:, :, None]
    return sent, v


def on_feature_map(values: Tensor, types: int, dim: int, layout: str) -> Tensor:
    """Sum values of primary capsules over those at the same place.

    Args:
        values: [B, N], of the capsules that `capsops.nn.PrimaryCapsules` makes of `types · dim` channels.
        types: of capsules.
        dim: of a capsule, K.
        layout: see `capsops.nn.PrimaryCapsules`. In layout "legacy" a capsule is made of K pixels of a row of the
            feature map, or more rows, and its value is divided equally among them.

    Returns:
        [B, H, H].
    """
    batch, capsules = values.shape
    if layout == "legacy":
        values = (values / dim).repeat_interleave(dim, dim=1)
        types *= dim
    side = round((values.shape[1] / types) ** 0.5)
    if types * side**2 != values.shape[1]:
        raise ValueError(f"on_feature_map: values has {capsules} capsules; expected those of a square feature map")
    return values.view(batch, types, side, side).sum(dim=1)


def capsule_map(network: CardioCaps, image: Tensor, label: Tensor) -> Tensor:
    """What the primary capsules send to a class capsule, on the network's input.

    A primary capsule sees all nine channels at its place, so its value belongs to the same place of all three views.

    Args:
        network: in evaluation mode.
        image: [B, 9, S, S].
        label: the class of each image, int64 [B].

    Returns:
        [B, S, S], whose sum over the pixels is the length of s of that class.
    """
    with torch.no_grad():
        u = network.primary(network.conv(image))
        sent, _ = contributions(network.classes, u)
    index = label.view(-1, 1, 1).expand(-1, sent.shape[1], 1)
    primary = network.primary
    cells = on_feature_map(sent.gather(2, index).squeeze(2), primary.types, primary.dim, primary.layout)
    grid = Grid()
    for conv in (*network.conv, primary.conv):
        if isinstance(conv, nn.Conv2d):
            grid = grid.after(conv.kernel_size[0], conv.stride[0])
    return grid.on_input(cells, image.shape[-1])
