"""The systems that the exhibits compare, and the settings that each is trained with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from cardiocaps.config import TrainConfig
from cardiocaps.models import MODELS

MAIN = "cardiocaps"
"""The key of the system that the others are compared with."""

LAMBDAS = (1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.5, 1.0)
"""λ_reg of figure 6. 0.05 is the default, with which the system is CardioCaps itself."""

FIRST_SEED = 10
"""The paper's first seed."""

PAPER_CLIPS = 300
"""Number of rows of the table that the published code used."""

CLASSIFIERS = {"logistic-regression": "Logistic regression", "random-forest": "Random forest", "xgboost": "XGBoost"}
SAMPLINGS = {"oversampling": "oversampling", "undersampling": "undersampling", "class-weight": "class weight"}


@dataclass(frozen=True)
class System:
    """Something that classifies echocardiograms.

    Attributes:
        key: for example "resnet18".
        title: for readers.
        settings: what makes it: settings of TrainConfig, or `classifier` and `sampling` for
            `models.pixel_classifiers.fit`.
    """

    key: str
    title: str
    settings: Mapping[str, Any]


def _system(key: str, title: str, **settings: Any) -> System:
    return System(key, title, settings)


def lambda_key(value: float) -> str:
    return MAIN if value == TrainConfig.regression_weight else f"cardiocaps-lambda-{value:g}"


_SYSTEMS = (
    _system("cardiocaps", "CardioCaps (attention, new loss)"),
    _system("dr", "DR-CapsNet, new loss", routing="dynamic"),
    _system("dr-margin", "DR-CapsNet, margin loss", routing="dynamic", class_weight="none", regression_weight=0.0),
    _system("dr-weighted-margin", "DR-CapsNet, weighted margin loss", routing="dynamic", regression_weight=0.0),
    _system("cardiocaps-convolution", "CardioCaps, convolutional affine map", affine="convolution"),
    _system("cardiocaps-constant", "CardioCaps, constant affine map", affine="constant"),
    *(
        _system(f"{classifier}-{sampling}", f"{name}, {how}", classifier=classifier, sampling=sampling)
        for (classifier, name), (sampling, how) in product(CLASSIFIERS.items(), SAMPLINGS.items())
    ),
    *(
        _system(model, MODELS[model].title, model=model)
        for model in ("cnn-1", "cnn-2", "resnet18", "unet", "vit", "em-capsnet", "efficient-capsnet")
    ),
    *(
        _system(lambda_key(value), f"CardioCaps, λ_reg = {value:g}", regression_weight=value)
        for value in LAMBDAS
        if value != TrainConfig.regression_weight
    ),
    _system("cardiocaps-video-protocol", "CardioCaps, split by video", protocol="video"),
    _system("cardiocaps-frames", "CardioCaps, the same, split by frame", protocol="video", split="frames"),
    _system("cardiocaps-paper-protocol", "CardioCaps, the paper's protocol", protocol="paper"),
    _system("dr-naive", "DR-CapsNet, naive dynamic routing", routing="dynamic", backend="reference"),
    _system("cardiocaps-naive", "CardioCaps, naive attention", backend="reference"),
)
SYSTEMS: Mapping[str, System] = {system.key: system for system in _SYSTEMS}


def trained_as(key: str, protocol: str) -> str:
    """The key under which a system is trained: CardioCaps in the protocol of all others is CardioCaps itself."""
    return MAIN if key == f"cardiocaps-{protocol}-protocol" else key


def configure(base: TrainConfig, system: System, seed: int, folder: Path) -> TrainConfig:
    """The resolved settings of a job: those of the experiment with the system's own, its seed and its folder."""
    own = {name: value for name, value in system.settings.items() if name not in ("classifier", "sampling")}
    if own.get("protocol") == "paper" and base.protocol == "video":
        # The phantom's table is too short for the rows that the published code used.
        own |= {"split": "auto", "limit": PAPER_CLIPS if base.limit is None else base.limit}
    return replace(base, **own, seed=seed, split_seed=base.seed, out=folder).resolved()
