"""Frames for Lightning: read from the cache, made into views on the device.

What item i shows in epoch e depends only on (seed, e, i). So it is the same for any number of workers and after a
resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cardiocaps.data import cache, splits
from cardiocaps.data.study import Clip, Study
from cardiocaps.data.views import base_side, draw_jitter, three_views
from cardiocaps.errors import ConfigError, OutputError, ResourceError
from cardiocaps.runtime.processes import start_errors

# Parts of torch's messages when /dev/shm is full: from a worker that notices, and from one that is killed there.
_SIGNS_OF_SHARED_MEMORY = ("unable to write to file </torch", "unable to allocate shared memory", "Bus error")


class FrameDataset(Dataset[dict[str, Any]]):
    """The frames of one split, by (epoch, index)."""

    def __init__(
        self,
        cached: cache.Cached,
        clips: tuple[Clip, ...],
        items: NDArray[np.int64],
        *,
        target: str,
        seed: int,
        train: bool,
        augment_full: bool,
    ) -> None:
        self.cached, self.clips, self.items = cached, clips, items
        self.target, self.seed, self.train, self.augment_full = target, seed, train, augment_full
        self.labels = np.array([clips[clip].label for clip in items[:, 0]], np.int64)

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, index: int) -> Tensor:
        """uint8 [3, S, S]"""
        clip, frame = (int(value) for value in self.items[index])
        return torch.from_numpy(self.cached.frame(self.clips[clip], frame))

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        number, frame = (int(value) for value in self.items[index])
        clip = self.clips[number]
        rng = np.random.default_rng([self.seed, epoch, index])
        jitter, tone = draw_jitter(rng, self.train, self.augment_full)
        return {
            "base": self.pixels(index),
            "jitter": torch.from_numpy(jitter),
            "tone": torch.from_numpy(tone),
            "label": clip.label,
            "target": torch.tensor(clip.targets[self.target], dtype=torch.float32),
            "clip": number,
            "frame": int(self.cached.numbers[clip.path][frame]),
        }


class FrameSampler(DistributedSampler[tuple[int, int]]):
    """Yields (epoch, index): in training shuffled anew in each epoch, in evaluation in order and never padded.

    It is a DistributedSampler, so that Lightning calls `set_epoch` and does not replace it.
    """

    def __init__(self, dataset: FrameDataset) -> None:
        ready = torch.distributed.is_available() and torch.distributed.is_initialized()
        replicas = torch.distributed.get_world_size() if ready else 1
        rank = torch.distributed.get_rank() if ready else 0
        super().__init__(dataset, replicas, rank, shuffle=dataset.train, seed=dataset.seed)
        self.train = dataset.train
        self.skip = 0  # items that the next pass leaves out: they were used before a checkpoint

    def __iter__(self) -> Iterator[tuple[int, int]]:
        n = len(self.dataset)  # type: ignore[arg-type]
        order = np.arange(n)
        if self.train:
            # The third number is n, so that no item of this epoch uses the same generator.
            order = np.random.default_rng([self.seed, self.epoch, n]).permutation(n)
            order = np.resize(order, self.total_size)  # so that every process makes the same number of steps
        skip, self.skip = self.skip, 0
        return iter([(self.epoch, int(i)) for i in order[self.rank :: self.num_replicas][skip:]])

    def __len__(self) -> int:
        n = self.total_size if self.train else len(self.dataset)  # type: ignore[arg-type]
        return len(range(self.rank, n, self.num_replicas))


class FrameLoader(DataLoader[dict[str, Any]]):
    """A loader that saves its position in an epoch in the checkpoint, through the methods that Lightning calls."""

    done = 0  # batches of this epoch that have been yielded
    resume_at = 0  # batches that the next pass leaves out

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resume_at = state["batches"] % len(self)  # after a whole epoch the next one starts at 0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        # This is a generator, so nothing is fetched before Lightning has called `set_epoch`.
        self.done, self.resume_at = self.resume_at, 0
        self.sampler.skip = self.done * (self.batch_size or 1)  # type: ignore[attr-defined]
        with _worker_errors(self.num_workers):
            for batch in super().__iter__():
                self.done += 1
                yield batch


@contextmanager
def _worker_errors(workers: int) -> Iterator[None]:
    """Turn errors of the worker processes into errors of one line.

    Raises:
        ResourceError: the machine lacks processes, or shared memory for the batches.
        OutputError: a worker's own, without the traceback that torch puts before it.
    """
    advice = "; --workers 0 loads in the main process"
    # The destructor reads this attribute, also of an iterator that could not be built.
    _MultiProcessingDataLoaderIter._shutdown = True
    try:
        with start_errors(f"{workers} workers that load data", advice):
            yield
    except OutputError as error:
        raise OutputError(str(error).rstrip().rpartition("OutputError: ")[2]) from error
    except RuntimeError as error:
        if not workers or not any(sign in str(error) for sign in _SIGNS_OF_SHARED_MEMORY):
            raise
        raise ResourceError(f"the workers that load data lack shared memory, /dev/shm{advice}") from error


class EchoDataModule(LightningDataModule):
    """Loaders of the training, validation and test split of a study.

    A batch, after `on_after_batch_transfer`, is a dict of image float32 [B, 9, size, size] in [0, 1]; label int64 [B];
    target float32 [B], NaN if not measured; clip int64 [B], an index into `clips(split)`; frame int64 [B], the frame's
    number in its video.

    Args:
        study: what a reader of `cardiocaps.data.datasets` returns.
        size: side of the network's input in pixels.
        batch_size: frames in a batch.
        frames_per_clip: the most frames of a clip.
        frame_choice: see `cache.choose_frames`; None: "first" in the paper protocol, else "spread".
        target: what is regressed, one of `study.units`.
        seed: of order and augmentation.
        split_seed: of a split over frames; None: `seed`.
        cache_dir: folder of the cache; None: `cache.default_folder`.
        num_workers: processes that load data.
        max_bad_share: largest share of unusable videos.
        augment_full: see `views.draw_jitter`.
        decode_workers: threads, see `cache.build`.
        reader: see `cache.build`.
        progress: see `cache.build`.
        pin_memory: put batches into page-locked memory, which a GPU can read while it computes.
        channels_last: memory order of the images.

    Raises:
        ConfigError: an argument that is not allowed.
        DataError, OutputError: from `setup`, as `cache.build`.
    """

    def __init__(
        self,
        study: Study,
        *,
        size: int = 256,
        batch_size: int = 8,
        frames_per_clip: int = 50,
        frame_choice: str | None = None,
        target: str = "width",
        seed: int = 10,
        split_seed: int | None = None,
        cache_dir: Path | str | None = None,
        num_workers: int = 0,
        max_bad_share: float = 0.05,
        augment_full: bool = True,
        decode_workers: int | None = None,
        reader: str = "pyav",
        progress: bool = False,
        pin_memory: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if target not in study.units:
            raise ConfigError(f"target is {target!r}; expected one of {', '.join(study.units)}")
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected at least 1")
        if num_workers < 0:
            raise ConfigError(f"num_workers is {num_workers}; expected at least 0")
        for name, value in (("seed", seed), ("split_seed", split_seed)):
            if value is not None and value < 0:
                raise ConfigError(f"{name} is {value}; expected at least 0")
        choice = frame_choice or ("first" if study.protocol == "paper" else "spread")
        cache.choose_frames(1, frames_per_clip, choice)
        self.study = study
        self.size, self.batch_size, self.target, self.seed = size, batch_size, target, seed
        self.split_seed = seed if split_seed is None else split_seed
        self.num_workers, self.augment_full = num_workers, augment_full
        self.pin_memory, self.channels_last = pin_memory, channels_last
        self._cache_options: dict[str, Any] = {
            "size": base_side(size),
            "frames_per_clip": frames_per_clip,
            "frame_choice": choice,
            "folder": cache_dir,
            "max_bad_share": max_bad_share,
            "workers": decode_workers,
            "reader": reader,
            "progress": progress,
        }
        self.predicted = "test"  # the split that `predict_dataloader` gives
        self._datasets: dict[str, FrameDataset] = {}
        self._contents: dict[str, str] = {}

    def prepare_data(self) -> None:
        """Decode what is not in the cache; Lightning calls this in one process only."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Decode or find the frames and split them. Afterwards `study` lacks the videos that cannot be decoded."""
        if self._datasets:
            return
        cached = cache.build(self.study, **self._cache_options)
        self.study = cached.study
        counts = [len(cached.numbers[clip.path]) for clip in self.study.clips]
        items = splits.frame_items([clip.split for clip in self.study.clips], counts, self.split_seed)
        datasets = {
            split: FrameDataset(
                cached,
                self.study.clips_in(split),
                items[split],
                target=self.target,
                seed=self.seed,
                train=split == "train",
                augment_full=self.augment_full,
            )
            for split in splits.SPLITS
        }
        splits.check_classes({split: datasets[split].labels for split in self.study.needed_splits}, "frames")
        self._datasets = datasets
        self._contents = {clip.name: cached.digests[clip.path] for clip in self.study.clips}

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.predicted)

    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        """Make the views on the device of the batch, so that only uint8 frames are copied to it."""
        rest = dict(batch)
        base, jitter, tone = rest.pop("base"), rest.pop("jitter"), rest.pop("tone")
        image = three_views(base, self.size, jitter, tone)
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return {"image": image, **rest}

    def clips(self, split: str) -> tuple[Clip, ...]:
        """The clips of a split; `clip` of a batch is an index into them."""
        return self._dataset(split).clips

    def labels(self, split: str) -> NDArray[np.int64]:
        """The label of every frame of a split, int64 [n]."""
        return self._dataset(split).labels.copy()

    def contents(self) -> dict[str, str]:
        """Name -> SHA-256 of the file's bytes, of each video that could be decoded."""
        self.setup()
        return dict(self._contents)

    def train_class_counts(self) -> Tensor:
        """Number of training frames of normal and of abnormal clips, int64 [2]."""
        return torch.bincount(torch.from_numpy(self._dataset("train").labels), minlength=2)

    def train_target_mean(self) -> float:
        """Mean of the regression target over the training clips in which it was measured; 0 if there is none."""
        targets = [clip.targets[self.target] for clip in self.clips("train")]
        measured = [x for x in targets if not math.isnan(x)]
        return fmean(measured) if measured else 0.0

    def pixels(self, split: str, side: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """The frames of a split as grey values, without augmentation, for classifiers of pixels.

        Returns:
            float32 [n, side·side] in [0, 1], labels int64 [n], clip indices int64 [n].
        """
        if side < 1:
            raise ConfigError(f"side is {side}; expected at least 1")
        dataset = self._dataset(split)
        grey = np.empty((len(dataset), side * side), np.float32)
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601
        for i in range(len(dataset)):
            image = (dataset.pixels(i) * luma).sum(0) / 255
            scaled = interpolate(image[None, None], (side, side), mode="bilinear", antialias=True)
            grey[i] = scaled.flatten().numpy()
        return grey, self.labels(split), dataset.items[:, 0].copy()

    def _dataset(self, split: str) -> FrameDataset:
        if split not in splits.SPLITS:
            raise ConfigError(f"split is {split!r}; expected one of {', '.join(splits.SPLITS)}")
        self.setup()
        return self._datasets[split]

    def _loader(self, split: str) -> DataLoader[dict[str, Any]]:
        dataset = self._dataset(split)
        # Batch normalisation needs more than one item, so a last training batch of one item is dropped.
        sampler = FrameSampler(dataset)
        single = len(sampler) > 1 and len(sampler) % self.batch_size == 1
        return FrameLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            drop_last=split == "train" and single,
            pin_memory=self.pin_memory,
        )
