"""Optional packages, and the version of this one."""

from __future__ import annotations

import socket
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from cardiocaps import __version__
from cardiocaps.errors import ConfigError


def require_package(module: str, package: str, what: str, extra: str = "experiments") -> ModuleType:
    """Import a module of an optional package.

    Args:
        module: for example "monai.networks.nets".
        package: the package that has the module, as pip calls it.
        what: the setting that needs it, as the error message begins, for example "model: 'resnet18'".
        extra: the extra of cardiocaps that installs the package.

    Raises:
        ConfigError: the package is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except Exception as error:  # XGBoost raises one of its own if its library does not load
        reason = "" if find_spec(module.partition(".")[0]) is None else f", which cannot be imported ({error})"
        raise ConfigError(f"{what} needs the package {package}{reason}; pip install 'cardiocaps[{extra}]'") from error


def check_version(expected: str, work: str) -> None:
    """Raise ConfigError unless this machine has the version of cardiocaps that gave it work, for example a "job"."""
    if expected != __version__:
        raise ConfigError(
            f"{socket.gethostname()} has cardiocaps {__version__}; expected {expected}, which gave it the {work}"
        )
