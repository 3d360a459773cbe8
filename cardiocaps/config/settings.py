"""Every setting of a training run, declared once: the command line, YAML files and run folders read `TrainConfig`."""
# ruff: noqa: RUF009  (`setting` is a field, not a shared default)

import os
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from cardiocaps.config.option import Affects, Option, path_text, setting, shown
from cardiocaps.config.presets import PRESETS, TRAINING_DEFAULTS, Preset
from cardiocaps.errors import ConfigError

TRAINABLE_PHANTOM = 18
"""Fewest videos of a new phantom: with fewer, a split has no abnormal ones. (Older versions made smaller phantoms.)"""

PAPER_FRAMES = 50
"""Frames that the published code took from the beginning of each video."""

_SECTIONS = {
    "data": "data",
    "preset": "model",
    "class_weight": "loss",
    "init": "training",
    "device": "machine",
    "out": "run",
}
"""Sections of the help, by the setting that each begins with."""

_OF_MODEL = {"cardiocaps": ("routing", "affine", "primary_layout"), "em-capsnet": ("renormalise",)}
"""Settings that one model alone has."""

_CAPSULE_NETWORKS = ("cardiocaps", "em-capsnet", "efficient-capsnet")

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
"""The names in the setting `logger`."""

OF_TABLE = ("table", "path_column", "label_column", "positive", "target_column", "abnormal", "split_column")
"""Settings that say how any table of videos is read."""

_OF_LABELS = ("label_column", "positive", "abnormal", "threshold")
"""Settings that say what the labels are."""

_SEEDS = (0, 2**32 - 1)

