"""The systems that the exhibits compare, and the settings that each is trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from cardiocaps.config import TrainConfig
from cardiocaps.config.option import shown
from cardiocaps.errors import ConfigError
from cardiocaps.models import MODELS

MAIN = "cardiocaps"
"""The key of the system that the others are compared with."""

LAMBDAS = (1e-4, 1e-3, 1e-2, 0.05, 0.1, 0.5, 1.0)
"""λ_reg of figure 6. 0.05 is the default, with which the system is CardioCaps itself."""

FIRST_SEED = 10
"""The paper's first seed."""

PUBLISHED_SEEDS = (10, 1225)
"""The two seeds of the published code, of the rows in its form. Their population deviation is the paper's ±."""

FORMS = ("corrected", "published", "both")
"""The rows of tables I to VI and figures 3 to 5: ours, those as published, or each with the other below it."""

PAPER_CLIPS = 300
"""Number of rows of the table that the published code used."""

_PUBLISHED_BATCH = 16
"""Of the networks that CardioCaps is compared with, in the published code."""

PHANTOM: Mapping[str, Any] = {"phantom_videos": 682, "phantom_test": 300, "phantom_dir": Path("phantom-test300")}
"""The phantom of an experiment that names none: 300 videos for training, 82 for validation, and a test of 300.

With the 90 test videos of a single training's phantom the intervals are wider than the differences between systems.
"""

TRAINING_VIDEOS: Mapping[int, int] = {75: 395, 150: 491, 300: 682, 600: 1064}
"""Training videos of the learning curve -> `phantom_videos` that give them, with the 300 test videos of PHANTOM."""

PREVALENCES = (0.5, 0.2, 0.1, 0.05, 0.02)
"""Shares of abnormal videos in training and validation. The test keeps its 20 %."""

