"""The backends, the choice between them, and `Info`: what was built, what runs here, and why not the rest.

`reference` has the functions of the operators in plain PyTorch, which differentiates them. The others are compiled.
Each of those is a module with two functions: `why_not` tells why it cannot run an operator on tensors of a device and
dtype, and `run` fills the outputs of an operator.
"""

from __future__ import annotations

import os
import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ..dtypes import FLOATING
from . import cpu, cuda, extension, triton

# In the order of preference. What none of them can run, the reference runs.
COMPILED: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
NAMES = (*COMPILED, "reference")


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here."""


_EXPECTED = f"expected one of {', '.join(NAMES)}"

# The names that `use_backend` and CAPSOPS_BACKEND have forced; the last one counts.
_forced: list[str] = []

# What is wrong with the environment variables, if anything. It is raised by the first operator: an exception during
# the import would be a traceback in every program.
_environment_error = cpu.ENVIRONMENT_ERROR
if _named := os.environ.get("CAPSOPS_BACKEND"):
    if _named in NAMES:
        _forced.append(_named)
    else:
        _environment_error = f"CAPSOPS_BACKEND is {_named!r}; {_EXPECTED}"


def check_environment() -> None:
    """Raise BackendError if CAPSOPS_BACKEND or CAPSOPS_ISA has a value that is not allowed. Every operator calls it."""
    if _environment_error is not None:
        raise BackendError(_environment_error)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Use one backend inside a block, `with use_backend("reference"):`, for all tensors.

    This holds for the whole process, not for one thread: of overlapping blocks, the one that began last counts. A
    gradient runs on the backend of its forward pass. The environment variable CAPSOPS_BACKEND forces a backend for a
    whole run; if it has no backend's name, every operator raises an error.

    Args:
        name: "cpu", "cuda", "triton" or "reference".

    Raises:
        BackendError: there is no such backend; or, at the first operator, it cannot take the tensors.
    """
    if name not in NAMES:
        raise BackendError(f"use_backend: name is {name!r}; {_EXPECTED}")
    return _using(name)


@contextmanager
def _using(name: str) -> Iterator[None]:
    _forced.append(name)
    try:
        yield
    finally:
        # Remove the last entry of this name: another thread's block may have begun in the meantime.
        del _forced[len(_forced) - 1 - _forced[::-1].index(name)]


def forced() -> str | None:
    """The name of the backend that is forced, or None."""
    return _forced[-1] if _forced else None


def _first(op: str, device: torch.device, dtype: torch.dtype, only: str | None) -> tuple[str | None, list[str]]:
    """The first compiled backend that can run an operator, and why those before it cannot.

    Args:
        only: the name of the single backend to ask; None asks all.
    """
    reasons: list[str] = []
    for name, module in COMPILED.items():
        if only not in (None, name):
            continue
        reason = module.why_not(op, device, dtype)
        if reason is None:
            return name, reasons
        reasons.append(f"{name}: {reason}")
    return None, reasons


