"""`paths.json`: where the paths among a run's settings led when the run began.

`config.yaml` holds each path as the user gave it, which may be relative. This file adds the absolute path, so that a
run can be resumed from another working folder.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from cardiocaps.config.option import as_path, path_text
from cardiocaps.errors import ConfigError, printable
from cardiocaps.runtime.files import is_missing

PLACES = ("data", "phantom_dir", "cache_dir")
"""Settings that name a place outside of the run's folder."""


def place_of(path: Path) -> dict[str, str]:
    """What `paths.json` keeps of a path."""
    place = {"given": path_text(path)}
    # The working folder's own name may have characters that no setting may have.
    if as_path(path.absolute()) is not None:
        place["absolute"] = str(path.absolute())
    return place


def read_places(file: Path) -> Mapping[str, Mapping[str, str]]:
    """The content of `paths.json`; empty for a run of an older version, which has none. Raises ConfigError."""
    try:
        places = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for name, place in places.items():
            known = name in PLACES and {"given"} <= set(place) <= {"given", "absolute"}
            if not known or None in map(as_path, place.values()):
                raise ValueError
    except OSError as error:
        raise ConfigError(f"cannot read {printable(file)}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{printable(file)} is damaged; if you delete it, the paths in config.yaml are used as they are"
        ) from error
    return dict(places)


def locate(name: str, given: str, absolute: str | None = None) -> Path:
    """Where the place of a setting is now: where it was, or, if that is missing, where the path as given leads.

    The second holds for a data folder that was moved together with the run.
    """
    there = Path(given if absolute is None else absolute)
    # A missing cache is made anew, provided that its parent exists.
    needed = there.parent if name == "cache_dir" else there
    if is_missing(needed) and (name == "cache_dir" or not is_missing(Path(given))):
        return Path(given)
    return there
