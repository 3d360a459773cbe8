"""Reads, writes and compares checkpoints and the weights in them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from cardiocaps.config import TrainConfig
from cardiocaps.errors import CardioCapsError, CheckpointError
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
            content = torch.load(path, map_location="cpu", weights_only=True)
    # A truncated or foreign file can make torch raise almost any exception, with an unhelpful message.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged, or not a checkpoint of this program") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}")
    return content


def load_weights(network: Classifier, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint into the network. Raises CheckpointError if they do not fit."""
    check_configuration(checkpoint, network.config)
    own, weights = network.state_dict(), checkpoint["state_dict"]
    for name in own.keys() & weights.keys():
        wrong = _not_weights(weights[name], own[name])
        if wrong is not None:
            raise CheckpointError(f"{path} does not fit the network: {name} is {wrong}")
    try:
        network.load_state_dict(weights)
    # Keys that are not text and values that are not tensors can make torch raise almost any exception.
    except Exception as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit the network: {reason}") from error


def _not_weights(value: Any, own: Tensor) -> str | None:
    """What `value` is, if it cannot be copied into the weights `own`; None if it can. Ignores the shape."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        return "not a plain tensor"
    if value.is_complex() or value.is_floating_point() != own.is_floating_point():
        return f"of {str(value.dtype).removeprefix('torch.')}, not {str(own.dtype).removeprefix('torch.')}"
    return None


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

    restoring = False  # whether a checkpoint was read for a training that has not begun yet

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.restoring = True
        return read_checkpoint(Path(path))


@contextmanager
def restoring_errors(files: CheckpointFiles, path: Path) -> Iterator[None]:
    """Raise CheckpointError for exceptions of Lightning and torch while they restore a checkpoint that `files` read."""
    try:
        yield
    except (CardioCapsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not files.restoring:
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {reason}") from error
