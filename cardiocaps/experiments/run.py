"""Runs an experiment: prepares the data, runs the jobs, and writes the exhibits from their results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from cardiocaps.config import TrainConfig
from cardiocaps.data.cache import default_folder
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.data.datasets import DATASETS
from cardiocaps.data.fingerprint import Fingerprint
from cardiocaps.data.open import dataset_of, decode, read_study, with_layout
from cardiocaps.errors import CardioCapsError, ConfigError, DataError
from cardiocaps.evaluation.predictions import unit_of
from cardiocaps.experiments.display import Display
from cardiocaps.experiments.engines.engine import Engine
from cardiocaps.experiments.engines.remote import remove_progress
from cardiocaps.experiments.exhibits import EXHIBITS, keys_of
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.folder import ExperimentFolder
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.markdown import count
from cardiocaps.experiments.plan import OF_PHANTOM, SYSTEMS, configure, jobs_of, trained_as
from cardiocaps.experiments.reference_rows import Truth
from cardiocaps.experiments.results import is_finished, read_result
from cardiocaps.experiments.runner import run_jobs
from cardiocaps.experiments.summaries import Row
from cardiocaps.experiments.tables import write_exhibit, write_index
from cardiocaps.runtime.device import decide, machine_for, visible_gpu
from cardiocaps.runtime.files import lock_folder, output_errors, remove_leftovers
from cardiocaps.runtime.program import Interrupted, print_line
from cardiocaps.runtime.quiet import quiet
from cardiocaps.training.run_folder import RunFolder


def run(
    exhibits: Sequence[Exhibit],
    config: TrainConfig,
    seeds: int,
    engine: Engine,
    out: Path,
    command: str,
    form: str = "corrected",
) -> None:
    """Run the jobs of these exhibits that are not finished yet, and write the exhibits to `out`/tables.

    Args:
        exhibits: for example some of EXHIBITS.
        config: settings that all jobs share.
        seeds: number of seeds for each system.
        engine: where the jobs run.
        command: command line that makes the exhibits; the index shows it.
        form: one of `plan.FORMS`.

    Raises:
        CardioCapsError: the settings, the data or the folder cannot be used; or some jobs failed.
    """
    quiet()
    exhibits = [exhibit.in_form(form) for exhibit in exhibits]
    for exhibit in exhibits:
        if config.split == "frames" and any("split" in SYSTEMS[key].settings for key in exhibit.systems):
            raise ConfigError(
                f"split is 'frames', which is a row of {exhibit.name} itself; expected auto, column or stratified"
            )
        if (reason := exhibit.why_not(config)) is not None:
            raise ConfigError(f"{exhibit.name}: {reason}")
    if engine.is_here:
        decide(config, visible_gpu())  # raises before anything is written if the device is missing
    share = engine.share(config)
    config = with_layout(config)
    target = config.regression_target or DATASETS[dataset_of(config)].target
    config = replace(config, regression_target=target)
    folder = ExperimentFolder(out)

    def job(key: str, seed: int) -> Job:
        own = configure(config, SYSTEMS[key], seed, folder.job(key, seed))
        return Job(SYSTEMS[key], seed, replace(own, threads=share.threads, progress=False), share.at_once)

    jobs = [job(key, seed) for key, seed in jobs_of(keys_of(exhibits, config.protocol), seeds)]
    folder.make()
    with lock_folder(folder.path):
        remove_leftovers(folder.path, folder.data, folder.tables)
        folder.claim(config)
        data, unusable = _prepare(jobs, config, folder, engine)
        finished = [job for job in jobs if is_finished(job.folder)]
        for one in jobs:
            remove_progress(one)
        left = [job for job in jobs if job not in finished and job.name not in unusable]
        pace = f"{count(share.at_once, 'job')} at a time, {count(share.threads, 'thread')} each"
        print_line(f"{count(len(jobs), 'job')}, {len(finished)} of them finished; {pace}")
        try:
            display = Display(len(left), bars=config.progress)
            with display.bars:
                errors = {**unusable, **run_jobs(left, share.at_once, display, engine)}
            exhibits, untested = _test(exhibits, jobs, config, folder, share.at_once, engine)
        except Interrupted as stop:
            raise Interrupted(stop.signum, "what was done is saved, and the same command goes on") from None
        _write(exhibits, jobs, errors, config, data, folder, command)
    print_line(f"tables and figures: {folder.tables}")
    errors = {**untested, **errors}
    if errors:
        failed = "".join(f"\n  {name}: {why}" for name, why in errors.items())
        raise CardioCapsError(f"{len(errors)} of {len(jobs)} jobs failed; the same command tries them again{failed}")


def _test(
    exhibits: Sequence[Exhibit],
    jobs: Sequence[Job],
    config: TrainConfig,
    folder: ExperimentFolder,
    at_once: int,
    engine: Engine,
) -> tuple[Sequence[Exhibit], Mapping[str, str]]:
    """The exhibits with the tests that some add to those of the finished jobs; and by a job's name why it failed them.

    These tests run on this machine, which may lack the GPUs and cores of an engine elsewhere.
    """
    finished = [job for job in jobs if is_finished(job.folder)]
    if not engine.is_here:
        finished = [replace(job, config=replace(job.config, device="auto", threads=None)) for job in finished]
        at_once = 1
    tested: list[Exhibit] = []
    errors: dict[str, str] = {}
    for exhibit in exhibits:
        more, failed = exhibit.tested(finished, folder, at_once, config.progress)
        tested.append(more)
        errors |= failed
    return tested, errors


def _prepare(
    jobs: Sequence[Job], config: TrainConfig, folder: ExperimentFolder, engine: Engine
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Read and decode the data of the jobs once.

    Returns:
        A sentence about the data of each protocol, split and phantom; and by the name of a job, why its data cannot be
        used.

    Raises:
        DataError: the data of the first job, which most jobs share, cannot be used or have changed since the first use.
    """
    said: dict[str, str] = {}
    refused: dict[str, CardioCapsError] = {}
    for job in jobs:
        if _data_of(job) not in {**said, **refused}:
            watched = replace(job.config, progress=config.progress)
            if not engine.is_here:  # this machine only reads and decodes, and may lack the GPUs of the others
                watched = replace(watched, device="cpu")
            try:
                with machine_for(watched) as machine:
                    study = read_study(watched)
                    before = folder.known_data(watched)
                    data = decode(watched, machine, study if before is None else before.as_used(study))
            except (ConfigError, DataError) as error:  # a data set other than EchoNet-LVH has no protocol of the paper
                if job is jobs[0]:
                    raise
                refused[_data_of(job)] = error
                continue
            folder.claim_data(watched, Fingerprint.of(study).with_contents(data.contents()))
            said[_data_of(job)] = _described(watched, data)
    return said, {job.name: str(refused[_data_of(job)]) for job in jobs if _data_of(job) in refused}


