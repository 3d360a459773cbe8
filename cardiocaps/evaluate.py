"""`python -m cardiocaps.evaluate RUN`: evaluate a run's best network on the test split once more.

The same code evaluates at the end of training, so the numbers are the same.
"""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiocaps.config import CommandLine, TrainConfig, add_options, options, read_run, settings_that_affect
from cardiocaps.errors import CardioCapsError, CheckpointError, plural, printable
from cardiocaps.evaluation.pixel_baseline import PIXEL_SIDE
from cardiocaps.runtime.program import Interrupted, Interruption, print_line, run_program

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from cardiocaps.data.datamodule import EchoDataModule
    from cardiocaps.data.fingerprint import Fingerprint
    from cardiocaps.evaluation.decision import Decision
    from cardiocaps.evaluation.predictions import Predictions
    from cardiocaps.metrics import RegressionReport, Report
    from cardiocaps.runtime.device import Machine
    from cardiocaps.training.module import Classifier
    from cardiocaps.training.run_folder import RunFolder

DISCLAIMER = "Research use only. Not a medical device."

_CHANGEABLE = (
    "data",
    "follow_links",
    "group_column",
    "allow_split_patients",
    "max_bad_share",
    "cache_dir",
    "device",
    "threads",
    "workers",
)
"""Settings of the run that an evaluation may change: where the data lie, how they are read, and the machine."""

_CHANGED_DATA = "--allow-changed-data evaluates on it all the same"


@dataclass(frozen=True)
class Scores:
    """What one model says of the test split, judged by its own decision: reports by video and by frame, the same at a
    threshold of 0.5, and by either how far the regression is off."""

    test: Predictions
    validation: Predictions | None
    decision: Decision
    video: Report
    frame: Report
    video_at_half: Report
    frame_at_half: Report
    regression: Mapping[str, RegressionReport]  # by unit; empty for a model that does not regress

    @classmethod
    def of(cls, test: Predictions, validation: Predictions | None, decision: Decision, bootstrap: int) -> Scores:
        """The bootstrap draws videos, or patients where the table names them."""
        from cardiocaps.evaluation.predictions import UNITS
        from cardiocaps.metrics import THRESHOLD, evaluate, mean_by, regression_report

        reports = {
            (unit, threshold): evaluate(
                *test.samples(unit), threshold=threshold, bootstrap=bootstrap, group_name=test.group_name
            )
            for unit in UNITS
            for threshold in (decision.threshold, THRESHOLD)
        }
        regression = {}
        if test.regression is not None and test.target is not None:
            said, truth = test.regression, test.target
            regression = {
                "video": regression_report(mean_by(said, test.clip), mean_by(truth, test.clip), decision.target_mean),
                "frame": regression_report(said, truth, decision.target_mean),
            }
        return cls(
            test,
            validation,
            decision,
            video=reports["video", decision.threshold],
            frame=reports["frame", decision.threshold],
            video_at_half=reports["video", THRESHOLD],
            frame_at_half=reports["frame", THRESHOLD],
            regression=regression,
        )

    def report(self, unit: str) -> Report:
        """By video or by frame."""
        return self.video if unit == "video" else self.frame

    def report_at_half(self, unit: str) -> Report:
        return self.video_at_half if unit == "video" else self.frame_at_half

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        from cardiocaps.evaluation.predictions import UNITS
        from cardiocaps.metrics import DECISIONS

        content: dict[str, Any] = {
            "decision": {"threshold": self.decision.threshold, "unit": self.decision.unit, "rule": self.decision.rule}
        }
        content |= {unit: self.report(unit).as_dict() for unit in UNITS}
        for unit in UNITS:
            report = self.report_at_half(unit).as_dict()
            metrics = {name: report["metrics"][name] for name in DECISIONS}
            content[f"{unit}_at_0.5"] = {"metrics": metrics, "confusion": report["confusion"]}
        return content


