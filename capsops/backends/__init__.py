"""The backends, and the choice between them.

Each backend is a module with the same function names. `reference` is plain PyTorch and differentiated by it; the
compiled ones fill the outputs of the operators in `capsops.ops`. A compiled backend says by `why_not` why it cannot run an
operator on tensors of a device and dtype.
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
from typing import NamedTuple

import torch
from torch import Tensor

from ..dtypes import FLOATING
from . import cpu, cuda, extension, triton

# In the order of preference. The reference takes whatever the others refuse.
COMPILED: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
NAMES = (*COMPILED, "reference")


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here."""


_EXPECTED = f"expected one of {', '.join(NAMES)}"

# The last one counts.
_forced: list[str] = []

# What is wrong with the environment. An import that failed would be a traceback in every program.
_environment_error = cpu.ENVIRONMENT_ERROR
if _named := os.environ.get("CAPSOPS_BACKEND"):
    if _named in NAMES:
        _forced.append(_named)
    else:
        _environment_error = f"CAPSOPS_BACKEND is {_named!r}; {_EXPECTED}"


def check_environment() -> None:
    """Raise BackendError if CAPSOPS_BACKEND or CAPSOPS_ISA names what there is not. Every operator asks this."""
    if _environment_error is not None:
        raise BackendError(_environment_error)


def use_backend(name: str) -> AbstractContextManager[None]:
    """Use one backend inside a block, `with use_backend("reference"):`, for all tensors.

    name: "cpu", "cuda", "triton" or "reference".

    Holds for the whole process, not for one thread: of overlapping blocks the last begun counts. The environment
    variable CAPSOPS_BACKEND does the same for a whole run; if it names no backend, every operator raises an error.

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
        # The last of this name, for another thread's block may have begun meanwhile.
        del _forced[len(_forced) - 1 - _forced[::-1].index(name)]


def forced() -> str | None:
    """The backend that is forced, if one is."""
    return _forced[-1] if _forced else None


def select(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that runs an operator on tensors like these.

    Raises:
        BackendError: a backend is forced and cannot, or `check_environment` raises it.
    """
    check_environment()
    only = forced()
    if only == "reference":
        return "reference"
    if device.type == "meta" and only is None:
        return "meta"  # shapes only, by the operators' own rules
    reasons = []
    for name, module in COMPILED.items():
        if only not in (None, name):
            continue
        reason = module.why_not(op, device, dtype)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    if dtype not in FLOATING:
        return "reference"  # it checks the arguments first, and refuses this one by name
    if only:
        raise BackendError(f"the forced backend cannot run {op} here: {'; '.join(reasons)}")
    _warn_slow(op, "; ".join(reasons))
    return "reference"


class Choice(NamedTuple):
    """The backend that a call has chosen: it runs the operator `op` and its gradient on such tensors."""

    op: str
    device: torch.device
    dtype: torch.dtype
    backend: ModuleType

    @staticmethod
    def of(op: str, tensor: Tensor, name: str) -> Choice | None:
        """The choice of the backend `name`; None for "meta", where nothing runs."""
        return None if name == "meta" else Choice(op, tensor.device, tensor.dtype, COMPILED[name])


class _Thread(threading.local):
    choice: Choice | None = None


_thread = _Thread()


class remembered:
    """A context in which this thread uses a choice for the operator and its gradient, instead of choosing again."""

    def __init__(self, choice: Choice | None) -> None:
        self._choice = choice

    def __enter__(self) -> None:
        self._outer, _thread.choice = _thread.choice, self._choice

    def __exit__(self, *_: object) -> None:
        _thread.choice = self._outer


def chosen() -> Choice | None:
    """The choice that is remembered in this thread."""
    return _thread.choice


def compiled(op: str, tensor: Tensor) -> ModuleType:
    """The compiled backend for an operator on tensors like this one.

    This is the remembered one; else the one that is forced, if it can run the operator; else the first that can.

    Raises:
        BackendError: there is none, or `check_environment` raises it.
    """
    device, dtype = tensor.device, tensor.dtype
    choice = _thread.choice
    if (
        choice is not None
        and choice.dtype == dtype
        and choice.device == device
        and choice.op == op.removesuffix("_backward")
    ):
        return choice.backend
    check_environment()
    only = forced()
    if only in COMPILED and COMPILED[only].why_not(op, device, dtype) is None:
        return COMPILED[only]
    for module in COMPILED.values():
        if module.why_not(op, device, dtype) is None:
            return module
    raise BackendError(f"{op}: no compiled backend takes a {dtype} tensor on {device}\n{info()}")


_warned: set[str] = set()


def _warn_slow(op: str, reasons: str) -> None:
    # A graph that is being compiled has no place for a warning; whoever compiles has run the code before.
    if reasons not in _warned and not torch.compiler.is_compiling():
        _warned.add(reasons)
        warnings.warn(
            f"capsops runs {op} on its slow reference backend, which materialises the votes ({reasons}). "
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
    gpus: tuple[str, ...]  # those that torch sees
    forced: str | None
    backends: dict[str, str]  # name -> "yes", or why not
    chosen: dict[str, str]  # device -> what runs on its tensors

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


# One that all backends have, and one that not all have.
_USUAL, _RARE = "dynamic_routing", "em_routing"


def _chosen(device: torch.device) -> str:
    """What runs on the tensors of a device."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            usual, rare = (select(op, device, torch.float32) for op in (_USUAL, _RARE))
    except BackendError as error:
        return f"nothing: {error}"
    if usual == rare:
        return usual
    return f"{usual}; EM routing on {rare} ({usual}: {COMPILED[usual].why_not(_RARE, device, torch.float32)})"


def _state(module: ModuleType) -> str:
    usual, rare = (module.why_not(op, torch.device(module.DEVICE_TYPE), torch.float32) for op in (_USUAL, _RARE))
    return f"no: {usual}" if usual else f"yes, but {rare}" if rare else "yes"


def info() -> Info:
    """What was built, what runs here, and why not the rest.

    Raises:
        BackendError: `check_environment` raises it.
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
