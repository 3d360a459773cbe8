"""`python -m cardiocaps.experiments table1 … | all`: train every system that a table or a figure of the paper compares,
under the same conditions, and write the table.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiocaps.config import CommandLine, TrainConfig, add_options, options, settings_that_affect
from cardiocaps.errors import CardioCapsError, ConfigError, DataError
from cardiocaps.experiments.plan import EXHIBITS, FIRST_SEED, SYSTEMS, configure, keys_of, trained_as
from cardiocaps.runtime.files import output_errors
from cardiocaps.runtime.program import Interrupted, Interruption, print_line, run_program

if TYPE_CHECKING:
    from rich.progress import Progress

    from cardiocaps.data.datamodule import EchoDataModule
    from cardiocaps.experiments.exhibits import Exhibit
    from cardiocaps.experiments.folder import ExperimentFolder
    from cardiocaps.experiments.jobs import Job

# Settings that each system decides, and settings of a single run.
_BY_SYSTEM = ("model", "routing", "affine", "class_weight", "regression_weight", "backend")
_BY_RUN = ("seed", "split_seed", *settings_that_affect("place"))


def parser() -> CommandLine:
    parser = CommandLine(
        prog="python -m cardiocaps.experiments",
        description="Train every system that the named tables and figures compare, each with several seeds, and write "
        "them. What is finished is not done again: after whatever stopped it, the same command goes on.",
        epilog="Research use only. Not a medical device.",
    )
    parser.add_argument(
        "exhibits",
        metavar="EXHIBIT",
        nargs="+",
        choices=[*EXHIBITS, "all"],
        help=f"what to write: {', '.join(EXHIBITS)}, or all",
    )
    number = options()["phantom_videos"]  # an integer's reader; the bounds are ours
    parser.add_argument(
        "--seeds",
        metavar="N",
        type=replace(number, low=1, high=100).from_text,
        default=3,
        help=f"seeds for each system, from {FIRST_SEED} on (default: 3)",
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=replace(number, low=1, high=256).from_text,
        default=1,
        help="systems trained at a time, each with its share of the CPU (default: 1)",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        type=options()["data"].from_text,
        help="folder of the experiments (default: experiments/PRESET)",
    )
    add_options(parser, [name for name in options() if name not in (*_BY_SYSTEM, *_BY_RUN)])
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 where a system failed; else as `cardiocaps.train.main`."""
    given = vars(parser().parse_args(argv))
    names, seeds, at_once, out = (given.pop(name) for name in ("exhibits", "seeds", "jobs", "out"))
    exhibits = list(EXHIBITS) if "all" in names else list(dict.fromkeys(names))

    def body(_: Interruption) -> None:
        config = TrainConfig(**{name: value for name, value in given.items() if value is not None}, seed=FIRST_SEED)
        typed = [*names, "--seeds", str(seeds), "--jobs", str(at_once), *_as_typed(given)]
        command = " ".join(["python -m cardiocaps.experiments", *typed])
        run(exhibits, config, seeds, at_once, out or Path("experiments", config.preset), command)

    return run_program(body)


