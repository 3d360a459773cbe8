"""Networks in files of their own: safetensors files, and folders in the layout of the Hugging Face hub.

A folder holds `config.json` (how the network is built), `model.safetensors` (its weights) and `README.md` (a model
card). Nothing in these files is executed, and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cardiocaps import DISCLAIMER, __version__
from cardiocaps.config import TRAINING_DEFAULTS, TrainConfig, settings_that_affect
from cardiocaps.errors import CheckpointError, ConfigError, OutputError, printable
from cardiocaps.models import build, title
from cardiocaps.models.prediction import IN_CHANNELS
from cardiocaps.runtime.files import atomic_write, is_missing, json_text, output_errors, read_json, write_text

_OF_OLDER = {"form": "corrected", "renormalise": False}
"""Settings that folders of older versions do not hold, with the values that they have there."""

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
METADATA = "cardiocaps"
"""The key of a network's description in the metadata of a file; its value is JSON, as `config.json` holds it."""

_KIND = "cardiocaps network"


def raw_bytes(tensor: Tensor) -> memoryview:
    """The numbers of a tensor, in the order of its elements."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of weights and their names, in hexadecimal. It does not depend on the file that holds them."""
    digest = hashlib.sha256()
    for name, weights in sorted(tensors.items()):
        digest.update(f"{name} {weights.dtype} {list(weights.shape)}\n".encode())
        digest.update(raw_bytes(weights))
    return digest.hexdigest()


