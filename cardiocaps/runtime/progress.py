"""Progress of a long step: a bar on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from cardiocaps.runtime.program import print_line

BAR_AFTER, LINE_EVERY = 2.0, 10.0  # seconds
T = TypeVar("T")


def shown(results: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Pass `total` results on and report on standard error how many there are so far.

    Args:
        what: the step, for example "decoding videos".
    """
    # A terminal that cannot move its cursor (TERM=dumb) cannot show a bar.
    if sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        yield from _with_bar(results, total, what)
        return
    said = time.monotonic()
    for count, result in enumerate(results, 1):
        yield result
        if time.monotonic() - said >= LINE_EVERY:
            print_line(f"{what}: {count} of {total}", sys.stderr)
            said = time.monotonic()


def _with_bar(results: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Show a bar once the results have taken two seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True))
    task, start, running = bar.add_task(what, total=total), time.monotonic(), False
    try:
        for result in results:
            yield result
            bar.advance(task)
            if not running and time.monotonic() - start > BAR_AFTER:
                bar.start()
                running = True
    finally:
        if running:
            bar.stop()
