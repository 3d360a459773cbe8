"""`python -m cardiocaps.export`: every network in every form, and what the files say."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cardiocaps import DISCLAIMER, export
from cardiocaps.config import TrainConfig, read_run
from cardiocaps.models import MODELS
from cardiocaps.models.pretrained import digest_of, read_safetensors
from cardiocaps.prediction import export as writing
from cardiocaps.training.checkpoints import best_network
from cardiocaps.training.module import Classifier
from cardiocaps.training.network import TrainedNetwork
from cardiocaps.training.run_folder import RunFolder
from tests.cardiocaps.programs import ROOT

FORMS = {"safetensors": "safetensors", "onnx": "onnx", "torch-export": "pt2"}


def _run_of(model: str, folder: Path) -> Path:
    """A run's folder with a network of random weights, as far as an export reads it. No network is trained."""
    config = TrainConfig(model=model, out=folder, regression_target="width").resolved()  # type: ignore[arg-type]
    run = RunFolder.create(folder)
    run.begin(config, "cpu")
    network = Classifier(config, torch.ones(2), 0.0)
    for name, x in network.model.named_buffers():
        if name.endswith("running_var"):  # as of a network that was trained
            x.copy_(torch.rand_like(x) + 0.5)
    checkpoint: dict[str, Any] = {"state_dict": network.state_dict()}
    network.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, run.best)
    return folder


