"""Training in several processes computes what one process computes, and ends and goes on as one does."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from cardiocaps import train
from cardiocaps.config import TrainConfig
from cardiocaps.data.datamodule import PART, FrameSampler, PartKey, PartSampler, samples_of, shares_of
from cardiocaps.models.losses import CardioCapsLoss, CrossEntropyLoss, Shares, SpreadLoss
from cardiocaps.phantom import write_phantom
from cardiocaps.training.batch_norm import GlobalBatchNorm
from cardiocaps.training.module import Classifier
from tests.cardiocaps.kills import WITHOUT_FIGURES, rows
from tests.cardiocaps.programs import ROOT, free_port, launch, python, start_program, variables, wait_for

FRAMES = 46  # of the training split below: with batches of 11, the last has two frames, fewer than three ranks
FAST = ["--frames-per-clip", "2", "--epochs", "2", "--batch-size", "11", "--clip", "1"]
QUICK = ["--bootstrap", "0", "--threads", "1", "--no-progress"]
NORMALISED = ("em-capsnet", "efficient-capsnet", "unet")  # three of the networks with batch normalisation

TERMINATED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Exit statuses of a process that gets SIGTERM: before it handles signals or at its end, and else."""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    phantom = tmp_path_factory.mktemp("phantom")
    write_phantom(phantom, 40, 3, processes=1)
    return ["--data", str(phantom), "--cache-dir", str(tmp_path_factory.mktemp("cache")), *FAST, *QUICK]


