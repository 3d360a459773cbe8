"""Progress of a long step: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from cardiocaps.runtime.program import print_line

LINE_EVERY = 10.0  # seconds
T = TypeVar("T")


def shown(results: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Pass `total` results on and report on standard error how many there are so far.

    Args:
        what: the step, for example "decoding videos".
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_interactive:
        yield from track(results, what, total, console=console)
        return
    said = time.monotonic()
    for count, result in enumerate(results, 1):
        yield result
        if time.monotonic() - said >= LINE_EVERY:
            print_line(f"{what}: {count} of {total}", sys.stderr)
            said = time.monotonic()
