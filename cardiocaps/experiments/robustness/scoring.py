"""Scores trained systems on the shifted tests: predictions of every frame, and the features of every video.

For each test the phantom's videos are made and decoded once into a folder of their own. All systems are scored on
them, and then the folder is removed: videos and frames of all tests together would take gigabytes. What a system gave
in a test is one file in the folder of its job, which is also the folder of its run; training the job again removes it.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cardiocaps.config import TrainConfig
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.data.open import decode, read_study
from cardiocaps.errors import CardioCapsError, CheckpointError, ResourceError, printable
from cardiocaps.evaluation.pixel_baseline import PixelBaseline
from cardiocaps.evaluation.predictions import Predictions
from cardiocaps.evaluation.scores import predict
from cardiocaps.experiments.engines.process import PRELOAD
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.markdown import count
from cardiocaps.experiments.robustness.shifts import ShiftedTest, phantom_of
from cardiocaps.metrics import Floats
from cardiocaps.models.prediction import CLASSES, Prediction
from cardiocaps.phantom import write_phantom
from cardiocaps.phantom.dataset import VERSION
from cardiocaps.runtime.device import Machine, machine_for
from cardiocaps.runtime.files import output_errors, write_bytes
from cardiocaps.runtime.processes import die_with_parent, in_parallel
from cardiocaps.runtime.program import print_line
from cardiocaps.runtime.quiet import quiet
from cardiocaps.training.checkpoints import best_network
from cardiocaps.training.module import Classifier
from cardiocaps.training.run_folder import RunFolder


@dataclass(frozen=True)
class Scored:
    """What a trained system gave in a test.

    Attributes:
        test: the predictions, by frame.
        features: float64 [videos, d], means over the frames of each video, in the order of `test.samples("video")`;
            None for classifiers of pixels.
    """

    test: Predictions
    features: Floats | None


def file_of(job: Job, test: ShiftedTest) -> Path:
    """Where the scores of a job are, once it has been scored."""
    return RunFolder(job.folder).shifted / f"{test.name}.npz"


def score_all(
    jobs: Sequence[Job], tests: Sequence[ShiftedTest], folder: Path, at_once: int, progress: bool
) -> Mapping[str, str]:
    """Score finished jobs on the tests; what is scored already is not repeated.

    Args:
        jobs: of the same phantom.
        tests: to score.
        folder: for the videos and frames of one test at a time; it is removed at the end.
        at_once: jobs that are scored at a time.
        progress: show how many videos are made and decoded.

    Returns:
        Name of each job that could not be scored -> why.

    Raises:
        OutputError: as `write_phantom`.
        ResourceError: a process was killed.
    """
    left = {test: [job for job in jobs if not _is_scored(job, test)] for test in tests}
    done, total = 0, sum(map(len, left.values()))
    print_line(
        f"{count(len(tests), 'test')} of {count(len(jobs), 'job')}: {len(tests) * len(jobs) - total} done before"
    )
    errors: dict[str, str] = {}
    for test, waiting in left.items():
        if not waiting:
            continue
        place = folder / test.name
        _make(waiting[0], test, place, progress)
        for job, error in _scored(waiting, test, place, at_once):
            done += 1
            if error is not None:
                errors.setdefault(job.name, f"{test.name}: {error}")
            print_line(f"[{done}/{total}] {test.name}: {job.name}{'' if error is None else f'  failed: {error}'}")
        with output_errors(place):
            shutil.rmtree(place)
    if folder.is_dir():
        with output_errors(folder):
            shutil.rmtree(folder)
    return errors


def read_scores(job: Job, test: ShiftedTest) -> Scored:
    """The scores of a job.

    Raises:
        CheckpointError: there are none, they are of another phantom, or the file is damaged.
    """
    path = file_of(job, test)
    try:
        with np.load(path, allow_pickle=False) as content:
            if json.loads(str(content["about"])) != _about(job.config, test):
                raise CheckpointError(f"{printable(path)} is of another phantom")
            test_set = Predictions(
                content["probability"],
                content["label"],
                content["clip"],
                tuple(content["video"].tolist()),
                frame=content.get("frame"),
            )
            features = content["features"].astype(np.float64) if "features" in content else None
            if features is not None and len(features) != test_set.videos:
                raise ValueError(f"features has {len(features)} rows; expected {test_set.videos}")
            return Scored(test_set, features)
    except FileNotFoundError as error:
        raise CheckpointError(f"{printable(path)} does not exist") from error
    except CheckpointError:
        raise
    except Exception as error:  # a truncated archive can make zipfile and numpy raise almost any exception
        raise CheckpointError(f"{printable(path)} is damaged") from error


def _is_scored(job: Job, test: ShiftedTest) -> bool:
    """Whether the file of a job's scores can be read; a damaged one is made again."""
    try:
        read_scores(job, test)
    except CheckpointError:
        return False
    return True


