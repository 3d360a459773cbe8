"""The compiled CUDA backend: the kernels of the extension, for tensors on an NVIDIA GPU."""

from __future__ import annotations

from functools import cache

import torch

from . import extension
from ._compiling import constant_when_compiled
from .extension import run as run

DEVICE_TYPE = "cuda"


def why_not(op: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run an operator on tensors like these, or None if it can."""
    if extension.MISSING:
        return extension.MISSING
    if device.type != DEVICE_TYPE:
        return f"it does not run on {device.type}"
    if dtype not in extension.DTYPES:
        return f"it does not take {dtype}"
    if (reason := unfit(0 if device.index is None else device.index)) is not None:
        return reason
    return None if op in extension.OPERATORS[DEVICE_TYPE] else f"it has no kernel for {op}"


@cache
@constant_when_compiled
def unfit(index: int) -> str | None:
    """Why the kernels that were built do not run on GPU number `index`, or None if they do."""
    if extension._C.cuda_architectures is None:
        return f"the extension was built without CUDA kernels ({extension._C.cuda_reason})"
    if torch.version.hip:
        return "it needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    driver, runtime = extension._C.cuda_driver(), extension._C.cuda_runtime
    if driver // 1000 < runtime // 1000:
        return f"its driver runs CUDA up to {_version(driver)}, and the kernels were built by CUDA {_version(runtime)}"
    major, minor = torch.cuda.get_device_capability(index)
    form = form_for(major, minor)
    if form is None:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, "
            f"and the kernels were built for {extension.gpu_code()} (CAPSOPS_CUDA_ARCHS)"
        )
    if form == "PTX" and driver < runtime:
        return (
            f"its driver compiles PTX of CUDA up to {_version(driver)}, and CUDA {_version(runtime)} made that of the "
            f"kernels, which were built for {extension.gpu_code()} (CAPSOPS_CUDA_ARCHS)"
        )
    return None


def form_for(major: int, minor: int) -> str | None:
    """In which form a GPU of a compute capability runs the kernels: "machine code", "PTX", or None if it cannot.

    Machine code runs on GPUs of the same major version and at least its minor version. PTX ("90-virtual") runs on all
    later GPUs: their driver compiles it when it loads a kernel for the first time, and keeps the result on disk.
    """
    architectures = (extension._C.cuda_architectures or "").split()
    machine_code = [divmod(int(a), 10) for a in architectures if a.isdigit()]
    if any(a == major and b <= minor for a, b in machine_code):
        return "machine code"
    ptx = [divmod(int(a.removesuffix("-virtual")), 10) for a in architectures if not a.isdigit()]
    return "PTX" if any(capability <= (major, minor) for capability in ptx) else None


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
