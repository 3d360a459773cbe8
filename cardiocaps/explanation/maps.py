"""The methods of explanation, and the maps of a video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cardiocaps.errors import CheckpointError, ConfigError
from cardiocaps.explanation.capsules import capsule_map
from cardiocaps.explanation.gradcam import grad_cam
from cardiocaps.models.cardiocaps import CardioCaps
from cardiocaps.prediction.ensemble import Ensemble, Member
from cardiocaps.runtime.device import Machine

Maps = Mapping[str, NDArray[np.float32]]
"""The maps [n, S, S] of the frames of a video, by method, on the coordinates of the network's input."""

METHODS: Mapping[str, Callable[..., Tensor]] = {"capsules": capsule_map, "gradcam": grad_cam}
"""name -> method(network, image [n, 9, S, S], label int64 [n]), which returns the maps [n, S, S]."""

TITLES = {"capsules": "what the capsules send", "gradcam": "Grad-CAM"}


def check_explainable(ensemble: Ensemble) -> None:
    """Raise ConfigError for a network that knows no classes: a map shows where it finds one."""
    if ensemble.regresses_alone:
        raise ConfigError(
            "RUN: its task is 'regression'; expected both or classification, because maps explain a class"
        )


def methods_for(network: nn.Module, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """The methods to use for a network: those asked for, or all that it allows.

    Raises:
        ConfigError: the network does not allow one that was asked for.
    """
    allowed = tuple(name for name in METHODS if name != "capsules" or isinstance(network, CardioCaps))
    for name in asked:
        if name not in allowed:
            raise ConfigError(
                f"methods: {name!r} needs primary capsules on a grid that route to the classes; this network allows "
                f"{', '.join(allowed)}"
            )
    return tuple(dict.fromkeys(asked)) or allowed


def maps_of(member: Member, machine: Machine, pixels: NDArray[np.uint8], label: int, methods: Sequence[str]) -> Maps:
    """The maps of frames, in float32 whatever the precision of the run.

    Args:
        member: the network.
        machine: where it runs.
        pixels: the frames [n, 3, S, S].
        label: the class that is explained.
        methods: names of METHODS.

    Raises:
        CheckpointError: a map is not finite.
        ConfigError: a method needs a package that is not installed.
    """
    assert member.config.batch_size is not None
    found: dict[str, list[Tensor]] = {name: [] for name in methods}
    for first in range(0, len(pixels), member.config.batch_size):
        image = member.image_of(pixels[first : first + member.config.batch_size], machine)
        labels = torch.full((len(image),), label, device=image.device)
        for name in methods:
            found[name].append(METHODS[name](member.network.model, image, labels).cpu())
    maps = {name: torch.cat(parts).numpy() for name, parts in found.items()}
    if not all(np.isfinite(values).all() for values in maps.values()):
        raise CheckpointError(f"{member.name}: the explanation is not finite: its training diverged")
    return maps