def _read(form: str, path: Path) -> tuple[Callable[[Tensor], dict[str, Tensor]], dict[str, Any]]:
    """The outputs of a file as the pages say to read it, and its description."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        names = [x.name for x in session.get_outputs()]

        def call(image: Tensor) -> dict[str, Tensor]:
            found = session.run(None, {"image": image.numpy()})
            return {name: torch.from_numpy(x) for name, x in zip(names, found, strict=True)}

        return call, json.loads(session.get_modelmeta().custom_metadata_map["cardiocaps"])
    said = {"cardiocaps": ""}
    program = torch.export.load(path, extra_files=said).module()
    return program, json.loads(said["cardiocaps"])


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
@pytest.mark.parametrize("model", MODELS)
def test_every_network_in_every_graph(
    model: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    if model in ("resnet18", "unet", "vit"):
        pytest.importorskip("monai", reason="monai is not installed")
    run, out = _run_of(model, tmp_path / "run"), tmp_path / f"x.{FORMS[form]}"
    assert export.main([str(run), "--to", form, "--out", str(out), "--threads", "1"]) == 0
    assert "largest difference from the network's outputs for 16 random frames" in capsys.readouterr().out
    for place in (ROOT, tmp_path, sys.prefix):  # the paths of this machine can name the user
        assert str(place).encode() not in out.read_bytes()
    call, description = _read(form, out)
    network = best_network(read_run(run), RunFolder(run), TrainedNetwork).model.eval()
    image = torch.rand(3, 9, 64, 64)  # a batch that the program did not compare
    with torch.inference_mode():
        expected = {name: x for name, x in network(image)._asdict().items() if x is not None}
        got = call(image)
    assert got.keys() == expected.keys() == description["outputs"].keys()
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5)
        assert ["batch", *x.shape[1:]] == description["outputs"][name]
    # Some networks of random weights say 0.5 of every image.
    assert any((x[0] - x[1]).abs().max() > 1e-6 for x in expected.values())
    assert description["settings"]["model"] == model
    assert description["digest"] == digest_of(network.state_dict())
    assert (description["regression"] is not None) == ("regression" in expected)


def test_a_trained_run_says_all_that_a_caller_needs(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    assert export.main([str(runs[0]), "--to", "safetensors", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert ": 0 (allowed: 0)" in said and "baseline on pixels is no network" in said
    weights, description = read_safetensors(out)
    network = best_network(read_run(runs[0]), RunFolder(runs[0]), TrainedNetwork).model
    assert all(torch.equal(x, weights[name]) for name, x in network.state_dict().items())
    decision = json.loads((runs[0] / "decision.json").read_text())
    calibration = json.loads((runs[0] / "calibration.json").read_text())
    assert description["use"] == DISCLAIMER == "Research use only. Not a medical device."
    assert description["decision"]["threshold"] == decision["threshold"]
    assert {name: calibration[name] for name in description["calibration"]} == description["calibration"]
    assert description["classes"] == ["normal", "abnormal"]
    assert description["regression"] == {"target": "width", "unit": "cm"}
    assert description["frames"]["count"] == 2 and description["frames"]["choice"] == "spread"
    assert description["input"]["frame"]["shape"] == [3, 182, 182]
    assert description["input"]["views"][2]["centre"] == pytest.approx([0.5, 0.5 + 54 / 728])
    for place in (runs[0].parent, tmp_path):
        assert str(place) not in json.dumps(description)


def test_an_exported_file_begins_a_training(runs: list[Path], tmp_path: Path) -> None:
    from cardiocaps.training.initial import InitialWeights

    out = tmp_path / "x.safetensors"
    assert export.main([str(runs[0]), "--to", "safetensors", "--out", str(out)]) == 0
    config = TrainConfig(init=out, regression_target="width").resolved()
    assert InitialWeights.read(config) is not None


def test_a_file_is_replaced_only_on_request(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    command = [str(runs[0]), "--to", "safetensors", "--out", str(out)]
    assert export.main(command) == 4
    assert "exists; choose another --out, or replace a file by --overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert export.main([*command, "--overwrite"]) == 0
    assert read_safetensors(out)[1]["kind"] == "cardiocaps network"
    out.unlink()
    out.mkdir()
    assert export.main([*command, "--overwrite"]) == 4
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_with_other_outputs_is_not_written(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = writing._WRITERS["torch-export"]
    out = tmp_path / "x.pt2"
    for factor in (1.001, float("nan")):

        def wrong(*given: Any, factor: float = factor) -> Callable[[Tensor], dict[str, Tensor]]:
            call = right(*given)
            return lambda image: {name: x * factor for name, x in call(image).items()}

        monkeypatch.setitem(writing._WRITERS, "torch-export", wrong)
        assert export.main([str(runs[0]), "--to", "torch-export", "--out", str(out)]) == 5
        assert "the outputs of the file differ from the network's by" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_a_diverged_network_is_not_written(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    checkpoint = torch.load(run / "best.ckpt", weights_only=True)
    for x in checkpoint["state_dict"].values():
        if x.is_floating_point():
            x.fill_(torch.nan)
    torch.save(checkpoint, run / "best.ckpt")
    assert export.main([str(run), "--to", "safetensors", "--out", str(tmp_path / "x.safetensors")]) == 5
    assert "is not finite: its training diverged" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [run]


def test_onnx_without_its_packages(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export.main([str(runs[0]), "--to", "onnx", "--out", str(tmp_path / "x.onnx")]) == 2
    error = capsys.readouterr().err
    assert "--to onnx needs the package onnx" in error and "pip install 'cardiocaps[export]'" in error


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["RUN", "--to", "onnx", "--out", "x.pt2"], 2, "expected a name that ends in .onnx, for --to onnx"),
        (["RUN", "--to", "tensorrt", "--out", "x"], 2, "--to"),
        (["RUN", "--out", "x.onnx"], 2, "--to"),
        (["RUN", "--to", "onnx"], 2, "--out"),
        (["OTHER", "--to", "onnx", "--out", "x.onnx"], 2, "expected the folder of a run"),
        (["RUN/pixel_baseline.json", "--to", "onnx", "--out", "x.onnx"], 2, "its baseline on pixels is no network"),
        (["RUN", "--to", "safetensors", "--out", "none/x.safetensors"], 4, "none is not a folder"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    status: int,
    message: str,
    runs: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [x.replace("RUN", str(runs[0])) for x in arguments]
    try:
        found = export.main(given)
    except SystemExit as ended:
        found = int(str(ended.code))
    error = capsys.readouterr().err
    assert found == status and message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
