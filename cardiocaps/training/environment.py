"""The environment of a run, on which a result can depend: versions, processor, GPU, commit."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from cardiocaps import __version__

_PACKAGES = (
    "torch",
    "lightning",
    "numpy",
    "scipy",
    "torchmetrics",
    "scikit-learn",
    "imbalanced-learn",
    "xgboost-cpu",
    "monai",
    "av",
    "matplotlib",
)


def environment(device: str) -> dict[str, Any]:
    """Versions, processor, threads, GPU and commit of a run on `device`, "cpu" or "cuda".

    It never identifies the user or the machine: no host name, user name, path or environment variable.
    """
    import torch  # here, because tables read run folders without it

    import capsops

    # Not from the metadata: `pip install -e .` installs both packages as one distribution, cardiocaps.
    packages: dict[str, str | None] = {"capsops": capsops.__version__}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    gpu = torch.cuda.is_available()
    return {
        "cardiocaps": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": packages,
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "gpu": torch.cuda.get_device_name() if gpu else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or "unknown")


def _commit() -> str | None:
    """The commit of the checkout that holds this package, with `+` if files differ from it; None if installed."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    command = ("git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+")
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
