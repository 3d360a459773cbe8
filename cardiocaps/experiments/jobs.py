"""One job: a system trained with one seed in a folder of its own, and what it says of validation and test.

A network's folder is that of a run of `cardiocaps.train`: `cardiocaps.evaluate` takes it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from threadpoolctl import threadpool_limits

from cardiocaps.config import TrainConfig
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.data.open import decode_for_run, read_study
from cardiocaps.evaluation.decision import Decision, training_mean, write_decision
from cardiocaps.evaluation.pixel_baseline import PIXEL_SIDE
from cardiocaps.evaluation.predictions import Predictions, unit_of
from cardiocaps.evaluation.scores import predict
from cardiocaps.experiments.folder import ExperimentFolder
from cardiocaps.experiments.plan import System
from cardiocaps.experiments.results import Result, is_finished, write_result
from cardiocaps.models.pixel_classifiers import fit
from cardiocaps.runtime.device import Machine, machine_for
from cardiocaps.runtime.files import lock_folder, write_json
from cardiocaps.runtime.peak_memory import PeakMemory
from cardiocaps.runtime.program import Interruption
from cardiocaps.training.checkpoints import best_network, weights_digest
from cardiocaps.training.fit import make_trainer, quiet, train
from cardiocaps.training.run_folder import RunFolder

_OTHER_DATA = "choose another --out for these"

Watch = Callable[[float, str], None]
"""Told how much of a job is done, from 0 to 1, and what is being done."""


@dataclass(frozen=True)
class Job:
    """A system, its seed, and the resolved settings of its run."""

    system: System
    seed: int
    config: TrainConfig
    at_once: int = 1  # how many jobs share the machine

    @property
    def name(self) -> str:
        return f"{self.system.key} seed {self.seed}"

    @cached_property
    def folder(self) -> Path:
        assert self.config.out is not None
        return self.config.out

    @property
    def log(self) -> Path:
        """What the job printed. Beside its folder, which is a run's."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def is_network(self) -> bool:
        return "classifier" not in self.system.settings


def run(job: Job, watch: Watch, interruption: Interruption) -> None:
    """Do a job, or what is left of it; nothing if it is finished.

    Raises:
        CardioCapsError: see cardiocaps.errors. What was reached is saved, and another call goes on from there.
    """
    quiet()
    if is_finished(job.folder):
        return
    watch(0.0, "reading")
    begun = (job.folder / "config.yaml").is_file()
    folder = RunFolder.open(job.folder) if begun else RunFolder.create(job.folder, overwrite=True)
    with lock_folder(folder.path), machine_for(job.config) as machine:
        folder.remove_leftovers()
        if not begun:
            yaml, paths = job.config.kept()
            folder.begin(yaml, machine.device, paths)
            # All jobs go without what the first ones went without, whether it can be decoded by now or not.
            known = ExperimentFolder(job.folder.parents[2]).known_data(job.config)
            if known is not None:
                write_json(folder.data, known.as_dict())
        data = decode_for_run(
            job.config, machine, read_study(job.config), folder.data, _OTHER_DATA, trained=folder.is_trained, keep=True
        ).data
        config = replace(job.config, resume=folder.path) if begun else job.config
        if begun:
            folder.keep(*job.config.kept())
        if job.is_network:
            _network(job, config, machine, folder, data, watch, interruption)
        else:
            _pixels(job, config, data, watch)


def _network(
    job: Job,
    config: TrainConfig,
    machine: Machine,
    folder: RunFolder,
    data: EchoDataModule,
    watch: Watch,
    interruption: Interruption,
) -> None:
    memory = PeakMemory(machine.device)
    history = train(config, machine, folder, data, interruption, callbacks=[_progress(watch), memory])
    watch(1.0, "evaluating")
    network = best_network(config, folder)
    machine.lay_out(network.model)
    trainer = make_trainer(config, machine)
    scores = {split: predict(trainer, network, data, split) for split in ("val", "test")}
    # So that `cardiocaps.evaluate` decides as the tables do, on whatever data.
    decision = Decision.choose(scores["val"], unit_of(config), weights_digest(network), training_mean(data))
    write_decision(folder.decision, decision)
    seconds = [row["seconds"] for row in history]
    best = min(history, key=lambda row: row["val_loss"])
    _write(
        job,
        scores,
        device=machine.gpu or machine.device,
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        epochs=len(history),
        best_epoch=int(best["epoch"]),
        seconds_per_epoch=median(seconds),
        seconds=sum(seconds),
        peak_memory=memory.peak,
    )
    folder.last.unlink(missing_ok=True)


def _pixels(job: Job, config: TrainConfig, data: EchoDataModule, watch: Watch) -> None:
    pixels = {split: data.pixels(split, PIXEL_SIDE) for split in ("train", "val", "test")}
    watch(0.5, "fitting")
    assert config.patience is not None
    threads = torch.get_num_threads()
    with threadpool_limits(threads):  # of what has no option for it: linear algebra, neighbours
        begin = time.monotonic()
        model = fit(
            job.system.settings["classifier"],
            job.system.settings["sampling"],
            *pixels["train"][:2],
            *pixels["val"][:2],
            seed=job.seed,
            threads=threads,
            patience=config.patience,
        )
        seconds = time.monotonic() - begin
        watch(1.0, "evaluating")
        scores = {
            split: Predictions.of(
                {
                    "probability": model.probability(pixels[split][0]),
                    "label": pixels[split][1],
                    "clip": pixels[split][2],
                },
                data.clips(split),
                data.study.group_kind,
            )
            for split in ("val", "test")
        }
    _write(
        job,
        scores,
        device="cpu",
        parameters=model.parameters,
        epochs=None,
        best_epoch=None,
        seconds_per_epoch=None,
        seconds=seconds,
        peak_memory=None,
    )


def _write(job: Job, scores: Mapping[str, Predictions], **measured: Any) -> None:

    result = Result(
        system=job.system.key,
        seed=job.seed,
        unit=unit_of(job.config),
        validation=scores["val"],
        test=scores["test"],
        at_once=job.at_once,
        threads=torch.get_num_threads(),
        **measured,
    )
    write_result(job.folder, result)


def _progress(watch: Watch) -> Callback:
    class Progress(Callback):
        """Tells `watch` where training is."""

        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            assert trainer.max_epochs is not None
            done = trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches
            watch(done / trainer.max_epochs, f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    return Progress()
