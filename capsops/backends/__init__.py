"""The backends, and the choice between them.

Each backend is a module with the same function names. `reference` is plain PyTorch and differentiated by it; the
compiled ones fill the outputs of the operators in `_ops.py`. A compiled backend says by `why_not` why it cannot take a
tensor.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import cpu

# In the order of preference. The reference takes whatever the others refuse.
COMPILED: dict[str, ModuleType] = {"cpu": cpu}
NAMES = (*COMPILED, "reference")


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here."""


def _checked(name: str, where: str) -> str:
    if name not in NAMES:
        raise BackendError(f"{where} is {name!r}; allowed are {', '.join(NAMES)}")
    return name


# The last one counts.
_forced: list[str] = []
if os.environ.get("CAPSOPS_BACKEND"):
    _forced.append(_checked(os.environ["CAPSOPS_BACKEND"], "CAPSOPS_BACKEND"))


def use_backend(name: str) -> AbstractContextManager[None]:
    """Use one backend ("cpu" or "reference") inside a block, `with use_backend("reference"):`, for all tensors.

    Holds for the whole process, not for one thread: of overlapping blocks the last begun counts. The environment
    variable CAPSOPS_BACKEND does the same for a whole run.

    Raises:
        BackendError: there is no such backend; or, at the first operator, it cannot take the tensors.
    """
    return _using(_checked(name, "use_backend: name"))


@contextmanager
def _using(name: str) -> Iterator[None]:
    _forced.append(name)
    try:
        yield
    finally:
        # The last of this name, for another thread's block may have begun meanwhile.
        del _forced[len(_forced) - 1 - _forced[::-1].index(name)]


def forced() -> str | None:
    """The backend that is forced, if one is."""
    return _forced[-1] if _forced else None


def select(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that takes tensors like these.

    Raises:
        BackendError: a backend is forced and cannot take them.
    """
    only = forced()
    if only == "reference":
        return "reference"
    if device.type == "meta" and only is None:
        return "meta"  # shapes only, by the operators' own rules
    reasons = []
    for name, module in COMPILED.items():
        if only not in (None, name):
            continue
        reason = module.why_not(device.type, dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if only:
        raise BackendError(f"the forced backend cannot run here: {'; '.join(reasons)}")
    _warn_slow("; ".join(reasons))
    return "reference"


def compiled(op: str, tensor: Tensor) -> ModuleType:
    """The compiled backend for an operator on tensors like this one.

    Raises:
        BackendError: there is none.
    """
    for module in COMPILED.values():
        if module.why_not(tensor.device.type, tensor.dtype) is None:
            return module
    raise BackendError(f"{op}: no compiled backend takes a {tensor.dtype} tensor on {tensor.device}\n{info()}")


_warned: set[str] = set()


def _warn_slow(reasons: str) -> None:
    # A graph that is being compiled has no place for a warning; whoever compiles has run the code before.
    if reasons not in _warned and not torch.compiler.is_compiling():
        _warned.add(reasons)
        warnings.warn(
            f"capsops runs on its slow reference backend, which materialises the votes ({reasons}). "
            "`python -m capsops.info` says what was built.",
            RuntimeWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class Info:
    """What was built, what runs here, and why not the rest. Prints as a table."""

    version: str
    torch: str
    python: str
    machine: str
    threads: int
    extension: str  # what built it, or that it was not built
    instruction_set: str  # the instruction set of the CPU kernels
    forced: str | None
    backends: dict[str, str]  # name -> "yes", or why not

    def __str__(self) -> str:
        rows = [
            ("capsops", f"{self.version}, Python {self.python}, torch {self.torch}"),
            ("machine", f"{self.machine}, {self.threads} threads"),
            ("extension", self.extension),
            ("instruction set", self.instruction_set),
            ("backend forced", self.forced or "none (the first that can, in the order below)"),
            *((f"backend {name}", state) for name, state in self.backends.items()),
        ]
        width = max(len(key) for key, _ in rows)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)

    __repr__ = __str__


def info() -> Info:
    """What was built, what runs here, and why not the rest."""
    from .. import __version__

    states = {name: module.why_not(module.DEVICE_TYPE, torch.float32) or "yes" for name, module in COMPILED.items()}
    states["reference"] = "yes (plain PyTorch; slow, materialises the votes)"
    return Info(
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        extension=cpu.built() or "not built",
        instruction_set=cpu.instructions() or "none",
        forced=forced(),
        backends=states,
    )
