"""Every setting of a training run, declared once: the command line, the YAML file and the run's record all
read `TrainConfig`.

Precedence: defaults < the preset's own values < the YAML file < the command line. With `--resume`, the run's
own configuration takes the place of the defaults. Imports nothing heavy, so that `--help` answers at once.
"""
# ruff: noqa: RUF009  (`_option` is a field, not a shared default)

import argparse
import difflib
import math
import os
import re
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from cardiocaps import __version__
from cardiocaps.errors import ConfigError, printable
from cardiocaps.runtime.files import is_missing

MAY_DIFFER_ON_RESUME = (
    "data",
    "phantom_dir",
    "epochs",
    "patience",
    "device",
    "channels_last",
    "compile",
    "backend",
    "threads",
    "workers",
    "decode_workers",
    "video_reader",
    "progress",
    "cache_dir",
    "follow_links",
)
"""Settings that may change when a run goes on: they decide how long and where it runs and where its data lie, not what
it computes, but for the rounding. (What lies there is compared by its fingerprint.)"""

_PLACES = ("data", "phantom_dir", "cache_dir")
"""Settings that name a place outside of the run."""

_NEWER: Mapping[str, Any] = {
    "tf32": False,
    "channels_last": False,
    "compile": False,
    "model": "cardiocaps",
    "affine": "matrices",
    "backend": "auto",
    "decode_workers": None,
    "video_reader": "pyav",
    "split_seed": None,
    "group_column": None,
    "allow_split_patients": False,
    "threshold": None,
    "follow_links": False,
}
"""Settings that the folders of older runs have no word of, and what those ran with."""

TRAINABLE_PHANTOM = 18
"""Fewest videos of a phantom that is made to be trained on: fewer leave a split without abnormal ones. (Older versions
made smaller ones.)"""

_LARGEST_FILE = 1 << 16
_LONGEST_TEXT = 100
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")

# Line ends of every kind among them, which YAML would not give back; and bytes that are no text.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Preset:
    """Sizes of the network (lengths in pixels of the input or of the map before), and the training that goes
    with them."""

    size: int
    conv_channels: int
    conv_kernel: int
    conv_stride: int
    primary_types: int
    primary_dim: int
    primary_kernel: int
    primary_stride: int
    out_dim: int
    decoder: tuple[int, int]
    frames_per_clip: int
    batch_size: int
    learning_rate: float
    epochs: int
    patience: int


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        size=64,
        conv_channels=32,
        conv_kernel=9,
        conv_stride=2,
        primary_types=8,
        primary_dim=8,
        primary_kernel=5,
        primary_stride=2,
        out_dim=16,
        decoder=(128, 256),
        frames_per_clip=8,
        batch_size=32,
        learning_rate=1e-3,
        epochs=20,
        patience=5,
    ),
    "small": Preset(
        size=128,
        conv_channels=64,
        conv_kernel=9,
        conv_stride=1,
        primary_types=16,
        primary_dim=8,
        primary_kernel=9,
        primary_stride=2,
        out_dim=16,
        decoder=(512, 1024),
        frames_per_clip=16,
        batch_size=16,
        learning_rate=3e-4,
        epochs=40,
        patience=6,
    ),
    "paper": Preset(  # CardioCaps, section III-A
        size=256,
        conv_channels=256,
        conv_kernel=9,
        conv_stride=1,
        primary_types=32,
        primary_dim=8,
        primary_kernel=9,
        primary_stride=2,
        out_dim=16,
        decoder=(512, 1024),
        frames_per_clip=50,
        batch_size=8,
        learning_rate=1e-4,
        epochs=100,
        patience=5,
    ),
}


def _option(default: Any, group: str, text: str, *, low: float | None = None, high: float | None = None) -> Any:
    """A field of TrainConfig, with its section in the help, its help, and its bounds (inclusive)."""
    return field(default=default, metadata={"group": group, "help": text, "low": low, "high": high})


