"""A process that is killed before it changes a file for the n-th time."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""Events that Python announces before it opens a file, or makes, renames or removes a file or folder."""


def killed_before(step: int, action: Callable[[], object]) -> bool:
    """Run `action` in a forked process, killed (kill -9) before its `step`-th change of a file, counted from 1.

    Returns:
        Whether it was killed; if not, the action has ended by itself.
    """
    child = os.fork()
    if child == 0:
        try:
            _kill_before(step)
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _kill_before(step: int) -> None:
    seen = 0

    def hook(event: str, about: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _EVENTS and not (event == "open" and about[2] & os.O_ACCMODE == os.O_RDONLY):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
