"""Settings from a YAML file and from the folder of a run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cardiocaps.config.option import did_you_mean, shown
from cardiocaps.config.settings import TrainConfig, found, options, read_places
from cardiocaps.config.yaml_types import yaml_types
from cardiocaps.errors import ConfigError, printable
from cardiocaps.runtime.files import is_missing

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

_LARGEST_FILE = 1 << 16


def read_run(folder: Path) -> TrainConfig:
    """The resolved configuration of the run in `folder`. Raises ConfigError where it is missing or not whole."""
    file = folder / "config.yaml"
    if is_missing(file):
        raise ConfigError(f"{shown(folder)} is not the folder of a run: it has no config.yaml")
    settings = completed(read_yaml(file))
    missing = [name for name in options() if name not in settings]
    if missing:
        raise ConfigError(f"{printable(file)} is not whole, or of another version: it has no {', '.join(missing)}")
    for name, place in read_places(folder / "paths.json").items():
        if settings[name] == Path(place["given"]):  # nobody has edited the YAML file since
            settings[name] = found(name, **place)
    # The folder may have been moved, or made with --overwrite: neither is a setting of the run.
    return TrainConfig(**{**settings, "out": folder, "resume": None, "overwrite": False}).resolved()


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a run has kept, with those that its version had no word of as it ran with them."""
    return {**_NEWER, **settings}


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
        content = yaml.load(path.read_bytes(), Loader=yaml_types()[0])  # a SafeLoader
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
            raise ConfigError(f"{file}: unknown setting {shown(key)}{did_you_mean(str(key)[:60], known)}")
    return {key: known[key].check(value, where=f"{file}: {key}") for key, value in content.items()}


def _yaml_problem(error: Exception) -> str:
    """What is wrong and where, without PyYAML's picture of the place: the file may be another than was meant."""
    problem = getattr(error, "problem", None) or getattr(error, "context", None)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{_one_line(problem or error)[:200]}{place}"


def _one_line(text: object) -> str:
    return printable(" ".join(str(text).split()))
