"""Frames for Lightning: read from the cache, made into views on the device.

What item i shows in epoch e depends only on (seed, e, i). So it is the same for any number of workers and after a
resume.

In a training of n ranks (processes), and with k parts of a batch one after another, every batch of the order that one
process has is divided into n · k parts: part p has the batch's items p, p + n k, p + 2 n k, … Rank r computes the parts
r, r + n, … So no item is lost or repeated, whatever the sizes. A part without items (of a last batch with fewer items
than parts) is filled with one item that counts for nothing, because every rank must compute as often as the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from cardiocaps.data import cache, splits
from cardiocaps.data.study import Clip
from cardiocaps.data.views import draw_jitter, three_views
from cardiocaps.errors import OutputError, ResourceError
from cardiocaps.runtime.processes import start_errors

# Parts of torch's messages when /dev/shm is full: from a worker that notices, and from one that is killed there.
_SIGNS_OF_SHARED_MEMORY = ("unable to write to file </torch", "unable to allocate shared memory", "Bus error")


@dataclass(eq=False)
class FrameDataset(Dataset[dict[str, Any]]):
    """The frames of one split, by (epoch, index)."""

    cached: cache.Cached
    clips: tuple[Clip, ...]
    items: NDArray[np.int64]  # [n, 2], rows (clip, cached frame)
    target: str | None
    seed: int
    train: bool

    @property
    def labels(self) -> NDArray[np.int64]:
        return np.array([self.clips[clip].label for clip in self.items[:, 0]], np.int64)

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, index: int) -> Tensor:
        """uint8 [3, S, S]"""
        clip, frame = (int(value) for value in self.items[index])
        return torch.from_numpy(self.cached.frame(self.clips[clip], frame))

    def measured(self) -> NDArray[np.bool_]:
        """Whether the regression target of every frame was measured, bool [n]."""
        known = np.array([not math.isnan(_target(clip, self.target)) for clip in self.clips])
        return known[self.items[:, 0]]

    def __getitem__(self, key: tuple[int, int] | PartKey) -> dict[str, Any]:
        epoch, index, *part = key
        number, frame = (int(value) for value in self.items[index])
        clip = self.clips[number]
        rng = np.random.default_rng([self.seed, epoch, index])
        jitter, tone = draw_jitter(rng, self.train)
        item = {
            "base": self.pixels(index),
            "jitter": torch.from_numpy(jitter),
            "tone": torch.from_numpy(tone),
            "label": clip.label,
            "target": torch.tensor(_target(clip, self.target), dtype=torch.float32),
            "clip": number,
            "frame": int(self.cached.frames[clip.path].numbers[frame]),
        }
        if part:
            item |= dict(zip(PART, part, strict=True))
        return item


def _target(clip: Clip, name: str | None) -> float:
    """A regression target of a clip; NaN if it was not measured, or if the study has none."""
    return math.nan if name is None else clip.targets[name]


class FrameSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, index): in training shuffled anew in each epoch, in evaluation in order."""

    epoch = 0
    skip = 0  # items that the next pass leaves out: they were used before a checkpoint

    def __init__(self, dataset: FrameDataset) -> None:
        self.dataset = dataset

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(len(self))
        if self.dataset.train:
            # The third number is that of the items, so that no item of this epoch uses the same generator.
            order = np.random.default_rng([self.dataset.seed, self.epoch, len(self)]).permutation(len(self))
        skip, self.skip = self.skip, 0
        return iter([(self.epoch, int(i)) for i in order[skip:]])

    def __len__(self) -> int:
        return len(self.dataset)


PART = ("samples", "measured", "counts")
"""What the items of a part of a batch have beside those of a whole one, each the same for all items of the part: the
mean number of samples, and of samples with a regression target, in a part of this batch; and whether they count."""

PartKey = tuple[int, int, float, float, bool]
"""(epoch, index), and the values of `PART`."""


