"""Invented results, for tests of the tables."""

from dataclasses import replace
from typing import Any

import numpy as np

from cardiocaps.evaluation.predictions import Predictions
from cardiocaps.experiments.exhibits import EXHIBITS
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.results import Result
from cardiocaps.experiments.summaries import Row


def predictions(seed: int, skill: float = 1.5, videos: int = 40, frames: int = 4, first: int = 0) -> Predictions:
    """A quarter of the videos abnormal, with probabilities that know it the better the larger `skill`."""
    rng = np.random.default_rng(seed)
    video = np.repeat(np.arange(videos), frames)
    label = (video % 4 == 0).astype(np.int64)
    logit = rng.normal(size=videos)[video] + 0.3 * rng.normal(size=video.size) + skill * (label - 0.3)
    names = tuple(f"0X{first + number:04X}" for number in video)
    return Predictions(1 / (1 + np.exp(-logit)), label, video, names, np.tile(np.arange(frames), videos))


def result(system: str = "cardiocaps", seed: int = 10, skill: float = 1.5, **changed: Any) -> Result:
    values: dict[str, Any] = {
        "system": system,
        "seed": seed,
        "unit": "video",
        "validation": predictions(seed + 100, skill, first=1000),
        "test": predictions(seed, skill),
        "parameters": 123_456,
        "epochs": 20 + seed % 3,
        "best_epoch": 15,
        "seconds_per_epoch": 3.5 + seed % 3,
        "seconds": 70.25,
        "peak_memory": 300 * 2**20,
        "device": "cpu",
        "at_once": 1,
        "threads": 2,
    }
    return Result(**{**values, **changed})


def row(system: str, title: str, skill: float = 1.5, seeds: int = 3, error: str | None = None, **changed: Any) -> Row:
    return Row(system, title, tuple(result(system, 10 + k, skill, **changed) for k in range(seeds)), error)


def exhibit(name: str, rows: list[Row], title: str = "Table: networks") -> Exhibit:
    return replace(EXHIBITS[name], title=title, systems=tuple(r.system for r in rows))
