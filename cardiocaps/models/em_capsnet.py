"""EM-CapsNet, matrix capsules with EM routing (Hinton, Sabour, Frosst 2018).

A convolution 5×5 with ReLU; primary capsules by a 1×1 convolution, each a pose of 4×4 and an activation; two
convolutional capsule layers, 3×3 with stride 2 and 3×3; a capsule for each class, whose matrices all positions of a type
share, with coordinate addition. Activations weigh the votes.

At the paper's size, of an input [9, 256, 256]: 32 channels on 126 × 126 by stride 2, then 32 types of capsules on
126 × 126, on 62 × 62 and on 60 × 60.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from capsops.functional import em_routing
from capsops.nn import ConvCapsules
from cardiocaps.config import Preset
from cardiocaps.models.prediction import CLASSES, IN_CHANNELS, Prediction, check_image, share

POSE = 4
_CHANNELS = 32


class EMCapsNet(nn.Module):
    def __init__(self, sizes: Preset, *, iterations: int = 3, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.size = sizes.size
        stride, types = (2, 32) if sizes.size > 128 else (4, 8)
        side = (sizes.size - 5) // stride + 1
        side = ((side - 3) // 2 + 1) - 2
        if side < 1:
            raise ValueError(f"EMCapsNet: images of {sizes.size} pixels leave no capsule; they need at least 29")
        self.types = types
        with torch.device(device or torch.get_default_device()):
            self.conv = nn.Sequential(nn.Conv2d(IN_CHANNELS, _CHANNELS, 5, stride), nn.ReLU())
            self.pose = nn.Conv2d(_CHANNELS, types * POSE**2, 1)
            self.activation = nn.Conv2d(_CHANNELS, types, 1)
            nn.init.kaiming_normal_(self.conv[0].weight, nonlinearity="relu")
            nn.init.kaiming_normal_(self.pose.weight, nonlinearity="linear")
            self.first = ConvCapsules(types, POSE, types, POSE, 3, 2, routing="em", iterations=iterations)
            self.second = ConvCapsules(types, POSE, types, POSE, 3, 1, routing="em", iterations=iterations)
            self.classes = ClassCapsules(types, CLASSES, iterations=iterations)

    def forward(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        check_image("EMCapsNet", image, self.size)
        features = self.conv(image)
        pose = self.pose(features).unflatten(1, (self.types, POSE, POSE)).permute(0, 1, 4, 5, 2, 3)
        activation = self.activation(features).sigmoid()
        pose, activation = self.first(pose, activation)
        pose, activation = self.second(pose, activation)
        pose, activation = self.classes(pose, activation)
        return Prediction(scores=activation, probability=share(activation), capsules=pose.flatten(2))


class ClassCapsules(nn.Module):
    def __init__(self, in_types: int, out_capsules: int, *, iterations: int = 3, inverse_temperature=0.01) -> None:
        super().__init__()
        self.iterations = iterations
        self.inverse_temperature = inverse_temperature
        self.weight = nn.Parameter(torch.empty(in_types, POSE, out_capsules, POSE))
        self.beta_u = nn.Parameter(torch.zeros(out_capsules))
        self.beta_a = nn.Parameter(torch.zeros(out_capsules))
        nn.init.normal_(self.weight, std=POSE**-0.5)
        adding = torch.zeros(in_types, 1, out_capsules, POSE)
        adding[..., -1] = 1
        self.register_buffer("adding", adding, persistent=False)

    def forward(self, pose: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
        B, T, H, W = activation.shape
        row = (torch.arange(H, device=pose.device, dtype=pose.dtype) + 0.5) / H
        column = (torch.arange(W, device=pose.device, dtype=pose.dtype) + 0.5) / W
        place = torch.zeros(H, W, POSE, 1, device=pose.device, dtype=pose.dtype)
        place[:, :, 0, 0] = row[:, None]
        place[:, :, 1, 0] = column
        pose = torch.cat([pose, place.expand(B, T, H, W, POSE, 1)], dim=-1)
        weight = torch.cat([self.weight, self.adding], dim=1)
        weight = weight[:, None].expand(T, H * W, *weight.shape[1:]).flatten(0, 1)
        return em_routing(
            pose.flatten(1, 3),
            activation.flatten(1),
            weight,
            self.beta_u,
            self.beta_a,
            self.iterations,
            inverse_temperature=self.inverse_temperature,
        )
