"""How Lightning writes and reads checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, OptimStateKeyType

from cardiocaps.runtime.files import atomic_write
from cardiocaps.training.checkpoints import content_digest, read_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, with a digest, and reads them without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as temporary:
            torch.save({**checkpoint, "digest": content_digest(checkpoint)}, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for divided parameters, which goes on from the checkpoint of any strategy.

    Lightning's own lets rank 0 send every tensor. torch sends it as it lies in memory, so a weight that a run with
    ddp has saved with channels last arrives with its numbers in another order. Here each rank reads the file and
    takes its own parts.
    """

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint, when the optimiser has its state. `train` has loaded the weights before they were divided."""
        assert self.model is not None
        checkpoint = read_checkpoint(Path(checkpoint_path))
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            by_name = FullyShardedDataParallel.rekey_optim_state_dict(state, OptimStateKeyType.PARAM_NAME, self.model)
            set_optimizer_state_dict(self.model, optimizer, by_name, options=StateDictOptions(full_state_dict=True))
        return checkpoint
