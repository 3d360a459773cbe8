"""A network as it is trained: with its loss, its settings, and what it says of frames. It needs no Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor, nn

from cardiocaps.config import TRAINING_DEFAULTS, TrainConfig, settings_that_affect
from cardiocaps.errors import CheckpointError
from cardiocaps.models import build, is_frozen, make_loss
from cardiocaps.models.losses import class_weights
from cardiocaps.models.prediction import RECONSTRUCTED_CHANNELS, Prediction

_SHAPE_OF_OLDER = {"model": "cardiocaps", "affine": "matrices", "form": "corrected", "renormalise": False}
"""Settings that older checkpoints do not hold, with the values that they have there."""


class TrainedNetwork(nn.Module):
    """A network with its loss.

    Args:
        config: the resolved settings of the run.
        class_counts: int64 [2], number of training frames of each class.
        target_mean: mean of the regression target in training, at which the regression head starts.
    """

    def __init__(self, config: TrainConfig, class_counts: Tensor, target_mean: float) -> None:
        super().__init__()
        self.config = config
        self.model = build(config, target_mean)
        self.regresses_alone = config.task == "regression"
        weights = None if self.regresses_alone else class_weights(class_counts, config.class_weight)
        self.loss: Any = make_loss(config, weights)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not is_frozen(config, name))
        self.train()

    def train(self, mode: bool = True) -> Self:
        """What is frozen stays in evaluation mode: batch normalisation then keeps its statistics too."""
        super().train(mode)
        for name, module in self.model.named_modules():
            if is_frozen(self.config, name):
                module.eval()
        return self

    def seen(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        """The network's output. `label`: as it is called with.

        Without labels nothing tells the class capsules apart, so the decoder always sees the first one.
        """
        if self.regresses_alone:
            label = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        prediction: Prediction = self.model(image, label)
        return prediction

    def of_frames(self, image: Tensor) -> dict[str, Tensor]:
        """What the network says of frames [n, 9, S, S], at most a batch of the run.

        A smaller batch is filled up with black frames: products of matrices round differently for other sizes, and the
        numbers of a frame should not depend on how many others there are.

        Returns:
            probability [n], unless the task is regression alone; if the network regresses, regression [n]; if it has a
            decoder, reconstruction_error [n], the mean squared error of a pixel.
        """
        n = len(image)
        assert self.config.batch_size is not None
        if n < self.config.batch_size:
            whole = image.new_zeros(self.config.batch_size, *image.shape[1:])
            layout = torch.channels_last if image.is_contiguous(memory_format=torch.channels_last) else None
            image = whole.contiguous(memory_format=layout or torch.contiguous_format).index_copy_(
                0, torch.arange(n, device=image.device), image
            )
        out = self.seen(image)
        said = {} if self.regresses_alone else {"probability": out.probability}
        if out.regression is not None:
            said["regression"] = out.regression.float()
        if out.reconstruction is not None:
            errors = out.reconstruction.float() - image[:, :RECONSTRUCTED_CHANNELS]
            said["reconstruction_error"] = errors.square().mean(dim=(1, 2, 3))
        return {name: values[:n] for name, values in said.items()}


def shape_of(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the parameters, and the sizes, because a preset can change between versions."""
    sizes = {f"preset.{name}": x for name, x in asdict(config.network).items() if name not in TRAINING_DEFAULTS}
    return {**{name: getattr(config, name) for name in settings_that_affect("shape")}, **sizes}


def check_configuration(checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise CheckpointError if a checkpoint belongs to a network of another configuration."""
    if "cardiocaps" not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError("the checkpoint was not written by cardiocaps.train")
    has = {**_SHAPE_OF_OLDER, **checkpoint["cardiocaps"]}
    different = [f"{n} is {has.get(n)!r}, the run's is {x!r}" for n, x in shape_of(config).items() if has.get(n) != x]
    if different:
        raise CheckpointError(f"the checkpoint is of another configuration: {'; '.join(different)}")
