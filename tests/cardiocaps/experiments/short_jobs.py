"""Jobs of a few seconds. `python -m tests.cardiocaps.experiments.short_jobs DATA CACHE OUT` runs them on Ray."""

import sys
from pathlib import Path

from cardiocaps.config import TrainConfig
from cardiocaps.experiments.display import Display
from cardiocaps.experiments.folder import ExperimentFolder
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.plan import FIRST_SEED, SYSTEMS, configure
from cardiocaps.experiments.runner import run_jobs

KEYS = ("cnn-2", "logistic-regression-class-weight")


def short_jobs(data: Path, cache: Path, out: Path) -> list[Job]:
    """A network and a classifier of pixels; `out` becomes a folder of experiments."""
    config = TrainConfig(
        data=data, cache_dir=cache, epochs=2, frames_per_clip=4, seed=FIRST_SEED, threads=1, progress=False
    )
    folder = ExperimentFolder(out)
    folder.make()
    folder.claim(config)
    return [
        Job(SYSTEMS[key], FIRST_SEED, configure(config, SYSTEMS[key], FIRST_SEED, folder.job(key, FIRST_SEED)))
        for key in KEYS
    ]


if __name__ == "__main__":
    from cardiocaps.experiments.engines.ray import RayEngine

    with RayEngine.connected(None, 2, 1) as engine:
        run_jobs(short_jobs(*map(Path, sys.argv[1:])), 2, Display(2, bars=False), engine)