OF_PHANTOM = ("phantom_videos", "phantom_abnormal")
"""Settings of a system that is trained on another phantom than the experiment's, with the same test videos."""

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
        note: what a reader of its row should know; "" for nothing.
    """

    key: str
    title: str
    settings: Mapping[str, Any]
    note: str = ""


def _system(key: str, title: str, note: str = "", **settings: Any) -> System:
    return System(key, title, settings, note)


_CONSTANT = (
    "votes are ones, which are not learned; each capsule weighs 2 / N after its coupling. In a test of two shapes of "
    "the same brightness (300 steps) this network decides 98 % right at preset tiny. With 50,176 capsules, as at "
    "preset small, it ranked the images (AUROC 0.92) and still gave all of them one class: nothing but the couplings "
    "tells the classes apart, and they follow the image slowly. With votes of 2 / N, an earlier form, the couplings "
    "hardly depend on the image, and all images got one class at preset tiny too"
)


def lambda_key(value: float) -> str:
    return MAIN if value == TrainConfig.regression_weight else f"cardiocaps-lambda-{value:g}"


def training_key(key: str, videos: int) -> str:
    """The key of a system that is trained on this number of videos, one of TRAINING_VIDEOS."""
    return key if TRAINING_VIDEOS[videos] == PHANTOM["phantom_videos"] else f"{key}-{videos}-videos"


def prevalence_key(key: str, share: float) -> str:
    """The key of a system that is trained with this share of abnormal videos, one of PREVALENCES."""
    return key if share == TrainConfig.phantom_abnormal else f"{key}-abnormal-{share:g}"


_SYSTEMS = (
    _system("cardiocaps", "CardioCaps (attention, new loss)"),
    _system("dr", "DR-CapsNet, new loss", routing="dynamic"),
    _system("dr-margin", "DR-CapsNet, margin loss", routing="dynamic", class_weight="none", regression_weight=0.0),
    _system("dr-weighted-margin", "DR-CapsNet, weighted margin loss", routing="dynamic", regression_weight=0.0),
    _system("cardiocaps-convolution", "CardioCaps, convolutional affine map", affine="convolution"),
    _system("cardiocaps-constant", "CardioCaps, constant affine map", _CONSTANT, affine="constant"),
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

LEARNING_CURVE = ("cardiocaps", "resnet18", "cnn-2", "logistic-regression-class-weight")
"""The systems that are trained on each number of TRAINING_VIDEOS."""

PREVALENCE = ("cardiocaps", "dr-margin", "dr-weighted-margin", "resnet18", "cnn-2", "efficient-capsnet")
"""The systems that are trained with each of PREVALENCES."""


def _on_other_phantoms() -> Iterator[System]:
    """The systems of the learning curve and of the prevalences that are trained on another phantom."""
    known = {system.key: system for system in _SYSTEMS}
    for videos, key in product(TRAINING_VIDEOS, LEARNING_CURVE):
        if training_key(key, videos) != key:
            settings = {**known[key].settings, "phantom_videos": TRAINING_VIDEOS[videos]}
            yield System(training_key(key, videos), f"{known[key].title}, {videos} training videos", settings)
    for share, key in product(PREVALENCES, PREVALENCE):
        if prevalence_key(key, share) != key:
            settings = {**known[key].settings, "phantom_abnormal": share}
            title = f"{known[key].title}, {share:.0%} abnormal".replace("%", " %")
            yield System(prevalence_key(key, share), title, settings)


_OF_PUBLISHED = "-published"

_KEPT = (
    "as the published code has it but for what every row shares: views drawn anew in each epoch, early stopping by the "
    "whole validation loss, and the test in evaluation mode"
)
_CAPSULES = {"primary_layout": "legacy", "decoder_mask": "predicted"}
_OWN_OF_PUBLISHED: Mapping[str, tuple[Mapping[str, Any], str]] = {
    "cardiocaps-convolution": (_CAPSULES, "; the map has 4 parameters"),
    "cardiocaps-constant": (
        _CAPSULES,
        "; votes are 0.01 (the paper says 1). At the paper's size both class capsules start at a length of 0.9998, "
        "where the squash has hardly a gradient, and the couplings vary by 1e-7: this row cannot learn there",
    ),
    "resnet18": ({}, "; the network is the corrected one"),
    "vit": ({}, "; the network is the corrected one (74,402 parameters at the paper's size, there 20,306)"),
    "unet": (
        {},
        "; ReLU on the logits: with 27 of 40 seeds one of them is 0 for every image from the start, and stays so",
    ),
    "em-capsnet": (
        {"class_weight": "none", "renormalise": True},
        "; the loss is not weighted, whatever the paper says, and its margin grows as in the corrected row",
    ),
    "efficient-capsnet": (
        {"class_weight": "none", "decoder_mask": "predicted"},
        "; the loss is not weighted, whatever the paper says. Here the network is trained: the optimiser of the "
        "published code holds the parameters of another one",
    ),
}
"""System -> the settings beside `form` that make its published form, and what its note adds."""


def _published(system: System) -> System:
    if "classifier" in system.settings:
        own: Mapping[str, Any] = {}
        more = "; pixels are 32×32 grey ones in place of all 589,824 numbers of the input"
    else:
        usual = _CAPSULES if "model" not in system.settings else {}
        own, more = _OWN_OF_PUBLISHED.get(system.key, (usual, ""))
    settings = {**system.settings, **own, "form": "published"}
    return System(system.key + _OF_PUBLISHED, f"{system.title}, as published", settings, _KEPT + more)


def in_form(keys: Sequence[str], form: str) -> tuple[str, ...]:
    """The keys of an exhibit's systems in one of FORMS."""
    forms = {"corrected": ("",), "published": (_OF_PUBLISHED,), "both": ("", _OF_PUBLISHED)}[form]
    return tuple(key + ending for key in keys for ending in forms)


def corrected_key(key: str) -> str:
    """The key of the system whose published form `key` is, or `key` itself."""
    return key.removesuffix(_OF_PUBLISHED)