def predict(trainer: Trainer, network: Classifier, data: EchoDataModule, split: str) -> Predictions:
    """What the network says of every frame of a split, in evaluation mode and in one process.

    Raises CheckpointError where it is not finite.
    """
    import numpy as np
    import torch

    from cardiocaps.evaluation.predictions import Predictions

    data.predicted = split
    batches = trainer.predict(network, datamodule=data, return_predictions=True)
    assert batches is not None
    out: dict[str, Any] = {name: torch.cat([b[name].cpu() for b in batches]).numpy() for name in batches[0]}
    if not all(np.isfinite(out[name]).all() for name in ("probability", "regression") if name in out):
        raise CheckpointError("the network's output is not finite: its training diverged")
    return Predictions.of(out, data.clips(split), data.study.group_kind)


METRIC_NAMES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "f1": "F1 (abnormal)",
    "f1_weighted": "F1 (weighted)",
    "accuracy": "accuracy",
    "brier": "Brier score",
}
PAPER_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "roc_auc": "ROC AUC (hard labels)",
    "pr_auc": "PR AUC (precision)",
}
ROUTING_NAMES = {"attention": "CardioCaps", "dynamic": "DR-CapsNet", "uniform": "uniform routing"}
MODEL_NAMES = {
    "em-capsnet": "EM-CapsNet",
    "efficient-capsnet": "Efficient-CapsNet",
    "cnn-1": "CNN-(1)",
    "cnn-2": "CNN-(2)",
    "resnet18": "ResNet18",
    "unet": "U-Net",
    "vit": "ViT",
}
TARGET_UNITS = {"width": "cm", "ef": "percentage points"}
"""Of the errors of a regression: two ejection fractions, in percent, differ by percentage points."""
INTERVALS = {
    "bootstrap": "the middle 95 % of the resamples of videos, or of the patients or studies that the table names, "
    "within each class",
    "exact": "Clopper and Pearson 1934: of samples, or of groups where these hold several and are all right or all "
    "wrong; for an AUROC of 0 or 1, of disjoint pairs of a normal and an abnormal group",
    "no interval": "the reason stands in no_interval",
}
_THRESHOLD_ROW = "at the threshold of validation"
PIXELS_NAME = f"logistic regression, {PIXEL_SIDE}×{PIXEL_SIDE} pixels"


def network_name(config: TrainConfig) -> str:
    """What tables call the network of a run."""
    if config.model != "cardiocaps":
        return MODEL_NAMES[config.model]
    name = ROUTING_NAMES[config.routing]
    return name if config.affine == "matrices" else f"{name}, {config.affine} affine map"


def unit_of(config: TrainConfig) -> str:
    """What a sample of a run's results is: a video, but a frame where these were split."""
    return "frame" if config.splits_frames else "video"


def print_table(network: Scores, pixels: Scores | None, config: TrainConfig, title: str) -> None:
    """The test results of a run side by side, for people; `title` names the run and the data."""
    from cardiocaps.metrics import DECISIONS, METRICS, THRESHOLD

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
    regression = _regression_rows(network, unit, config.regression_target)
    ours = reports[0]
    title = f"{title}: test split, {ours.n} {unit}s, {ours.positives} abnormal"
    head = ("with 95 % interval" if config.bootstrap else "", network_name(config), *([PIXELS_NAME] if pixels else []))
    if all(report.threshold == THRESHOLD for report in reports):
        at_half = []
    sections = [metrics(reports, ranks), decided, at_half, published, regression]
    _print(title, head, *sections, caption=_methods(reports + halves))
    for note in _notes(network, pixels, unit):
        print_line(f"note: {note}")


