"""The command-line programs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.forked_python import forked_python

ROOT = Path(__file__).parents[2]


def python() -> list[str]:
    """The beginning of a command that runs Python, where Lightning and scikit-learn are imported already."""
    return forked_python("lightning.pytorch", "sklearn.linear_model")


def start(module: str, *arguments: str) -> subprocess.Popen[str]:
    """`python -m module arguments`, from the root of the repository."""
    command = [*python(), "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def descendants(text: str) -> list[int]:
    """The processes that this one has started, or that those have, whose command line holds the text."""
    found, parents = [], {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if text.encode() in (path / "cmdline").read_bytes().replace(b"\0", b" "):
                found.append(int(path.name))
        except OSError:  # it has ended
            continue

    def is_below(number: int) -> bool:
        while number in parents:
            number = parents[number]
            if number == os.getpid():
                return True
        return False

    return [number for number in found if is_below(number)]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None) -> None:
    """Until the condition holds; `process` must not end before."""
    for _ in range(12_000):
        if condition():
            return
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.025)
    if process is not None:
        process.kill()
    raise AssertionError("nothing happened within five minutes")
