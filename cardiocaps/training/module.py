"""The Lightning module: a network with its loss and optimiser.

A checkpoint holds everything that the rest of the run depends on, also in the middle of an epoch. A run that was
interrupted therefore ends with the same numbers. States of random generators are not part of it, because after the
weights are drawn, every random number depends only on (seed, epoch, item).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from cardiocaps.data.datamodule import shares_of
from cardiocaps.models.losses import Shares, SpreadLoss
from cardiocaps.models.prediction import RECONSTRUCTED_CHANNELS, Prediction
from cardiocaps.training.batch_norm import GlobalBatchNorm
from cardiocaps.training.network import TrainedNetwork, check_configuration, shape_of


class Classifier(TrainedNetwork, LightningModule):
    """A network with its loss and optimiser; arguments as `TrainedNetwork`."""

    def _losses(self, batch: Mapping[str, Tensor], label: Tensor | None) -> tuple[Prediction, dict[str, Tensor]]:
        out = self.seen(batch["image"], label)
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

    def on_train_start(self) -> None:
        """Give what the optimiser has restored the memory layout of its parameters.

        A run may go on where weights lie otherwise (channels last, or divided). torch's fused Adam pairs a parameter
        and its state by their places in memory, not by index, and would then train on with other numbers.
        """
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, x in state.items():
                    if isinstance(x, Tensor) and x.shape == parameter.shape and x.stride() != parameter.stride():
                        state[name] = torch.empty_like(parameter, dtype=x.dtype).copy_(x)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["cardiocaps"] = shape_of(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_configuration(checkpoint, self.config)