def _regression_rows(network: Scores, unit: str, target: str) -> list[tuple[str, ...]]:
    report = network.regression.get(unit)
    if report is None or not report.n:
        return []
    measure = TARGET_UNITS[target]
    rows = [
        (f"{target}: mean absolute error, {report.n} {unit}s", f"{report.mae:.2f} {measure}"),
        (f"{target}: error of the training mean", f"{report.constant_mae:.2f} {measure}"),
        (f"{target}: R²", f"{report.r2:.3f}"),
    ]
    return [(name, "undefined" if text.startswith("nan") else text) for name, text in rows]


def _methods(reports: Sequence[Report]) -> str:
    """What the names of methods in the cells mean."""
    from cardiocaps.metrics import BOOTSTRAP, EXACT, NO_INTERVAL

    used = {estimate.method for report in reports for estimate in report.metrics.values()}
    drawn = f"{reports[0].groups} {plural(reports[0].group_name)}"
    means = {
        BOOTSTRAP: f"{BOOTSTRAP}: the middle of {reports[0].bootstrap:,} resamples of the {drawn}.",
        EXACT: f"{EXACT}: Clopper and Pearson; for an AUROC, of disjoint pairs.",
        NO_INTERVAL: f"{NO_INTERVAL}: the middle 95 % of the resamples have one and the same value.",
    }
    return " ".join(text for method, text in means.items() if method in used)


def _notes(network: Scores, pixels: Scores | None, unit: str) -> list[str]:
    report = network.report(unit)
    notes = list(report.notes)
    notes += [f"{METRIC_NAMES.get(name, name)}: {why}" for name, why in report.undefined.items()]
    if not network.decision.is_chosen:
        notes.append(f"the threshold is {network.decision.rule}")
    if pixels is None:
        notes.append("the run keeps no classifier of pixels to compare with: its folder has no pixel_baseline.json")
    return notes


def print_means(runs: Sequence[tuple[Scores, Scores | None, TrainConfig]]) -> None:
    """Mean and standard deviation over several runs, of both models, with intervals that draw the runs too."""
    from cardiocaps.metrics import METRICS, RunsReport, evaluate_runs

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
    head = ("with 95 % interval" if config.bootstrap else "", network_name(config), PIXELS_NAME)
    drawn = plural(runs[0][0].test.group_name)
    caption = (
        f"bootstrap: the middle of {config.bootstrap:,} resamples of the {drawn} and the runs. exact: Clopper and "
        "Pearson; for an AUROC, of disjoint pairs. exact/bootstrap: at either end the farther of both."
    )
    _print(title, head[: len(reports) + 1], rows, caption=caption if config.bootstrap else "")
    for note in reports[0].notes:
        print_line(f"note: {note}")


def _print(title: str, head: Sequence[str], *sections: Sequence[Sequence[str]], caption: str = "") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    # A Text, for a path may hold what rich takes for its markup.
    below = Text(f"{caption}\n{DISCLAIMER}" if caption else DISCLAIMER)
    table = Table(title=Text(title), caption=below, box=box.HEAVY_HEAD if unicode else box.ASCII)
    table.title_justify = table.caption_justify = "left"
    for column in head:
        table.add_column(column)
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    # To a text first, which `say` gets out whatever has become of the terminal.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 120
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    print_line(text.getvalue().rstrip())


