"""Settings in a YAML file and in the folder of a run.

`config.yaml` of a run holds each path as the user gave it, which may be relative. `paths.json` holds the absolute path
too, so that a run can be resumed from another working folder.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cardiocaps.config.option import as_path, did_you_mean, path_text, shown
from cardiocaps.config.settings import TrainConfig, options, settings_that_affect
from cardiocaps.errors import ConfigError, printable
from cardiocaps.runtime.files import is_missing, write_json, write_text

_PLACES = ("data", "phantom_dir", "cache_dir")
"""Settings that name a place outside of the run's folder."""

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
    "calibration": "none",
    "report_frames": False,
    "dataset": "echonet-lvh",
    "view": "A4C",
    "val_fold": 8,
    "test_fold": 9,
    "table": None,
    "path_column": None,
    "label_column": None,
    "positive": None,
    "target_column": None,
    "abnormal": None,
    "split_column": None,
    "init": None,
    "freeze": None,
    "logger": "csv",
    "task": "both",
    "form": "corrected",
    "renormalise": False,
    "accumulate": 1,
    "clip": None,
    "devices": None,
    "nodes": None,
    "strategy": "ddp",
    "rendezvous": None,
    "connect_timeout": 300.0,
    "phantom_difficulty": "easy",
    "phantom_test": None,
    "phantom_abnormal": 0.2,
}
"""Settings that older versions did not write, with the values that those versions ran with."""


_ONE_PROCESS: Mapping[str, Any] = {"devices": None, "nodes": None, "rendezvous": None}


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, checked one by one, in their own types.

    Raises:
        ConfigError: the file cannot be read or parsed, a key is unknown or repeated, or a value is not allowed.
    """
    from cardiocaps.config.yaml_text import load

    file = printable(path)
    try:
        content = load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"config: cannot read {file}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"config: {file} is not valid YAML: {printable(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config: {file} must hold lines of the form `setting: value`")
    known = options()
    for key in content:
        if key not in known:
            raise ConfigError(f"{file}: unknown setting {shown(key)}{did_you_mean(str(key)[:60], known)}")
    return {key: known[key].check(value, where=f"{file}: {key}") for key, value in content.items()}


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a run has saved, and those that its version did not know, with the values that it ran with."""
    return {**_NEWER, **settings}


def read_run(folder: Path) -> TrainConfig:
    """The resolved settings of the run in `folder`. Raises ConfigError where they are missing or incomplete."""
    file = folder / "config.yaml"
    if is_missing(file):
        raise ConfigError(f"{shown(folder)} is not the folder of a run: it has no config.yaml")
    settings = completed(read_yaml(file))
    missing = [name for name in options() if name not in settings]
    if missing:
        raise ConfigError(f"{printable(file)} is not whole, or of another version: it has no {', '.join(missing)}")
    for name, place in _read_places(folder).items():
        if settings[name] == Path(place["given"]):  # else a user has edited config.yaml since
            settings[name] = _locate(name, place)
    # The folder may have been moved, or made with --overwrite: neither is a setting of the run.
    return TrainConfig(**{**settings, "out": folder, "resume": None, "overwrite": False}).resolved()


def write_run(config: TrainConfig, folder: Path) -> None:
    """Write `config.yaml` and `paths.json`, from which `read_run` reads the settings. Raises OutputError.

    A path that has not changed since the run was written last keeps its entry. The number of processes is not kept: a
    run that is resumed has as many as its command says.
    """
    known, places = _read_places(folder), {}
    for name in _PLACES:
        path: Path | None = getattr(config, name)
        if path is not None and name in known and path == _locate(name, known[name]):
            places[name] = known[name]
        elif path is not None:
            places[name] = {"given": path_text(path)}
            # The working folder's own name may have characters that no setting may have.
            if as_path(path.absolute()) is not None:
                places[name]["absolute"] = str(path.absolute())
    write_json(folder / "paths.json", places)
    given: dict[str, Any] = {name: place["given"] for name, place in places.items()}
    write_text(folder / "config.yaml", replace(config, resume=None, **_ONE_PROCESS, **given).to_yaml())


def _read_places(folder: Path) -> dict[str, dict[str, str]]:
    """The content of `paths.json`; empty for a new run, and for one of an older version. Raises ConfigError."""
    file = folder / "paths.json"
    try:
        places = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return {name: {"given": places[name]["given"], **places[name]} for name in _PLACES if name in places}
    except OSError as error:
        raise ConfigError(f"cannot read {printable(file)}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            f"{printable(file)} is damaged; if you delete it, the paths in config.yaml are used as they are"
        ) from error


def _locate(name: str, place: Mapping[str, str]) -> Path:
    """Where the place of a setting is now: where it was, or, if that is missing, where the path as given leads.

    The second holds for a data folder that was moved together with the run.
    """
    given = Path(place["given"])
    there = Path(place.get("absolute", given))
    # A missing cache is made anew, provided that its parent exists.
    needed = there.parent if name == "cache_dir" else there
    if is_missing(needed) and (name == "cache_dir" or not is_missing(given)):
        return given
    return there


def check_resumable(old: TrainConfig, new: TrainConfig) -> None:
    """Raise ConfigError if the run of `old` cannot be resumed with `new`; the message lists all differing settings.

    Settings may differ if they do not change the result, or only how long a run trains.
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
