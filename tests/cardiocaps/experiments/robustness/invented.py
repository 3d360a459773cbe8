"""Invented scores of systems on shifted tests, in the files that scoring leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cardiocaps.config import TrainConfig
from cardiocaps.evaluation.predictions import Predictions
from cardiocaps.experiments.folder import ExperimentFolder
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.plan import SYSTEMS, configure
from cardiocaps.experiments.results import Result
from cardiocaps.experiments.robustness import scoring
from cardiocaps.experiments.robustness.scoring import Scored
from cardiocaps.experiments.robustness.shifts import UNSHIFTED, ShiftedTest, phantom_of
from cardiocaps.phantom.patients import plan
from tests.cardiocaps.experiments import invented

FRAMES = 2


def config(tests: int = 40, bootstrap: int = 40) -> TrainConfig:
    return TrainConfig(phantom_videos=tests + 40, phantom_test=tests, seed=10, bootstrap=bootstrap)


def predictions(base: TrainConfig, rng: np.random.Generator, skill: float) -> Predictions:
    """Of the test patients of the phantom: the better the larger `skill`."""
    patients = plan(base.phantom_videos, base.phantom_seed, phantom_of(base, UNSHIFTED))
    clip = np.repeat(np.arange(len(patients)), FRAMES)
    label = np.array([int(patient.abnormal) for patient in patients])[clip]
    logit = rng.normal(size=len(patients))[clip] + skill * (label - 0.3) + 0.1 * rng.normal(size=clip.size)
    return Predictions(1 / (1 + np.exp(-logit)), label, clip, tuple(patients[i].name for i in clip))


def scored_jobs(
    out: Path, skills: Mapping[str, float], tests: Sequence[ShiftedTest], base: TrainConfig, seeds: int = 2
) -> tuple[list[Job], dict[str, list[Result]]]:
    """Jobs whose scores lie in their folders, and their results on the unshifted test.

    The skill of a system falls with the size of the shift. Networks have features of which some know the angle.
    """
    folder, jobs, results = ExperimentFolder(out), [], {}
    for number, (key, skill) in enumerate(skills.items()):
        results[key] = []
        for seed in range(10, 10 + seeds):
            own = configure(base, SYSTEMS[key], seed, folder.job(key, seed))
            job = Job(SYSTEMS[key], seed, own)
            job.folder.mkdir(parents=True)
            hearts = np.random.default_rng([number, seed]).normal(size=(base.phantom_test or 0, 12))
            for k, test in enumerate(tests):
                rng = np.random.default_rng([number, seed, k])
                size = abs(test.size) / 30 if test.axis == "angle" else 0.2 * (test != UNSHIFTED)
                said = predictions(base, rng, skill * (1 - 0.6 * size))
                features = None
                if "classifier" not in job.system.settings:
                    features = hearts + rng.normal(size=hearts.shape) * 0.3
                    features[:, :3] += size * skill
                scoring._write(scoring.file_of(job, test), Scored(said, features), scoring._about(own, test))
                if test == UNSHIFTED:
                    results[key].append(_result(key, seed, said, skill))
            jobs.append(job)
    return jobs, results


def score_or_die(job: Job, test: ShiftedTest, place: Path) -> None:
    """Stands for `scoring._score`: kills its process when it first comes to the last seed and a shifted test."""
    killed = place / "killed"
    if test != UNSHIFTED and job.seed == 12 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    said = predictions(job.config, np.random.default_rng(job.seed), 1.0)
    scoring._write(scoring.file_of(job, test), Scored(said, None), scoring._about(job.config, test))


def _result(key: str, seed: int, test: Predictions, skill: float) -> Result:
    changed: dict[str, Any] = {"seconds_per_epoch": 2.0 + skill + 0.1 * (seed % 3)}
    return replace(invented.result(key, seed, skill), test=test, **changed)