def _data_of(job: Job) -> str:
    """A key that is equal for jobs with the same data."""
    return ", ".join(f"{name} {getattr(job.config, name)}" for name in ("protocol", "split", *OF_PHANTOM))


def _described(config: TrainConfig, data: EchoDataModule) -> str:
    """A sentence about the data, without their path, which can contain names."""
    if config.data is None:
        about = f"{config.phantom_videos} videos, seed {config.phantom_seed}, {config.phantom_difficulty}"
        what = f"The synthetic phantom ({about}), no patients' data"
    else:
        what = DATASETS[dataset_of(config)].title
    parts = []
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        labels = data.labels(split) if config.splits_frames else [clip.label for clip in data.clips(split)]
        parts.append(f"{name} {len(labels)} {unit_of(config)}s, {int(sum(labels))} abnormal")
    rule = ", split by frame" if config.split == "frames" else ""
    return f"{what}; preset {config.preset}, protocol {config.protocol}{rule}: {'; '.join(parts)}."


def _write(
    exhibits: Sequence[Exhibit],
    jobs: Sequence[Job],
    errors: Mapping[str, str],
    config: TrainConfig,
    data: Mapping[str, str],
    folder: ExperimentFolder,
    command: str,
) -> None:
    """Write the exhibits from the finished jobs, and the index of all exhibits in the folder."""
    finished = [job for job in jobs if is_finished(job.folder)]

    def row(key: str) -> Row:
        own = [job for job in jobs if job.system.key == trained_as(key, config.protocol)]
        results = tuple(read_result(job.folder) for job in own if job in finished)
        why = {job.seed: _without_paths(errors[job.name], config, folder) for job in own if job.name in errors}
        failed = [f"seed {seed}: {error}" for seed, error in why.items()]
        return Row(key, SYSTEMS[key].title, results, "; ".join(failed) or None)

    with output_errors(folder.tables):
        folder.tables.mkdir(exist_ok=True)
    environments = {
        job.name: json.loads(RunFolder(job.folder).environment.read_text(encoding="utf-8")) for job in finished
    }
    truth = Truth.of(config)
    for exhibit in exhibits:
        keys = {trained_as(key, config.protocol) for key in exhibit.systems}
        own = [job for job in jobs if job.system.key in keys]
        write_exhibit(
            exhibit,
            [row(key) for key in exhibit.systems],
            folder.tables,
            data=_listed([data[_data_of(job)] for job in own if _data_of(job) in data]),
            bootstrap=config.bootstrap,
            environments=[environments[job.name] for job in own if job.name in environments],
            truth=truth,
        )
    written = [e for e in EXHIBITS.values() if e in exhibits or (folder.tables / f"{e.name}.csv").is_file()]
    write_index(
        written,
        folder.tables,
        data=next(iter(data.values())),
        commands=folder.remember(command),
        environments=list(environments.values()),
    )


def _listed(sentences: Sequence[str]) -> str:
    """Each sentence once: one as it is, several as a list."""
    different = list(dict.fromkeys(sentences))
    return different[0] if len(different) == 1 else "\n".join(f"* {sentence}" for sentence in different)


def _without_paths(text: str, config: TrainConfig, folder: ExperimentFolder) -> str:
    """An error text for tables, which are shown to others: paths are replaced, because they can identify the user."""
    places = {
        "OUT": folder.path,
        "DATA": config.data,
        "CACHE": config.cache_dir or default_folder(),
        "HOME": Path.home(),
    }
    for name, place in places.items():
        for form in () if place is None else (place.resolve(), place.absolute(), place):
            if len(form.parts) > 1:  # neither the root of the file system nor a bare name
                text = re.sub(rf"(?<![\w/.-]){re.escape(str(form))}(?![\w.-])", name, text)
    return text