_Model = Literal["cardiocaps", "em-capsnet", "efficient-capsnet", "cnn-1", "cnn-2", "resnet18", "unet", "vit"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    All values are checked whenever a configuration is made; ConfigError names the setting, its value and what is
    allowed. For a setting that is None, the preset decides (see `resolved`), or its help gives the meaning.
    """

    data: Path | None = setting(
        None, "folder of the data set, or a table of videos (.csv, .parquet); none: the phantom", affects="machine"
    )
    dataset: Literal["auto", "echonet-lvh", "echonet-dynamic", "echonet-pediatric", "table"] = setting(
        "auto",
        "layout of the data; auto: recognised by its files; table: a row for each video; the phantom has that of "
        "echonet-lvh",
    )
    view: Literal["A4C", "PSAX", "both"] = setting(
        "A4C", "of echonet-pediatric: the view, apical or parasternal, or both"
    )
    val_fold: int = setting(8, "of echonet-pediatric: fold for validation", bounds=(0, 9))
    test_fold: int = setting(9, "of echonet-pediatric: fold for the test; the others are trained on", bounds=(0, 9))
    table: str | None = setting(None, "name of a table in the data folder, which is then read as data set table")
    path_column: str | None = setting(
        None, "of a table: column with the videos' paths, relative to the table; none: path"
    )
    label_column: str | None = setting(
        None,
        "of a table: column with the labels, 0 or 1 (abnormal), or two words; none: label, if no threshold is given",
    )
    positive: str | None = setting(None, "of a table: the word that means abnormal")
    target_column: str | None = setting(
        None, "of a table: column with the numbers that are regressed, or COLUMN:UNIT; none: nothing is regressed"
    )
    abnormal: Literal["below", "above"] | None = setting(
        None, "of a table with a threshold: whether values below it are abnormal, or those from it on"
    )
    split_column: str | None = setting(
        None, "of a table: column with the splits (train, val, test); none: split, if present"
    )
    phantom_videos: int = setting(
        300,
        f"videos of the phantom, which is used without --data; a new phantom needs at least {TRAINABLE_PHANTOM}",
        bounds=(10, 100_000),
    )
    phantom_seed: int = setting(10, "seed of the phantom", bounds=_SEEDS)
    phantom_difficulty: Literal["easy", "moderate", "hard"] = setting(
        "easy",
        "difficulty of the phantom; moderate, hard: hearts near the thresholds, readers that err, several machines and "
        "poor images",
    )
    phantom_test: int | None = setting(
        None,
        "test videos of the phantom, which stay the same if phantom_videos changes; none: 30 % of its videos",
        bounds=(10, 100_000),
    )
    phantom_abnormal: float = setting(
        0.2,
        "share of abnormal videos in the phantom's training and validation; other values need phantom_test",
        bounds=(0.01, 0.99),
    )
    phantom_dir: Path = setting(
        Path("phantom"), "folder that the phantom is written to and read from", affects="machine"
    )
    cache_dir: Path | None = setting(
        None, "folder for decoded frames; none: $CARDIOCAPS_CACHE or ~/.cache/cardiocaps", affects="machine"
    )
    protocol: Literal["video", "paper"] = setting(
        "video",
        "video: one label per video, split by video; paper (echonet-lvh alone): one per row of the table, the first 50 "
        "frames, split by frame with equal shares of the classes, which leaks",
    )
    split: Literal["auto", "column", "stratified", "frames"] = setting(
        "auto",
        "column: the data set's own; stratified: drawn with equal shares of the classes; auto: the column if there is "
        "one, else stratified; frames: drawn from the frames of all videos, which leaks",
    )
    split_seed: int | None = setting(None, "seed of a split that is drawn; none: the seed of the run", bounds=_SEEDS)
    group_column: str | None = setting(
        None,
        "column of the table with the patient; none: PatientID, patient_id, Patient, subject, study or StudyID, if "
        "present",
    )
    allow_split_patients: bool = setting(
        False, "keep the data set's own split even if videos of one patient are in several splits"
    )
    threshold: Mapping[str, float] | None = setting(
        None,
        "threshold of a measurement in the label rule, may be repeated for others; echonet-lvh: smallest abnormal "
        "length in cm (IVSd=1.2); echonet-dynamic, echonet-pediatric: smallest normal ejection fraction in percent "
        "(ef=45); table: of the target column (NAME=X), see abnormal; none: as published",
        bounds=(-1e9, 1e9),
    )
    follow_links: bool = setting(False, "follow links that lead out of the data folder", affects="machine")
    frames_per_clip: int | None = setting(
        None, "frames taken from a video; none: the preset's, or 50 in the paper protocol", bounds=(1, 10_000)
    )
    frame_choice: Literal["spread", "first"] | None = setting(
        None, "frames spread evenly over the video, or its first; none: first in the paper protocol, else spread"
    )
    limit: int | None = setting(
        None, "use only this many clips, keeping the shares of splits and classes; none: all", bounds=(1, 10**9)
    )
    max_bad_share: float = setting(0.05, "share of unusable videos above which the run stops", bounds=(0, 1))

    preset: Literal["tiny", "small", "paper"] = setting("tiny", "size of the network and its training")
    model: _Model = setting(
        "cardiocaps", "the network: CardioCaps, or one that the paper compares it with", affects="shape"
    )
    form: Literal["corrected", "published"] = setting(
        "corrected",
        "published: network and loss as in the code published with the paper, where it differs (docs/experiments.md)",
        affects="shape",
    )
    task: Literal["both", "classification", "regression"] = setting(
        "both",
        "what is learned; both: the label, and the regression target if the data have one; classification: the label "
        "alone; regression (model cardiocaps): the target alone, of data that need no labels",
    )
    routing: Literal["attention", "dynamic", "uniform"] = setting(
        "attention", "routing algorithm of CardioCaps", affects="shape"
    )
    affine: Literal["matrices", "convolution", "constant"] = setting(
        "matrices",
        "votes of CardioCaps: from learned matrices, from one 1x1 convolution for all capsules, or from one constant",
        affects="shape",
    )
    iterations: int = setting(3, "iterations of dynamic and EM routing", affects="shape", bounds=(1, 10))
    renormalise: bool = setting(
        False,
        "EM routing as some implementations have it: activations do not weigh the votes (model em-capsnet)",
        affects="shape",
    )
    primary_layout: Literal["channels", "legacy"] = setting(
        "channels",
        "capsules of CardioCaps: channels: the neurons of one location; legacy: as in the published code",
        affects="shape",
    )
    decoder_mask: Literal["label", "predicted"] = setting("label", "class capsule that the decoder sees in training")

    class_weight: Literal["balanced", "proportion", "none"] = setting(
        "balanced",
        "weight of a class: n / (2 n_c) for its samples; proportion: p_c = n_c / n, in a margin loss for its capsule "
        "(eq. 2 as it is printed); or one",
    )
    reconstruction_weight: float = setting(
        0.0005, "weight of the squared error of the reconstruction, summed over an image", bounds=(0, 1000)
    )
    regression_weight: float = setting(0.05, "weight of the regression loss (lambda_reg of eq. 2)", bounds=(0, 1000))
    regression_target: str | None = setting(
        None,
        "what is regressed: echonet-lvh: width (of the left ventricle, cm) or ef (ejection fraction, percent); "
        "echonet-dynamic: ef, esv or edv (volumes in mL); echonet-pediatric: ef; table: the target column; none: the "
        "first of these",
        affects="shape",
    )

    init: Path | None = setting(
        None,
        "start from the weights of a run's best network, of a folder with config.json and model.safetensors, or of a "
        ".safetensors file, as far as names and shapes fit",
    )
    freeze: Literal["primary", "backbone"] | None = setting(
        None,
        "weights of init that are not trained; primary (capsule networks): all before the routing; backbone (the other "
        "networks): all but the classifier",
    )
    batch_size: int | None = setting(
        None,
        "frames in a batch, from which one step is made, over all processes of the training; none: the preset's",
        bounds=(1, 65_536),
    )
    accumulate: int = setting(
        1,
        "parts of a batch that each process computes one after another, which takes less memory; only networks with "
        "batch normalisation then compute other numbers",
        bounds=(1, 65_536),
    )
    clip: float | None = setting(
        None, "largest norm of a batch's gradient; a longer one is shortened to it", bounds=(1e-9, 1e9)
    )
    learning_rate: float | None = setting(None, "learning rate of Adam; none: the preset's", bounds=(1e-9, 1))
    epochs: int | None = setting(None, "most epochs; none: the preset's", affects="length", bounds=(1, 100_000))
    patience: int | None = setting(
        None,
        "epochs without a better validation loss before training stops; none: the preset's",
        affects="length",
        bounds=(1, 100_000),
    )
    seed: int = setting(10, "seed of weights, order and augmentation", bounds=_SEEDS)

    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "auto: the first CUDA or ROCm GPU, else the CPU", affects="machine"
    )
    precision: Literal["32", "bf16"] = setting("32", "float32, or bfloat16 autocast")
    tf32: bool = setting(False, "on a GPU, float32 products and convolutions in TensorFloat-32")
    channels_last: bool = setting(True, "images and feature maps in channels_last order", affects="rounding")
    compile: bool = setting(False, "train the network through torch.compile", affects="rounding")
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = setting(
        "auto",
        "kernels of the routing; auto: the first that can run; reference: plain PyTorch, which stores the votes",
        affects="rounding",
    )
    devices: int | None = setting(
        None,
        "processes of the training on each node, each with a GPU of its own; none: those that torchrun has started, "
        "or 1",
        affects="machine",
        bounds=(1, 1024),
    )
    nodes: int | None = setting(
        None, "machines of the training; none: those of torchrun, or 1", affects="machine", bounds=(1, 65_536)
    )
    strategy: Literal["ddp", "fsdp"] = setting(
        "ddp",
        "with several processes: ddp: each holds the whole network; fsdp: they share parameters, gradients and the "
        "optimiser's state",
        affects="rounding",
    )
    rendezvous: str | None = setting(
        None,
        "HOST:PORT of one of the nodes, where all of them meet; the command is started on each",
        affects="machine",
    )
    connect_timeout: float = setting(
        300.0, "seconds within which all processes of the training must answer", affects="machine", bounds=(1, 86_400)
    )
    threads: int | None = setting(
        None, "threads of the CPU, for each process; none: torch decides", affects="machine", bounds=(1, 1024)
    )
    workers: int = setting(
        0, "processes that load data, for each process of the training; 0: none", affects="machine", bounds=(0, 256)
    )
    decode_workers: int | None = setting(
        None, "threads that decode videos; none: one for each core", affects="machine", bounds=(1, 1024)
    )
    video_reader: Literal["pyav", "decord"] = setting(
        "pyav",
        "decord: decode Motion JPEG in AVI with decord, to the same pixels; it does not report damaged frames",
        affects="machine",
    )

    out: Path | None = setting(None, "folder of the run; none: runs/PRESET-NETWORK-seedSEED", affects="place")
    overwrite: bool = setting(False, "replace the folder of an earlier run", affects="place")
    resume: Path | None = setting(
        None,
        "continue the run in this folder with its settings; --epochs, --device and others that do not change the "
        "result may differ",
        affects="place",
    )
    progress: bool = setting(True, "progress bars; without a terminal, a line every ten seconds", affects="display")
    logger: str = setting(
        "csv",
        "who gets the numbers of every epoch and of the evaluation, with commas between them: csv (metrics.csv, "
        "always), tensorboard, wandb, mlflow; all stays in the run's folder, unless $WANDB_MODE or "
        "$MLFLOW_TRACKING_URI say otherwise",
        affects="display",
    )
    calibration: Literal["temperature", "isotonic", "none"] = setting(
        "temperature",
        "how probabilities are calibrated on the validation split: by a temperature, or by isotonic regression",
    )
    report_frames: bool = setting(
        False,
        "show a frame of each wrongly decided test video in report.html; the page is then a part of your data",
        affects="display",
    )
    bootstrap: int = setting(1000, "resamples for the intervals; 0: no intervals", bounds=(0, 100_000))

    def __post_init__(self) -> None:
        for name, option in options().items():
            object.__setattr__(self, name, option.check(getattr(self, name), where=name))
        if self.data is None and self.dataset not in ("auto", "echonet-lvh"):
            raise ConfigError(
                f"dataset is {self.dataset!r}; expected auto or echonet-lvh, because without data the phantom is used, "
                "which has the layout of EchoNet-LVH"
            )
        if self.protocol == "paper" and self.split != "auto":
            raise ConfigError(f"split is {self.split!r}; expected auto, because protocol paper is split by frame")
        for owner, its_own in _OF_MODEL.items():
            for name in () if self.model == owner else its_own:
                value, default = getattr(self, name), options()[name].default
                if value != default:
                    raise ConfigError(
                        f"{name} is {shown(value)}; expected {default}, because only model {owner} has this setting "
                        f"and model is {self.model!r}"
                    )
        self._check_task()
        part = "primary" if self.model in _CAPSULE_NETWORKS else "backbone"
        if self.freeze not in (None, part):
            raise ConfigError(
                f"freeze is {self.freeze!r}; expected {part}, which model {self.model!r} can freeze, or null"
            )
        names = self.logger.split(",")
        if len(set(names)) < len(names) or not set(names) <= set(LOGGERS):
            raise ConfigError(
                f"logger is {shown(self.logger)}; expected some of {', '.join(LOGGERS)}, each once, with commas and "
                "without spaces between them"
            )
        if self.resume is not None:
            if self.overwrite:
                raise ConfigError("overwrite is true; expected false, because resume is given")
            if self.out is not None and os.path.realpath(self.out) != os.path.realpath(self.resume):
                raise ConfigError(f"out is {shown(self.out)}; expected the resumed run's folder {shown(self.resume)}")

    def _check_task(self) -> None:
        """Raise ConfigError for a setting that the task has no use for."""
        if self.task == "regression" and self.model != "cardiocaps":
            raise ConfigError(
                f"task is 'regression'; expected both or classification, because model {self.model!r} regresses nothing"
            )
        unused = {"classification": ("target_column", "regression_target"), "regression": _OF_LABELS}.get(self.task, ())
        for name in unused:
            value = getattr(self, name)
            # A threshold of the target column makes labels.
            if value is not None and not (name == "target_column" and self.threshold is not None):
                raise ConfigError(f"{name} is {shown(value)}; expected null, because task is {self.task!r}")

    @property
    def network(self) -> Preset:
        """The sizes of the network. (The training values of a preset are only defaults: read those from here.)"""
        return PRESETS[self.preset]

    @property
    def loggers(self) -> tuple[str, ...]:
        """The loggers beside metrics.csv, which is always written."""
        return tuple(name for name in self.logger.split(",") if name != "csv")

    @property
    def splits_frames(self) -> bool:
        """Whether frames of one video are in every split, so that no video is new in the test."""
        return self.protocol == "paper" or self.split == "frames"

    def resolved(self) -> "TrainConfig":
        """The same configuration with the preset's values and the run's folder in place of None."""
        unset = {name: getattr(self.network, name) for name in TRAINING_DEFAULTS if getattr(self, name) is None}
        if self.protocol == "paper" and "frames_per_clip" in unset:
            unset["frames_per_clip"] = PAPER_FRAMES
        network: str = self.model
        if self.model == "cardiocaps":
            network = self.routing if self.affine == "matrices" else f"{self.routing}-{self.affine}"
        if self.form != "corrected":
            network = f"{network}-{self.form}"
        out = self.out or self.resume or Path("runs", f"{self.preset}-{network}-seed{self.seed}")
        return replace(self, out=out, **unset)

    def as_dict(self) -> dict[str, bool | int | float | str | dict[str, float] | None]:
        """Plain values, paths as text: what a checkpoint can hold and `TrainConfig(**values)` takes back."""
        return {name: path_text(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def to_yaml(self) -> str:
        """The configuration as a YAML file that `read_yaml` takes back."""
        import yaml  # here, because `--help` does without it

        text: str = yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True, width=1000)
        return text


@cache
def options() -> dict[str, Option]:
    """Every setting by name, in the order of `TrainConfig`."""
    table, section = {}, ""
    for item in fields(TrainConfig):
        hint: Any = item.type
        section = _SECTIONS.get(item.name, section)
        optional = get_origin(hint) in (Union, types.UnionType)
        if optional:
            (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
        mapping = get_origin(hint) is Mapping
        if mapping:
            hint, _ = get_args(hint)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        kind = dict if mapping else str if choices else hint
        table[item.name] = Option(item.name, kind, optional, choices, item.default, section, **item.metadata)
    return table


def settings_that_affect(*kinds: Affects) -> tuple[str, ...]:
    """Names of the settings that affect one of `kinds`, in the order of `TrainConfig`."""
    return tuple(name for name, option in options().items() if option.affects in kinds)
