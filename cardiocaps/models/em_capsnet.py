"""EM-CapsNet, matrix capsules with EM routing (Hinton, Sabour, Frosst 2018).

A convolution 5×5 with ReLU; primary capsules by 1×1 convolutions, each a pose of 4×4 and an activation; two
convolutional capsule layers, 3×3 with stride 2 and 3×3; a capsule for each class, whose matrices all positions of a
type share, with coordinate addition. Activations weigh the votes. In the convolutional layers each position routes by
itself; in the paper the output capsules of all positions compete (`competition` of `capsops.nn.ConvCapsules`).

At the paper's size, of an input [9, 256, 256]: 32 channels on 126 × 126 by stride 2, then 32 types of capsules on
126 × 126, on 62 × 62 and on 60 × 60.

Additions, without which a network of another size than the authors' would not learn:

* Batch normalisation after the convolution, as in published implementations. It keeps the scale of the poses
  independent of the image's brightness.
* Transformation matrices start as the identity with noise. With noise alone, the mean of many votes is a tenth of a
  pose, and the pose is lost after three layers.
* The logit of an activation is λ (β_a − Σ_i r_i Σ_h (β_u + ln σ_h)), which is proportional to the number of votes: a
  class capsule has 100 in the authors' network for smallNORB, and 57,600 at the paper's size. So λ is proportional to
  J / N, which keeps the logistic function from saturating. Over the iterations it grows by the authors' schedule. β_u
  starts near −ln σ of votes that differ only by the noise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from capsops.functional import em_routing
from capsops.nn import ConvCapsules, EMCapsules
from cardiocaps.config import Preset
from cardiocaps.models.prediction import CLASSES, IN_CHANNELS, Prediction, check_image, share

POSE = 4
_CHANNELS = 32
# λ · N / J.
_SHARPNESS = 3.0
# Standard deviation of the noise on the transformation matrices, and of the poses of the primary capsules.
_NOISE, _SPREAD = 0.25, 1.0
_BETA_U = 1.0
_PUBLISHED_LAMBDA = 1e-3


class EMCapsNet(nn.Module):
    """The network.

    Args:
        sizes: of the image. Above 128 pixels the convolution has stride 2 and there are 32 types of capsules in a
            layer, the paper's; else it has stride 3 and there are 8.
        iterations: of EM routing.
        renormalise: see `capsops.em_routing`. Activations then do not weigh the votes.
        published: as in the published code: 8 channels and 8 types at every size; a convolution with bias, stride 2 and
            padding; coordinates on the first two elements of the pose; random matrices without the identity; λ from
            0.001 on (by its schedule) and β at 0. Its votes are many and its λ small, so that it hardly learns.

    Shape: image [B, 9, S, S] in [0, 1] -> `Prediction` with activations and poses [B, 2, 16]; label is ignored.

    Raises:
        ValueError: an image of another shape, or a preset whose images are too small.
    """

    def __init__(
        self, sizes: Preset, *, iterations: int = 3, renormalise: bool = False, published: bool = False
    ) -> None:
        super().__init__()
        self.size = sizes.size
        stride, self.types = (2, 8) if published else (2, 32) if sizes.size > 128 else (3, 8)
        channels, padding = (8, 2) if published else (_CHANNELS, 0)
        first = (sizes.size + 2 * padding - 5) // stride + 1
        side = (first - 3) // 2 + 1 - 2
        if side < 1:
            raise ValueError(f"EMCapsNet: images of {sizes.size} pixels leave no capsule; they need at least 23")
        self.conv = nn.Sequential(
            nn.Conv2d(IN_CHANNELS, channels, 5, stride, padding, bias=published), nn.BatchNorm2d(channels), nn.ReLU()
        )
        self.pose = nn.Conv2d(channels, self.types * POSE**2, 1)
        self.activation = nn.Conv2d(channels, self.types, 1)
        # The mean square of normalised features after ReLU is one half.
        nn.init.normal_(self.pose.weight, std=_SPREAD * (2 / channels) ** 0.5)

        def temperature(in_capsules: int, out_capsules: int) -> float:
            return _PUBLISHED_LAMBDA if published else _inverse_temperature(in_capsules, out_capsules)

        grids = []
        for step in (2, 1):
            layer = ConvCapsules(
                self.types,
                POSE,
                self.types,
                POSE,
                kernel_size=3,
                stride=step,
                routing="em",
                competition="window",
                iterations=iterations,
                inverse_temperature=temperature(3 * 3 * self.types, self.types),
                renormalise=renormalise,
            )
            assert isinstance(layer.capsules, EMCapsules)
            _start(layer.capsules.weight, layer.capsules.beta_u, published)
            grids.append(layer)
        self.grids = nn.ModuleList(grids)
        self.classes = ClassCapsules(
            self.types,
            CLASSES,
            iterations=iterations,
            inverse_temperature=temperature(side**2 * self.types, CLASSES),
            renormalise=renormalise,
            published=published,
        )

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        check_image("EMCapsNet", image, self.size)
        features = self.conv(image)
        pose = self.pose(features).unflatten(1, (self.types, POSE, POSE)).permute(0, 1, 4, 5, 2, 3)
        activation = self.activation(features).sigmoid()
        for layer in (*self.grids, self.classes):
            pose, activation = layer(pose, activation)
        return Prediction(scores=activation, probability=share(activation), capsules=pose.flatten(2))


class ClassCapsules(nn.Module):
    """EM routing from a grid of matrix capsules to a capsule for each class, with coordinate addition.

    All positions of a type share one matrix, so the position must be part of the vote: its scaled coordinates, row and
    column, are added to the first two elements of the vote's last column (Hinton et al. 2018, section 4). This does not
    materialise the votes: the pose gets a fifth column (row, column, 0, 0), and the matrix a fifth row (0, 0, 0, 1),
    which is not learned.

    Args:
        in_types: T.
        out_capsules: J.
        iterations: see `capsops.em_routing`.
        inverse_temperature: see `capsops.em_routing`.
        renormalise: see `capsops.em_routing`.
        published: add the coordinates to the first two elements of the vote's first row, as the published code does,
            and start as it does.

    Parameters: weight [T, 4, J, 4], beta_u [J] and beta_a [J].

    Shape: pose [B, T, H, W, 4, 4] and activation [B, T, H, W] -> pose [B, J, 4, 4] and activation [B, J].
    """

    place_row: Tensor

    def __init__(
        self,
        in_types: int,
        out_capsules: int,
        *,
        iterations: int = 3,
        inverse_temperature: float = 0.01,
        renormalise: bool = False,
        published: bool = False,
    ) -> None:
        super().__init__()
        self.iterations, self.inverse_temperature, self.renormalise = iterations, inverse_temperature, renormalise
        # (row, column) of the pose's further columns that the two coordinates are put in.
        self.places = ((0, 0), (0, 1)) if published else ((0, 0), (1, 0))
        self.weight = nn.Parameter(torch.empty(in_types, POSE, out_capsules, POSE))
        self.beta_u = nn.Parameter(torch.empty(out_capsules))
        self.beta_a = nn.Parameter(torch.zeros(out_capsules))
        _start(self.weight, self.beta_u, published)
        added = 2 if published else 1
        row = torch.zeros(in_types, added, out_capsules, POSE)
        for k in range(added):
            row[:, k, :, k if published else -1] = 1
        self.register_buffer("place_row", row, persistent=False)

    def forward(self, pose: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        B, T, H, W = activation.shape
        added = self.place_row.shape[1]
        place = pose.new_zeros(H, W, POSE, added)
        for (row, column), centres in zip(self.places, (_centres(H, pose)[:, None], _centres(W, pose)), strict=True):
            place[:, :, row, column] = centres
        pose = torch.cat([pose, place.expand(B, T, H, W, POSE, added)], dim=-1)
        weight = torch.cat([self.weight, self.place_row], dim=1)
        weight = weight[:, None].expand(T, H * W, *weight.shape[1:])
        return em_routing(
            pose.flatten(1, 3),
            activation.flatten(1),
            weight.flatten(0, 1),
            self.beta_u,
            self.beta_a,
            self.iterations,
            inverse_temperature=self.inverse_temperature,
            renormalise=self.renormalise,
        )


def _centres(n: int, like: Tensor) -> Tensor:
    """The centres of n cells that divide 0 … 1."""
    return (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n


def _inverse_temperature(in_capsules: int, out_capsules: int) -> float:
    return _SHARPNESS * out_capsules / in_capsules


def _start(weight: Tensor, beta_u: Tensor, published: bool = False) -> None:
    """Start every matrix of [N, 4, J, 4] as the identity with noise; as noise alone in the published form."""
    if published:
        nn.init.normal_(weight)
        nn.init.zeros_(beta_u)
        return
    nn.init.normal_(weight, std=_NOISE)
    with torch.no_grad():
        weight += torch.eye(POSE, device=weight.device)[:, None, :]
    nn.init.constant_(beta_u, _BETA_U)
