"""Compiles every kernel of the Triton backend for an NVIDIA GPU; the machine does not need one.

    python -m tests.capsops.triton_cubins 80 90 [--dtype float32] [--shape 8,4096,8,2,16]

Every operator runs forward and backward on tensors of the CPU, but its kernels are compiled instead of launched: with
the arguments that they would be launched with. Prints a line for each kernel; the exit status is 1 where one fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

import capsops
from capsops.backends import triton as backend

from .routings import OPERATORS, run

# These use every kernel; the other routings differ from them in options.
FEW = ("attention-weights", "dynamic3", "self-attention-prior-weights", "em3", "votes", "step-logits-inputs")


class Absent(DriverBase):
    """The driver of a GPU that the machine does not have."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # keeps the kernels of different GPUs apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def is_active() -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        return None


def resources(cubin: bytes) -> tuple[int, int]:
    """The bytes of stack, into which registers spill, and the number of registers."""
    if cubin in known:
        return known[cubin]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    known[cubin] = tuple(int(re.search(rf"\b{name}:(\d+)", said)[1]) for name in ("STACK", "REG"))
    return known[cubin]


# Triton ships one.
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

known: dict[bytes, tuple[int, int]] = {}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("capabilities", type=int, nargs="+")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16", "float16"))
    parser.add_argument("--shape", default="8,64,8,2,16", help="B,N,K,J,D")
    parser.add_argument("--all", action="store_true", help="every option of every routing")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    shape = tuple(int(n) for n in options.shape.split(","))
    compiled: dict[str, list[float]] = {}
    used: dict[str, tuple[int, int]] = {}

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        start = time.perf_counter()
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.asm["cubin"], self.__name__
        name = f"sm_{driver.capability} {self.__name__} {kwargs.get('routing', '')}".rstrip()
        compiled.setdefault(name, []).append(time.perf_counter() - start)
        used[name] = max(used.get(name, (0, 0)), resources(kernel.asm["cubin"]))
        return kernel

    launch = JITFunction.run
    JITFunction.run = compile_instead
    backend.why_not = lambda *_: None
    for capability in options.capabilities:
        driver = Absent(capability)
        triton.runtime.driver.set_active(driver)
        for routing in OPERATORS:
            if options.all or routing.name in FEW:
                run(routing, routing.arguments(shape), dtype, "triton")
            if options.all or routing.name == "votes":
                run(routing, routing.arguments(shape, shared=True), dtype, "triton")
        with capsops.use_backend("triton"):
            features = torch.randn(2, 16, 5, 5, dtype=dtype, requires_grad=True)
            capsops.primary_capsules(features, 4).sum().backward()
            capsops.squash(torch.randn(3, 5, dtype=dtype), kind="efficient")
            # Votes that are given, the same for all output capsules, with initial logits.
            B, N, K, J, _ = shape
            u, logits = (torch.randn(B, N, size, dtype=dtype, requires_grad=True) for size in (K, J))
            capsops.routing_step(u.unsqueeze(2), None, torch.zeros(B, J, K, dtype=dtype), logits).sum().backward()
    for name, seconds in compiled.items():
        stack, registers = used[name]
        print(
            f"{name}: {len(seconds)} launches, compiled in {sum(seconds):.1f} s, "
            f"at most {registers} registers, {stack} bytes of stack"
        )
    return 0 if compiled else 1


if __name__ == "__main__":
    sys.exit(main())
