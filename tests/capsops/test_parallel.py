"""Input capsules that are split over processes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.forked_python import forked_python

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_outputs_and_gradients_are_those_of_one_process(ranks: int, tmp_path: Path) -> None:
    """`in_parallel.py` says what they compare."""
    command = [*forked_python(), "-m", "tests.capsops.in_parallel"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store")],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(outputs)
    assert all(output.endswith("done\n") for output in outputs)