def write_results(
    run: RunFolder, network: Scores, pixels: Scores | None, config: TrainConfig, **identity: str | int | None
) -> None:
    """The predictions, the decision, the plots and, last, metrics.json of a run. `identity` says what was evaluated,
    and on what. Raises OutputError."""
    from cardiocaps import plots
    from cardiocaps.evaluation.decision import write_decision
    from cardiocaps.evaluation.predictions import write_predictions
    from cardiocaps.runtime.files import output_errors, write_json

    unit = unit_of(config)
    report, at_half = network.report(unit), network.report_at_half(unit)
    scores, truth, _ = network.test.samples(unit)
    with output_errors(run.plots):
        run.plots.mkdir(exist_ok=True)
    write_decision(run.decision, network.decision)
    write_predictions(run, network.test, network.validation, network.decision.threshold)
    counts = {f"{unit}s, probability > {report.threshold:.3g}, chosen on validation": report.confusion}
    if not network.decision.is_chosen:
        counts = {}
    counts[f"{unit}s, probability > {at_half.threshold:g}"] = at_half.confusion
    plots.confusion_matrices(counts, run.confusion_matrix)
    plots.roc_curve(scores, truth, run.roc_curve, report=report)
    plots.precision_recall_curve(scores, truth, run.precision_recall_curve, report=report)
    regression = {
        "target": config.regression_target,
        "unit": TARGET_UNITS[config.regression_target],
        **{of: of_unit.as_dict() for of, of_unit in network.regression.items()},
    }
    # Last, for its presence says that the run is complete.
    results = {
        **identity,
        "network": {
            "name": network_name(config),
            **network.as_dict(),
            **({"regression": regression} if network.regression else {}),
        },
        "pixel_logistic_regression": None if pixels is None else pixels.as_dict(),
        "intervals": INTERVALS,
        "use": DISCLAIMER,
    }
    write_json(run.metrics_json, results)


def evaluate_network(
    config: TrainConfig,
    machine: Machine,
    run: RunFolder,
    data: EchoDataModule,
    results: RunFolder | None,
    *,
    own_data: bool = True,
    fingerprint: str | None = None,
    left_out: int = 0,
) -> tuple[Scores, Scores | None]:
    """Evaluate a run's best network beside the run's logistic regression on pixels; print the table, write into
    `results`.

    What the run keeps of its training, its threshold and that regression, is used; at the end of training, where
    `results` is the run itself, both are made and kept. `own_data`: whether `data` is what the run was trained on, so
    that what an older run does not keep can be made anew. `fingerprint`: of the data, None to find it out. `left_out`:
    how many test videos are not in `data`, for the run was trained or validated on them.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another configuration, or what the run keeps is
            damaged. OutputError.
    """
    from cardiocaps.data.fingerprint import Fingerprint
    from cardiocaps.evaluation.decision import Decision, read_decision, training_mean
    from cardiocaps.evaluation.pixel_baseline import PixelBaseline
    from cardiocaps.runtime.files import write_json
    from cardiocaps.train import make_trainer
    from cardiocaps.training.module import best_network, weights_digest

    training = results is not None and results.path == run.path
    unit = unit_of(config)
    network = best_network(config, run)
    weights = weights_digest(network)
    machine.lay_out(network.model)
    trainer = make_trainer(config, machine)
    test = predict(trainer, network, data, "test")
    decision = None if training else read_decision(run.decision, weights)
    validation = None
    if own_data and (results is not None or decision is None):
        validation = predict(trainer, network, data, "val")
        decision = decision or Decision.choose(validation, unit, weights, training_mean(data))
    scores = Scores.of(test, validation, decision or Decision.unknown(unit, weights), config.bootstrap)

    baseline = None if training else PixelBaseline.read(run.pixel_baseline)
    if baseline is None and own_data:
        baseline = PixelBaseline.fit(data, unit)
        if training:
            baseline.write(run.pixel_baseline)
    pixels = None
    if baseline is not None:
        pixels = Scores.of(baseline.predict(data, "test"), None, baseline.decision, config.bootstrap)
    fingerprint = fingerprint or Fingerprint.of(data.study).digest
    if results:
        identity: dict[str, str | int | None] = {
            "weights": weights,
            "fingerprint": fingerprint,
            "test_videos_left_out": left_out,
        }
        write_results(results, scores, pixels, config, **identity)
    if results and not training:
        # Names, not paths: these may say who keeps them, and results are shown to others.
        run_name, data_name = (place.resolve().name for place in (run.path, data.study.root))
        write_json(results.evaluation, {"run": run_name, "data": data_name, **identity, "own_data": own_data})
    place, source = printable(run.path), printable(data.study.root)
    title = f"{place} (weights {weights[:12]}) on {source} (fingerprint {fingerprint})"
    print_table(scores, pixels, config, title)
    return scores, pixels


