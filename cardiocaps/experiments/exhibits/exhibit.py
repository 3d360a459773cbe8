"""What every exhibit has: the tables of its results, of the published definitions and of the cost, and a figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cardiocaps.errors import plural
from cardiocaps.evaluation.names import PAPER_NAMES
from cardiocaps.experiments.exhibits import comparisons
from cardiocaps.experiments.markdown import DASH, Column, count, joined, metric_columns, plus_minus, rows_table, table
from cardiocaps.experiments.plan import MAIN, SYSTEMS, corrected_key, in_form, why_not
from cardiocaps.experiments.reference_rows import BOUNDS, REFERENCES
from cardiocaps.experiments.reported import (
    ABNORMAL_FRAMES,
    ALWAYS_NORMAL,
    BINARY_F1,
    ON,
    TABLES,
    TEST_FRAMES,
    Reported,
    confusion_of,
    reported,
)
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.metrics import PUBLISHED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cardiocaps.config import TrainConfig
    from cardiocaps.experiments.folder import ExperimentFolder
    from cardiocaps.experiments.jobs import Job

VARIED = ("lambda", "training_videos", "abnormal_share")
"""Columns of the CSV with what an exhibit varies; empty in the others."""

_PROBABILITIES = ("auroc", "average_precision", "brier")
_DECISIONS = ("f1", "f1_weighted", "accuracy", "sensitivity", "specificity")


@dataclass(frozen=True)
class Exhibit:
    """A table or figure that compares systems. Subclasses add sections or draw another figure.

    Attributes:
        name: of its files, for example "table1".
        title: for readers.
        systems: keys of `plan.SYSTEMS`, in the order of the rows.
        of_table: the table of the paper whose figures are shown beside ours; "": the one called `name`.
    """

    name: str
    title: str
    systems: tuple[str, ...]
    of_table: str = ""

    @property
    def table(self) -> str:
        """The table of the paper, or "" for an exhibit that shows none."""
        name = self.of_table or self.name
        return name if name in TABLES else ""

    def in_form(self, form: str) -> Self:
        """The exhibit with its rows in one of `plan.FORMS`; only exhibits of the paper's tables have several."""
        return replace(self, systems=in_form(self.systems, form)) if self.table else self

    def reported(self, system: str) -> Reported | None:
        """The paper's figures for a system, in either form; None if it has none."""
        return reported(self.of_table or self.name, corrected_key(system))

    def why_not(self, config: TrainConfig) -> str | None:
        """Why an experiment with these settings cannot train the exhibit's systems; None: it can."""
        reasons = (why_not(config, SYSTEMS[key]) for key in self.systems)
        return next((reason for reason in reasons if reason is not None), None)

    def tested(
        self, jobs: Sequence[Job], folder: ExperimentFolder, at_once: int, progress: bool
    ) -> tuple[Self, Mapping[str, str]]:
        """Test the finished jobs further than they did themselves, on this machine, if the exhibit shows such tests.

        Args:
            jobs: of all exhibits.
            folder: of the experiments.
            at_once: jobs that are tested at a time.
            progress: show bars.

        Returns:
            The exhibit with what the tests gave; and the name of each job that could not be tested -> why.
        """
        return self, {}

    def varied(self, system: str) -> Mapping[str, float]:
        """The cells of VARIED that a row of the CSV has: what the exhibit varies, and its value for this system."""
        return {}

    @property
    def has_references(self) -> bool:
        """Whether its table has rows that no system was trained for: always normal, and the bounds of a phantom."""
        return self.name == self.table

    def draws(self, system: str) -> bool:
        """Whether a row with numbers is in the figure."""
        return system not in REFERENCES

    def compared_with(self, system: str, systems: Sequence[str]) -> str | None:
        """The system that one of `systems` is compared with; None: none, as it is the reference itself.

        The reference is CardioCaps; in an exhibit without it the last system, which is the paper's proposal there. A
        comparison is with the reference of the same form, corrected or published.
        """
        published = corrected_key(system) != system
        same_form = [key for key in systems if (corrected_key(key) != key) == published]
        main = [key for key in same_form if corrected_key(key) == MAIN]
        reference = (main or same_form)[-1]
        return None if reference == system else reference

    def sections(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        """The Markdown between the figure and the notes. `found` maps systems with results to their summaries."""
        return [
            *self._results(rows, found, bootstrap),
            *comparisons.section(rows, found, bootstrap, self.compared_with),
            *self._published(rows, found),
            *self._cost(rows, found),
        ]

    def draw(self, summaries: Sequence[Summary]) -> Figure:
        """The figure of the rows with results, of which there is at least one."""
        from cardiocaps.experiments.exhibits.dots import draw

        return draw(self.title, summaries)

    def write_more(self, folder: Path, summaries: Sequence[Summary]) -> None:
        """Write the files beyond NAME.md, NAME.csv and NAME.png into the folder of tables, if there are any."""

    def _results(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        decisions: list[Column] = [("threshold", lambda s: plus_minus(s.threshold))]
        return [
            "## Results",
            _definitions(list(found.values()), bootstrap),
            rows_table(rows, found, metric_columns(_PROBABILITIES)),
            rows_table(rows, found, decisions + metric_columns(_DECISIONS)),
        ]

    def _published(self, rows: Sequence[Row], found: Mapping[str, Summary]) -> list[str]:
        """The published definitions, beside the paper's figures if it has any."""
        rows = [row for row in rows if row.system not in BOUNDS]
        with_paper = [row.system for row in rows if self.reported(row.system)]
        binary = [system for system in with_paper if system.startswith(BINARY_F1)]

        def ours(name: str) -> Callable[[Summary], str]:
            return lambda summary: plus_minus(summary.published.paper[name])

        def theirs(name: str, row: Row) -> str:
            figures = self.reported(row.system)
            mark = " †" if name == "f1" and row.system in binary else " ‡" if row.system == ALWAYS_NORMAL else ""
            return plus_minus(figures[name], 4) + mark if figures else DASH

        columns: list[Column] = []
        for name in PUBLISHED:
            columns.append(("F1 (weighted)" if name == "f1" else PAPER_NAMES[name], ours(name)))
            if name == "f1" and binary:
                columns.append(("F1 (abnormal)", lambda summary: plus_minus(summary.published.metrics["f1"])))
            if with_paper:
                columns.append((f"*{PAPER_NAMES[name]}, {ON}*", {row.system: theirs(name, row) for row in rows}))
        text = (
            "By the definitions of the published code, by frame, of decisions at 0.5: its “ROC AUC” is that of hard "
            "labels, which is the mean of sensitivity and specificity, and its “PR AUC” the precision of the abnormal "
            "class."
        )
        always = reported(self.table, ALWAYS_NORMAL)
        if with_paper:
            text += f" The columns in italics are the paper's own figures, {ON}."
        if always is not None:
            text += (
                " Its ± is the population deviation of two runs (seeds 10 and 1225); ours is the sample deviation over "
                "the seeds, which for two is √2 times as large. A classifier that always says normal has accuracy "
                f"{always['accuracy'].value:.4f} and weighted F1 {always['f1'].value:.4f} on its test set of "
                f"{TEST_FRAMES:,} frames, {ABNORMAL_FRAMES} abnormal (‡: not in the paper)."
            )
        if binary:
            text += " † The paper's F1 of this row is that of the abnormal class; those of the other rows are weighted."
        heading = "## As published, beside what the paper reports" if with_paper else "## As published"
        return [heading, text, rows_table(rows, found, columns), *self._decoded(rows)]

    def _decoded(self, rows: Sequence[Row]) -> list[str]:
        """The confusion matrices behind the paper's figures."""
        known = [(row, x) for row in rows if (x := confusion_of(self.table, corrected_key(row.system)))]
        if not known:
            return []
        text = (
            f"The paper's figures of a single run fit one matrix of whole frames each, of {TEST_FRAMES:,} frames with "
            f"{ABNORMAL_FRAMES} abnormal. (Its text calls the false positives 246 and 108 false negatives.)"
        )
        lines = [(row.title, *(f"{counts[name]:,}" for name in ("tn", "fp", "fn", "tp"))) for row, counts in known]
        head = (
            "normal, called normal",
            "normal, called abnormal",
            "abnormal, called normal",
            "abnormal, called abnormal",
        )
        return [text, table(("system", *(f"*{name}, {ON}*" for name in head)), lines)]

    def _cost(self, rows: Sequence[Row], found: Mapping[str, Summary]) -> list[str]:
        """Times and memory, and what the times depend on."""
        rows = [row for row in rows if row.system not in REFERENCES]
        shared = dict.fromkeys((r.at_once, r.threads) for row in rows for r in row.results)
        paces = [f"{count(jobs, 'job')} at a time with {count(threads, 'thread')} each" for jobs, threads in shared]
        ours = found[MAIN].cost("seconds_per_epoch").value if MAIN in found else math.nan

        def relative(summary: Summary) -> str:
            seconds = summary.cost("seconds_per_epoch").value
            return DASH if math.isnan(seconds / ours) else f"{seconds / ours:.2f}"

        columns: list[Column] = [
            ("seeds", lambda s: str(s.seeds)),
            ("parameters", lambda s: DASH if s.parameters is None else f"{s.parameters:,}"),
            ("epochs", lambda s: plus_minus(s.cost("epochs"), 1)),
            ("best epoch", lambda s: plus_minus(s.cost("best_epoch"), 1)),
            ("seconds per epoch", lambda s: plus_minus(s.cost("seconds_per_epoch"), 2)),
            ("seconds in all", lambda s: plus_minus(s.cost("seconds"), 1)),
            ("peak memory, MiB", lambda s: DASH if s.peak_memory is None else f"{s.peak_memory / 2**20:,.0f}"),
            ("device", lambda s: joined(list(dict.fromkeys(r.device for r in s.results)))),
        ]
        if ours > 0 and len(found) > 1:
            columns.insert(5, ("relative to CardioCaps", relative))
        return ["## Cost", f"Trained {joined(paces)}.", rows_table(rows, found, columns)]


def _definitions(summaries: Sequence[Summary], bootstrap: int) -> str:
    """A paragraph that defines the numbers of the results: means, intervals, samples and thresholds."""
    interval = ""
    if bootstrap:
        drawn = joined(list(dict.fromkeys(plural(s.drawn) for s in summaries)))
        interval = (
            f", and in brackets the 95 % interval of the mean: bootstrap, the middle of {bootstrap:,} resamples of the "
            f"test {drawn} and of the seeds; exact, the interval of Clopper and Pearson, for an AUROC that of disjoint "
            f"pairs of {drawn}; exact/bootstrap: the wider of both bounds at each end"
        )
    by_frame = [s.title for s in summaries if s.unit == "frame"]
    frames = f", but a frame for {joined(by_frame)}" if by_frame else ""
    return (
        f"Mean over the seeds ± standard deviation{interval}. A sample is a video, with the mean probability of its "
        f"frames{frames}. F1, accuracy, sensitivity and specificity are of decisions at a threshold that each run "
        "chooses on its own validation split: the one with the largest Youden index (sensitivity + specificity − 1), "
        "halfway between two neighbouring probabilities, of equally good ones the nearest to 0.5."
    )
