"""A job: trains a system with one seed in a folder of its own, and evaluates it on validation and test.

The folder of a network is the folder of a run, so `cardiocaps.evaluate` can evaluate it too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from cardiocaps.config import TrainConfig, write_run
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.data.open import decode_for_run, read_study
from cardiocaps.evaluation.decision import Decision, training_mean, write_decision
from cardiocaps.evaluation.pixel_baseline import BASELINE, PIXEL_SIDE, PixelBaseline, predict_pixels
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
from cardiocaps.runtime.quiet import quiet
from cardiocaps.training.callbacks import Progress, Watch
from cardiocaps.training.checkpoints import best_network, weights_digest
from cardiocaps.training.fit import train
from cardiocaps.training.module import Classifier
from cardiocaps.training.run_folder import RunFolder

_OTHER_DATA = "choose another --out for these"


@dataclass(frozen=True)
class Job:
    """A system, its seed, and the resolved settings of its run."""

    system: System
    seed: int
    config: TrainConfig
    at_once: int = 1  # number of jobs that run at a time, on one machine or on those of an engine

    @property
    def name(self) -> str:
        return f"{self.system.key} seed {self.seed}"

    @property
    def folder(self) -> Path:
        assert self.config.out is not None
        return self.config.out

    @property
    def log(self) -> Path:
        """The output of the job. It lies beside the folder, which holds only files of the run."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def experiments(self) -> ExperimentFolder:
        """The folder of the experiments that the job belongs to."""
        return ExperimentFolder(self.folder.parents[2])


def run(job: Job, watch: Watch, interruption: Interruption) -> None:
    """Run a job, or go on with it; do nothing if it is finished.

    Raises:
        CardioCapsError: see `cardiocaps.errors`. The progress is saved, and another call goes on from there.
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
            # All jobs leave out the videos that the first jobs left out, even if they can be decoded by now.
            known = job.experiments.known_data(job.config)
            if known is not None:
                write_json(folder.data, known.as_dict())
            folder.begin(job.config, machine.device)  # config.yaml comes last: a job that has it has begun
        data = decode_for_run(
            job.config, machine, read_study(job.config), folder.data, _OTHER_DATA, trained=folder.is_trained, keep=True
        ).data
        config = replace(job.config, regression_target=data.target)
        write_run(config, folder.path)
        if begun:
            config = replace(config, resume=folder.path)
        if "classifier" in job.system.settings:
            _fit_pixels(job, config, data, watch)
        else:
            _train_network(job, config, machine, folder, data, watch, interruption)


def _train_network(
    job: Job,
    config: TrainConfig,
    machine: Machine,
    folder: RunFolder,
    data: EchoDataModule,
    watch: Watch,
    interruption: Interruption,
) -> None:
    memory = PeakMemory(machine.device)
    history = train(config, machine, folder, data, interruption, callbacks=[Progress(watch), memory])
    watch(1.0, "evaluating")
    network = best_network(config, folder, Classifier)
    said = predict(config, machine, network, data, ("val", "test"))
    # `cardiocaps.evaluate` reads this file, so that it uses the same threshold as the tables.
    decision = Decision.choose(said["val"], unit_of(config), weights_digest(network), training_mean(data))
    write_decision(folder.decision, decision)
    seconds = [row["seconds"] for row in history]
    _write(
        job,
        said,
        device=machine.gpu or machine.device,
        parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        epochs=len(history),
        best_epoch=int(min(history, key=lambda row: row["val_loss"])["epoch"]),
        seconds_per_epoch=median(seconds),
        seconds=sum(seconds),
        peak_memory=memory.peak,
    )
    folder.last.unlink(missing_ok=True)


def _fit_pixels(job: Job, config: TrainConfig, data: EchoDataModule, watch: Watch) -> None:
    train, validation = (data.pixels(split, PIXEL_SIDE)[:2] for split in ("train", "val"))
    watch(0.5, "fitting")
    assert config.patience is not None
    threads = torch.get_num_threads()
    with threadpool_limits(threads):  # linear algebra and nearest neighbours have no option of their own for it
        begin = time.monotonic()
        own = job.system.settings
        model = fit(
            own["classifier"],
            own["sampling"],
            *train,
            *validation,
            seed=job.seed,
            threads=threads,
            patience=config.patience,
            published=config.form == "published",
        )
        seconds = time.monotonic() - begin
        watch(1.0, "evaluating")
        said = {split: predict_pixels(model, data, split) for split in ("val", "test")}
    if (own["classifier"], own["sampling"], config.form) == (*BASELINE, "corrected"):
        # For the shifted tests. The other classifiers are not tested again, and trees have no exact numbers to write.
        PixelBaseline(model, Decision.choose(said["val"], unit_of(config))).write(RunFolder(job.folder).pixel_baseline)
    _write(job, said, device="cpu", parameters=model.parameters, seconds=seconds)


def _write(job: Job, said: Mapping[str, Predictions], **measured: Any) -> None:
    """Write the result of a job: its predictions, and what was `measured` (fields of `Result`)."""
    result = Result(
        system=job.system.key,
        seed=job.seed,
        unit=unit_of(job.config),
        validation=said["val"],
        test=said["test"],
        at_once=job.at_once,
        threads=torch.get_num_threads(),
        **measured,
    )
    write_result(job.folder, result)