_Calc = Literal["IVSd", "IVSs", "LVPWd", "LVPWs", "LVIDd", "LVIDs", "LVID", "RVDd"]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run. Every way of making one checks every value; ConfigError names the
    setting, its value and what is allowed. A setting that is None is decided by the preset (see `resolved`)
    or has the meaning its help gives."""

    data: Path | None = _option(
        None, "data", "EchoNet-LVH folder (MeasurementsList.csv, Batch1 to Batch4); none: the phantom"
    )
    phantom_videos: int = _option(
        300,
        "data",
        f"videos of the synthetic phantom, where no --data is given; at least {TRAINABLE_PHANTOM} where it is made",
        low=10,
        high=100_000,
    )
    phantom_seed: int = _option(10, "data", "seed of the phantom", low=0, high=2**32 - 1)
    phantom_dir: Path = _option(Path("phantom"), "data", "folder the phantom is written to and reused from")
    cache_dir: Path | None = _option(
        None, "data", "folder for decoded frames; none: $CARDIOCAPS_CACHE or ~/.cache/cardiocaps"
    )
    protocol: Literal["video", "paper"] = _option(
        "video",
        "data",
        "video: one label per video, split by video; paper: row by row, split by frame, which leaks",
    )
    split: Literal["auto", "column", "stratified", "frames"] = _option(
        "auto",
        "data",
        "the data set's own column, or groups stratified by label; auto: the column where there is one; "
        "frames: at random over all videos' frames, which leaks",
    )
    split_seed: int | None = _option(
        None,
        "data",
        "seed of the stratified groups, or of a split by frame; none: the run's",
        low=0,
        high=2**32 - 1,
    )
    group_column: str | None = _option(
        None,
        "data",
        "the table's column that says whose video it is; none: PatientID, patient_id, Patient, subject or study, "
        "where there is one",
    )
    allow_split_patients: bool = _option(
        False, "data", "keep the data set's own split although videos of one patient stand in several"
    )
    threshold: Mapping[_Calc, float] | None = _option(
        None,
        "data",
        "smallest abnormal value of a measurement in cm (IVSd=1.2; may be given again for others); none: as published",
        low=0.01,
        high=100,
    )
    follow_links: bool = _option(False, "data", "follow links that leave the data folder")
    frames_per_clip: int | None = _option(
        None, "data", "frames taken from a video; none: the preset's", low=1, high=10_000
    )
    frame_choice: Literal["spread", "first"] | None = _option(
        None,
        "data",
        "frames spread evenly over the video, or its first; none: first in the paper protocol, else spread",
    )
    limit: int | None = _option(
        None, "data", "use so many clips only, of each split and class its share; none: all", low=1, high=10**9
    )
    max_bad_share: float = _option(0.05, "data", "share of unusable videos above which the run stops", low=0, high=1)

    preset: Literal["tiny", "small", "paper"] = _option("tiny", "model", "size of the network and its training")
    model: Literal["cardiocaps", "em-capsnet", "efficient-capsnet", "cnn-1", "cnn-2", "resnet18", "unet", "vit"] = (
        _option("cardiocaps", "model", "the network: CardioCaps, or one that the paper compares it with")
    )
    routing: Literal["attention", "dynamic", "uniform"] = _option("attention", "model", "CardioCaps' routing algorithm")
    affine: Literal["matrices", "convolution", "constant"] = _option(
        "matrices",
        "model",
        "CardioCaps' votes: by learned matrices, by a 1x1 convolution that all capsules share, or by one constant",
    )
    iterations: int = _option(3, "model", "iterations of dynamic and EM routing", low=1, high=10)
    primary_layout: Literal["channels", "legacy"] = _option(
        "channels", "model", "CardioCaps' capsules: the neurons of one location, or as in the published code"
    )
    decoder_mask: Literal["label", "predicted"] = _option(
        "label", "model", "class capsule that the decoder sees in training"
    )

    class_weight: Literal["balanced", "proportion", "none"] = _option(
        "balanced", "loss", "weight of a class: n / (2 n_c), n_c / n (the letter of eq. 2), or one"
    )
    reconstruction_weight: float = _option(
        0.0005, "loss", "weight of the reconstruction's squared error, summed over an image", low=0, high=1000
    )
    regression_weight: float = _option(
        0.05, "loss", "weight of the regression loss (lambda_reg of eq. 2)", low=0, high=1000
    )
    regression_target: Literal["width", "ef"] = _option(
        "width", "loss", "what is regressed: LV width in cm, or ejection fraction in percent"
    )

    batch_size: int | None = _option(None, "training", "frames in a batch; none: the preset's", low=1, high=65_536)
    learning_rate: float | None = _option(
        None, "training", "learning rate of Adam; none: the preset's", low=1e-9, high=1
    )
    epochs: int | None = _option(None, "training", "most epochs; none: the preset's", low=1, high=100_000)
    patience: int | None = _option(
        None,
        "training",
        "epochs without a better validation loss before stopping; none: the preset's",
        low=1,
        high=100_000,
    )
    seed: int = _option(10, "training", "seed of weights, order and augmentation", low=0, high=2**32 - 1)

    device: Literal["auto", "cpu", "cuda"] = _option(
        "auto", "machine", "auto: the first CUDA or ROCm GPU, else the CPU"
    )
    precision: Literal["32", "bf16"] = _option("32", "machine", "float32, or bfloat16 autocast")
    tf32: bool = _option(False, "machine", "on a GPU, float32 products and convolutions in TensorFloat-32")
    channels_last: bool = _option(True, "machine", "images and feature maps in channels_last order")
    compile: bool = _option(False, "machine", "train the network through torch.compile")
    backend: Literal["auto", "reference", "cpu", "cuda", "triton"] = _option(
        "auto",
        "machine",
        "kernels of the routing; auto: the first that can; reference: plain PyTorch, which holds the votes",
    )
    threads: int | None = _option(None, "machine", "threads of the CPU; none: torch decides", low=1, high=1024)
    workers: int = _option(0, "machine", "processes that load data; 0: the main one", low=0, high=256)
    decode_workers: int | None = _option(
        None, "machine", "threads that decode videos, once; none: one for each core", low=1, high=1024
    )
    video_reader: Literal["pyav", "decord"] = _option(
        "pyav", "machine", "decord: Motion JPEG in AVI is decoded by decord, to the same pixels; it tells no damage"
    )

    out: Path | None = _option(None, "run", "folder of the run; none: runs/PRESET-NETWORK-seedSEED")
    overwrite: bool = _option(False, "run", "replace the folder of an earlier run")
    resume: Path | None = _option(
        None,
        "run",
        "go on with the run in this folder and its settings; --epochs, --device and the like may differ",
    )
    progress: bool = _option(True, "run", "progress bars; without a terminal, a line every ten seconds")
    bootstrap: int = _option(1000, "run", "resamples for the intervals; 0: none", low=0, high=100_000)

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
            if self.out is not None and not _same_path(self.out, self.resume):
                raise ConfigError(
                    f"out: a resumed run stays in its folder {_shown(self.resume)}; drop {_shown(self.out)}"
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
            frames_per_clip=_first(self.frames_per_clip, preset.frames_per_clip),
            batch_size=_first(self.batch_size, preset.batch_size),
            learning_rate=_first(self.learning_rate, preset.learning_rate),
            epochs=_first(self.epochs, preset.epochs),
            patience=_first(self.patience, preset.patience),
            out=self.out or self.resume or Path("runs", f"{self.preset}-{self._network_name()}-seed{self.seed}"),
        )

    def _network_name(self) -> str:
        if self.model != "cardiocaps":
            return self.model
        return self.routing if self.affine == "matrices" else f"{self.routing}-{self.affine}"

    def as_dict(self) -> dict[str, bool | int | float | str | dict[str, float] | None]:
        """Plain values, paths as text: what a checkpoint can hold and `TrainConfig(**values)` takes back."""
        return {name: _path_text(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}

    def kept(self, before: Path | None = None) -> tuple[str, dict[str, dict[str, str]]]:
        """What the run's folder keeps: the YAML of the configuration, its paths as they were given, and of each path
        also where that was, whatever the working folder may be next time.

        `before`: the file of the paths that the folder has kept, for a run that goes on.
        """
        places: dict[str, dict[str, str]] = {}
        known = {} if before is None else _read_places(before)
        for name in _PLACES:
            path = getattr(self, name)
            if path is not None:
                is_known = name in known and path == _found(name, **known[name])
                now = {"given": _path_text(path)}
                # The working folder's name may be what no path of a run may be: no text, or with control characters.
                if options()[name].takes(path.absolute()):
                    now["absolute"] = str(path.absolute())
                places[name] = known[name] if is_known else now
        given = {name: place["given"] for name, place in places.items()}
        return replace(self, resume=None, **given).to_yaml(), places  # type: ignore[arg-type]

    def to_yaml(self) -> str:
        """The configuration as a YAML file that `read_yaml` takes back."""
        import yaml

        text: str = yaml.dump(self.as_dict(), Dumper=_yaml_types()[1], sort_keys=False, allow_unicode=True, width=1000)
        return text


@dataclass(frozen=True)
class Option:
    """One setting, read off its field in TrainConfig."""

    name: str
    kind: type  # bool, int, float, str, Path, or dict: a number for each of some names, which are the choices
    optional: bool
    choices: tuple[str, ...]
    default: Any
    group: str
    help: str
    low: float | None
    high: float | None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def allowed(self) -> str:
        if self.kind is dict:
            one, some = self.choices[0], ", ".join(self.choices)
            what = f"numbers from {self.low:.10g} to {self.high:.10g} for some of {some} ({one}=X; in YAML {one}: X)"
        elif self.choices:
            what = f"one of {', '.join(self.choices)}"
        elif self.kind is str:
            what = f"text of 1 to {_LONGEST_TEXT} characters without control characters"
        elif self.kind is bool:
            what = "true or false"
        elif self.kind is Path:
            what = "a path without control characters (~ is the home folder)"
        else:
            number = "an integer" if self.kind is int else "a number"
            what = f"{number} from {self.low:.10g} to {self.high:.10g}"
        return what + (" or null" if self.optional else "")

    def check(self, value: Any, where: str) -> Any:
        """`value` in the setting's own type. Raises ConfigError, beginning with `where`."""
        if not self.takes(value):
            raise ConfigError(f"{where}: {_shown(value)} is not allowed; give {self.allowed}")
        return self._converted(value)

    def takes(self, value: Any) -> bool:
        """Whether `check` takes the value."""
        return (value is None and self.optional) or self._converted(value) is not None

    def from_text(self, text: str) -> Any:
        """The value that `text` on the command line stands for. Raises argparse's error, which names the
        option."""
        value: Any = text
        if self.kind is int and re.fullmatch(r"[-+]?[0-9]{1,20}", text):
            value = int(text)
        if self.kind is dict:
            name, _, number = text.partition("=")
            value = {name: number}
        try:
            return self.check(value, where="")
        except ConfigError as error:
            message = str(error).removeprefix(": ").removesuffix(" or null")
            if self.kind is dict:
                message = message.replace(_shown(value), _shown(text), 1)
            raise argparse.ArgumentTypeError(message) from None

    def _converted(self, value: Any) -> Any:
        """`value` in the setting's own type, None where that is impossible."""
        if self.kind is dict:
            if not isinstance(value, Mapping) or not value or not set(value) <= set(self.choices):
                return None
            numbers = {name: self._inside(_as_float(value[name])) for name in self.choices if name in value}
            return None if None in numbers.values() else numbers
        if self.choices:  # precision: 32 in YAML is a number
            text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
            return text if isinstance(text, str) and text in self.choices else None
        if self.kind is bool:
            return value if isinstance(value, bool) else None
        if self.kind is Path:
            # Path("") is the working folder, which nobody means.
            if not isinstance(value, str | Path) or not str(value).strip() or _CONTROL.search(str(value)):
                return None
            # What no file system takes (Linux: NAME_MAX, PATH_MAX) would fail later, and less clearly.
            path = _path(value) if isinstance(value, str) else value
            lengths = [4096] if path is None else [len(os.fsencode(part)) for part in path.parts]
            return path if max(lengths, default=0) <= 255 and sum(lengths) < 4096 else None
        if self.kind is str:
            fits = isinstance(value, str) and 0 < len(value) <= _LONGEST_TEXT and not _CONTROL.search(value)
            return value if fits and value.strip() else None
        if self.kind is int:
            return self._inside(value if isinstance(value, int) and not isinstance(value, bool) else None)
        return self._inside(_as_float(value))

    def _inside(self, number: Any) -> Any:
        """`number` where it is within the bounds, else None."""
        inside = number is not None and _first(self.low, -math.inf) <= number <= _first(self.high, math.inf)
        return number if inside else None


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


