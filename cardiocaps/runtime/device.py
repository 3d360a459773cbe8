"""The device of a run and how it computes there, decided from the settings and the GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

import capsops
from capsops.backends import check_environment
from cardiocaps.errors import ConfigError

if TYPE_CHECKING:
    from cardiocaps.config import TrainConfig


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, and whether it computes in bfloat16 without emulation."""

    name: str
    bfloat16: bool


@dataclass(frozen=True)
class Machine:
    """How a run uses the machine; see `decide`."""

    device: Literal["cpu", "cuda"]  # ROCm is "cuda" to torch
    gpu: str | None  # its name, if the run uses it
    precision: Literal["32", "bf16"]
    tf32: bool
    channels_last: bool
    compile: bool
    backend: str  # of capsops; "auto": the first that can run

    @property
    def pin_memory(self) -> bool:
        """Whether batches are in page-locked memory, which a GPU can read while it computes."""
        return self.device == "cuda"

    def __str__(self) -> str:
        flags = {
            "TF32": self.tf32,
            "channels_last": self.channels_last,
            "compiled": self.compile,
            f"routing on {self.backend}": self.backend != "auto",
        }
        number = {"32": "float32", "bf16": "bfloat16 autocast"}[self.precision]
        where = "cpu" if self.gpu is None else f"{self.device} ({self.gpu})"
        return ", ".join([where, number, *(name for name, on in flags.items() if on)])

    def lay_out(self, network: nn.Module) -> None:
        """Give the weights of convolutions the memory format of the images from `EchoDataModule`."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def decide(config: TrainConfig, gpu: Gpu | None) -> Machine:
    """How a run with the settings `config` uses a machine with `gpu` (None: no GPU).

    Raises:
        ConfigError: the device is "cuda" without a GPU, the precision is "bf16" on a GPU without it, or
            CAPSOPS_BACKEND or CAPSOPS_ISA has an unknown value.
    """
    try:
        check_environment()
    except capsops.BackendError as error:
        raise ConfigError(str(error)) from error
    if config.device == "cpu":
        gpu = None
    elif config.device == "cuda" and gpu is None:
        raise ConfigError("device is 'cuda'; expected auto or cpu, because torch sees no GPU")
    if config.precision == "bf16" and gpu is not None and not gpu.bfloat16:
        raise ConfigError(f"precision is 'bf16'; expected 32, because {gpu.name} does not compute in bfloat16")
    return Machine(
        device="cpu" if gpu is None else "cuda",
        gpu=None if gpu is None else gpu.name,
        precision=config.precision,
        tf32=config.tf32 and gpu is not None,
        channels_last=config.channels_last,
        compile=config.compile,
        backend=config.backend,
    )


def visible_gpu() -> Gpu | None:
    """The first GPU that torch finds through CUDA or ROCm. Apple's GPUs do not count: they lack float64."""
    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(0), torch.cuda.is_bf16_supported(including_emulation=False))


@contextmanager
def machine_for(config: TrainConfig) -> Iterator[Machine]:
    """The machine of a run. Inside the block, torch uses the run's number of threads and its choice of TF32, and
    capsops its backend; these are global states, and the block restores them at its end.

    Raises:
        ConfigError: see `decide`; or a kernel in the block cannot run on the backend that is set.
    """
    # Makes matrix products on a GPU repeatable to the last digit. CUDA reads it when it starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    machine = decide(config, None if config.device == "cpu" else visible_gpu())
    # Do not use the newer `fp32_precision`: after it has allowed TF32, reading these flags raises an error, and
    # Lightning and torch.compile read them.
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, torch.get_num_threads()
    products.allow_tf32 = convolutions.allow_tf32 = machine.tf32
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with nullcontext() if config.backend == "auto" else capsops.use_backend(config.backend):
            yield machine
    except capsops.BackendError as error:
        setting = "" if config.backend == "auto" else f"backend is {config.backend!r}, but "
        raise ConfigError(f"{setting}{error}") from error
    finally:
        products.allow_tf32, convolutions.allow_tf32, threads = before
        torch.set_num_threads(threads)


@contextmanager
def compilation_errors() -> Iterator[None]:
    """Turn errors of torch.compile inside the block, such as a missing C++ compiler, into a ConfigError of one line."""
    try:
        yield
    except Exception as error:
        # Known by its module, because importing the class takes a second.
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"compile: torch could not compile the network ({reason}); leave out --compile") from error
