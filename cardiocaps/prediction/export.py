"""Writes the best network of a run to one file: safetensors, ONNX, or a program of torch.export.

Each file holds a description of the network and of its input, as JSON, under the key `cardiocaps`. The file is read
back, and its outputs are compared with the network's, before it gets its name.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cardiocaps.config import TrainConfig, read_run
from cardiocaps.data.views import draw_jitter
from cardiocaps.errors import CheckpointError, OutputError, printable
from cardiocaps.evaluation.calibration import Calibration, read_calibration
from cardiocaps.evaluation.decision import Decision, read_decision
from cardiocaps.evaluation.predictions import unit_of
from cardiocaps.models import build
from cardiocaps.models.prediction import IN_CHANNELS
from cardiocaps.models.pretrained import METADATA, describe, read_safetensors, save_safetensors
from cardiocaps.prediction.ensemble import FrameSettings, regression_unit
from cardiocaps.runtime.device import machine_for
from cardiocaps.runtime.files import atomic_write, is_missing, json_text, output_errors
from cardiocaps.runtime.packages import require_package
from cardiocaps.runtime.program import print_line
from cardiocaps.training.checkpoints import best_network, weights_digest
from cardiocaps.training.network import TrainedNetwork
from cardiocaps.training.run_folder import RunFolder

BOUNDS = {"safetensors": 0.0, "torch-export": 1e-5, "onnx": 1e-4}
"""The largest difference of an output that each form may have, relative to the output's largest value, at least 1."""

_BATCHES = (1, 2, 5, 8)
_LARGEST_BATCH = 65_536
_SEED = 0

Outputs = Mapping[str, Tensor]


class Named(nn.Module):
    """A network that returns only the outputs it has, by the names of `Prediction`: a graph has no place for None."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {name: x for name, x in self.network(image)._asdict().items() if x is not None}


def export(
    run: Path, form: str, out: Path, *, overwrite: bool = False, threads: int | None = None
) -> tuple[float, dict[str, Any]]:
    """Write the best network of a run to a file; print the largest difference of its outputs from the network's.

    Args:
        run: the folder of a run.
        form: a key of `BOUNDS`.
        out: the file.
        overwrite: replace a file that is there.
        threads: of the CPU; None: torch decides.

    Returns:
        The largest difference, as `BOUNDS` counts it, and the description that the file holds.

    Raises:
        ConfigError: `run` is not a run, or a package is missing.
        OutputError: the file exists, or cannot be written.
        CheckpointError: the run has no usable network, or the outputs differ by more than `BOUNDS`.
    """
    write = _WRITERS[form]
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require_package(package, package, "--to onnx", "export")
    folder, config = RunFolder.open(run), read_run(run)
    _refuse(out, overwrite)
    # The CPU and its own kernels: the file is for other machines.
    with machine_for(replace(config, device="cpu", backend="auto", threads=threads)):
        classifier = best_network(config, folder, TrainedNetwork)
        network = classifier.model.eval()
        inputs = list(_random_frames(config.network.size))
        expected = [_outputs_of(Named(network), image) for image in inputs]
        if not all(x.isfinite().all() for outputs in expected for x in outputs.values()):
            raise CheckpointError(f"{folder.best}: the network's output is not finite: its training diverged")
        description = describe(network, config, _about(folder, config, weights_digest(classifier), expected[0]))
        with atomic_write(out) as temporary:
            call = write(temporary, network, config, description)
            difference = max(_difference(want, call(image)) for image, want in zip(inputs, expected, strict=True))
            if not difference <= BOUNDS[form]:  # also for NaN
                raise CheckpointError(
                    f"--to {form}: the outputs of the file differ from the network's by {difference:.2g}; expected at "
                    f"most {BOUNDS[form]:.2g}"
                )
    print_line(
        f"{printable(out)}: {out.stat().st_size / 1e6:.1f} MB; largest difference from the network's outputs for "
        f"{sum(_BATCHES)} random frames: {difference:.2g} (allowed: {BOUNDS[form]:.2g})"
    )
    if folder.pixel_baseline.is_file():
        print_line("note: the run's baseline on pixels is no network, and is not exported")
    return difference, description


def _refuse(out: Path, overwrite: bool) -> None:
    """Raise OutputError where the file would not be written, before the work is done."""
    with output_errors(out):
        if not is_missing(out) and not (overwrite and out.is_file()):
            raise OutputError(f"{printable(out)} exists; choose another --out, or replace a file by --overwrite")
        if not out.parent.is_dir():
            raise OutputError(f"cannot write {printable(out)}: {printable(out.parent)} is not a folder")


def _about(run: RunFolder, config: TrainConfig, weights: str, outputs: Outputs) -> dict[str, Any]:
    """What a caller needs beside the network's own settings. It names no path."""
    frames, size, unit = FrameSettings.of(config), config.network.size, unit_of(config)
    decision = read_decision(run.decision, weights) or Decision.unknown(unit, weights)
    calibration = read_calibration(run.calibration, weights) or Calibration("none", unit, weights)
    jitter, _ = draw_jitter(np.random.default_rng(_SEED), train=False)
    widths = (1.0, size / frames.size, size / frames.size)  # as `three_views` cuts them
    regression = None
    if "regression" in outputs:
        regression = {"target": config.regression_target, "unit": regression_unit(run.path)}
    return {
        "input": {
            "name": "image",
            "shape": ["batch", IN_CHANNELS, size, size],
            "dtype": "float32",
            "range": [0, 1],
            "frame": {
                "shape": [3, frames.size, frames.size],
                "channels": "RGB",
                "value": "uint8 / 255",
                "resized": "whole frame, aspect ratio not kept",
            },
            "views": [
                {
                    "channels": [3 * i, 3 * i + 3],
                    "centre": [0.5 + float(dx), 0.5 + float(dy)],
                    "width": width,
                }
                for i, ((_, dx, dy, _), width) in enumerate(zip(jitter, widths, strict=True))
            ],
            "views_by": "cardiocaps.data.views.three_views",
        },
        "frames": {"count": frames.count, "choice": frames.choice, "of_a_video": "mean of the outputs over its frames"},
        "outputs": {name: ["batch", *x.shape[1:]] for name, x in outputs.items()},
        "classes": ["normal", "abnormal"],
        "regression": regression,
        "decision": {"threshold": decision.threshold, "unit": decision.unit, "rule": decision.rule},
        "calibration": {
            name: x for name, x in asdict(calibration).items() if name in ("method", "unit", "scale", "corners")
        },
        "precision": "float32",
    }