def _about(config: TrainConfig, test: ShiftedTest) -> dict[str, Any]:
    """What the videos of a test depend on."""
    return {
        "version": VERSION,
        "videos": config.phantom_videos,
        "seed": config.phantom_seed,
        "test_videos": config.phantom_test,
        "difficulty": config.phantom_difficulty,
        "shift": dict(test.shift.changes()),
    }


def _make(job: Job, test: ShiftedTest, place: Path, progress: bool) -> None:
    """Make the videos of a test and decode them for all jobs."""
    config = job.config
    with output_errors(place):
        place.mkdir(parents=True, exist_ok=True)
    variant = phantom_of(config, test)
    write_phantom(place / "videos", config.phantom_videos, config.phantom_seed, progress=progress, variant=variant)
    reading = replace(_reading(config, place), progress=progress, device="cpu")
    with machine_for(reading) as machine:
        decode(reading, machine, read_study(reading, needed_splits=("test",)))


def _reading(config: TrainConfig, place: Path) -> TrainConfig:
    """The settings with which a job reads the videos of a test."""
    return replace(config, data=place / "videos", cache_dir=place / "frames")


def _scored(jobs: Sequence[Job], test: ShiftedTest, place: Path, at_once: int) -> Iterable[tuple[Job, str | None]]:
    """Score jobs, `at_once` at a time; yields each with its error."""
    work: Callable[[Job], str | None] = partial(_score, test=test, place=place)
    at_once = min(at_once, len(jobs))
    if at_once == 1:
        yield from ((job, work(job)) for job in jobs)
        return
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with ExitStack() as pool:
        try:
            yield from pool.enter_context(
                in_parallel(partial(ProcessPoolExecutor, at_once, context, die_with_parent), work, jobs)
            )
        except BrokenProcessPool as error:
            raise ResourceError(
                "a process that scores was killed (out of memory?); the same command goes on, with fewer --jobs it "
                "needs less memory"
            ) from error


def _score(job: Job, test: ShiftedTest, place: Path) -> str | None:
    """Score a job on the decoded videos of a test, and write its file; returns why it could not."""
    try:
        quiet()
        with machine_for(job.config) as machine:
            reading = _reading(job.config, place)
            data = decode(reading, machine, read_study(reading, needed_splits=("test",)))
            found = (
                _of_classifier(job, data) if "classifier" in job.system.settings else _of_network(job, machine, data)
            )
        _write(file_of(job, test), found, _about(job.config, test))
    except CardioCapsError as error:
        return str(error)
    return None


def _of_classifier(job: Job, data: EchoDataModule) -> Scored:
    run = RunFolder(job.folder)
    classifier = PixelBaseline.read(run.pixel_baseline)
    if classifier is None:
        raise CheckpointError(
            f"{printable(run.path)} has no {run.pixel_baseline.name}, because an older version fitted it; remove this "
            "folder, and the same command fits it again"
        )
    return Scored(classifier.predict(data, "test"), None)


def _of_network(job: Job, machine: Machine, data: EchoDataModule) -> Scored:
    network = best_network(job.config, RunFolder(job.folder), Classifier)
    parts: list[Tensor] = []
    hook = _record(network.model, parts)
    try:
        said = predict(job.config, machine, network, data, ("test",))["test"]
    finally:
        hook.remove()
    by_frame = torch.cat(parts)[: said.clip.size].double().numpy()  # the last batch is filled up
    names, index = np.unique(said.clip, return_inverse=True)
    features = np.zeros((names.size, by_frame.shape[1]))
    np.add.at(features, index, by_frame)
    return Scored(said, features / np.bincount(index)[:, None])


def _record(model: nn.Module, parts: list[Tensor]) -> torch.utils.hooks.RemovableHandle:
    """Append the features of every batch, float32 [B, d], to `parts`.

    The features of a capsule network are its class capsules, of another network the input of its last linear layer,
    which makes the logits.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if linear and linear[-1].out_features == CLASSES:
        return linear[-1].register_forward_pre_hook(lambda _, inputs: parts.append(inputs[0].detach().float().cpu()))

    def keep(_: nn.Module, __: Any, out: Prediction) -> None:
        assert out.capsules is not None
        parts.append(out.capsules.detach().flatten(1).float().cpu())

    return model.register_forward_hook(keep)


def _write(path: Path, found: Scored, about: Mapping[str, Any]) -> None:
    with output_errors(path):
        path.parent.mkdir(exist_ok=True)
    said = found.test
    content: dict[str, Any] = {
        "about": np.array(json.dumps(about)),
        "probability": said.probability,
        "label": said.label,
        "clip": said.clip,
        "video": np.array(said.video),
    }
    if said.frame is not None:
        content["frame"] = said.frame
    if found.features is not None:
        content["features"] = found.features.astype(np.float32)
    archive = io.BytesIO()
    np.savez_compressed(archive, **content)
    write_bytes(path, archive.getvalue())
