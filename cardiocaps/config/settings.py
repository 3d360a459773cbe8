"""Every setting of a training run, declared once."""
# ruff: noqa: RUF009  (`setting` is a field, not a shared default)

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

from cardiocaps.config.option import Affects, Option, first, path_text, same_path, setting, shown
from cardiocaps.config.presets import PRESETS, Preset
from cardiocaps.config.yaml_types import yaml_types
from cardiocaps.errors import ConfigError, printable
from cardiocaps.runtime.files import is_missing

TRAINABLE_PHANTOM = 18
"""Fewest videos of a phantom that is made to be trained on: fewer leave a split without abnormal ones. (Older versions
made smaller ones.)"""

_PLACES = ("data", "phantom_dir", "cache_dir")
"""Settings that name a place outside of the run."""

_Calc = Literal["IVSd", "IVSs", "LVPWd", "LVPWs", "LVIDd", "LVIDs", "LVID", "RVDd"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Every way of making one checks every value; ConfigError names the
    setting, its value and what is allowed. A setting that is None is decided by the preset (see `resolved`)
    or has the meaning its help gives."""

    data: Path | None = setting(
        None,
        "data",
        "EchoNet-LVH folder (MeasurementsList.csv, Batch1 to Batch4); none: the phantom",
        affects="machine",
    )
    phantom_videos: int = setting(
        300,
        "data",
        f"videos of the synthetic phantom, where no --data is given; at least {TRAINABLE_PHANTOM} where it is made",
        low=10,
        high=100_000,
    )
    phantom_seed: int = setting(10, "data", "seed of the phantom", low=0, high=2**32 - 1)
    phantom_dir: Path = setting(
        Path("phantom"), "data", "folder the phantom is written to and reused from", affects="machine"
    )
    cache_dir: Path | None = setting(
        None, "data", "folder for decoded frames; none: $CARDIOCAPS_CACHE or ~/.cache/cardiocaps", affects="machine"
    )
    protocol: Literal["video", "paper"] = setting(
        "video",
        "data",
        "video: one label per video, split by video; paper: row by row, split by frame, which leaks",
    )
    split: Literal["auto", "column", "stratified", "frames"] = setting(
        "auto",
        "data",
        "the data set's own column, or groups stratified by label; auto: the column where there is one; "
        "frames: at random over all videos' frames, which leaks",
    )
    split_seed: int | None = setting(
        None,
        "data",
        "seed of the stratified groups, or of a split by frame; none: the run's",
        low=0,
        high=2**32 - 1,
    )
    group_column: str | None = setting(
        None,
        "data",
        "the table's column that says whose video it is; none: PatientID, patient_id, Patient, subject or study, "
        "where there is one",
    )
    allow_split_patients: bool = setting(
        False, "data", "keep the data set's own split although videos of one patient stand in several"
    )
    threshold: Mapping[_Calc, float] | None = setting(
        None,
        "data",
        "smallest abnormal value of a measurement in cm (IVSd=1.2; may be given again for others); none: as published",
        low=0.01,
        high=100,
    )
    follow_links: bool = setting(False, "data", "follow links that leave the data folder", affects="machine")
    frames_per_clip: int | None = setting(
        None, "data", "frames taken from a video; none: the preset's", low=1, high=10_000
    )
    frame_choice: Literal["spread", "first"] | None = setting(
        None,
        "data",
        "frames spread evenly over the video, or its first; none: first in the paper protocol, else spread",
    )
    limit: int | None = setting(
        None, "data", "use so many clips only, of each split and class its share; none: all", low=1, high=10**9
    )
    max_bad_share: float = setting(0.05, "data", "share of unusable videos above which the run stops", low=0, high=1)

    preset: Literal["tiny", "small", "paper"] = setting("tiny", "model", "size of the network and its training")
    model: Literal["cardiocaps", "em-capsnet", "efficient-capsnet", "cnn-1", "cnn-2", "resnet18", "unet", "vit"] = (
        setting(
            "cardiocaps", "model", "the network: CardioCaps, or one that the paper compares it with", affects="shape"
        )
    )
    routing: Literal["attention", "dynamic", "uniform"] = setting(
        "attention", "model", "CardioCaps' routing algorithm", affects="shape"
    )
    affine: Literal["matrices", "convolution", "constant"] = setting(
        "matrices",
        "model",
        "CardioCaps' votes: by learned matrices, by a 1x1 convolution that all capsules share, or by one constant",
        affects="shape",
    )
    iterations: int = setting(3, "model", "iterations of dynamic and EM routing", affects="shape", low=1, high=10)
    primary_layout: Literal["channels", "legacy"] = setting(
        "channels",
        "model",
        "CardioCaps' capsules: the neurons of one location, or as in the published code",
        affects="shape",
    )
    decoder_mask: Literal["label", "predicted"] = setting(
        "label", "model", "class capsule that the decoder sees in training"
    )

    class_weight: Literal["balanced", "proportion", "none"] = setting(
        "balanced", "loss", "weight of a class: n / (2 n_c), n_c / n (the letter of eq. 2), or one"
    )
    reconstruction_weight: float = setting(
        0.0005, "loss", "weight of the reconstruction's squared error, summed over an image", low=0, high=1000
    )
    regression_weight: float = setting(
        0.05, "loss", "weight of the regression loss (lambda_reg of eq. 2)", low=0, high=1000
    )
    regression_target: Literal["width", "ef"] = setting(
        "width", "loss", "what is regressed: LV width in cm, or ejection fraction in percent", affects="shape"
    )

    batch_size: int | None = setting(None, "training", "frames in a batch; none: the preset's", low=1, high=65_536)
    learning_rate: float | None = setting(
        None, "training", "learning rate of Adam; none: the preset's", low=1e-9, high=1
    )
    epochs: int | None = setting(
        None, "training", "most epochs; none: the preset's", affects="length", low=1, high=100_000
    )
    patience: int | None = setting(
        None,
        "training",
        "epochs without a better validation loss before stopping; none: the preset's",
        affects="length",
        low=1,
        high=100_000,
    )
    seed: int = setting(10, "training", "seed of weights, order and augmentation", low=0, high=2**32 - 1)

    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", "machine", "auto: the first CUDA or ROCm GPU, else the CPU", affects="machine"
    )
    precision: Literal["32", "bf16"] = setting("32", "machine", "float32, or bfloat16 autocast")
    tf32: bool = setting(False, "machine", "on a GPU, float32 products and convolutions in TensorFloat-32")
    channels_last: bool = setting(True, "machine", "images and feature maps in channels_last order", affects="rounding")
    compile: bool = setting(False, "machine", "train the network through torch.compile", affects="rounding")
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = setting(
        "auto",
        "machine",
        "kernels of the routing; auto: the first that can; reference: plain PyTorch, which holds the votes",
        affects="rounding",
    )
    threads: int | None = setting(
        None, "machine", "threads of the CPU; none: torch decides", affects="machine", low=1, high=1024
    )
    workers: int = setting(
        0, "machine", "processes that load data; 0: the main one", affects="machine", low=0, high=256
    )
    decode_workers: int | None = setting(
        None,
        "machine",
        "threads that decode videos, once; none: one for each core",
        affects="machine",
        low=1,
        high=1024,
    )
    video_reader: Literal["pyav", "decord"] = setting(
        "pyav",
        "machine",
        "decord: Motion JPEG in AVI is decoded by decord, to the same pixels; it tells no damage",
        affects="machine",
    )

    out: Path | None = setting(None, "run", "folder of the run; none: runs/PRESET-NETWORK-seedSEED", affects="place")
    overwrite: bool = setting(False, "run", "replace the folder of an earlier run", affects="place")
    resume: Path | None = setting(
        None,
        "run",
        "go on with the run in this folder and its settings; --epochs, --device and the like may differ",
        affects="place",
    )
    progress: bool = setting(
        True, "run", "progress bars; without a terminal, a line every ten seconds", affects="display"
    )
    bootstrap: int = setting(1000, "run", "resamples for the intervals; 0: none", low=0, high=100_000)

    def __post_init__(self) -> None:
        for name, option in options().items():
            object.__setattr__(self, name, option.check(getattr(self, name), where=name))
        if self.protocol == "paper" and self.split != "auto":
            raise ConfigError(f"split: {self.split!r} has no meaning with protocol 'paper' (split by frame); give auto")
        if self.model != "cardiocaps":
            for name in ("routing", "affine", "primary_layout"):
                if getattr(self, name) != options()[name].default:
                    given = getattr(self, name)
                    raise ConfigError(f"{name}: {given!r} is for model 'cardiocaps'; the model is {self.model!r}")
        if self.resume is not None:
            if self.overwrite:
                raise ConfigError("overwrite: a run that is resumed cannot be overwritten; give one of the two")
            if self.out is not None and not same_path(self.out, self.resume):
                raise ConfigError(
                    f"out: a resumed run stays in its folder {shown(self.resume)}; drop {shown(self.out)}"
                )

    @property
    def network(self) -> Preset:
        """The preset's network sizes (its training values are only defaults: read those from this
        configuration)."""
        return PRESETS[self.preset]

    @property
    def splits_frames(self) -> bool:
        """Whether frames of one video are in every split, so that no video is new in the test."""
        return self.protocol == "paper" or self.split == "frames"

    def resolved(self) -> "TrainConfig":
        """The same with the preset's values and the run's folder in place of None."""
        preset = PRESETS[self.preset]
        return replace(
            self,
            frames_per_clip=first(self.frames_per_clip, preset.frames_per_clip),
            batch_size=first(self.batch_size, preset.batch_size),
            learning_rate=first(self.learning_rate, preset.learning_rate),
            epochs=first(self.epochs, preset.epochs),
            patience=first(self.patience, preset.patience),
            out=self.out or self.resume or Path("runs", f"{self.preset}-{self._network_name()}-seed{self.seed}"),
        )

    def _network_name(self) -> str:
        if self.model != "cardiocaps":
            return self.model
        return self.routing if self.affine == "matrices" else f"{self.routing}-{self.affine}"

    def as_dict(self) -> dict[str, bool | int | float | str | dict[str, float] | None]:
        """Plain values, paths as text: what a checkpoint can hold and `TrainConfig(**values)` takes back."""
        return {name: path_text(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def kept(self, before: Path | None = None) -> tuple[str, dict[str, dict[str, str]]]:
        """What the run's folder keeps: the YAML of the configuration, its paths as they were given, and of each path
        also where that was, whatever the working folder may be next time.

        `before`: the file of the paths that the folder has kept, for a run that goes on.
        """
        places: dict[str, dict[str, str]] = {}
        known = {} if before is None else read_places(before)
        for name in _PLACES:
            path = getattr(self, name)
            if path is not None:
                is_known = name in known and path == found(name, **known[name])
                now = {"given": path_text(path)}
                # The working folder's name may be what no path of a run may be: no text, or with control characters.
                if options()[name].takes(path.absolute()):
                    now["absolute"] = str(path.absolute())
                places[name] = known[name] if is_known else now
        given = {name: place["given"] for name, place in places.items()}
        return replace(self, resume=None, **given).to_yaml(), places  # type: ignore[arg-type]

    def to_yaml(self) -> str:
        """The configuration as a YAML file that `read_yaml` takes back."""
        import yaml

        text: str = yaml.dump(self.as_dict(), Dumper=yaml_types()[1], sort_keys=False, allow_unicode=True, width=1000)
        return text


def settings_that_affect(*kinds: Affects) -> tuple[str, ...]:
    """Names of the settings that affect one of `kinds`, in their order in `TrainConfig`."""
    return tuple(item.name for item in fields(TrainConfig) if item.metadata["affects"] in kinds)


@cache
def options() -> dict[str, Option]:
    """Every setting by name, in order."""
    hints = get_type_hints(TrainConfig)
    table = {}
    for item in fields(TrainConfig):
        hint = hints[item.name]
        optional = get_origin(hint) in (Union, types.UnionType)
        if optional:
            (hint,) = (part for part in get_args(hint) if part is not types.NoneType)
        mapping = get_origin(hint) is Mapping
        if mapping:
            hint, _ = get_args(hint)
        choices = get_args(hint) if get_origin(hint) is Literal else ()
        table[item.name] = Option(
            name=item.name,
            kind=dict if mapping else str if choices else hint,
            optional=optional,
            choices=choices,
            default=item.default,
            **item.metadata,
        )
    return table


def read_places(file: Path) -> dict[str, dict[str, str]]:
    """The paths that `TrainConfig.kept` gave; none for a run of an older version. Raises ConfigError: it is damaged."""
    import json

    try:
        places = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for name, place in places.items():
            if name not in _PLACES or not {"given"} <= set(place) <= {"given", "absolute"}:
                raise ValueError
            for path in place.values():
                options()[name].check(path, where=name)
    except OSError as error:
        raise ConfigError(f"cannot read {printable(file)}: {error.strerror}") from error
    except (ConfigError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{printable(file)} is damaged; without it, the paths in config.yaml count as they stand"
        ) from error
    return dict(places)


def found(name: str, given: str, absolute: str | None = None) -> Path:
    """Where what a run used is now: where it was, or where the path leads that was given, for a folder that has moved
    along with its run."""
    there = Path(given if absolute is None else absolute)
    if name == "cache_dir":  # which is made where it is not
        return Path(given) if is_missing(there.parent) else there
    return Path(given) if is_missing(there) and not is_missing(Path(given)) else there


def check_resumable(old: TrainConfig, new: TrainConfig) -> None:
    """Raise ConfigError where `new` would go on with the run of `old` under other settings; the message lists
    them all.

    May differ: settings that change no result but for the rounding, how long it is trained, and where the run lies.
    """
    may_differ = settings_that_affect("length", "rounding", "machine", "display")
    ignored = {*may_differ, *settings_that_affect("place")}
    before, after = old.resolved().as_dict(), new.resolved().as_dict()
    different = [
        f"{name} is {shown(after[name])}, was {shown(before[name])}"
        for name in before
        if name not in ignored and before[name] != after[name]
    ]
    if different:
        raise ConfigError(
            f"resume: the run has other settings ({'; '.join(different)}); start a new run for these. "
            f"Only {', '.join(may_differ)} may differ"
        )
