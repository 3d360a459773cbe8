"""Where forms run and how they are timed there: the CPU, or a GPU that torch sees.

On a CPU a clock is read before and after a call. A GPU works while Python goes on: events are recorded on its stream
before and after several calls, behind one call that is not timed and keeps it busy while the others are launched. Each
call takes its own inputs, so that none are found in a cache (`race.Pool`). float32 means float32: TF32 is off.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import machine
from .machine import Machine
from .shapes import Case

if TYPE_CHECKING:
    from torch import Tensor

_ROUND = 2e-3  # seconds of a round on a GPU
_MOST_CALLS = 50  # most calls in a round
_LONG = 10e-3  # seconds; a call this long hides its launch
_GPU_CACHE = 50 << 20  # bytes, if the size of a GPU's cache is not known


@dataclass(frozen=True)
class Device:
    """type: "cpu" or "cuda" (ROCm is "cuda" to torch)."""

    type: str = "cpu"

    @property
    def on_gpu(self) -> bool:
        return self.type != "cpu"

    def prepare(self) -> None:
        """What a measuring process does first."""
        if self.on_gpu:
            import torch

            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def backends(self, case: Case) -> list[str]:
        """The backends of capsops that route a case here, the one that capsops chooses first; on a CPU, that one."""
        if not self.on_gpu:
            return [""]
        import torch

        from capsops.backends import COMPILED

        op = "em_routing" if case.routing.name == "em" else "dynamic_routing"
        dtype = getattr(torch, case.dtype)
        return [name for name, module in COMPILED.items() if module.why_not(op, torch.device(self.type), dtype) is None]

    def why_not(self) -> dict[str, str | None]:
        """For each backend of a GPU, why it does not run here, or None."""
        import torch

        from capsops.backends import COMPILED

        where = torch.device(self.type)
        return {n: COMPILED[n].why_not("dynamic_routing", where, torch.float32) for n in ("cuda", "triton")}

    def cache_bytes(self) -> int:
        """Bytes of the last-level cache."""
        if not self.on_gpu:
            return machine.last_level_cache()
        import torch

        return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or _GPU_CACHE

    # Time

    def synchronize(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def mark(self) -> Any:
        """A point in time, on the GPU's current stream if there is one."""
        if not self.on_gpu:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Seconds between two marks, when both are over."""
        if not self.on_gpu:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def calls(self, seconds: float) -> int:
        """Calls in a round, for a form whose call takes `seconds`."""
        return max(1, min(_MOST_CALLS, int(_ROUND / max(seconds, 1e-9)))) if self.on_gpu else 1

    def timed(self, calls: Sequence[Callable[[], object]], *, lead: bool = True) -> float:
        """Seconds per call. lead: on a GPU, do not time the first of several calls."""
        if self.on_gpu and lead and len(calls) > 1:
            calls[0]()
            calls = calls[1:]
        start = self.mark()
        for call in calls:
            results = call()
        end = self.mark()
        seconds = self.between(start, end) / len(calls)
        del results
        return seconds

    def lead(self, seconds: float) -> int:
        """Untimed calls before a round, for a form whose call takes `seconds`."""
        return 1 if self.on_gpu and seconds < _LONG else 0

    # Kernels

    def profiled(self, call: Callable[[], object], calls: int) -> list[tuple[str, float, float]]:
        """The kernels on a GPU, or operators on a CPU, from torch's profiler, the longest first: for each its name,
        launches per call and microseconds per call."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        activity, where = (
            (ProfilerActivity.CUDA, DeviceType.CUDA) if self.on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
        )
        self.synchronize()
        with profile(activities=[activity]) as profiler:
            for _ in range(calls):
                call()
            self.synchronize()
        time_of = attrgetter("self_device_time_total" if self.on_gpu else "self_cpu_time_total")
        found = [
            (event.key, event.count / calls, time_of(event) / calls)
            for event in profiler.key_averages()
            if event.device_type == where
        ]
        return sorted((row for row in found if row[2] > 0), key=lambda row: -row[2])

    @contextmanager
    def watched(self) -> Iterator[None]:
        """What a profiler that waits for a mark looks at."""
        if not self.on_gpu:
            yield
            return
        import torch

        torch.cuda.profiler.start()
        try:
            yield
        finally:
            torch.cuda.profiler.stop()

    # Memory

    def extra_bytes(self, call: Callable[[], Sequence[Tensor]]) -> int | None:
        """Peak bytes beyond what was there before and the results; None where it cannot be told in this process."""
        if not self.on_gpu:
            return None
        import torch

        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = call()
        torch.cuda.synchronize()
        return max(0, torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results))

    def start_peak(self) -> None:
        if self.on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Of all tensors, since `start_peak`."""
        if not self.on_gpu:
            return None
        import torch

        return torch.cuda.max_memory_allocated()

    def recover(self) -> bool:
        """After an error: let go of memory, and say whether the device still answers."""
        if not self.on_gpu:
            return True
        import torch

        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:  # an illegal access ends every use of a GPU by a process
            return False
        return True


CPU = Device()


def rates(device: Device, quick: bool = False) -> Iterator[dict[str, float]]:
    """Yields once, for `worker.events`: copy, in bytes read and written a second; float32, tf32 and bfloat16 products
    of large matrices, in operations a second. Medians; of the copies, the quicker way's."""
    import torch

    device.prepare()
    numbers = (1 << 20) if quick else (1 << 29)
    side, repeats = (256, 3) if quick else (8192, 10)
    x = torch.rand(numbers, device=device.type)
    y = torch.empty_like(x)

    def median(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        return statistics.median(device.timed([call]) for _ in range(repeats))

    a, b = (torch.randn(side, side, device=device.type) for _ in range(2))
    found = {"copy": 2 * x.nbytes / min(median(lambda: y.copy_(x)), median(lambda: torch.mul(x, 1.0, out=y)))}
    found["float32"] = 2 * side**3 / median(lambda: torch.mm(a, b))
    if device.on_gpu:
        torch.backends.cuda.matmul.allow_tf32 = True
        found["tf32"] = 2 * side**3 / median(lambda: torch.mm(a, b))
        torch.backends.cuda.matmul.allow_tf32 = False
    low_a, low_b = a.bfloat16(), b.bfloat16()
    found["bfloat16"] = 2 * side**3 / median(lambda: torch.mm(low_a, low_b))
    yield found


def best(found: dict[str, float]) -> Machine:
    """The rates that floors are made of: reading at the rate of copying, and float32 without TF32."""
    return Machine(read=found["copy"], copy=found["copy"], fma=found["float32"])


def environment(device: Device, found: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Yields once, for `worker.events`: the device, its rates, the versions and the commit."""
    import torch

    import capsops

    info = capsops.info()
    here: dict[str, Any] = {"device": machine.cpu_model(), "driver": "", "cuda": ""}
    if device.on_gpu:
        of = torch.cuda.get_device_properties(0)
        here = {
            "device": of.name,
            "driver": machine.first_line(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "",
            "cuda": torch.version.cuda or torch.version.hip or "",
            "compute_capability": f"{of.major}.{of.minor}",
            "multiprocessors": of.multi_processor_count,
            "memory_bytes": of.total_memory,
        }
    yield {
        "machine": {
            **here,
            "cache_bytes": device.cache_bytes(),
            "cpu": machine.cpu_model(),
            "cores": os.cpu_count(),
            "rates": found,
            **{name: rate for name, rate in asdict(best(found)).items() if not name.endswith("_by")},
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _triton(),
            "capsops": capsops.__version__,
            "capsops_built_by": info.extension,
            "nvcc": nvcc_version(),
        },
        "backends": {name: reason or "yes" for name, reason in device.why_not().items()} if device.on_gpu else {},
        "commit": machine.commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on the path, or under CUDA_HOME or its usual place."""
    found = shutil.which(name)
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        for folder in ("bin", "compute-sanitizer", "extras/compute-sanitizer"):
            found = found or (shutil.which(name, path=Path(home, folder)) if home else None)
    return found


def nvcc_version() -> str:
    path = find_tool("nvcc")
    if path is None:
        return ""
    try:
        text = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    match = re.search(r"release (\S+),", text)
    return match[1] if match else ""
