"""How Lightning writes and reads checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from cardiocaps.runtime.files import atomic_write
from cardiocaps.training.checkpoints import content_digest, read_checkpoint


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints whole or not at all, with a digest, and reads them without executing code."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as temporary:
            torch.save({**checkpoint, "digest": content_digest(checkpoint)}, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))