class CommandLine(argparse.ArgumentParser):
    """A parser that takes no abbreviation, and answers a mistake in one line: `error: …`, exit status 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = next((text for text in unknown if text.startswith("-")), None)
            if option is None:
                self.error(f"unexpected argument {_shown(unknown[0])}; every setting is given as --option")
            flag = option.partition("=")[0][:60]
            self.error(f"unknown option {flag}{_did_you_mean(flag, self._option_string_actions)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


def command_line(prog: str = "cardiocaps.train", description: str | None = None) -> CommandLine:
    """The training program's parser. Only what is typed lands in its namespace, besides `config`, the YAML
    file."""
    parser = CommandLine(
        prog=prog,
        usage="%(prog)s [--config FILE] [options]",
        description=description,
        epilog="Research use only. Not a medical device.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"cardiocaps {__version__}")
    parser.add_argument(
        "--config",
        type=options()["data"].from_text,
        metavar="FILE",
        default=None,
        help="YAML file with any of the settings below",
    )
    add_options(parser, list(options()))
    return parser


def add_options(parser: argparse.ArgumentParser, names: Sequence[str], default: str | None = None) -> None:
    """Give a parser the named settings, in their sections of the help. What is not typed has no default there, or the
    one that `default` says in words."""
    groups: dict[str, Any] = {}
    for option in (options()[name] for name in names):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        group = groups[option.group]
        if option.kind is bool:
            usual = default or ("yes" if option.default else "no")
            group.add_argument(
                option.flag, action=argparse.BooleanOptionalAction, help=f"{option.help} (default: {usual})"
            )
            continue
        usual = default or option.default
        text = option.help if usual is None else f"{option.help} (default: {usual})"
        choices = f"{{{','.join(option.choices)}}}" if option.choices else "TEXT"
        metavar = {int: "N", float: "X", Path: "PATH", str: choices, dict: "NAME=X"}[option.kind]
        group.add_argument(
            option.flag,
            type=option.from_text,
            action=_Collect if option.kind is dict else "store",
            metavar=metavar,
            help=text.replace("%", "%%"),
        )


class _Collect(argparse.Action):
    """An option that may be given again for another name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None) or {}
        for name in before.keys() & values.keys():
            raise argparse.ArgumentError(self, f"{name} is given twice")
        setattr(namespace, self.dest, {**before, **values})


