"""Jobs of a few seconds. `python -m tests.cardiocaps.experiments.short_jobs table5 …` is the program of the experiments
with a table that compares them."""

import sys
from dataclasses import replace
from pathlib import Path

from cardiocaps.config import TrainConfig
from cardiocaps.experiments import __main__ as program
from cardiocaps.experiments.exhibits import EXHIBITS
from cardiocaps.experiments.folder import ExperimentFolder
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.plan import FIRST_SEED, SYSTEMS, configure

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


def command(data: Path, cache: Path, out: Path) -> list[str]:
    """The arguments with which the program runs the same jobs."""
    options = {"--data": data, "--cache-dir": cache, "--epochs": 2, "--frames-per-clip": 4, "--threads": 1}
    options |= {"--seeds": 1, "--bootstrap": 0, "--jobs": 2, "--out": out}
    return ["table5", "--no-progress", *(str(part) for option in options.items() for part in option)]


if __name__ == "__main__":
    import tests.cardiocaps.empty_figures  # noqa: F401

    EXHIBITS["table5"] = replace(EXHIBITS["table5"], systems=KEYS)
    sys.exit(program.main())
