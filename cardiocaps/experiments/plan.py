"""Which systems there are, and which of them each table and figure of the paper compares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from cardiocaps.config import TrainConfig
from cardiocaps.experiments.exhibits import Exhibit, System

LAMBDAS = (1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.5, 1.0)
"""λ_reg of figure 6. 0.05 is the default: CardioCaps itself."""

FIRST_SEED = 10
"""The paper's."""

PAPER_CLIPS = 300
"""Rows of the table that the published code used."""

CLASSIFIERS = {"logistic-regression": "Logistic regression", "random-forest": "Random forest", "xgboost": "XGBoost"}
SAMPLINGS = {"oversampling": "oversampling", "undersampling": "undersampling", "class-weight": "class weight"}


def _system(key: str, title: str, **settings: Any) -> System:
    return System(key, title, settings)


def _lambda_key(value: float) -> str:
    return "cardiocaps" if value == TrainConfig.regression_weight else f"cardiocaps-lambda-{value:g}"


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
    _system("cnn-1", "CNN-(1)", model="cnn-1"),
    _system("cnn-2", "CNN-(2)", model="cnn-2"),
    _system("resnet18", "ResNet18", model="resnet18"),
    _system("unet", "U-Net", model="unet"),
    _system("vit", "ViT", model="vit"),
    _system("em-capsnet", "EM-CapsNet", model="em-capsnet"),
    _system("efficient-capsnet", "Efficient-CapsNet", model="efficient-capsnet"),
    *(
        _system(_lambda_key(value), f"CardioCaps, λ_reg = {value:g}", regression_weight=value)
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

_TABLE_1 = ("dr-margin", "dr-weighted-margin", "dr")
_TABLE_2 = ("dr-margin", "dr", "cardiocaps")
_TABLE_3 = ("cardiocaps", "cardiocaps-convolution", "cardiocaps-constant")
_TABLE_4 = (*(f"{classifier}-{sampling}" for classifier, sampling in product(CLASSIFIERS, SAMPLINGS)), "cardiocaps")
_TABLE_5 = ("cnn-1", "cnn-2", "resnet18", "unet", "vit", "cardiocaps")
_TABLE_6 = ("em-capsnet", "efficient-capsnet", "cardiocaps")
_MAIN = ("logistic-regression-class-weight", "random-forest-class-weight", "xgboost-class-weight")

_EXHIBITS = (
    Exhibit("table1", "Table I: the loss of DR-CapsNet", _TABLE_1),
    Exhibit("table2", "Table II: dynamic routing and attention", _TABLE_2),
    Exhibit("table3", "Table III: the affine map", _TABLE_3),
    Exhibit("table4", "Table IV: machine learning on pixels", _TABLE_4),
    Exhibit("table5", "Table V: other deep networks", _TABLE_5),
    Exhibit("table6", "Table VI: other capsule networks", _TABLE_6),
    Exhibit("fig3", "Figure 3: confusion matrices of table I", _TABLE_1),
    Exhibit("fig4", "Figure 4: confusion matrices of table II", _TABLE_2),
    Exhibit("fig5", "Figure 5: confusion matrices of table III", _TABLE_3),
    Exhibit("fig6", "Figure 6: the weight of the regression loss", tuple(_lambda_key(value) for value in LAMBDAS)),
    Exhibit(
        "leakage",
        "Split by video and by frame",
        ("cardiocaps-video-protocol", "cardiocaps-frames", "cardiocaps-paper-protocol"),
    ),
    Exhibit("efficiency", "Naive and fused routing", ("dr-naive", "dr", "cardiocaps-naive", "cardiocaps")),
    Exhibit("calibration", "Calibration", (*_MAIN, *_TABLE_5[:-1], *_TABLE_6[:-1], "dr", "cardiocaps")),
)
EXHIBITS: Mapping[str, Exhibit] = {exhibit.name: exhibit for exhibit in _EXHIBITS}


def trained_as(key: str, protocol: str) -> str:
    """The key under which a system is trained: under its own protocol, CardioCaps is CardioCaps."""
    return "cardiocaps" if key == f"cardiocaps-{protocol}-protocol" else key


def keys_of(exhibits: Iterable[Exhibit], protocol: str) -> list[str]:
    """The systems to train for these, each once, CardioCaps first."""
    keys = dict.fromkeys(trained_as(key, protocol) for exhibit in exhibits for key in exhibit.systems)
    return sorted(keys, key=list(SYSTEMS).index)


def configure(base: TrainConfig, system: System, seed: int, folder: Path) -> TrainConfig:
    """The resolved settings of one job: those of the whole experiment, the system's own, its seed and its folder."""
    own = {name: value for name, value in system.settings.items() if name not in ("classifier", "sampling")}
    if own.get("protocol") == "paper" and base.protocol == "video":
        # The phantom's table is not long enough for the published code's own rows.
        own |= {"split": "auto", "limit": PAPER_CLIPS if base.limit is None else base.limit}
    return replace(base, **own, seed=seed, split_seed=base.seed, out=folder).resolved()