class PartSampler(Sampler[list[PartKey]]):
    """Yields the items of each part of each batch that one rank computes.

    Args:
        sampler: gives the order of all items. (Lightning sets the epoch of a batch sampler's `sampler`.)
        batch_size: items in a whole batch.
        drop_single: leave out a last batch of one item.
        rank: of this process, of `ranks`.
        steps: parts of a batch that a rank computes one after another.
    """

    skip = 0  # parts that the next pass leaves out

    def __init__(
        self, sampler: FrameSampler, batch_size: int, drop_single: bool, rank: int, ranks: int, steps: int = 1
    ) -> None:
        self.sampler, self.batch_size, self.drop_single = sampler, batch_size, drop_single
        self.rank, self.ranks, self.steps = rank, ranks, steps
        self._measured = sampler.dataset.measured()

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.batch_size)
        return self.steps * (whole + (rest > self.drop_single))

    def __iter__(self) -> Iterator[list[PartKey]]:
        order = list(self.sampler)
        skip, self.skip = self.skip, 0
        parts = self.ranks * self.steps
        for number in range(skip, len(self)):
            batch, step = divmod(number, self.steps)
            items = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            measured = max(1, int(self._measured[[index for _, index in items]].sum()))
            own = items[step * self.ranks + self.rank :: parts]
            yield [(*item, len(items) / parts, measured / parts, bool(own)) for item in own or items[:1]]


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
        if isinstance(self.batch_sampler, PartSampler):
            self.batch_sampler.skip = self.done
        else:
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
    """Loaders of the training, validation and test split of a decoded study.

    A batch, after `on_after_batch_transfer`, is a dict of image float32 [B, 9, size, size] in [0, 1]; label int64 [B];
    target float32 [B], NaN if not measured; clip int64 [B], an index into `clips(split)`; frame int64 [B], the frame's
    number in its video. A part of a batch also has the values of `PART`; `shares_of` says what it counts.

    With several ranks, a trainer must be made with `use_distributed_sampler=False`: the loaders divide the batches.

    Args:
        cached: the study and its frames, of the side `base_side(size)`.
        size: side of the network's input in pixels.
        batch_size: frames in a batch, over all ranks of a training.
        target: what is regressed, one of `study.units`; None: the usual one, if the study has targets.
        seed: of order and augmentation.
        split_seed: of a split over frames; None: `seed`.
        num_workers: processes that load data.
        pin_memory: put batches into page-locked memory, which a GPU can read while it computes.
        channels_last: memory order of the images.

    Raises:
        DataError: a needed split lacks frames of a class.
        ConfigError: the study has no such target.
    """

    def __init__(
        self,
        cached: cache.Cached,
        *,
        size: int,
        batch_size: int,
        target: str | None = None,
        seed: int = 10,
        split_seed: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self._cached = cached
        self.study = study = cached.study
        self.size, self.batch_size = size, batch_size
        self.target = target = study.target(target)
        self.num_workers, self.pin_memory, self.channels_last = num_workers, pin_memory, channels_last
        self.predicted = "test"  # the split that `predict_dataloader` gives
        counts = [len(cached.frames[clip.path].numbers) for clip in study.clips]
        items = splits.frame_items(
            [clip.split for clip in study.clips],
            counts,
            [clip.label for clip in study.clips],
            seed if split_seed is None else split_seed,
        )
        self._datasets = {
            split: FrameDataset(cached, study.clips_in(split), items[split], target, seed, train=split == "train")
            for split in splits.SPLITS
        }
        found = {split: self._datasets[split].labels for split in study.needed_splits}
        splits.check(found, "frames", study.has_labels)
        self._contents = {clip.name: cached.frames[clip.path].video.sha256 for clip in study.clips}

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader("val")

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
        return self._datasets[split].clips

    def labels(self, split: str) -> NDArray[np.int64]:
        """The label of every frame of a split, int64 [n]."""
        return self._datasets[split].labels

    def middle_frame(self, clip: Clip) -> tuple[NDArray[np.uint8], float]:
        """The middle one of a clip's frames, uint8 [3, S, S], and the aspect (width / height) of its video."""
        found = self._cached.frames[clip.path]
        header = found.video.header
        return self._cached.frame(clip, len(found.numbers) // 2), header.width / header.height

    def contents(self) -> dict[str, str]:
        """Name -> SHA-256 of the file's bytes, of each video that could be decoded."""
        return dict(self._contents)

    def train_class_counts(self) -> Tensor:
        """Number of training frames of normal and of abnormal clips, int64 [2]."""
        return torch.bincount(torch.from_numpy(self._datasets["train"].labels), minlength=2)

    def train_target_mean(self) -> float | None:
        """Mean of the regression target over the training clips in which it was measured; None if there is none."""
        targets = [_target(clip, self.target) for clip in self.clips("train")]
        measured = [x for x in targets if not math.isnan(x)]
        return fmean(measured) if measured else None

    def pixels(self, split: str, side: int) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """The frames of a split as grey values, without augmentation, for classifiers of pixels.

        Returns:
            float32 [n, side·side] in [0, 1], labels int64 [n], clip indices int64 [n].
        """
        dataset = self._datasets[split]
        grey = np.empty((len(dataset), side * side), np.float32)
        luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)  # ITU-R BT.601
        for i in range(len(dataset)):
            image = (dataset.pixels(i) * luma).sum(0) / 255
            scaled = interpolate(image[None, None], (side, side), mode="bilinear", antialias=True)
            grey[i] = scaled.flatten().numpy()
        return grey, self.labels(split), dataset.items[:, 0].copy()

    def _loader(self, split: str) -> DataLoader[dict[str, Any]]:
        dataset = self._datasets[split]
        # Batch normalisation needs more than one item, so a last training batch of one item is dropped.
        single = split == "train" and len(dataset) > 1 and len(dataset) % self.batch_size == 1
        rank, ranks, steps = 0, 1, 1
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            rank, ranks = self.trainer.global_rank, self.trainer.world_size
            steps = self.trainer.accumulate_grad_batches if split == "train" else 1
        sampler = FrameSampler(dataset)
        batches: dict[str, Any] = {"batch_size": self.batch_size, "sampler": sampler, "drop_last": single}
        if ranks * steps > 1:
            batches = {"batch_sampler": PartSampler(sampler, self.batch_size, single, rank, ranks, steps)}
        return FrameLoader(
            dataset,
            **batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
        )


def shares_of(batch: Mapping[str, Tensor]) -> tuple[Tensor | float, Tensor | float]:
    """What the means over a batch of `EchoDataModule` count, of all samples and of those with a regression target.

    Both are 1 for a whole batch. For a part they are the shares of `cardiocaps.models.losses.Shares`.
    """
    if "counts" not in batch:
        return 1.0, 1.0
    counts = batch["counts"]
    measured = counts & ~batch["target"].isnan()
    shares = counts.sum() / batch["samples"][0], measured.sum() / batch["measured"][0]
    return shares[0].to(batch["target"].dtype), shares[1].to(batch["target"].dtype)


def samples_of(batch: Mapping[str, Tensor]) -> Tensor | int:
    """The number of samples that the means over a batch are of; for a part, the mean over the parts of its batch."""
    return batch["samples"][0] if "samples" in batch else len(batch["label"])
