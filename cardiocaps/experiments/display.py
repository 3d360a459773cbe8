"""Shows the progress of the jobs: bars on a terminal, else a line for each job that ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cardiocaps.experiments.jobs import Job
from cardiocaps.runtime.program import print_line

if TYPE_CHECKING:
    from rich.progress import Progress


class Lines:
    """Prints a line for each job that ends."""

    def __init__(self, jobs: int) -> None:
        self.jobs, self.done = jobs, 0

    def started(self, job: Job) -> None:
        pass

    def progress(self, job: Job, done: float, doing: str) -> None:
        pass

    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        self.done += 1
        failure = "" if error is None else f"  failed: {error}"
        print_line(f"[{self.done}/{self.jobs}] {job.name}  {seconds:.0f} s{failure}")


class Bars(Lines):
    """Shows a bar for all jobs and one for each running job, below the lines."""

    def __init__(self, jobs: int, bars: Progress) -> None:
        super().__init__(jobs)
        self.bars, self.tasks = bars, {}  # type: ignore[var-annotated]
        self.all = bars.add_task("jobs", total=jobs, doing="")

    def started(self, job: Job) -> None:
        self.tasks[job.name] = self.bars.add_task(job.name, total=1.0, doing="starting")

    def progress(self, job: Job, done: float, doing: str) -> None:
        self.bars.update(self.tasks[job.name], completed=done, doing=doing)

    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        self.bars.remove_task(self.tasks.pop(job.name))
        super().ended(job, seconds, error)
        self.bars.update(self.all, completed=self.done)


@contextmanager
def display(jobs: int, progress: bool) -> Iterator[Lines]:
    if not progress or not sys.stderr.isatty() or not jobs:
        yield Lines(jobs)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[doing]}")
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        yield Bars(jobs, bars)
