"""The operators take DTensors."""

from __future__ import annotations

from pathlib import Path

from .ranks import run_ranks


def test_dtensors_give_the_values_and_gradients_of_ordinary_tensors(tmp_path: Path) -> None:
    """In two processes; `sharded.py` says what they compare."""
    run_ranks("tests.capsops.sharded", [[str(rank), str(tmp_path / "store")] for rank in range(2)])
