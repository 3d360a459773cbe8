"""Reads, writes and compares checkpoints and the weights in them."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cardiocaps.config import TrainConfig
from cardiocaps.errors import CheckpointError
from cardiocaps.models.pretrained import digest_of, raw_bytes
from cardiocaps.training.network import TrainedNetwork, check_configuration
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
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}")
    # A truncated or foreign file can make torch raise almost any exception, with an unhelpful message.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged, or not a checkpoint of this program") from error
    return content


def load_weights(network: TrainedNetwork, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Load the weights of a checkpoint into the network. Raises CheckpointError if they do not fit."""
    try:
        check_configuration(checkpoint, network.config)
        weights = checkpoint["state_dict"]
        for name, own in network.state_dict().items():
            # torch would convert other types, and drop the imaginary part of complex numbers.
            if name in weights and weights[name].dtype != own.dtype:
                raise TypeError(f"{name} is of {weights[name].dtype}; expected {own.dtype}")
        network.load_state_dict(weights)
    except CheckpointError:
        raise
    except Exception as error:  # something else in place of a tensor can make torch raise almost any exception
        reason = (str(error).splitlines() or [repr(error)])[-1].strip()
        raise CheckpointError(f"{path} does not fit the network: {reason}") from error


def check_digest(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if a checkpoint does not hold what `CheckpointFiles` has written.

    Lightning and torch do not check what they restore: a wrong value would end in a traceback, or in a crash of the
    optimiser's kernel, or train on. Checkpoints of older versions have no digest and pass.
    """
    content = dict(checkpoint)
    try:
        right = content.pop("digest", None) in (None, content_digest(content))
    except Exception:  # other kinds of tensors, for example
        right = False
    if not right:
        raise CheckpointError(f"{path} is damaged: its content is not what was saved")


def content_digest(content: Any) -> str:
    """SHA-256 of the names, types and numbers in a checkpoint, in hexadecimal."""
    kind, value = type(content).__name__, content
    if isinstance(content, Tensor):
        value = (content.dtype, content.shape, hashlib.sha256(raw_bytes(content)).hexdigest())
    elif isinstance(content, Mapping):
        value = [(name, content_digest(item)) for name, item in content.items()]
    elif isinstance(content, list | tuple):
        value = [content_digest(item) for item in content]
    return hashlib.sha256(repr((kind, value)).encode()).hexdigest()


def epochs_ended(checkpoint: Mapping[str, Any]) -> int:
    """The number of epochs that had ended when a checkpoint was saved."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return int(checkpoint["epoch"]) + bool(batches["is_last_batch"])


Network = TypeVar("Network", bound=TrainedNetwork)


def best_network(config: TrainConfig, run: RunFolder, kind: type[Network]) -> Network:
    """The network with the run's least validation loss, as a `TrainedNetwork` or a `Classifier` of Lightning.

    Raises:
        CheckpointError: it is missing, or does not fit.
    """
    network = kind(config, torch.ones(2), 0.0)
    load_weights(network, read_checkpoint(run.best), run.best)
    return network


def weights_digest(network: TrainedNetwork) -> str:
    """SHA-256 of a network's weights and their names, in hexadecimal. It does not depend on the file."""
    return digest_of(network.state_dict())
