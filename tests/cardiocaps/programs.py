"""The command-line programs in processes of their own, as a user starts them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    """`python -m module arguments`, from the root of the repository."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None) -> None:
    """Until the condition holds; `process` must not end before."""
    for _ in range(2400):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.025)
    raise AssertionError("nothing happened within a minute")
