"""The compiled CPU backend: the kernels of the extension, for tensors on the CPU."""

from __future__ import annotations

import os

import torch

from . import extension
from .extension import run as run

DEVICE_TYPE = "cpu"


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that the kernels were compiled for and that this CPU has, best first."""
    return () if extension._C is None else tuple(extension._C.instruction_sets().split())


def use_instruction_set(name: str) -> None:
    """Use the kernels of one instruction set from now on; CAPSOPS_ISA does so from the start.

    Args:
        name: one of `instruction_sets`, or "auto", the default: the best one, or the next one for votes that would
            leave half of its vectors unused.

    Raises:
        ValueError: the instruction set was not compiled or does not run here.
    """
    if extension._C is None or not extension._C.use_instruction_set(name):
        allowed = ", ".join(("auto", *instruction_sets())) if extension._C else "none: the extension does not load"
        raise ValueError(f"CAPSOPS_ISA is {name!r}; expected one of {allowed}, which run here")


# The error message for a wrong CAPSOPS_ISA.
ENVIRONMENT_ERROR: str | None = None
if extension._C is not None and os.environ.get("CAPSOPS_ISA"):
    try:
        use_instruction_set(os.environ["CAPSOPS_ISA"])
    except ValueError as error:
        ENVIRONMENT_ERROR = str(error)


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run an operator on tensors like these, or None if it can."""
    if extension.MISSING:
        return extension.MISSING
    if device.type != DEVICE_TYPE:
        return f"it does not run on {device.type}"
    if dtype not in extension.DTYPES:
        return f"it does not take {dtype}"
    return None if op in extension.OPERATORS[DEVICE_TYPE] else f"it has no kernel for {op}"


def instructions() -> str | None:
    """The instruction set in use and those that could be forced, for `capsops.info`."""
    if extension._C is None:
        return None
    others = [name for name in instruction_sets() if name != extension._C.instruction_set()]
    return extension._C.instruction_set() + (f" (CAPSOPS_ISA can force {' or '.join(others)})" if others else "")
