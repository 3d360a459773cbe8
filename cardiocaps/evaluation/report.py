"""Prints the results of a run as a table, and writes them into files."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiocaps import DISCLAIMER, plots
from cardiocaps.config import TrainConfig, options
from cardiocaps.errors import plural
from cardiocaps.evaluation.calibration import write_calibration
from cardiocaps.evaluation.decision import write_decision
from cardiocaps.evaluation.familiarity import Familiarity, write_familiarity
from cardiocaps.evaluation.names import METRIC_NAMES, PAPER_NAMES
from cardiocaps.evaluation.pixel_baseline import TITLE as PIXELS
from cardiocaps.evaluation.predictions import unit_of, write_predictions
from cardiocaps.evaluation.scores import Scores
from cardiocaps.metrics import (
    BOOTSTRAP,
    BOTH,
    DECISIONS,
    EXACT,
    METRICS,
    NO_INTERVAL,
    THRESHOLD,
    Report,
    RunsReport,
    evaluate_runs,
)
from cardiocaps.models import title as network_title
from cardiocaps.pages import inline, jpeg, write_page
from cardiocaps.runtime.files import output_errors, write_json
from cardiocaps.runtime.program import print_line
from cardiocaps.training.run_folder import RunFolder

if TYPE_CHECKING:
    from cardiocaps.data.datamodule import EchoDataModule

INTERVALS = {
    "bootstrap": "the middle 95 % of the resamples of videos, or of the patients or studies that the table names, "
    "within each class",
    "exact": "Clopper and Pearson 1934: of samples, or of groups where these hold several and are all right or all "
    "wrong; for an AUROC of 0 or 1, of disjoint pairs of a normal and an abnormal group",
    "no interval": "the reason stands in no_interval",
}
_THRESHOLD_ROW = "at the threshold of validation"


@dataclass(frozen=True)
class ResultsTable:
    """The test results of a run side by side, for people: cells of text, and what the methods in them mean."""

    title: str
    head: Sequence[str]
    sections: Sequence[Sequence[Sequence[str]]]
    methods: str
    notes: Sequence[str]


def results_table(
    network: Scores, pixels: Scores | None, config: TrainConfig, regressed: tuple[str, str] | None
) -> ResultsTable:
    """The results of a network and of the classifier of pixels.

    Args:
        regressed: the regression target and the unit of its errors; None: the data have no target.
    """
    unit = unit_of(config)
    both = [network] if pixels is None else [network, pixels]
    reports = [scores.report(unit) for scores in both]
    halves = [scores.report_at_half(unit) for scores in both]
    ranks = [name for name in METRICS if name not in DECISIONS]

    def metrics(of: Sequence[Report], names: Sequence[str]) -> list[tuple[str, ...]]:
        return [(METRIC_NAMES[name], *(str(report.metrics[name]) for report in of)) for name in names]

    decided = [(_THRESHOLD_ROW, *(f"{report.threshold:.3f}" for report in reports)), *metrics(reports, DECISIONS)]
    at_half = [("at a threshold of", *(f"{THRESHOLD:.3f}" for _ in halves)), *metrics(halves, DECISIONS)]
    published = [
        (f"as published: {text}", *(f"{report.paper[key]:.3f}" for report in reports))
        for key, text in PAPER_NAMES.items()
    ]
    regression = _regression_rows(network, unit, *regressed) if regressed else []
    calibrated = _calibration_rows(both, unit)
    ours = reports[0]
    title = f"test split, {ours.n} {unit}s, {ours.positives} abnormal"
    head = ("with 95 % interval" if config.bootstrap else "", network_title(config), *([PIXELS] if pixels else []))
    if all(report.threshold == THRESHOLD for report in reports):
        at_half = []
    sections = [metrics(reports, ranks), calibrated, decided, at_half, published, regression]
    methods = _methods(config.bootstrap, f"{ours.groups} {plural(ours.group_name)}")
    return ResultsTable(title, head, sections, methods, _notes(network, pixels, unit))


def print_table(table: ResultsTable, title: str) -> None:
    """Print a table; `title` names the run and the data."""
    _print(f"{title}: {table.title}", table.head, *table.sections, caption=table.methods)
    for note in table.notes:
        print_line(f"note: {note}")


def _calibration_rows(both: Sequence[Scores], unit: str) -> list[tuple[str, ...]]:
    before, after = zip(*(scores.calibration_error(unit) for scores in both), strict=True)
    method = both[0].calibration.method
    rows = [("expected calibration error", *(f"{error:.3f}" for error in before))]
    if method != "none":
        rows.append((f"after calibration ({method})", f"{after[0]:.3f}", *([""] * (len(both) - 1))))
    return rows


def _regression_rows(network: Scores, unit: str, target: str, measure: str) -> list[tuple[str, ...]]:
    report = network.regression.get(unit)
    if report is None or not report.n:
        return []
    rows = [
        (f"{target}: mean absolute error, {report.n} {unit}s", f"{report.mae:.2f} {measure}".rstrip()),
        (f"{target}: error of the training mean", f"{report.constant_mae:.2f} {measure}".rstrip()),
        (f"{target}: R²", f"{report.r2:.3f}"),
    ]
    return [(name, "undefined" if text.startswith("nan") else text) for name, text in rows]


def _methods(bootstrap: int, drawn: str) -> str:
    """What the methods that the cells name mean; empty without intervals."""
    if not bootstrap:
        return ""
    return (
        f"{BOOTSTRAP}: the middle of {bootstrap:,} resamples of the {drawn}. {EXACT}: Clopper and Pearson; for an "
        f"AUROC, of disjoint pairs. {BOTH}: the wider of both bounds at each end. {NO_INTERVAL}: the middle 95 % of "
        "the resamples have one and the same value."
    )


def _notes(network: Scores, pixels: Scores | None, unit: str) -> list[str]:
    report = network.report(unit)
    notes = list(report.notes)
    notes += [f"{METRIC_NAMES.get(name, name)}: {why}" for name, why in report.undefined.items()]
    if network.calibration.reason:
        notes.append(f"the probabilities are not calibrated, for {network.calibration.reason}")
    if not network.decision.is_chosen:
        notes.append(f"the threshold is {network.decision.rule}")
    if pixels is None:
        notes.append("the run keeps no classifier of pixels to compare with: its folder has no pixel_baseline.json")
    return notes


def print_means(runs: Sequence[tuple[Scores, Scores | None, TrainConfig]]) -> None:
    """Print mean and standard deviation over several runs, of network and baseline; the intervals draw runs too."""
    config = runs[0][2]
    unit = unit_of(config)

    def over_runs(scores: Sequence[Scores]) -> RunsReport:
        probabilities, labels, groups = zip(*(one.test.samples(unit) for one in scores), strict=True)
        return evaluate_runs(
            probabilities,
            labels,
            groups,
            [one.decision.threshold for one in scores],
            bootstrap=config.bootstrap,
            group_name=scores[0].test.group_name,
        )

    reports = [over_runs([network for network, _, _ in runs])]
    pixels = [of for _, of, _ in runs if of is not None]
    if len(pixels) == len(runs):
        reports.append(over_runs(pixels))
    rows = [(METRIC_NAMES[name], *(str(report.metrics[name]) for report in reports)) for name in METRICS]
    title = f"Mean over {len(runs)} runs ± standard deviation, decisions at each run's threshold"
    head = ("with 95 % interval" if config.bootstrap else "", network_title(config), PIXELS)
    drawn = f"{plural(runs[0][0].test.group_name)} and the runs"
    _print(title, head[: len(reports) + 1], rows, caption=_methods(config.bootstrap, drawn))
    for note in reports[0].notes:
        print_line(f"note: {note}")


def _print(title: str, head: Sequence[str], *sections: Sequence[Sequence[str]], caption: str = "") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    # A Text, because a path may contain rich's markup.
    below = Text(f"{caption}\n{DISCLAIMER}" if caption else DISCLAIMER)
    table = Table(title=Text(title), caption=below, box=box.HEAVY_HEAD if unicode else box.ASCII)
    table.title_justify = table.caption_justify = "left"
    for column in head:
        table.add_column(column)
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    # Rendered to text first, because `print_line` works for every terminal, also a closed one.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    print_line(text.getvalue().rstrip())


def write_results(
    run: RunFolder,
    network: Scores,
    pixels: Scores | None,
    config: TrainConfig,
    regressed: tuple[str, str] | None,
    familiarity: Familiarity | None,
    data: EchoDataModule,
    **identity: str | int | None,
) -> None:
    """Write the predictions, the decision, the plots, the page and, last, metrics.json into a run's folder.

    Args:
        regressed: as in `results_table`.
        familiarity: of the network; None: there is none.
        data: on which it was evaluated.
        identity: what was evaluated, and on what.
    """
    unit = unit_of(config)
    report, at_half = network.report(unit), network.report_at_half(unit)
    scores, truth, _ = network.test.samples(unit)
    with output_errors(run.plots):
        run.plots.mkdir(exist_ok=True)
    write_decision(run.decision, network.decision)
    write_calibration(run.calibration, network.calibration)
    if familiarity is not None:
        write_familiarity(run.familiarity, familiarity)
    write_predictions(run, network.test, network.validation, network.decision.threshold, network.calibration)
    counts = {f"{unit}s, probability > {report.threshold:.3g}, chosen on validation": report.confusion}
    if not network.decision.is_chosen:
        counts = {}
    counts[f"{unit}s, probability > {at_half.threshold:g}"] = at_half.confusion
    plots.confusion_matrices(counts, run.confusion_matrix)
    plots.roc_curve(scores, truth, run.roc_curve, report=report)
    plots.precision_recall_curve(scores, truth, run.precision_recall_curve, report=report)
    plots.reliability_diagram(scores, network.calibration(scores), truth, network.calibration.method, run.reliability)
    regression = {}
    if regressed and network.regression:
        of_units = {of: of_unit.as_dict() for of, of_unit in network.regression.items()}
        regression = {"regression": {"target": regressed[0], "unit": regressed[1], **of_units}}
    numbers = [
        (str(report.metrics["auroc"]).partition(" (")[0], "AUROC"),
        (str(report.metrics["average_precision"]).partition(" (")[0], "average precision"),
        (str(report.n), f"test {unit}s"),
        (str(report.positives), "of them abnormal"),
    ]
    table = results_table(network, pixels, config, regressed)
    write_run_page(run, table, numbers, network, config, data, **identity)
    # metrics.json comes last: its presence says that the run is complete.
    results = {
        **identity,
        "network": {
            "name": network_title(config),
            **network.as_dict(),
            **regression,
        },
        "pixel_logistic_regression": None if pixels is None else pixels.as_dict(),
        "intervals": INTERVALS,
        "use": DISCLAIMER,
    }
    write_json(run.metrics_json, results)


def write_run_page(
    run: RunFolder,
    table: ResultsTable,
    numbers: Sequence[tuple[str, str]],
    network: Scores | None,
    config: TrainConfig,
    data: EchoDataModule,
    **identity: str | int | None,
) -> None:
    """Write `report.html`: results, figures, wrong decisions, data and settings on one page, in one file.

    It has no path of this machine, and no frame of a video unless `report_frames` is set.

    Args:
        run: the folder.
        table: the results.
        numbers: the most important ones, and what they are.
        network: whose wrong decisions are listed; None: it decides nothing.
        config: settings of the run.
        data: on which it was evaluated.
        identity: weights and fingerprint.

    Raises:
        OutputError: a file cannot be read or written.
    """
    figures = {
        "Learning curves": run.learning_curves,
        "Regression": run.regression,
        "Receiver operating characteristic": run.roc_curve,
        "Precision and recall": run.precision_recall_curve,
        "Reliability": run.reliability,
        "Confusion matrices": run.confusion_matrix,
    }
    mistakes, decided = ([], 0) if network is None else _mistakes(network, data, config.report_frames)
    with output_errors(run.path):
        pictures = [(title, inline(path.read_bytes(), "png")) for title, path in figures.items() if path.exists()]
    weights, fingerprint = str(identity["weights"])[:12], identity["fingerprint"]
    write_page(
        run.report,
        "run",
        title=f"{network_title(config)}, seed {config.seed}",
        subtitle=f"Weights {weights}, data {fingerprint}, {table.title}.",
        numbers=numbers,
        head=table.head,
        sections=table.sections,
        methods=table.methods,
        notes=table.notes,
        figures=pictures,
        decides=network is not None,
        mistakes=mistakes,
        decided=decided,
        frames=config.report_frames,
        data=data.study.summary(),
        settings=_settings(config),
    )


def _mistakes(network: Scores, data: EchoDataModule, with_frames: bool) -> tuple[list[dict[str, Any]], int]:
    """The videos of the test split that were decided wrongly, the most wrong first, and how many videos there are."""
    test, threshold = network.test, network.decision.threshold
    probability, label, _ = test.samples("video")
    clips = data.clips("test")
    numbers = sorted(set(test.clip.tolist()))
    wrong = []
    for number, p, y in zip(numbers, probability.tolist(), label.tolist(), strict=True):
        if (p > threshold) == bool(y):
            continue
        frame = data.middle_frame(clips[number]) if with_frames else None
        mistake = {
            "video": clips[number].where,
            "label": ("normal", "abnormal")[y],
            "decision": ("normal", "abnormal")[1 - y],
            "probability": f"{p:.3f}",
            "frame": None if frame is None else inline(jpeg(*frame), "jpeg"),
        }
        wrong.append((abs(p - threshold), mistake))
    wrong.sort(key=lambda one: one[0], reverse=True)
    return [mistake for _, mistake in wrong], len(numbers)


def _settings(config: TrainConfig) -> list[tuple[str, str]]:
    """The settings that differ from their defaults, without paths, which can identify the user."""
    return [
        (option.flag.removeprefix("--"), str(value))
        for name, option in options().items()
        if (value := getattr(config, name)) not in (option.default, None) and not isinstance(value, Path)
    ]
