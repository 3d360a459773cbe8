import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.nn.functional import interpolate

from cardiocaps.data import cache
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.data.echonet_lvh.reader import read_folder
from cardiocaps.data.study import Study
from cardiocaps.data.views import base_side
from cardiocaps.errors import DataError, OutputError

from .sample_videos import measurement, split_of, write_folder, write_table

Batch = dict[str, Tensor]


def decoded(study: Study, folder: Path, frames_per_clip: int = 3, **options: Any) -> cache.Cached:
    return cache.build(study, size=base_side(16), frames_per_clip=frames_per_clip, folder=folder, **options)


def module(folder: Path, cache_dir: Path, **options: Any) -> EchoDataModule:
    study = read_folder(folder, seed=options.get("split_seed", options.get("seed", 10)))
    return EchoDataModule(decoded(study, cache_dir), **({"size": 16, "batch_size": 4} | options))


def epoch_of(data: EchoDataModule, split: str, epoch: int = 0) -> list[Batch]:
    loader = data._loader(split)
    loader.sampler.set_epoch(epoch)
    return [data.on_after_batch_transfer(batch, 0) for batch in loader]


def joined(batches: list[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(a: list[Batch], b: list[Batch]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        for key in one:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0, equal_nan=True)


def test_a_batch_is_what_the_model_expects(shared_folder: Path, shared_cache: Path) -> None:
    data = module(shared_folder, shared_cache)
    batch = epoch_of(data, "train")[0]
    assert set(batch) == {"image", "label", "target", "clip", "frame"}
    assert batch["image"].shape == (4, 9, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["image"].min() >= 0 and batch["image"].max() <= 1
    assert batch["target"].dtype == torch.float32
    for key in ("label", "clip", "frame"):
        assert batch[key].shape == (4,) and batch[key].dtype == torch.int64
    clips = data.clips("train")
    for clip, label, target in zip(batch["clip"], batch["label"], batch["target"], strict=True):
        assert clips[clip].label == label
        assert target == torch.tensor(clips[clip].targets["width"])


def test_what_a_gpu_wants_of_its_batches(
    shared_folder: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = module(shared_folder, shared_cache)
    last = module(shared_folder, shared_cache, channels_last=True)
    for one, other in zip(epoch_of(plain, "train"), epoch_of(last, "train"), strict=True):
        assert other["image"].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(one["image"], other["image"])
    assert plain.train_dataloader().pin_memory is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # of no interest to a run on the CPU
    assert plain.train_dataloader().pin_memory is False
    assert module(shared_folder, shared_cache, pin_memory=True).train_dataloader().pin_memory is True


def test_loader_processes_live_from_epoch_to_epoch(shared_folder: Path, shared_cache: Path) -> None:
    loader = module(shared_folder, shared_cache, num_workers=1).train_dataloader()
    processes = set()
    for _ in range(2):
        for _ in loader:
            pass
        processes |= {worker.pid for worker in loader._iterator._workers}
    assert len(processes) == 1


def test_an_epoch_has_every_frame_once(shared_folder: Path, shared_cache: Path) -> None:
    data = module(shared_folder, shared_cache)
    for split, clips in (("train", 4), ("val", 2), ("test", 2)):
        batch = joined(epoch_of(data, split))
        pairs = sorted(zip(batch["clip"].tolist(), batch["frame"].tolist(), strict=True))
        assert pairs == [(clip, frame) for clip in range(clips) for frame in (2, 6, 10)]
    assert data.train_class_counts().tolist() == [6, 6]


def test_evaluation_is_in_order_and_always_the_same(shared_folder: Path, shared_cache: Path) -> None:
    data = module(shared_folder, shared_cache)
    batches = epoch_of(data, "test")
    assert joined(batches)["clip"].tolist() == [0, 0, 0, 1, 1, 1] and [len(b["clip"]) for b in batches] == [
        4,
        2,
    ]
    assert_same(batches, epoch_of(data, "test", epoch=7))
    assert_same(batches, epoch_of(module(shared_folder, shared_cache, seed=99), "test"))


def test_training_differs_by_epoch_and_by_seed(shared_folder: Path, shared_cache: Path) -> None:
    data = module(shared_folder, shared_cache)
    first, second = joined(epoch_of(data, "train", 0)), joined(epoch_of(data, "train", 1))
    assert first["clip"].tolist() != second["clip"].tolist()
    assert not torch.equal(first["image"], second["image"])
    other = joined(epoch_of(module(shared_folder, shared_cache, seed=11), "train", 0))
    assert not torch.equal(first["image"], other["image"])


def test_training_is_the_same_for_any_number_of_workers(shared_folder: Path, shared_cache: Path) -> None:
    one = epoch_of(module(shared_folder, shared_cache), "train", 3)
    assert_same(one, epoch_of(module(shared_folder, shared_cache, num_workers=2), "train", 3))


class Recorder(LightningModule):
    """Learns nothing; notes what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shown: dict[int, list[float]] = {}
        self.validated: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.shown.setdefault(self.current_epoch, []).append(float(batch["image"].double().sum()))
        return self.weight.sum() * batch["image"].mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(len(batch["label"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: EchoDataModule, folder: Path, epochs: int, resume: Path | None = None) -> Recorder:
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(recorder, datamodule=data, ckpt_path=str(resume) if resume else None)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    return recorder


def test_lightning_sets_the_epoch_also_after_a_resume(shared_folder: Path, shared_cache: Path, tmp_path: Path) -> None:
    through = fit(module(shared_folder, shared_cache), tmp_path, 3)
    assert through.shown.keys() == {0, 1, 2} and len({tuple(sums) for sums in through.shown.values()}) == 3
    assert through.validated == [4, 2] * 3
    fit(module(shared_folder, shared_cache), tmp_path, 1)
    resumed = fit(module(shared_folder, shared_cache), tmp_path, 3, tmp_path / "1.ckpt")
    assert resumed.shown == {epoch: through.shown[epoch] for epoch in (1, 2)}


@pytest.mark.parametrize("batch_size, sizes", [(4, [4, 4, 4]), (5, [5, 5, 2]), (11, [11]), (1, [1] * 12), (99, [12])])
def test_only_a_last_batch_of_one_is_dropped(
    shared_folder: Path, shared_cache: Path, batch_size: int, sizes: list[int]
) -> None:
    data = module(shared_folder, shared_cache, batch_size=batch_size)
    assert [len(batch["label"]) for batch in epoch_of(data, "train")] == sizes


def test_evaluation_keeps_a_last_batch_of_one(shared_folder: Path, shared_cache: Path) -> None:
    assert [len(b["label"]) for b in epoch_of(module(shared_folder, shared_cache, batch_size=5), "val")] == [
        5,
        1,
    ]


def test_targets(tmp_path: Path, shared_cache: Path) -> None:
    root, rows = write_folder(tmp_path), []
    for i in range(8):
        name, split = f"0X{i:016X}", split_of(i)
        rows.append(measurement(name, "IVSd", 1.4 if i % 2 else 0.8, split=split))
        if i not in (4, 5):
            rows.append(measurement(name, "LVIDd", 5.0, split=split))
        if i < 2:
            rows.append(measurement(name, "LVIDs", 3.0, split=split))
    write_table(root, rows)
    width = joined(epoch_of(module(root, shared_cache), "train"))["target"]
    assert (width == 5).all()
    assert joined(epoch_of(module(root, shared_cache), "val"))["target"].isnan().all()
    batch = joined(epoch_of(module(root, shared_cache, target="ef"), "train"))
    assert torch.equal(batch["target"].isnan(), batch["clip"] >= 2)
    assert batch["target"][batch["clip"] < 2].tolist() == pytest.approx([70.4] * 6, abs=1e-3)


def test_pixels_for_the_baselines(shared_folder: Path, shared_cache: Path) -> None:
    data = module(shared_folder, shared_cache, batch_size=99)
    grey, labels, clips = data.pixels("test", 16)
    assert grey.shape == (6, 256) and grey.dtype == np.float32 and grey.min() >= 0 and grey.max() <= 1
    (batch,) = epoch_of(data, "test")
    assert labels.tolist() == batch["label"].tolist() and clips.tolist() == batch["clip"].tolist()
    luma = (batch["image"][:, :3] * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1)
    np.testing.assert_allclose(grey, luma.flatten(1).numpy(), atol=1e-5)
    half = interpolate(luma[:, None], (8, 8), mode="bilinear", antialias=True).flatten(1)
    assert float(np.abs(data.pixels("test", 8)[0] - half.numpy()).mean()) < 0.02


@pytest.mark.filterwarnings("ignore:the paper protocol")
def test_the_paper_protocol_spreads_frames_of_one_clip(shared_folder: Path, shared_cache: Path) -> None:
    study = read_folder(shared_folder, protocol="paper")
    cached = decoded(study, shared_cache, 5, frame_choice="first")
    data = EchoDataModule(cached, size=16, batch_size=9)
    batches = {split: joined(epoch_of(data, split)) for split in ("train", "val", "test")}
    assert [len(batch["clip"]) for batch in batches.values()] == [50, 25, 5]
    shares = [float(batch["label"].float().mean()) for batch in batches.values()]
    assert shares == pytest.approx([np.mean([clip.label for clip in study.clips])] * 3, abs=0.15)
    pairs = [
        (clip, frame)
        for batch in batches.values()
        for clip, frame in zip(batch["clip"].tolist(), batch["frame"].tolist(), strict=True)
    ]
    assert sorted(pairs) == [(clip, frame) for clip in range(16) for frame in range(5)]  # the first frames
    assert data.clips("val") == data.study.clips and data.clips("val")[3].targets["width"] == 4.55


def test_a_study_that_changed_is_reported(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", 16)
    study = read_folder(root)
    (root / "Batch1" / "0X0000000000000000.avi").write_bytes(b"nothing")
    data = EchoDataModule(decoded(study, tmp_path / "cache", max_bad_share=0.1), size=16, batch_size=8)
    assert [problem.where for problem in data.study.problems] == ["0X0000000000000000"]
    assert len(data.clips("train")) == 7
    with pytest.raises(DataError, match="1 of 16 videos"):
        decoded(study, tmp_path / "cache")


def test_the_package_starts_without_heavy_imports() -> None:
    heavy = ("torch", "lightning", "av", "pandas", "rich")
    code = f"import sys, cardiocaps.data; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_test_split_alone_gives_batches(tmp_path: Path, shared_cache: Path) -> None:
    root = write_folder(tmp_path)
    table = root / "MeasurementsList.csv"
    table.write_text(table.read_text().replace(",train", ",test").replace(",val", ",test"))
    data = EchoDataModule(decoded(read_folder(root, needed_splits=("test",)), shared_cache, 2), size=16, batch_size=5)
    assert len(joined(epoch_of(data, "test"))["clip"]) == 16 and len(data.labels("train")) == 0


def _with_little_shared_memory(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that has a /dev/shm of its own, of 4k."""
    inside = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && exec "$@"'
    return subprocess.run(
        ["unshare", "-Urm", "bash", "-c", inside, "bash", *command], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_worker_says_of_the_cache_is_one_line(
    workers: int, shared_folder: Path, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = module(shared_folder, shared_cache, num_workers=workers)

    def refuses(*_: object) -> None:
        raise OutputError("cache_dir is /x; expected a cache of your own")

    monkeypatch.setattr(cache.Cached, "frame", refuses)
    with pytest.raises(OutputError, match=r"^cache_dir is /x; expected a cache of your own$"):
        next(iter(data.train_dataloader()))


def test_workers_without_shared_memory_are_an_error_of_one_line(shared_folder: Path, shared_cache: Path) -> None:
    """4k: not enough for their locks; 256k: not enough for their batches."""
    if shutil.which("unshare") is None or _with_little_shared_memory("true").returncode:
        pytest.skip("this machine lets nobody mount a /dev/shm of his own")
    script = (
        "import subprocess, sys\n"
        "from cardiocaps.data import cache\n"
        "from cardiocaps.data.datamodule import EchoDataModule\n"
        "from cardiocaps.data.echonet_lvh.reader import read_folder\n"
        "from cardiocaps.runtime.program import run_program\n"
        "cached = cache.build(read_folder(sys.argv[1]), size=364, frames_per_clip=50, folder=sys.argv[2])\n"
        "for size in ('4k', '256k'):\n"
        "    subprocess.run(['mount', '-o', f'remount,size={size}', '/dev/shm'], check=True)\n"
        "    data = EchoDataModule(cached, size=128, batch_size=8, num_workers=2)\n"
        "    print(run_program(lambda _: list(data.val_dataloader()) and None), flush=True)\n"
    )
    done = _with_little_shared_memory(sys.executable, "-c", script, str(shared_folder), str(shared_cache))
    assert (done.returncode, done.stdout) == (0, "1\n1\n"), done.stderr
    line = r"error: [^\n]* /dev/shm[^\n]*; --workers 0 loads in the main process\n"
    assert re.fullmatch(f"{line}{line}", done.stderr)
