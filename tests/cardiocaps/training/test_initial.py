"""Training that begins with weights: of a run, of a folder in the hub's layout, of a safetensors file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cardiocaps import train
from cardiocaps.config import TrainConfig, read_run
from cardiocaps.errors import CheckpointError, OutputError
from cardiocaps.models import MODELS, build, from_pretrained, is_frozen, save_pretrained
from cardiocaps.models.pretrained import read_safetensors
from cardiocaps.phantom import write_phantom
from cardiocaps.training.checkpoints import best_network
from cardiocaps.training.network import TrainedNetwork
from cardiocaps.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("empty_figures")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    write_phantom(folder / "phantom", 40, 3, processes=1)
    return [
        *("--data", str(folder / "phantom"), "--cache-dir", str(folder / "cache"), "--no-progress"),
        *("--frames-per-clip", "2", "--epochs", "1", "--batch-size", "8", "--bootstrap", "0", "--threads", "1"),
    ]


@pytest.fixture(scope="module")
def source(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "source"
    assert train.main([*arguments, "--out", str(run)]) == 0
    return run


@pytest.fixture(scope="module")
def pretrained(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "network"
    config = read_run(source)
    save_pretrained(
        best_network(config, RunFolder(source), TrainedNetwork).model,
        config,
        folder,
        {"decision": {"unit": "video", "threshold": 0.4}},
    )
    return folder


def _weights(run: Path, which: str = "best.ckpt") -> dict[str, Tensor]:
    state = torch.load(run / which, weights_only=True)["state_dict"]
    return {name.removeprefix("model."): x.contiguous() for name, x in state.items() if name.startswith("model.")}


def test_a_run_begins_with_the_weights_of_another_and_keeps_what_is_frozen(
    source: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    begin = ["--init", str(source), "--freeze", "primary", "--seed", "2", "--out", str(run)]
    assert train.main([*arguments, *begin]) == 0
    before, after = _weights(source), _weights(run, "last.ckpt")
    assert f"init: {len(before)} of {len(before)} tensors are from {source}" in capsys.readouterr().out
    config = read_run(run)
    frozen = {name for name in before if is_frozen(config, name)}
    assert {name.partition(".")[0] for name in frozen} == {"conv", "primary"}
    assert {name for name in before if torch.equal(before[name], after[name])} == frozen
    # One epoch away: with random weights the others would be far from these.
    assert all(torch.allclose(before[name], after[name], atol=0.1) for name in before)
    kept = json.loads((run / "initial.json").read_text())
    assert kept["loaded"] == list(before) and kept["not_loaded"] == []

    # Going on needs the other run no more.
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    text = (copy / "config.yaml").read_text().replace(str(source), str(tmp_path / "gone"))
    (copy / "config.yaml").write_text(text)
    assert train.main(["--resume", str(copy), "--epochs", "2", "--no-progress"]) == 0
    later = _weights(copy, "last.ckpt")
    assert {name for name in before if torch.equal(before[name], later[name])} == frozen


def test_a_folder_and_a_file_begin_a_run_as_the_run_does(
    source: Path, pretrained: Path, arguments: list[str], tmp_path: Path
) -> None:
    file = shutil.copy(pretrained / "model.safetensors", tmp_path / "x.safetensors")
    results = []
    for place in (source, pretrained, file):
        out = tmp_path / f"from {place.name}"
        assert train.main([*arguments, "--init", str(place), "--seed", "3", "--out", str(out)]) == 0
        results.append(_weights(out, "last.ckpt"))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in results[0])


def test_what_does_not_fit_is_listed(
    source: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another target: the regression begins anew. Another shape, an unknown name, a missing one."""
    assert (
        train.main([*arguments, "--init", str(source), "--regression-target", "ef", "--out", str(tmp_path / "a")]) == 0
    )
    assert "  of another target (width): regression." in capsys.readouterr().out
    weights = {name: x.clone() for name, x in _weights(source).items()}
    first, second = list(weights)[:2]
    weights[first] = weights[first][..., :1].contiguous()
    weights["other.weight"] = weights.pop(second)
    save_file(weights, tmp_path / "x.safetensors")
    assert train.main([*arguments, "--init", str(tmp_path / "x.safetensors"), "--out", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    assert f"  of another shape: {first} is " in said
    assert f"  missing there: {second}" in said and "  unknown here: other.weight" in said
    assert json.loads((tmp_path / "b" / "initial.json").read_text())["not_loaded"] == [first, second]


@pytest.mark.parametrize(
    ("given", "status", "message"),
    [
        (["--init", "NONE"], 2, "but it does not exist"),
        (["--init", "EMPTY"], 2, "but it is something else"),
        (["--init", "BAD"], 5, "is damaged, or not a safetensors file"),
        (["--init", "OTHER"], 5, "fits the network of model 'cardiocaps'"),
        (["--init", "NAN"], 5, "is not finite: its training diverged"),
        (["--init", "PART", "--freeze", "primary"], 5, "because init does not fit there"),
        (["--freeze", "primary"], 2, "because without init the weights are random"),
        (["--init", "NAN", "--freeze", "backbone"], 2, "expected primary, which model 'cardiocaps' can freeze"),
    ],
)
def test_wrong_weights(
    given: list[str],
    status: int,
    message: str,
    source: Path,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {name: tmp_path / f"{name}.safetensors" for name in ("BAD", "OTHER", "NAN", "PART")}
    places |= {"NONE": tmp_path / "none", "EMPTY": tmp_path / "empty"}
    places["EMPTY"].mkdir()
    places["BAD"].write_bytes(b"x" * 100)
    weights = _weights(source)
    save_file({"other": torch.zeros(2)}, places["OTHER"])
    save_file({name: torch.full_like(x, torch.nan) for name, x in weights.items()}, places["NAN"])
    save_file({name: x for name, x in weights.items() if not name.startswith("primary")}, places["PART"])
    out = tmp_path / "out"
    assert train.main([*arguments, *[str(places.get(x, x)) for x in given], "--out", str(out)]) == status
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("model", MODELS)
def test_what_freeze_names_is_there(model: str) -> None:
    (part,) = MODELS[model].freezable
    config = TrainConfig(model=model, freeze=part).resolved()  # type: ignore[arg-type]
    with torch.device("meta"):
        network = build(config)
    names = {name for name, _ in network.named_modules()} | {name for name, _ in network.named_parameters()}
    assert set(MODELS[model].freezable[part]) <= names
    frozen = [name for name, _ in network.named_parameters() if is_frozen(config, name)]
    assert 0 < len(frozen) < len(list(network.parameters()))


def test_a_folder_holds_the_network(source: Path, pretrained: Path) -> None:
    config = read_run(source)
    own = best_network(config, RunFolder(source), TrainedNetwork).model.eval()
    image = torch.rand(3, 9, config.network.size, config.network.size)
    with torch.inference_mode():
        expected, got = own(image), from_pretrained(pretrained)(image)
    assert torch.equal(got.probability, expected.probability)
    assert torch.equal(got.regression, expected.regression)
    assert {path.name for path in pretrained.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    card = (pretrained / "README.md").read_text()
    assert "Research use only. Not a medical device." in card and "above a probability of 0.4" in card
    assert str(source) not in (pretrained / "config.json").read_text() + card
    weights, description = read_safetensors(pretrained / "model.safetensors")
    assert description == json.loads((pretrained / "config.json").read_text())
    assert weights.keys() == own.state_dict().keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(kind="other"), "is damaged"),
        (lambda x: x["settings"].update(routing="magic"), "routing"),
        (lambda x: x["settings"].update(routing="dynamic"), "does not fit the network"),
        (lambda x: x["settings"].pop("model"), "is of another version"),
        (lambda x: x["sizes"].update(size=65), "has other sizes in this version"),
        (lambda x: x.update(digest="0"), "another digest"),
    ],
)
def test_a_damaged_folder_is_an_error(change, message: str, pretrained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "network"
    shutil.copytree(pretrained, folder)
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(folder)


def test_a_folder_is_not_overwritten_and_another_network_is_refused(
    source: Path, pretrained: Path, tmp_path: Path
) -> None:
    config = read_run(source)
    network = best_network(config, RunFolder(source), TrainedNetwork).model
    with pytest.raises(OutputError, match="exists"):
        save_pretrained(network, config, pretrained)
    with pytest.raises(CheckpointError, match="the network is not of these settings"):
        save_pretrained(network, TrainConfig(model="cnn-1").resolved(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
