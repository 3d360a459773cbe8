"""Processes of one test that talk to one another."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.forked_python import forked_python

ROOT = Path(__file__).parents[2]


def run_ranks(module: str, arguments: Sequence[Sequence[str]]) -> None:
    """Run the module in a process for each list of arguments; all must end well and print "done" last."""
    processes = [
        subprocess.Popen(
            [*forked_python(), "-m", module, *own],
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for own in arguments
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    assert all(output.endswith("done\n") for output in outputs)
