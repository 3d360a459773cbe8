"""Reads, writes and compares checkpoints and the weights in them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cardiocaps.config import TrainConfig
from cardiocaps.errors import CheckpointError
from cardiocaps.runtime.files import atomic_write
from cardiocaps.training.module import Classifier, check_configuration
from cardiocaps.training.run_folder import RunFolder


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU. Code in the file is never executed.

    Raises:
        CheckpointError: the file is missing or damaged, or holds other types than a checkpoint.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    # A truncated or foreign file can make torch raise almost any exception, with an unhelpful message.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged, or not a checkpoint of this program") from error
    return content


def load_weights(network: Classifier, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint into the network. Raises CheckpointError if they do not fit."""
    check_configuration(checkpoint, network.config)
    try:
        network.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit the network: {reason}") from error


def epochs_ended(checkpoint: Mapping[str, Any]) -> int:
    """The number of epochs that had ended when a checkpoint was saved."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return int(checkpoint["epoch"]) + bool(batches["is_last_batch"])


def best_network(config: TrainConfig, run: RunFolder) -> Classifier:
    """The network with the run's least validation loss. Raises CheckpointError if it is missing or does not fit."""
    network = Classifier(config, torch.ones(2), 0.0)
    load_weights(network, read_checkpoint(run.best), run.best)
    return network


def weights_digest(network: Classifier) -> str:
    """SHA-256 of a network's weights and their names, in hexadecimal. It does not depend on the file."""
    digest = hashlib.sha256()
    for name, weights in sorted(network.state_dict().items()):
        array = weights.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(memoryview(array.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, and reads them without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))
