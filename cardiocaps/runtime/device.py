"""What a run computes on: decided in one place from its settings and the GPU, and set in one place."""

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
    """A GPU, by its name, and whether it computes in bfloat16 itself."""

    name: str
    bfloat16: bool


@dataclass(frozen=True)
class Machine:
    """How a run uses the machine; see `decide`."""

    device: Literal["cpu", "cuda"]  # ROCm is "cuda" to torch
    gpu: str | None  # its name, where the run uses it
    precision: Literal["32", "bf16"]
    tf32: bool
    channels_last: bool
    compile: bool
    backend: str  # of capsops; "auto": the first that can

    @property
    def pin_memory(self) -> bool:
        """Whether batches wait in page-locked memory, from which a GPU fetches them while it computes."""
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
        """Put the weights of the convolutions in the order of the images, which `EchoDataModule` makes."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def compile_for_training(self, network: nn.Module) -> None:
        """Compile the network in place, so that the names in its state dict stay as they are.

        For training alone: one pass over the test split would not win back the time.
        """
        if self.compile:
            network.compile()


def decide(config: TrainConfig, gpu: Gpu | None) -> Machine:
    """How a run of `config` uses a machine with `gpu` (None: no GPU).

    Raises:
        ConfigError: a GPU is asked for and there is none, or bfloat16 on one that cannot compute in it; or
            CAPSOPS_BACKEND or CAPSOPS_ISA names what there is not.
    """
    try:
        check_environment()
    except capsops.BackendError as error:
        raise ConfigError(str(error)) from error
    if config.device == "cpu":
        gpu = None
    elif config.device == "cuda" and gpu is None:
        raise ConfigError("device: 'cuda' is asked for, but torch sees no GPU; give auto or cpu")
    if config.precision == "bf16" and gpu is not None and not gpu.bfloat16:
        raise ConfigError(f"precision: 'bf16' is asked for, but {gpu.name} does not compute in bfloat16; give 32")
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
    """The first GPU that torch sees through CUDA or ROCm, if there is one. Apple's is none: it lacks float64."""
    if not torch.cuda.is_available():
        return None
    return Gpu(torch.cuda.get_device_name(0), torch.cuda.is_bf16_supported(including_emulation=False))


@contextmanager
def machine_for(config: TrainConfig) -> Iterator[Machine]:
    """The machine of a run. Inside the block torch, which keeps these for the whole process, has the run's number of
    threads and its choice about TF32, and capsops its backend; after it, those of before.

    Raises:
        ConfigError: see `decide`; and where the block meets a backend that is asked for and cannot run.
    """
    # Without it, matrix products on a GPU may differ in the last digits from run to run. Read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    machine = decide(config, None if config.device == "cpu" else visible_gpu())
    # Not through `fp32_precision`: once it has allowed TF32, these two and `torch.get_float32_matmul_precision` raise,
    # and Lightning and torch.compile ask them.
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32, torch.get_num_threads()
    products.allow_tf32 = convolutions.allow_tf32 = machine.tf32
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with nullcontext() if config.backend == "auto" else capsops.use_backend(config.backend):
            yield machine
    except capsops.BackendError as error:
        asked = "" if config.backend == "auto" else f"backend: {config.backend!r} is asked for, but "
        raise ConfigError(f"{asked}{error}") from error
    finally:
        products.allow_tf32, convolutions.allow_tf32, threads = before
        torch.set_num_threads(threads)


@contextmanager
def compilation_errors() -> Iterator[None]:
    """Say in a line what keeps torch.compile from compiling, such as a machine without a C++ compiler.

    Raises:
        ConfigError: in place of what torch.compile raises.
    """
    try:
        yield
    except Exception as error:
        # By its module: to import the class would cost every run a second.
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"compile: torch could not compile the network ({reason}); leave out --compile") from error
