"""Packages that only some systems need."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from cardiocaps.errors import ConfigError


def require_package(module: str, package: str, what: str, extra: str = "experiments") -> ModuleType:
    """The module, imported now.

    Args:
        module: for example "monai.networks.nets". package: what provides it, as pip calls it. what: needs it, in words
            that an error can begin with, for example "model: 'resnet18'". extra: of capsops, which brings the package.

    Raises:
        ConfigError: the package is not installed, or cannot be imported.
    """
    try:
        return import_module(module)
    except Exception as error:  # XGBoost has one of its own for a library that does not load
        reason = "" if find_spec(module.partition(".")[0]) is None else f", which cannot be imported ({error})"
        raise ConfigError(f"{what} needs the package {package}{reason}; pip install 'capsops[{extra}]'") from error
