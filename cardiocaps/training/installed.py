"""What is installed and built here, for `cardiocaps info`: versions, devices, kernels, extras, readers, the cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import capsops
from capsops.backends import info
from cardiocaps import __version__
from cardiocaps.data.cache import default_folder
from cardiocaps.errors import ConfigError, printable
from cardiocaps.training.environment import environment

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "cluster": ("ray", "submitit"),
    "decord": ("decord",),
    "dicom": ("pydicom", "PIL", "jpeg_ls"),
    "experiments": ("monai", "einops", "imblearn", "xgboost"),
    "explain": ("captum",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "loggers": ("tensorboard", "wandb", "mlflow"),
    "parquet": ("pyarrow",),
    "triton": ("triton",),
}
"""The extras of cardiocaps and the modules that they install. The packages are not imported: that takes seconds."""


def installed() -> dict[str, Any]:
    """All that `cardiocaps info` prints, in types of JSON.

    Raises:
        ConfigError: CAPSOPS_BACKEND or CAPSOPS_ISA has a value that is not allowed.
    """
    try:
        kernels = asdict(info())
    except capsops.BackendError as error:
        raise ConfigError(str(error)) from error
    here = environment("cpu")
    missing = {name: [x for x in modules if find_spec(x) is None] for name, modules in EXTRAS.items()}
    folder = default_folder()
    files = list(_files(folder))
    return {
        "cardiocaps": __version__,
        "capsops": kernels,
        "commit": here["commit"],
        "cpu": here["cpu"],
        "versions": {name: x for name, x in here["packages"].items() if x is not None},
        "extras": {name: {"installed": not absent, "missing": absent} for name, absent in missing.items()},
        "readers": {
            "pyav": f"libavcodec {_libavcodec()}",
            "decord": None if missing["decord"] else _version("decord") or _version("decord2"),
            "dicom": None if "pydicom" in missing["dicom"] else _version("pydicom"),
        },
        "cache": {"folder": str(folder), "files": len(files), "bytes": sum(files)},
    }


def as_text(found: Mapping[str, Any]) -> str:
    """What `installed` returns, as lines."""
    kernels, cache = found["capsops"], found["cache"]
    versions = ", ".join(f"{name} {x}" for name, x in found["versions"].items())
    rows = [
        ("cardiocaps", f"{found['cardiocaps']}, Python {kernels['python']}, torch {kernels['torch']}"),
        ("packages", versions),
        ("machine", f"{found['cpu']}, {kernels['machine']}, {kernels['threads']} threads"),
        ("GPUs", ", ".join(kernels["gpus"]) or "none that torch sees"),
        ("capsops", f"{kernels['version']}; extension: {kernels['extension']}; {kernels['instruction_set']}"),
        *((f"backend {name}", state) for name, state in kernels["backends"].items()),
        *((f"reader {name}", state or "not installed") for name, state in found["readers"].items()),
    ]
    for name, state in found["extras"].items():
        lacking = f"lacks {', '.join(state['missing'])}: pip install 'cardiocaps[{name}]'"
        rows.append((f"extra {name}", "installed" if state["installed"] else lacking))
    rows.append(("cache", f"{printable(cache['folder'])}: {cache['files']} files, {cache['bytes'] / 1e6:.1f} MB"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _libavcodec() -> str:
    import av

    return ".".join(map(str, av.library_versions["libavcodec"]))


def _files(folder: Path) -> Iterator[int]:
    """The sizes of the files in a folder and its subfolders, in bytes. What cannot be read does not count."""
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                yield (Path(place) / name).lstat().st_size
            except OSError:
                continue
