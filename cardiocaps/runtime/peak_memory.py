"""Peak memory of training."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback


class PeakMemory(Callback):
    """Measures the largest memory that training takes beyond what the process held when the callback was made.

    Make it before the network. On a GPU it counts torch's allocations there; on the CPU the resident memory of the
    process, which is known on Linux only. A run that is resumed keeps its earlier peak.

    Attributes:
        peak: in bytes; None where it is unknown.
    """

    def __init__(self, device: Literal["cpu", "cuda"]) -> None:
        self.device = device
        self.peak: int | None = None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to the present value
            self._before = _resident("VmRSS")

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.peak = state_dict["peak"]

    def on_validation_end(self, *_: Any) -> None:
        # This hook runs before the checkpoint of the epoch is written.
        now = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM")
        if now is not None and self._before is not None:
            self.peak = max(self.peak or 0, now - self._before)


def _resident(field: str) -> int | None:
    """A field of /proc/self/status, in bytes."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