def describe(network: nn.Module, config: TrainConfig, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The description of a network, in types of JSON: what `config.json` holds.

    Args:
        network: as `cardiocaps.models.build` makes it from `config`.
        config: only the settings that shape the network are kept, no path.
        about: further entries, for example the threshold of decisions.
    """
    size = config.network.size
    description = {
        "kind": _KIND,
        "version": __version__,
        "use": DISCLAIMER,
        "settings": {name: getattr(config, name) for name in ("preset", *settings_that_affect("shape"))},
        "sizes": _sizes(config),
        "input": {"shape": ["batch", IN_CHANNELS, size, size], "range": [0, 1]},
        "digest": digest_of(network.state_dict()),
        **(about or {}),
    }
    content: dict[str, Any] = json.loads(json_text(description))
    return content


def _sizes(config: TrainConfig) -> dict[str, Any]:
    """The sizes of a preset, which can change between versions."""
    sizes = {name: x for name, x in asdict(config.network).items() if name not in TRAINING_DEFAULTS}
    return {name: list(x) if isinstance(x, tuple) else x for name, x in sizes.items()}


def write_safetensors(path: Path, network: nn.Module, description: Mapping[str, Any]) -> None:
    """Write a network's weights, in one step, with its description in the metadata of the file. Raises OutputError."""
    with atomic_write(path) as temporary:
        save_safetensors(temporary, network, description)


def save_safetensors(path: Path, network: nn.Module, description: Mapping[str, Any]) -> None:
    """Write the file of `write_safetensors` at `path` itself."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = {name: x.detach().cpu().contiguous() for name, x in network.state_dict().items()}
    try:
        save_file(weights, path, metadata={"format": "pt", METADATA: json_text(description)})
    except SafetensorError as error:  # a full disk
        raise OutputError(f"cannot write {printable(path)}: {error}") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, on the CPU, and the description in it, which is empty in other files.

    Raises:
        CheckpointError: the file is missing or damaged, or is no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{printable(path)} {'does not exist' if is_missing(path) else 'is not a file'}")
    try:
        with safe_open(path, "pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is not a mapping)
            description = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{printable(path)} is damaged, or not a safetensors file") from error
    if not isinstance(description, dict):
        raise CheckpointError(f"{printable(path)} is damaged: its entry {METADATA} describes no network")
    return tensors, description


@dataclass(frozen=True)
class Fit:
    """Which tensors of a file fit a network, by their names.

    Attributes:
        fits: those of the network's name, shape and kind of number.
        differs: of the network's name but another shape or kind of number -> both, in words.
        missing: those of the network that the file does not have.
        unknown: those of the file that the network does not have.
    """

    fits: tuple[str, ...]
    differs: Mapping[str, str]
    missing: tuple[str, ...]
    unknown: tuple[str, ...]

    @classmethod
    def of(cls, own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, exact_dtype: bool) -> Fit:
        """Compare a network's tensors with those of a file.

        Args:
            own: `state_dict` of the network, which may be on the meta device.
            given: tensors of the file.
            exact_dtype: whether a floating-point tensor of another precision differs too.
        """
        both = [name for name in own if name in given]
        differs = {}
        for name in both:
            have, want = given[name], own[name]
            converts = not exact_dtype and have.is_floating_point() and want.is_floating_point()
            if have.shape != want.shape:
                differs[name] = f"{name} is {list(have.shape)}, the network's {list(want.shape)}"
            elif have.dtype != want.dtype and not converts:
                differs[name] = f"{name} is {have.dtype}, the network's {want.dtype}"
        return cls(
            tuple(name for name in both if name not in differs),
            differs,
            tuple(name for name in own if name not in given),
            tuple(name for name in given if name not in own),
        )


def save_pretrained(
    network: nn.Module, config: TrainConfig, folder: Path | str, about: Mapping[str, Any] | None = None
) -> None:
    """Write a network to a new folder in the layout of the hub: `config.json`, `model.safetensors`, `README.md`.

    The folder appears in one step, after what it holds was read back and compared.

    Args:
        network: as `cardiocaps.models.build` makes it from `config`, with any weights.
        config: the settings that it was built from. No path in them is written.
        folder: the new folder; an empty one will do too.
        about: further entries of `config.json`, for example the threshold of decisions.

    Raises:
        OutputError: the folder cannot be written, or exists and is not empty.
        CheckpointError: the network is not of these settings.
    """
    folder = Path(folder)
    description = describe(network, config, about)
    refuse_existing(folder)
    with output_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f"{folder.name}.{os.urandom(4).hex()}.part")
        temporary.mkdir()
        try:
            write_text(temporary / CONFIG, json_text(description))
            write_text(temporary / CARD, _card(config, description))
            write_safetensors(temporary / WEIGHTS, network, description)
            from_pretrained(temporary)
            temporary.replace(folder)
        except BaseException as error:
            shutil.rmtree(temporary)
            if isinstance(error, CheckpointError):
                raise CheckpointError(f"save_pretrained: the network is not of these settings: {error}") from error
            raise


def refuse_existing(path: Path) -> None:
    """Raise OutputError unless there is nothing at `path`, or an empty folder."""
    with output_errors(path):
        if not is_missing(path) and not (path.is_dir() and not any(path.iterdir())):
            raise OutputError(f"{printable(path)} exists; choose another --out")


def from_pretrained(folder: Path | str) -> nn.Module:
    """The network of a folder that `save_pretrained` wrote.

    Args:
        folder: on this machine; nothing is downloaded, and no code in it is executed.

    Returns:
        The network on the CPU, in evaluation mode. It maps image float32 [B, 9, S, S] in [0, 1] to a
        `cardiocaps.models.prediction.Prediction`; S is its attribute `size`.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not belong to the description.
        ConfigError: the network needs a package that is not installed.
    """
    folder = Path(folder)
    config, description = read_description(folder)
    path = folder / WEIGHTS
    weights, _ = read_safetensors(path)
    network = build(config)
    fit = Fit.of(network.state_dict(), weights, exact_dtype=True)
    wrong = [
        *fit.differs.values(),
        *(f"{x} is missing" for x in fit.missing),
        *(f"{x} is unknown" for x in fit.unknown),
    ]
    if wrong:
        raise CheckpointError(f"{printable(path)} does not fit the network of {CONFIG}: {'; '.join(wrong[:3])}")
    if digest_of(weights) != description["digest"]:
        raise CheckpointError(f"{printable(path)} does not hold the weights that {CONFIG} describes: another digest")
    network.load_state_dict(weights)
    return network.eval()


def read_description(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The settings that the network of a folder is built from, and all that `config.json` says.

    Raises:
        CheckpointError: the file is missing or damaged, or is of a network that this version does not build.
    """
    path = folder / CONFIG
    description = read_json(path, _KIND, dict, CheckpointError)
    settings, sizes = description.get("settings"), description.get("sizes")
    if isinstance(settings, dict):
        settings = {**_OF_OLDER, **settings}
    known = {"preset", *settings_that_affect("shape")}
    if not isinstance(settings, dict) or not isinstance(sizes, dict) or not isinstance(description.get("digest"), str):
        raise CheckpointError(f"{printable(path)} is damaged: it has no settings, sizes or digest")
    if settings.keys() != known:
        names = ", ".join(sorted(map(str, settings.keys() ^ known)))
        raise CheckpointError(f"{printable(path)} is of another version: its settings differ in {names}")
    try:
        config = TrainConfig(**settings).resolved()
    except ConfigError as error:
        raise CheckpointError(f"{printable(path)}: {error}") from error
    if sizes != _sizes(config):
        raise CheckpointError(f"{printable(path)}: preset {config.preset} has other sizes in this version")
    return config, description


def _card(config: TrainConfig, description: Mapping[str, Any]) -> str:
    """The model card, with the hub's head."""
    size = config.network.size
    decision = description.get("decision")
    lines = [
        "---",
        "library_name: cardiocaps",
        "tags: [echocardiography, capsule-network]",
        "---",
        f"# {title(config)}, preset {config.preset}",
        "",
        f"**{DISCLAIMER}**",
        "",
        f"The input is a batch of frames, float32 [B, {IN_CHANNELS}, {size}, {size}] in [0, 1]: three views of three "
        "channels of each frame, as `cardiocaps.data.views` makes them. The output holds the probability of being "
        "abnormal.",
    ]
    if decision:
        lines += ["", f"A {decision['unit']} counts as abnormal above a probability of {decision['threshold']:.6g}."]
    lines += [
        "",
        "```python",
        "from cardiocaps.models import from_pretrained",
        "",
        'network = from_pretrained("FOLDER")',
        "probability = network(image).probability",
        "```",
        "",
        f"Weights: SHA-256 {description['digest']}. `{CONFIG}` says how the network is built. Written by cardiocaps "
        f"{description['version']}.",
    ]
    return "\n".join(lines) + "\n"


def is_network_folder(path: Path) -> bool:
    """Whether a folder has the files that `from_pretrained` reads."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()
