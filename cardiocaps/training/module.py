"""The Lightning module: a network with its loss and optimiser.

A checkpoint holds everything that the rest of the run depends on, also in the middle of an epoch. A run that was
interrupted therefore ends with the same numbers. States of random generators are not part of it, because after the
weights are drawn, every random number depends only on (seed, epoch, item).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from cardiocaps.config import TRAINING_DEFAULTS, TrainConfig, settings_that_affect
from cardiocaps.data.datamodule import shares_of
from cardiocaps.errors import CheckpointError
from cardiocaps.models import build, is_frozen, make_loss
from cardiocaps.models.losses import Shares, SpreadLoss, class_weights
from cardiocaps.models.prediction import RECONSTRUCTED_CHANNELS, Prediction
from cardiocaps.training.batch_norm import GlobalBatchNorm

_SHAPE_OF_OLDER = {"model": "cardiocaps", "affine": "matrices", "form": "corrected", "renormalise": False}
"""Settings that older checkpoints do not hold, with the values that they have there."""


class Classifier(LightningModule):
    """A network with its loss and optimiser.

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

    def train(self, mode: bool = True) -> Classifier:
        """What is frozen stays in evaluation mode: batch normalisation then keeps its statistics too."""
        super().train(mode)
        for name, module in self.model.named_modules():
            if is_frozen(self.config, name):
                module.eval()
        return self

    def _seen(self, image: Tensor, label: Tensor | None = None) -> Prediction:
        """The network's output. `label`: as it is called with.

        Without labels nothing tells the class capsules apart, so the decoder always sees the first one.
        """
        if self.regresses_alone:
            label = torch.zeros(len(image), dtype=torch.int64, device=image.device)
        prediction: Prediction = self.model(image, label)
        return prediction

    def _losses(self, batch: Mapping[str, Tensor], label: Tensor | None) -> tuple[Prediction, dict[str, Tensor]]:
        out = self._seen(batch["image"], label)
        image = None if out.reconstruction is None else batch["image"][:, :RECONSTRUCTED_CHANNELS]
        target = None if out.regression is None else batch["target"]
        shares = Shares(*shares_of(batch))
        losses = self.loss(out.scores, batch["label"], out.reconstruction, image, out.regression, target, shares=shares)
        return out, losses

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        if isinstance(self.loss, SpreadLoss):
            assert self.config.epochs is not None
            # In every step, because Lightning calls no hook at the start of an epoch that is resumed in its middle.
            self.loss.begin_epoch(self.current_epoch, self.config.epochs)
        if "counts" in batch:
            GlobalBatchNorm.set_share(self.model, batch["counts"][0])
        return self._losses(batch, batch["label"] if self.config.decoder_mask == "label" else None)[1]

    def validation_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        out, losses = self._losses(batch, None)
        if self.regresses_alone:
            return {**losses, "regressed": out.regression.float()}  # type: ignore[union-attr]
        return {**losses, "probability": out.probability}

    def predict_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The batch without its image, with what the network says of each frame; see `of_frames`."""
        rest = {name: x for name, x in batch.items() if name != "image"}
        return {**rest, **self.of_frames(batch["image"])}

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
        out = self._seen(image)
        said = {} if self.regresses_alone else {"probability": out.probability}
        if out.regression is not None:
            said["regression"] = out.regression.float()
        if out.reconstruction is not None:
            errors = out.reconstruction.float() - image[:, :RECONSTRUCTED_CHANNELS]
            said["reconstruction_error"] = errors.square().mean(dim=(1, 2, 3))
        return {name: values[:n] for name, values in said.items()}

    def configure_model(self) -> None:
        """Lightning calls this when the processes are connected: with strategy fsdp they divide the parameters."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not isinstance(self.model, FSDPModule):
            assert self.device_mesh is not None
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.config.learning_rate is not None
        # Fused: one kernel for all parameters. On a CPU the default takes a tenth of a step of preset tiny.
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.Adam(trained, lr=self.config.learning_rate, fused=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["cardiocaps"] = _shape(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_configuration(checkpoint, self.config)


def _shape(config: TrainConfig) -> dict[str, Any]:
    """The settings that decide the parameters, and the sizes, because a preset can change between versions."""
    sizes = {f"preset.{name}": x for name, x in asdict(config.network).items() if name not in TRAINING_DEFAULTS}
    return {**{name: getattr(config, name) for name in settings_that_affect("shape")}, **sizes}


def check_configuration(checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise CheckpointError if a checkpoint belongs to a network of another configuration."""
    if "cardiocaps" not in checkpoint or "state_dict" not in checkpoint:
        raise CheckpointError("the checkpoint was not written by cardiocaps.train")
    has = {**_SHAPE_OF_OLDER, **checkpoint["cardiocaps"]}
    different = [f"{n} is {has.get(n)!r}, the run's is {x!r}" for n, x in _shape(config).items() if has.get(n) != x]
    if different:
        raise CheckpointError(f"the checkpoint is of another configuration: {'; '.join(different)}")
