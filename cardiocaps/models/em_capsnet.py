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


class EMCapsNet(nn.Module):
    """The network.

    Args:
        sizes: of the image. Above 128 pixels the convolution has stride 2 and there are 32 types of capsules in a
            layer, the paper's; else it has stride 3 and there are 8.
        iterations: of EM routing.

    Shape: image [B, 9, S, S] in [0, 1] -> `Prediction` with activations and poses [B, 2, 16]; label is ignored.

    Raises:
        ValueError: an image of another shape, or a preset whose images are too small.
    """

    def __init__(self, sizes: Preset, *, iterations: int = 3) -> None:
        super().__init__()
        self.size = sizes.size
        stride, self.types = (2, 32) if sizes.size > 128 else (3, 8)
        first = (sizes.size - 5) // stride + 1
        side = (first - 3) // 2 + 1 - 2
        if side < 1:
            raise ValueError(f"EMCapsNet: images of {sizes.size} pixels leave no capsule; they need at least 23")
        self.conv = nn.Sequential(
            nn.Conv2d(IN_CHANNELS, _CHANNELS, 5, stride, bias=False), nn.BatchNorm2d(_CHANNELS), nn.ReLU()
        )
        self.pose = nn.Conv2d(_CHANNELS, self.types * POSE**2, 1)
        self.activation = nn.Conv2d(_CHANNELS, self.types, 1)
        # The mean square of normalised features after ReLU is one half.
        nn.init.normal_(self.pose.weight, std=_SPREAD * (2 / _CHANNELS) ** 0.5)
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
                inverse_temperature=_inverse_temperature(3 * 3 * self.types, self.types),
            )
            assert isinstance(layer.capsules, EMCapsules)
            _start(layer.capsules.weight, layer.capsules.beta_u)
            grids.append(layer)
        self.grids = nn.ModuleList(grids)
        self.classes = ClassCapsules(
            self.types,
            CLASSES,
            iterations=iterations,
            inverse_temperature=_inverse_temperature(side**2 * self.types, CLASSES),
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

    Parameters: weight [T, 4, J, 4], beta_u [J] and beta_a [J].

    Shape: pose [B, T, H, W, 4, 4] and activation [B, T, H, W] -> pose [B, J, 4, 4] and activation [B, J].
    """

    place_row: Tensor

    def __init__(
        self, in_types: int, out_capsules: int, *, iterations: int = 3, inverse_temperature: float = 0.01
    ) -> None:
        super().__init__()
        self.iterations, self.inverse_temperature = iterations, inverse_temperature
        self.weight = nn.Parameter(torch.empty(in_types, POSE, out_capsules, POSE))
        self.beta_u = nn.Parameter(torch.empty(out_capsules))
        self.beta_a = nn.Parameter(torch.zeros(out_capsules))
        _start(self.weight, self.beta_u)
        row = torch.zeros(in_types, 1, out_capsules, POSE)
        row[..., -1] = 1
        self.register_buffer("place_row", row, persistent=False)

    def forward(self, pose: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        B, T, H, W = activation.shape
        place = pose.new_zeros(H, W, POSE, 1)
        place[:, :, 0, 0] = _centres(H, pose)[:, None]
        place[:, :, 1, 0] = _centres(W, pose)
        pose = torch.cat([pose, place.expand(B, T, H, W, POSE, 1)], dim=-1)
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
        )


def _centres(n: int, like: Tensor) -> Tensor:
    """The centres of n cells that divide 0 … 1."""
    return (torch.arange(n, device=like.device, dtype=like.dtype) + 0.5) / n


def _inverse_temperature(in_capsules: int, out_capsules: int) -> float:
    return _SHARPNESS * out_capsules / in_capsules


def _start(weight: Tensor, beta_u: Tensor) -> None:
    """Start every matrix of [N, 4, J, 4] as the identity with noise."""
    nn.init.normal_(weight, std=_NOISE)
    with torch.no_grad():
        weight += torch.eye(POSE, device=weight.device)[:, None, :]
    nn.init.constant_(beta_u, _BETA_U)
