"""Shows the progress of the jobs: bars on a terminal, and a line for each job that ends."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from cardiocaps.experiments.jobs import Job
from cardiocaps.runtime.program import print_line


class Display:
    """A bar for all `jobs` and one for each running job, below the lines; without a terminal, no bar.

    Attributes:
        bars: a context manager, inside which they are drawn.
    """

    def __init__(self, jobs: int, bars: bool, console: Console | None = None) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[doing]}"),
        )
        console = console or Console(stderr=True)
        self.bars = Progress(*columns, TimeElapsedColumn(), console=console, disable=not (bars and console.is_terminal))
        self.tasks: dict[str, TaskID] = {}
        self.jobs, self.done = jobs, 0
        self.all = self.bars.add_task("jobs", total=jobs, doing="")

    def started(self, job: Job) -> None:
        self.tasks[job.name] = self.bars.add_task(job.name, total=1.0, doing="starting")

    def progress(self, job: Job, done: float, doing: str) -> None:
        self.bars.update(self.tasks[job.name], completed=done, doing=doing)

    def lost(self, job: Job) -> None:
        """The job waits for another worker."""
        self.bars.remove_task(self.tasks.pop(job.name))

    def ended(self, job: Job, seconds: float, error: str | None) -> None:
        self.bars.remove_task(self.tasks.pop(job.name))
        self.done += 1
        failure = "" if error is None else f"  failed: {error}"
        print_line(f"[{self.done}/{self.jobs}] {job.name}  {seconds:.0f} s{failure}")
        self.bars.update(self.all, completed=self.done)