def jobs_of(keys: Sequence[str], seeds: int) -> list[tuple[str, int]]:
    """The systems with their seeds, seed by seed, so that an early stop leaves all of them with the first ones."""
    pairs = [
        (nth, number, key, seed)
        for number, key in enumerate(keys)
        for nth, seed in enumerate(
            PUBLISHED_SEEDS if key.endswith(_OF_PUBLISHED) else range(FIRST_SEED, FIRST_SEED + seeds)
        )
    ]
    return [(key, seed) for *_, key, seed in sorted(pairs)]


_TABLED = (
    "cardiocaps",
    "dr",
    "dr-margin",
    "dr-weighted-margin",
    "cardiocaps-convolution",
    "cardiocaps-constant",
    *(f"{classifier}-{sampling}" for classifier, sampling in product(CLASSIFIERS, SAMPLINGS)),
    "cnn-1",
    "cnn-2",
    "resnet18",
    "unet",
    "vit",
    "em-capsnet",
    "efficient-capsnet",
)
"""The systems of tables I to VI."""

SYSTEMS: Mapping[str, System] = {
    **{system.key: system for system in (*_SYSTEMS, *_on_other_phantoms())},
    **{published.key: published for published in (_published(system) for system in _SYSTEMS if system.key in _TABLED)},
}


def trained_as(key: str, protocol: str) -> str:
    """The key under which a system is trained: CardioCaps in the protocol of all others is CardioCaps itself."""
    return MAIN if key == f"cardiocaps-{protocol}-protocol" else key


def why_not(base: TrainConfig, system: System) -> str | None:
    """Why a system that needs another phantom cannot be trained in an experiment with these settings; None: it can.

    Its phantom has the test videos of the experiment's only if their number is given and the table's split is kept.
    """
    if not any(name in system.settings for name in OF_PHANTOM):
        return None
    required: dict[str, Any] = {"data": None}
    if base.data is None:
        required |= {"protocol": "video", "limit": None, "phantom_abnormal": TrainConfig.phantom_abnormal}
        if "phantom_videos" in system.settings:
            required |= {name: PHANTOM[name] for name in ("phantom_videos", "phantom_test")}
    given = {name: getattr(base, name) for name in required}
    wrong = [
        f"{name} is {shown(given[name])}; expected {'null' if value is None else value}"
        for name, value in required.items()
        if given[name] != value
    ]
    if base.data is None:
        if base.phantom_test is None and "phantom_test" not in required:
            wrong.append("phantom_test is None; expected a number of test videos")
        if base.split not in ("auto", "column"):
            wrong.append(f"split is {base.split!r}; expected auto or column")
    if not wrong:
        return None
    return f"{', and '.join(wrong)}: its systems are trained on several phantoms, which share the test videos"


def _phantom_of(base: TrainConfig, own: Mapping[str, Any]) -> Path:
    """The folder of a system's phantom, beside that of the experiment."""
    parts = [f"{name.removeprefix('phantom_')}{own[name]:g}" for name in OF_PHANTOM if name in own]
    return Path("-".join([str(base.phantom_dir), *parts]))


def configure(base: TrainConfig, system: System, seed: int, folder: Path) -> TrainConfig:
    """The resolved settings of a job: those of the experiment with the system's own, its seed and its folder.

    Raises:
        ConfigError: the system cannot be trained in this experiment; see `why_not`.
    """
    if (reason := why_not(base, system)) is not None:
        raise ConfigError(f"{system.key}: {reason}")
    own = {name: value for name, value in system.settings.items() if name not in ("classifier", "sampling")}
    if own.get("form") == "published" and "model" in own and base.preset == "paper" and base.batch_size is None:
        own["batch_size"] = _PUBLISHED_BATCH
    if own.get("protocol") == "paper" and base.protocol == "video":
        # The phantom's table is too short for the rows that the published code used.
        own |= {"split": "auto", "limit": PAPER_CLIPS if base.limit is None else base.limit}
    if any(name in own for name in OF_PHANTOM):
        own["phantom_dir"] = _phantom_of(base, own)
    return replace(base, **own, seed=seed, split_seed=base.seed, out=folder).resolved()