def _random_frames(size: int) -> Iterator[Tensor]:
    """Batches [B, 9, size, size] of noise, each image with a brightness of its own."""
    generator = torch.Generator().manual_seed(_SEED)
    for batch in _BATCHES:
        brightness = torch.rand(batch, 1, 1, 1, generator=generator)
        yield torch.rand(batch, IN_CHANNELS, size, size, generator=generator) * brightness


def _outputs_of(module: Callable[[Tensor], Outputs], image: Tensor) -> Outputs:
    with torch.inference_mode():
        return module(image)


def _difference(want: Outputs, got: Outputs) -> float:
    """The largest difference of an output, relative to its largest value, at least 1; NaN if one is NaN."""
    if want.keys() != got.keys() or any(x.shape != got[name].shape for name, x in want.items()):
        return float("inf")
    differences = [(got[name] - x).abs().max() / x.abs().max().clamp(min=1) for name, x in want.items()]
    return float(torch.stack(differences).max())


def _write_safetensors(
    path: Path, network: nn.Module, config: TrainConfig, description: Mapping[str, Any]
) -> Callable[[Tensor], Outputs]:
    save_safetensors(path, network, description)
    weights, found = read_safetensors(path)
    if found != description:
        raise CheckpointError("--to safetensors: the description in the file is not what was written")
    again = build(config)
    again.load_state_dict(weights)
    return lambda image: _outputs_of(Named(again.eval()), image)


def _write_torch_export(
    path: Path, network: nn.Module, config: TrainConfig, description: Mapping[str, Any]
) -> Callable[[Tensor], Outputs]:
    with _quiet(), torch.no_grad():
        images, shapes = _example(config.network.size)
        program = torch.export.export(Named(network), images, dynamic_shapes=shapes)
        for node in program.graph.nodes:  # where in the code each comes from, with the paths of this machine
            node.meta.pop("stack_trace", None)
        # Files, not names: torch would want a name that ends in .pt2.
        with path.open("wb") as file:
            torch.export.save(program, file, extra_files={METADATA: json_text(description)})  # type: ignore[arg-type]
        found = {METADATA: ""}
        with path.open("rb") as file:
            again = torch.export.load(file, extra_files=found).module()  # type: ignore[arg-type]
    if json.loads(found[METADATA]) != description:
        raise CheckpointError("--to torch-export: the description in the file is not what was written")
    return lambda image: _outputs_of(again, image)


def _write_onnx(
    path: Path, network: nn.Module, config: TrainConfig, description: Mapping[str, Any]
) -> Callable[[Tensor], Outputs]:
    import onnxruntime

    images, shapes = _example(config.network.size)
    with torch.no_grad():
        names = list(Named(network)(*images))
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            Named(network), images, input_names=["image"], output_names=names, dynamic_shapes=shapes, verbose=False
        )
        assert program is not None
        for node in program.model.graph.all_nodes():  # as in `_write_torch_export`
            node.metadata_props.clear()
        program.model.metadata_props[METADATA] = json_text(description)
        program.model.producer_name = "cardiocaps"
        program.save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    if json.loads(session.get_modelmeta().custom_metadata_map[METADATA]) != description:
        raise CheckpointError("--to onnx: the description in the file is not what was written")

    def call(image: Tensor) -> Outputs:
        found = session.run(names, {"image": image.numpy()})
        return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

    return call


_WRITERS = {"safetensors": _write_safetensors, "torch-export": _write_torch_export, "onnx": _write_onnx}
"""Each writes the file, reads it back and returns its outputs as a function of image [B, 9, S, S]."""


def _example(size: int) -> tuple[tuple[Tensor], tuple[dict[int, Any]]]:
    """An input, and which of its sizes may differ. Two images: torch takes a batch of one as a constant."""
    batch = torch.export.Dim("batch", min=1, max=_LARGEST_BATCH)
    return (torch.rand(2, IN_CHANNELS, size, size),), ({0: batch},)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the notes of torch's exporters, for example that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
