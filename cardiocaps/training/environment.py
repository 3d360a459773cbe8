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
    "capsops",
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
    """Versions, processor, threads, GPU and commit.

    It never identifies the user or the machine: no host name, user name, path or environment variable.

    Args:
        device: the one that the run computes on, "cpu" or "cuda".
    """
    import torch  # here, because tables read run folders without it

    packages: dict[str, str | None] = {}
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

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(root), *arguments)
        kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, env=kept)
        return done.stdout.strip()

    try:
        # An installed package can lie inside the checkout of another project, whose commit means nothing here.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None