@pytest.fixture(scope="module")
def alone(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in one process."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: file.write(b""))
        assert train.main([*arguments, "--out", str(run)]) == 0
    return run


def weights(run: Path, name: str = "last.ckpt") -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(run / name, weights_only=True)["state_dict"]
    return state


def assert_equal_runs(run: Path, other: Path) -> None:
    """Both have the same numbers, up to the rounding of float32 over the steps of a training."""
    names = [{str(path.relative_to(x)) for path in x.rglob("*")} for x in (run, other)]
    assert names[0] == names[1]
    for table, key in (("metrics.csv", "epoch"), ("predictions.csv", "video"), ("validation.csv", "video")):
        one, two = rows(run / table), rows(other / table)
        assert [row[key] for row in one] == [row[key] for row in two]
        for a, b in zip(one, two, strict=True):
            numbers = [name for name in a if name not in ("video", "seconds")]
            assert [float(a[name]) for name in numbers] == pytest.approx([float(b[name]) for name in numbers], rel=2e-3)
    for checkpoint in ("last.ckpt", "best.ckpt"):
        a, b = weights(run, checkpoint), weights(other, checkpoint)
        assert a.keys() == b.keys()
        for name, x in a.items():
            # Adam divides by the size of a gradient, so rounding moves a weight by a part of the learning rate, 1e-3.
            torch.testing.assert_close(x, b[name], rtol=0, atol=2e-4)
            assert (x - b[name]).norm() <= 1e-4 * x.norm() + 1e-6


class Frames:
    """What a sampler needs of a data set of n frames, every third without a target."""

    def __init__(self, n: int) -> None:
        self.n, self.train, self.seed = n, True, 4

    def __len__(self) -> int:
        return self.n

    def measured(self) -> np.ndarray[Any, Any]:
        return np.arange(self.n) % 3 != 0


def columns_of(keys: Sequence[PartKey]) -> dict[str, Tensor]:
    """What a loader makes of the values of `PART`."""
    return {name: default_collate([key[2 + i] for key in keys]) for i, name in enumerate(PART)}


@pytest.mark.parametrize("items", [1, 2, 7, 20])
@pytest.mark.parametrize("batch_size", [1, 3, 6, 30])
@pytest.mark.parametrize(("ranks", "steps"), [(2, 1), (3, 1), (1, 4), (2, 3), (5, 2)])
def test_parts_lose_and_repeat_nothing(items: int, batch_size: int, ranks: int, steps: int) -> None:
    dataset: Any = Frames(items)
    whole = FrameSampler(dataset)
    whole.set_epoch(3)
    order = list(whole)
    single = len(order) > 1 and len(order) % batch_size == 1
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    batches = batches[:-1] if single else batches
    samplers = []
    for rank in range(ranks):
        sampler = PartSampler(FrameSampler(dataset), batch_size, single, rank, ranks, steps)
        sampler.sampler.set_epoch(3)
        samplers.append(sampler)
    of_rank = [list(sampler) for sampler in samplers]
    assert {len(parts) for parts in of_rank} == {len(batches) * steps} == {len(sampler) for sampler in samplers}
    for number, batch in enumerate(batches):
        parts = [own[number * steps + step] for step in range(steps) for own in of_rank]
        counted = [key[:2] for part in parts for key in part if key[-1]]
        assert sorted(counted) == sorted(batch)
        assert parts[0][0][:2] == batch[0]
        assert sum(key[2] for (key, *_) in parts) == pytest.approx(len(batch))
        measured = sum(index % 3 != 0 for _, index in batch)
        assert sum(key[3] for (key, *_) in parts) == pytest.approx(max(1, measured))
        assert all(len(part) == 1 for part in parts if not part[0][-1]), "a filler is one item"
    samplers[0].skip = 1
    assert list(samplers[0]) == of_rank[0][1:] and list(samplers[0]) == of_rank[0], "one pass goes on after a resume"


@pytest.mark.parametrize("items", [1, 2, 5, 12])
@pytest.mark.parametrize("loss", [CardioCapsLoss, SpreadLoss, CrossEntropyLoss])
def test_the_mean_over_the_parts_is_the_loss_of_the_batch(items: int, loss: type[nn.Module]) -> None:
    generator = torch.Generator().manual_seed(items)
    image = torch.rand(items, 3, 4, 4, generator=generator)
    inputs = [torch.rand(items, 2, generator=generator), image + 0.1, 5 * torch.rand(items, generator=generator)]
    label = torch.randint(2, (items,), generator=generator)
    target = 5 * torch.rand(items, generator=generator)
    target[::3] = torch.nan
    compute = loss(torch.tensor([0.6, 3.0]))

    def losses(of: Sequence[Tensor], own: Tensor, **shares: Any) -> dict[str, Tensor]:
        scores, reconstruction, prediction = of
        return compute(scores, label[own], reconstruction, image[own], prediction, target[own], **shares)  # type: ignore[no-any-return]

    everything = torch.arange(items)
    whole = [x.clone().requires_grad_() for x in inputs]
    expected = losses(whole, everything)
    expected["loss"].backward()

    dataset: Any = Frames(items)
    dataset.train = False  # in order
    divided = [x.clone().requires_grad_() for x in inputs]
    sums: dict[str, Tensor] = {}
    for rank in range(3):
        (keys,) = PartSampler(FrameSampler(dataset), items, False, rank, 3)
        own = torch.tensor([key[1] for key in keys])
        batch = columns_of(keys)
        batch |= {"target": target[own], "label": label[own]}
        parts = losses([x[own] for x in divided], own, shares=Shares(*shares_of(batch)))
        (parts["loss"] / 3).backward()
        for name, x in parts.items():
            assert x.dtype == torch.float32
            sums[name] = sums.get(name, 0) + x * samples_of(batch) / items
    for name, x in expected.items():
        torch.testing.assert_close(sums[name].float(), x, rtol=1e-5, atol=1e-6)
    for a, b in zip(divided, whole, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None and b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("ranks", "strategy"), [(2, "ddp"), (3, "ddp"), (3, "fsdp")])
def test_several_processes_compute_what_one_does(
    ranks: int, strategy: str, arguments: list[str], alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = launch(ranks, WITHOUT_FIGURES.format(""), *arguments, "--strategy", strategy, "--out", str(run))
    assert [status for status, *_ in said] == [0] * ranks, said
    assert_equal_runs(alone, run)
    (_, first, _), *others = said
    assert f"{ranks} processes" in first and first.count("epoch ") == 2 and f"run folder: {run}" in first
    assert all((out, err) == ("", "") for _, out, err in others)


def test_parts_of_a_batch_one_after_another(
    arguments: list[str], alone: Path, tmp_path: Path, empty_figures: None
) -> None:
    run = tmp_path / "run"
    assert train.main([*arguments, "--accumulate", "4", "--out", str(run)]) == 0
    assert_equal_runs(alone, run)


def test_a_run_goes_on_with_another_layout_of_its_weights(
    arguments: list[str], alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_figures: None
) -> None:
    """The optimiser's state lies in the checkpoint as its weights did."""
    training_step = Classifier.training_step

    def stopping(self: Classifier, *batch: Any) -> Any:
        if self.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
        return training_step(self, *batch)

    run = tmp_path / "run"
    monkeypatch.setattr(Classifier, "training_step", stopping)
    assert train.main([*arguments, "--out", str(run)]) == 128 + signal.SIGTERM
    monkeypatch.setattr(Classifier, "training_step", training_step)
    assert train.main(["--resume", str(run), "--no-channels-last"]) == 0
    assert_equal_runs(alone, run)


def gradients(model: str, rank: int = 0, ranks: int = 1) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The sums over two batches, of five items and of two, of a network's gradients; its buffers after them.

    In float64, so that a mistake is not taken for rounding. Of several ranks, one has no item of the second batch.
    """
    torch.manual_seed(5)
    network = Classifier(TrainConfig(model=model).resolved(), torch.tensor([30, 10]), 4.5).double()  # type: ignore[arg-type]
    if ranks > 1:
        GlobalBatchNorm.replace_in(network.model)
    for items in (5, 2):
        batch = {
            "image": torch.rand(items, 9, 64, 64, dtype=torch.float64),
            "label": torch.randint(2, (items,)),
            "target": 5 * torch.rand(items, dtype=torch.float64),
        }
        batch["target"][0] = torch.nan
        if ranks > 1:
            dataset: Any = Frames(items)
            dataset.train = False  # in order
            dataset.measured = batch["target"].isfinite().numpy
            (keys,) = PartSampler(FrameSampler(dataset), items, False, rank, ranks)
            own = torch.tensor([key[1] for key in keys])
            batch = {name: x[own] for name, x in batch.items()}
            batch |= columns_of(keys)
        network.training_step(batch, 0)["loss"].backward()
    found = {name: x.grad for name, x in network.named_parameters() if x.grad is not None}
    for grad in found.values():
        if ranks > 1:
            torch.distributed.all_reduce(grad)
            grad /= ranks
    return found, dict(network.named_buffers())


def write_gradients(path: str) -> None:
    """What each of several ranks runs."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found = {model: gradients(model, rank, ranks) for model in NORMALISED}
    torch.save(found, f"{path}/{rank}")
    torch.distributed.destroy_process_group()


def test_batch_normalisation_is_over_the_batch_of_all_ranks(tmp_path: Path) -> None:
    program = "import sys; from tests.cardiocaps.training import test_ranks; test_ranks.write_gradients(sys.argv[1])"
    said = launch(3, program, str(tmp_path))
    assert [status for status, *_ in said] == [0, 0, 0], said
    found = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(3)]
    for model in NORMALISED:
        expected = gradients(model)
        for rank in range(3):
            for of_rank, of_one in zip(found[rank][model], expected, strict=True):
                assert of_rank.keys() == of_one.keys()
                for name, x in of_one.items():
                    error = (of_rank[name] - x).double().norm()
                    assert error <= 1e-8 * x.double().norm() + 1e-10, (model, name)
        assert any(x.abs().max() > 0 for x in expected[0].values())


KILLED = """
import os, signal, threading
from cardiocaps.training.module import Classifier
steps, training_step = 0, Classifier.training_step

def stopping(self, *batch):
    global steps
    steps += 1
    if os.environ["KILLED"] == os.environ["RANK"] and steps == int(os.environ["STEP"]):
        threading.Timer(float(os.environ["DELAY"]), os.kill, (os.getpid(), signal.SIGKILL)).start()
    return training_step(self, *batch)

Classifier.training_step = stopping
"""


def test_killed_at_random_moments_and_resumed_with_other_ranks_and_strategies(
    arguments: list[str], alone: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(10**6)
    chance, run, kills = random.Random(seed), tmp_path / "run", 0
    begin = [*arguments, "--out", str(run)]
    for _ in range(5):
        ranks = chance.choice([2, 3])
        killed = chance.randrange(ranks)
        where = {"KILLED": str(killed), "STEP": str(chance.randint(1, 6)), "DELAY": f"{chance.uniform(0, 0.05):.3f}"}
        how = [*(begin or ["--resume", str(run)]), "--strategy", chance.choice(["ddp", "fsdp"])]
        said = launch(ranks, WITHOUT_FIGURES.format(KILLED), *how, **where)
        if said[killed][0] == 0:  # the training had ended before
            break
        kills, begin = kills + 1, []
        assert said[killed][0] == -signal.SIGKILL, (seed, said)
        for rank, (status, _, errors) in enumerate(said):
            if rank != killed:
                assert status in (1, *TERMINATED) and "Traceback" not in errors, (seed, said)
        if killed and said[0][0] > 0:
            message = "^error: (another rank of the training has ended|stopped by SIGTERM)"
            assert re.search(message, said[0][2], re.MULTILINE), (seed, said)
    assert kills > 1, seed
    how = ["--resume", str(run), "--strategy", "ddp"]
    assert [status for status, *_ in launch(1, WITHOUT_FIGURES.format(""), *how)] == [0]
    assert_equal_runs(alone, run)


@pytest.mark.parametrize(("begun_with", "resumed_with"), [("fsdp", "fsdp"), ("ddp", "fsdp")])
def test_a_signal_to_one_rank_saves_and_stops_all(
    begun_with: str, resumed_with: str, arguments: list[str], alone: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    terminated = KILLED.replace("signal.SIGKILL", "signal.SIGTERM")
    where = {"KILLED": "1", "STEP": "2", "DELAY": "0"}
    said = launch(
        2, WITHOUT_FIGURES.format(terminated), *arguments, "--strategy", begun_with, "--out", str(run), **where
    )
    assert all(status in TERMINATED for status, *_ in said), said
    assert said[0][2] == f"error: stopped by SIGTERM; saved; go on with --resume {run}\n" and said[1][2] == ""
    assert 2 <= torch.load(run / "last.ckpt", weights_only=True)["global_step"] < 10
    resumed = launch(3, WITHOUT_FIGURES.format(""), "--resume", str(run), "--strategy", resumed_with)
    assert [status for status, *_ in resumed] == [0, 0, 0], resumed
    assert_equal_runs(alone, run)


@pytest.mark.parametrize(
    ("changed", "options", "status", "message"),
    [
        ("", ["--accumulate", "6"], 2, "batch_size is 11; expected at least 12: each of 2 processes computes 6 parts"),
        ("", ["--devices", "3"], 2, "devices is 3; expected 2, as the launcher has started"),
        ("", ["--data", "nowhere"], 3, "nowhere"),
        ('train.__version__ += "1" * (os.environ["RANK"] == "1")', [], 2, "on rank 1; expected .*, as on rank 0"),
        ('sys.argv += ["--seed", os.environ["RANK"]]', [], 2, "seed is 1 on rank 1; expected 0, as on rank 0"),
    ],
)
def test_mistakes_are_reported_once(
    changed: str, options: list[str], status: int, message: str, arguments: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    said = launch(2, WITHOUT_FIGURES.format(f"import os\n{changed}"), *arguments, *options, "--out", str(run))
    assert said[0][0] in (status, *TERMINATED) and said[1][0], said
    lines = [line for _, _, errors in said for line in errors.splitlines() if line.startswith(("error:", "Traceback"))]
    assert re.fullmatch(f"error: .*{message}.*", lines[0]), said
    # The ranks cannot know of each other's mistake before they have met.
    assert len(lines) == 1 or ("--devices" in options and lines[1] == lines[0]), said
    assert not run.exists()


def test_an_address_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [*python(), "-m", "cardiocaps.train", "--connect-timeout", "1", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    place = f"127.0.0.1:{os.environ['MASTER_PORT']}"
    assert f"error: rank 1 cannot meet the others at {place} (MASTER_ADDR:MASTER_PORT) within 1 s" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_ends_the_wait_for_the_other_ranks(rank: int, tmp_path: Path) -> None:
    """Rank 0 listens, and nothing comes; rank 1 comes to an address that says nothing."""
    address = ("127.0.0.1", free_port())
    with socket.create_server(address) if rank else nullcontext() as silent:
        out = str(tmp_path / "run")
        process = start_program(WITHOUT_FIGURES.format(""), "--out", out, **variables(rank, 2, address[1]))
        if silent is not None:
            silent.accept()
        else:
            wait_for(lambda: socket.socket().connect_ex(address) == 0, process)
        process.terminate()
        _, errors = process.communicate(timeout=30)
    assert process.returncode in TERMINATED
    assert "Traceback" not in errors and (rank or "error: stopped by SIGTERM; nothing is half-written" in errors)


@pytest.mark.parametrize("rendezvous", [[], ["--rendezvous", "node"], ["--rendezvous", "node:0"]])
def test_several_nodes_need_a_place_to_meet(rendezvous: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--nodes", "2", *rendezvous]) == 2
    assert "expected HOST:PORT of one of the 2 nodes" in capsys.readouterr().err


def test_nodes_that_do_not_come(capsys: pytest.CaptureFixture[str]) -> None:
    place = f"127.0.0.1:{free_port()}"
    assert train.main(["--nodes", "2", "--rendezvous", place, "--connect-timeout", "1"]) == 1
    assert capsys.readouterr().err == f"error: the 2 nodes did not meet at {place} (--rendezvous) within 1 s\n"


def start_launcher(*command: str) -> subprocess.Popen[str]:
    """Python itself, as a user starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def kill_second_rank(launcher: subprocess.Popen[str]) -> list[str]:
    """Kill rank 1; returns the process numbers of all ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    (second,) = (
        int(child) for child in children if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{child}/environ").read_bytes()
    )
    os.kill(second, signal.SIGKILL)
    return children


def test_the_launcher_names_the_rank_that_was_killed(arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    long = ["--epochs", "1000", "--patience", "1000", "--devices", "2", "--out", str(run)]
    launcher = start_launcher("cardiocaps.train", *arguments, *long)
    wait_for((run / "last.ckpt").exists, launcher)
    children = kill_second_rank(launcher)
    out, errors = launcher.communicate(timeout=100)
    assert launcher.returncode == 1 and "Traceback" not in errors
    assert "error: rank 1 was killed by SIGKILL (out of memory?), and the other ranks were stopped" in errors
    assert out.count("device: ") == 1
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_torchrun_itself_with_processes_that_load_data(arguments: list[str], alone: Path, tmp_path: Path) -> None:
    """A rank is killed, and the training goes on."""
    run = tmp_path / "run"
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "cardiocaps.train"]
    killed = start_launcher(*torchrun, *arguments, "--workers", "1", "--out", str(run))
    wait_for((run / "config.yaml").exists, killed)
    children = kill_second_rank(killed)
    _, errors = killed.communicate(timeout=100)
    assert killed.returncode == 1 and "Signal 9 (SIGKILL)" in errors
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    resumed = start_launcher(*torchrun, "--resume", str(run))
    out, errors = resumed.communicate(timeout=100)
    assert resumed.returncode == 0 and "2 processes" in out, errors
    assert_equal_runs(alone, run)
