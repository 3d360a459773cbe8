"""The most memory that training takes beyond what the process held before."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback


class PeakMemory(Callback):
    """Measures from when it is made, before the network, to the end of every epoch; goes on after a resume.

    On a GPU it is what torch allocates there; else the process's resident memory, which only Linux tells.

    Attributes: peak, in bytes; None where it cannot be told.
    """

    def __init__(self, device: Literal["cpu", "cuda"]) -> None:
        self.device = device
        self.peak: int | None = None
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now
            self._before = _resident("VmRSS")

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.peak = state_dict["peak"]

    def on_validation_end(self, *_: Any) -> None:
        # Of the callbacks of an epoch's end this comes before the checkpoint.
        now = torch.cuda.max_memory_allocated() if self.device == "cuda" else _resident("VmHWM")
        if now is not None and self._before is not None:
            self.peak = max(self.peak or 0, now - self._before)


def _resident(field: str) -> int | None:
    """Bytes, from /proc/self/status."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None