def evaluate_run(
    path: Path, changed: Mapping[str, Any], out: Path | None = None, *, allow_changed_data: bool = False
) -> tuple[Scores, Scores | None, TrainConfig, Fingerprint]:
    """Evaluate the run in folder `path` with some settings `changed`; print the table, and write to `out` if given.

    `allow_changed_data`: on other data than the run was trained on, too; on those of another folder all of them, in
    the splits of their own table where it has some. The fingerprint is that of the data.

    Raises:
        CardioCapsError: the folder is no run's, its checkpoint or data cannot be used, or `out` cannot be written.
    """
    from cardiocaps.data.splits import SPLITS
    from cardiocaps.runtime.device import machine_for
    from cardiocaps.train import decode_for_run, read_study
    from cardiocaps.training.run_folder import RunFolder

    run = RunFolder.open(path)
    config = replace(read_run(path), **changed)
    with machine_for(config) as machine:
        # What is made anew for an older run needs all splits; other data only have to be tested on.
        needed = ("test",) if allow_changed_data or "data" in changed else SPLITS
        reading = config
        if allow_changed_data and "data" in changed and not config.splits_frames:
            reading = replace(config, limit=None, split="auto")
        study = read_study(reading, again=True, needed_splits=needed)
        used = decode_for_run(reading, machine, run, study, _CHANGED_DATA, allow_changed=allow_changed_data)
        results = RunFolder.create(out) if out else None
        own_data = "data" not in changed if used.is_own is None else used.is_own  # data of the run may have moved
        try:
            scores, pixels = evaluate_network(
                config,
                machine,
                run,
                used.data,
                results,
                own_data=own_data,
                fingerprint=used.fingerprint.digest,
                left_out=used.left_out,
            )
        except (CardioCapsError, Interrupted):
            if results:
                results.discard()
            raise
    if results:
        print_line(f"written to {printable(results.path)}")
    return scores, pixels, config, used.fingerprint


def _but_for_the_seed(config: TrainConfig, data: Fingerprint) -> str:
    """What runs that may be averaged have in common: their data, wherever these lie, and their settings but for those
    of the machine."""
    ignored = {"seed", *settings_that_affect("rounding", "machine", "display", "place")}
    settings = {name: value for name, value in config.as_dict().items() if name not in ignored}
    # With a limit, another split is of other videos.
    return repr((settings, data.digest_without_splits if config.limit is None else data.table))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = CommandLine(
        prog="python -m cardiocaps.evaluate",
        description="Evaluate a run's best network on its test split once more and print the table; "
        "of several runs, their mean too.",
        epilog=DISCLAIMER,
    )
    path = options()["data"].from_text
    parser.add_argument("runs", metavar="RUN", type=path, nargs="+", help="folder of a run")
    parser.add_argument(
        "--allow-changed-data",
        action="store_true",
        help="evaluate on other data than the run was trained on too, and say what has changed",
    )
    parser.add_argument("--out", metavar="PATH", type=path, help="also write the results to this new folder")
    add_options(parser, _CHANGEABLE, default="the run's own")
    given = parser.parse_args(argv)
    if given.out and len(given.runs) > 1:
        parser.error("argument --out: holds the results of one run; give one RUN")
    changed = {name: getattr(given, name) for name in _CHANGEABLE if getattr(given, name) is not None}

    def body(_: Interruption) -> None:
        from cardiocaps.train import quiet

        quiet()
        results = [
            evaluate_run(run, changed, given.out, allow_changed_data=given.allow_changed_data) for run in given.runs
        ]
        differing = {_but_for_the_seed(config, data) for _, _, config, data in results}
        if len(differing) > 1:
            print_line("note: the runs differ in more than their seed, so there is no mean over them")
        elif len(results) > 1:
            print_means([(network, pixels, config) for network, pixels, config, _ in results])

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