def run(names: Sequence[str], config: TrainConfig, seeds: int, at_once: int, out: Path, command: str) -> None:
    """Do the jobs that these exhibits need and that `out` does not hold yet, and write the exhibits to `out`/tables,
    with the `command` that makes them.

    Raises:
        CardioCapsError: the settings, the data or the folder cannot be used; or, at the end, some systems failed.
    """
    import torch

    from cardiocaps.experiments.folder import ExperimentFolder
    from cardiocaps.experiments.jobs import Job
    from cardiocaps.experiments.results import is_finished
    from cardiocaps.experiments.runner import run_jobs
    from cardiocaps.experiments.tables import count
    from cardiocaps.runtime.device import decide, visible_gpu
    from cardiocaps.runtime.files import lock_folder, remove_leftovers
    from cardiocaps.train import quiet

    quiet()
    if config.split == "frames" and "leakage" in names:
        raise ConfigError("split: 'frames' is a row of leakage itself; allowed are 'auto', 'column', 'stratified'")
    decide(config, visible_gpu())  # before anything is written, whether the device is there
    exhibits = [EXHIBITS[name] for name in names]
    threads = config.threads or max(1, torch.get_num_threads() // at_once)
    folder = ExperimentFolder(out)

    def job(key: str, seed: int) -> Job:
        own = configure(config, SYSTEMS[key], seed, folder.job(key, seed))
        return Job(SYSTEMS[key], seed, replace(own, threads=threads, progress=False), at_once)

    # Seed by seed: whoever stops early has all systems with the first seeds.
    jobs = [job(key, FIRST_SEED + i) for i in range(seeds) for key in keys_of(exhibits, config.protocol)]
    folder.make()
    with lock_folder(folder.path):
        remove_leftovers(folder.path, folder.data, folder.tables)
        folder.claim(config)
        data, unusable = _prepare(jobs, config, folder)
        finished = [job for job in jobs if is_finished(job.folder)]
        left = [job for job in jobs if job not in finished and job.name not in unusable]
        pace = f"{count(at_once, 'job')} at a time, {count(threads, 'thread')} each"
        print_line(f"{count(len(jobs), 'job')}, {len(finished)} of them finished; {pace}")
        try:
            with _display(len(left), config.progress) as display:
                errors = {**unusable, **run_jobs(left, at_once, display)}
        except Interrupted as stop:
            raise Interrupted(stop.signum, "what was done is saved, and the same command goes on") from None
        _write(exhibits, jobs, errors, config, data, folder, command)
    print_line(f"tables and figures: {folder.tables}")
    if errors:
        failed = "".join(f"\n  {name}: {why}" for name, why in errors.items())
        raise CardioCapsError(f"{len(errors)} of {len(jobs)} jobs failed; the same command tries them again{failed}")


def _as_typed(given: Mapping[str, Any]) -> Iterator[str]:
    """The settings of a command line, without paths: they say nothing to others, and may say who ran it."""
    for name, value in given.items():
        option = options()[name]
        if value is None or (option.kind is Path and name != "data"):
            continue
        if option.kind is bool:
            yield option.flag if value else option.flag.replace("--", "--no-", 1)
        elif option.kind is dict:
            yield from (f"{option.flag} {key}={number:.10g}" for key, number in value.items())
        else:
            yield f"{option.flag} {'FOLDER' if option.kind is Path else shlex.quote(str(value))}"


def _prepare(
    jobs: Sequence[Job], config: TrainConfig, folder: ExperimentFolder
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Read and decode, once, what the jobs need.

    Returns:
        What the data of each protocol and split are, in a sentence; and, by the name of a job, why its data cannot be
        used.

    Raises:
        DataError: the data of the first job, which are most jobs', cannot be used, or have changed since they were
            first used here.
    """
    from cardiocaps.data.fingerprint import Fingerprint
    from cardiocaps.runtime.device import machine_for
    from cardiocaps.train import decode, read_study

    said: dict[str, str] = {}
    refused: dict[str, DataError] = {}
    for job in jobs:
        if _data_of(job) not in {**said, **refused}:
            watched = replace(job.config, progress=config.progress)
            try:
                with machine_for(watched) as machine:
                    study = read_study(watched)
                    before = folder.known_data(watched)
                    data = decode(watched, machine, study if before is None else before.as_used(study))
            except DataError as error:
                if job is jobs[0]:
                    raise
                refused[_data_of(job)] = error
                continue
            folder.claim_data(watched, Fingerprint.of(study).with_contents(data.contents()))
            said[_data_of(job)] = _described(watched, data)
    return said, {job.name: str(refused[_data_of(job)]) for job in jobs if _data_of(job) in refused}


def _data_of(job: Job) -> str:
    """What tells a job's data from those of others."""
    return f"protocol {job.config.protocol}, split {job.config.split}"


def _described(config: TrainConfig, data: EchoDataModule) -> str:
    """Without the data's place, which may name people."""
    if config.data is None:
        what = f"The synthetic phantom ({config.phantom_videos} videos, seed {config.phantom_seed}), no patients' data"
    else:
        what = "A folder in the layout of EchoNet-LVH"
    parts = []
    for split, name in (("train", "training"), ("val", "validation"), ("test", "test")):
        labels = data.labels(split)
        unit, n, positives = "frames", len(labels), int(labels.sum())
        if not config.splits_frames:
            clips = data.clips(split)
            unit, n, positives = "videos", len(clips), sum(clip.label for clip in clips)
        parts.append(f"{name} {n} {unit}, {positives} abnormal")
    rule = ", split by frame" if config.split == "frames" else ""
    return f"{what}; preset {config.preset}, protocol {config.protocol}{rule}: {'; '.join(parts)}."


def _write(
    exhibits: Sequence[Exhibit],
    jobs: Sequence[Job],
    errors: Mapping[str, str],
    config: TrainConfig,
    data: Mapping[str, str],
    folder: ExperimentFolder,
    command: str,
) -> None:
    """Every exhibit from the jobs that are finished, and the index of all that are there."""
    import json

    from cardiocaps.experiments.results import is_finished, read_result
    from cardiocaps.experiments.summaries import Row
    from cardiocaps.experiments.tables import write_exhibit, write_index
    from cardiocaps.training.run_folder import RunFolder

    finished = [job for job in jobs if is_finished(job.folder)]

    def row(key: str) -> Row:
        own = [job for job in jobs if job.system.key == trained_as(key, config.protocol)]
        results = tuple(read_result(job.folder) for job in own if job in finished)
        why = {job.seed: _without_paths(errors[job.name], config, folder) for job in own if job.name in errors}
        failed = [f"seed {seed}: {error}" for seed, error in why.items()]
        return Row(key, SYSTEMS[key].title, results, "; ".join(failed) or None)

    with output_errors(folder.tables):
        folder.tables.mkdir(exist_ok=True)
    for exhibit in exhibits:
        keys = {trained_as(key, config.protocol) for key in exhibit.systems}
        described = [data[_data_of(job)] for job in jobs if job.system.key in keys and _data_of(job) in data]
        rows = [row(key) for key in exhibit.systems]
        write_exhibit(exhibit, rows, folder.tables, data=" ".join(dict.fromkeys(described)), bootstrap=config.bootstrap)
    written = [e for e in EXHIBITS.values() if e in exhibits or (folder.tables / f"{e.name}.csv").is_file()]
    write_index(
        written,
        folder.tables,
        data=next(iter(data.values())),
        commands=folder.remember(command),
        environments=[json.loads(RunFolder(job.folder).environment.read_text(encoding="utf-8")) for job in finished],
    )


def _without_paths(text: str, config: TrainConfig, folder: ExperimentFolder) -> str:
    """An error for tables, which are shown to others: without where it was, which may say who ran it."""
    from cardiocaps.data.cache import default_folder

    places = {
        "OUT": folder.path,
        "DATA": config.data,
        "CACHE": config.cache_dir or default_folder(),
        "HOME": Path.home(),
    }
    for name, place in places.items():
        for form in () if place is None else (place.resolve(), place.absolute(), place):
            if len(form.parts) > 1:  # not the root of the file system, nor a name without a path
                text = re.sub(rf"(?<![\w/.-]){re.escape(str(form))}(?![\w.-])", name, text)
    return text


class Lines:
    """A line for each job that ends: for a log, or whoever wants no bars."""

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
    """A bar over all jobs, and one in each that runs; the lines above them."""

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
def _display(jobs: int, progress: bool) -> Iterator[Lines]:
    if not progress or not sys.stderr.isatty() or not jobs:
        yield Lines(jobs)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[doing]}")
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars:
        yield Bars(jobs, bars)


if __name__ == "__main__":
    sys.exit(main())