def select(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that runs an operator on tensors like these; "meta" where only shapes are computed.

    Raises:
        BackendError: a backend is forced that cannot run it, or the environment is wrong (`check_environment`).
    """
    check_environment()
    only = forced()
    if only == "reference":
        return "reference"
    if device.type == "meta" and only is None:
        return "meta"
    name, reasons = _first(op, device, dtype, only)
    if name is not None:
        return name
    if dtype not in FLOATING:
        return "reference"  # the arguments are checked before it runs, and the check names this one
    if only:
        raise BackendError(f"the forced backend cannot run {op} here: {'; '.join(reasons)}")
    _warn_slow(op, "; ".join(reasons))
    return "reference"


Choice = tuple[str, torch.device, torch.dtype, ModuleType]
"""An operator, the device and dtype of its tensors, and the backend that runs it and its gradient on them."""


class _Thread(threading.local):
    choice: Choice | None = None


_thread = _Thread()


def remember(choice: Choice | None) -> Choice | None:
    """Let the operators that this thread calls use this choice instead of choosing again; return the choice before."""
    before, _thread.choice = _thread.choice, choice
    return before


def remembered() -> Choice | None:
    """The choice that this thread remembers."""
    return _thread.choice


def compiled(op: str, tensor: Tensor) -> ModuleType:
    """The compiled backend for an operator on tensors like this one.

    It is the remembered one; otherwise the forced one, if it can run the operator; otherwise the first that can.

    Raises:
        BackendError: there is none, or the environment is wrong (`check_environment`).
    """
    device, dtype = tensor.device, tensor.dtype
    choice = _thread.choice
    # Compared, because a torch dispatch mode may call other operators while this call runs.
    if choice is not None and choice[:3] == (op.removesuffix("_backward"), device, dtype):
        return choice[3]
    check_environment()
    only = forced()
    name, reasons = _first(op, device, dtype, only if only in COMPILED else None)
    if name is None and only in COMPILED:
        name, reasons = _first(op, device, dtype, None)
    if name is None:
        raise BackendError(
            f"{op}: no compiled backend takes a {dtype} tensor on {device} ({'; '.join(reasons)})\n{info()}"
        )
    return COMPILED[name]


_warned: set[str] = set()


def _warn_slow(op: str, reasons: str) -> None:
    # Not while torch.compile traces: a warning would break the graph.
    if reasons not in _warned and not torch.compiler.is_compiling():
        _warned.add(reasons)
        warnings.warn(
            f"capsops runs {op} on its slow reference backend, which materialises the votes ({reasons}). "
            "`python -m capsops info` says what was built.",
            RuntimeWarning,
            stacklevel=5,
        )


@dataclass(frozen=True)
class Info:
    """What was built, what runs here, and why not the rest. Prints as a table."""

    version: str
    torch: str
    python: str
    machine: str
    threads: int
    extension: str  # what built it, or "not built"
    instruction_set: str  # of the CPU kernels
    gpus: tuple[str, ...]  # as torch sees them
    forced: str | None
    backends: dict[str, str]  # name -> "yes", "yes, without" some operators, or why not
    chosen: dict[str, str]  # device -> the backend that runs on its tensors

    def __str__(self) -> str:
        rows = [
            ("capsops", f"{self.version}, Python {self.python}, torch {self.torch}"),
            ("machine", f"{self.machine}, {self.threads} threads"),
            ("GPUs", ", ".join(self.gpus) or "none that torch sees"),
            ("extension", self.extension),
            ("instruction set", self.instruction_set),
            ("backend forced", self.forced or "none (the first that can, in the order below)"),
            *((f"backend {name}", state) for name, state in self.backends.items()),
            *((f"on {device}", state) for device, state in self.chosen.items()),
        ]
        width = max(len(key) for key, _ in rows)
        return "\n".join(f"{key:<{width}}  {value}" for key, value in rows)

    __repr__ = __str__


# An operator that all compiled backends have.
_USUAL = "dynamic_routing"


def _chosen(device: torch.device) -> str:
    """The backend that runs on the tensors of a device, for `Info`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return select(_USUAL, device, torch.float32)
    except BackendError as error:
        return f"nothing: {error}"


def _state(module: ModuleType) -> str:
    """Whether a compiled backend runs here, and what it has no kernel for, for `Info`."""
    device = torch.device(module.DEVICE_TYPE)
    if reason := module.why_not(_USUAL, device, torch.float32):
        return f"no: {reason}"
    forward = sorted(op for op in extension.OPERATORS.get("cpu", ()) if not op.endswith("_backward"))
    lacking = [op for op in forward if module.why_not(op, device, torch.float32)]
    return f"yes, without {', '.join(lacking)}" if lacking else "yes"


def info() -> Info:
    """What was built, what runs here, and why not the rest.

    Raises:
        BackendError: the environment is wrong (`check_environment`).
    """
    check_environment()
    from .. import __version__

    gpus = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return Info(
        version=__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        machine=platform.machine(),
        threads=torch.get_num_threads(),
        extension=extension.built() or "not built",
        instruction_set=cpu.instructions() or "none",
        gpus=tuple(f"{device} {torch.cuda.get_device_name(device)}" for device in gpus),
        forced=forced(),
        backends={
            **{name: _state(module) for name, module in COMPILED.items()},
            "reference": "yes (plain PyTorch; slow, materialises the votes)",
        },
        chosen={str(device): _chosen(device) for device in (torch.device("cpu"), *gpus)},
    )
