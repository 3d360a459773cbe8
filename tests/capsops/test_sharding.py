"""The operators take DTensors."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.forked_python import forked_python

ROOT = Path(__file__).parents[2]


def test_dtensors_give_the_values_and_gradients_of_ordinary_tensors(tmp_path: Path) -> None:
    """In two processes; `sharded.py` says what they compare."""
    command = [*forked_python(), "-m", "tests.capsops.sharded"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    assert all(output.endswith("done\n") for output in outputs)