def from_command_line(argv: Sequence[str] | None = None, prog: str = "cardiocaps.train") -> TrainConfig:
    """The resolved configuration that a command line asks for; `argv` None: the process's own.

    Exits with status 2 on a mistake in the command line; raises ConfigError for one in the YAML file, between
    settings, or for a run that cannot be resumed so.
    """
    typed = vars(command_line(prog).parse_args(argv))
    file = typed.pop("config", None)
    settings = _over(read_yaml(file) if file is not None else {}, typed)
    folder: Path | None = settings.get("resume")
    if folder is None:
        return TrainConfig(**settings).resolved()
    old = read_run(folder)
    new = replace(old, **_over(vars(old), settings)).resolved()
    check_resumable(old, new)
    return new


def _over(before: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings before, with the later ones in their place; those that are a mapping name by name."""
    both = {
        name: {**(before.get(name) or {}), **value} if isinstance(value, dict) else value
        for name, value in settings.items()
    }
    return {**before, **both}


def read_run(folder: Path) -> TrainConfig:
    """The resolved configuration of the run in `folder`. Raises ConfigError where it is missing or not whole."""
    file = folder / "config.yaml"
    if is_missing(file):
        raise ConfigError(f"{_shown(folder)} is not the folder of a run: it has no config.yaml")
    settings = completed(read_yaml(file))
    missing = [name for name in options() if name not in settings]
    if missing:
        raise ConfigError(f"{printable(file)} is not whole, or of another version: it has no {', '.join(missing)}")
    for name, place in _read_places(folder / "paths.json").items():
        if settings[name] == Path(place["given"]):  # nobody has edited the YAML file since
            settings[name] = _found(name, **place)
    # The folder may have been moved, or made with --overwrite: neither is a setting of the run.
    return TrainConfig(**{**settings, "out": folder, "resume": None, "overwrite": False}).resolved()


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a run has kept, with those that its version had no word of as it ran with them."""
    return {**_NEWER, **settings}


def _read_places(file: Path) -> dict[str, dict[str, str]]:
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


def _found(name: str, given: str, absolute: str | None = None) -> Path:
    """Where what a run used is now: where it was, or where the path leads that was given, for a folder that has moved
    along with its run."""
    there = Path(given if absolute is None else absolute)
    if name == "cache_dir":  # which is made where it is not
        return Path(given) if is_missing(there.parent) else there
    return Path(given) if is_missing(there) and not is_missing(Path(given)) else there


def check_resumable(old: TrainConfig, new: TrainConfig) -> None:
    """Raise ConfigError where `new` would go on with the run of `old` under other settings; the message lists
    them all.

    What may differ: MAY_DIFFER_ON_RESUME, and where the run lies (`out`, `resume`, `overwrite`).
    """
    ignored = {*MAY_DIFFER_ON_RESUME, "out", "resume", "overwrite"}
    before, after = old.resolved().as_dict(), new.resolved().as_dict()
    different = [
        f"{name} is {_shown(after[name])}, was {_shown(before[name])}"
        for name in before
        if name not in ignored and before[name] != after[name]
    ]
    if different:
        raise ConfigError(
            f"resume: the run has other settings ({'; '.join(different)}); start a new run for these. "
            f"Only {', '.join(MAY_DIFFER_ON_RESUME)} may differ"
        )


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, checked one by one, in their own types.

    Scalars are read as in YAML 1.2: 1e-4 is a number, 010 is not eight, yes and no are text. Raises
    ConfigError for a file that cannot be read or parsed, unknown or repeated keys, and values that are not
    allowed.
    """
    import yaml

    file = printable(path)
    try:
        # Anything but a file of moderate size (a pipe, a checkpoint) would block or fill the memory.
        if not path.is_file():
            raise ConfigError(f"config: {file} is not a file")
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(f"config: {file} is larger than a configuration can be ({_LARGEST_FILE} bytes)")
        content = yaml.load(path.read_bytes(), Loader=_yaml_types()[0])  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"config: cannot read {file}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"config: {file} is nested too deeply") from error
    # An explicit tag that does not suit its scalar (`!!bool perhaps`) fails in PyYAML with any of the others.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"config: {file} is not valid YAML: {_yaml_problem(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {file} must hold lines of the form `setting: value`")
    known = options()
    for key in content:
        if key not in known:
            raise ConfigError(f"{file}: unknown setting {_shown(key)}{_did_you_mean(str(key)[:60], known)}")
    return {key: known[key].check(value, where=f"{file}: {key}") for key, value in content.items()}


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, without PyYAML's picture of the place: the file may be another than was meant."""
    problem = getattr(error, "problem", None) or getattr(error, "context", None)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{_one_line(problem or error)[:200]}{place}"


@cache
def _yaml_types() -> tuple[Any, Any]:
    """A safe loader that refuses repeated keys, and a dumper, both with the scalars of YAML 1.2's core
    schema."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping = {}
            for key_node, value_node in node.value:
                key = self.construct_object(key_node, deep=True)
                if not isinstance(key, str):
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{_shown(key)} is not the name of a setting", key_node.start_mark
                    )
                if key in mapping:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"{_shown(key)} is given twice", key_node.start_mark
                    )
                mapping[key] = self.construct_object(value_node, deep=deep)
            return mapping

    class Dumper(yaml.SafeDumper):
        yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # type: ignore[misc]

    digits = "-+0123456789"
    for kind, pattern, first in (
        ("null", r"~|null|", ["~", "n", ""]),
        ("bool", r"true|false", list("tf")),
        ("int", r"[-+]?(0|[1-9][0-9]*)", list(digits)),
        (
            "float",
            r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
            list(digits + "."),
        ),
    ):
        for side in (Loader, Dumper):
            side.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(f"^(?:{pattern})$"), first)
    return Loader, Dumper


def _as_float(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    # No repeated part can match what another could, and none is long.
    if isinstance(value, str) and not (len(value) <= _LONGEST_TEXT and _NUMBER.fullmatch(value)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    completed = [name for name in known if len(word) > 3 and name.startswith(word)]
    close = completed or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _first(value: Any, otherwise: Any) -> Any:
    return otherwise if value is None else value


def _path(text: str) -> Path | None:
    """The path that a user means, None where nobody has the home folder that it begins with."""
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)
    except RuntimeError:
        return None


def _path_text(path: Path) -> str:
    """`path` as text that means the same path to `_path`."""
    return f"./{path}" if str(path).startswith("~") else str(path)


def _same_path(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Path) else reprlib.repr(value)


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split()))
