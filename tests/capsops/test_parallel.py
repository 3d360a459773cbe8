"""Input capsules that are split over processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from .ranks import run_ranks


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks: int, tmp_path: Path) -> None:
    """`in_parallel.py` says what they compare."""
    arguments = [[str(rank), str(ranks), str(tmp_path / "store")] for rank in range(ranks)]
    run_ranks("tests.capsops.in_parallel", arguments)
