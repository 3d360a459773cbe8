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

from cardiocaps.config import CommandLine, TrainConfig, options, read_run
from cardiocaps.errors import CheckpointError
from cardiocaps.program import Interruption, execute, say

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from cardiocaps.data.datamodule import EchoDataModule
    from cardiocaps.learning import Classifier
    from cardiocaps.machine import Machine
    from cardiocaps.metrics import RegressionReport, Report
    from cardiocaps.run_folder import RunFolder

DISCLAIMER = "Research use only. Not a medical device."

# Side of the downsized frames that the classical classifiers see, in pixels.
PIXEL_SIDE = 32


@dataclass(frozen=True)
class Scores:
    """What one model says of the test split: a row for each frame, and reports by frame and by video."""

    rows: list[dict[str, Any]]
    frame: Report
    video: Report
    regression: RegressionReport | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        reports = {"video": self.video.as_dict(), "frame": self.frame.as_dict()}
        return reports if self.regression is None else {**reports, "regression": self.regression.as_dict()}


def _scores(data: EchoDataModule, probability: Any, label: Any, clip: Any, bootstrap: int, **columns: Any) -> Scores:
    """Reports of frame probabilities; the bootstrap draws videos."""
    from cardiocaps.metrics import by_video, evaluate

    names = [c.name for c in data.clips("test")]
    video = [names[i] for i in clip]
    table = {"video": video, **columns, "label": label, "probability": probability}
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    # The paper protocol has several clips of one video, with labels that may differ: its unit is the clip.
    return Scores(
        rows=rows,
        frame=evaluate(probability, label, video, bootstrap=bootstrap),
        video=evaluate(*by_video(probability, label, clip), bootstrap=bootstrap),
    )


def score_network(trainer: Trainer, network: Classifier, data: EchoDataModule, bootstrap: int) -> Scores:
    """The network on every test frame, in evaluation mode and in one process."""
    from cardiocaps.metrics import regression_report

    out = predict(trainer, network, data, "test")
    columns = {name: out[name] for name in ("frame", "target", "regression") if name in out}
    scores = _scores(data, out["probability"], out["label"], out["clip"], bootstrap, **columns)
    if "regression" not in out:
        return scores
    return replace(scores, regression=regression_report(out["regression"], out["target"]))


def predict(trainer: Trainer, network: Classifier, data: EchoDataModule, split: str) -> dict[str, Any]:
    """What the network says of every frame of a split: arrays [n] by the names of `Classifier.predict_step`.

    Raises CheckpointError where it is not finite.
    """
    import numpy as np
    import torch

    data.predicted = split
    batches = trainer.predict(network, datamodule=data, return_predictions=True)
    assert batches is not None
    out: dict[str, Any] = {name: torch.cat([b[name].cpu() for b in batches]).numpy() for name in batches[0]}
    if not all(np.isfinite(out[name]).all() for name in ("probability", "regression") if name in out):
        raise CheckpointError("the network's output is not finite: its training diverged")
    return {**out, "probability": out["probability"].astype("float64")}


def score_pixels(data: EchoDataModule, bootstrap: int) -> Scores:
    """Logistic regression on downsized grey frames: what the label owes to mere brightness and position."""
    from cardiocaps.models.pixel_classifiers import fit

    train, train_label, _ = data.pixels("train", PIXEL_SIDE)
    test, label, clip = data.pixels("test", PIXEL_SIDE)
    classifier = fit("logistic-regression", "class-weight", train, train_label, seed=0)
    return _scores(data, classifier.probability(test), label, clip, bootstrap)


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
PIXELS_NAME = f"logistic regression, {PIXEL_SIDE}×{PIXEL_SIDE} pixels"


def network_name(config: TrainConfig) -> str:
    """What tables call the network of a run."""
    if config.model != "cardiocaps":
        return MODEL_NAMES[config.model]
    name = ROUTING_NAMES[config.routing]
    return name if config.affine == "matrices" else f"{name}, {config.affine} affine map"


def _reports(network: Scores, pixels: Scores, config: TrainConfig) -> tuple[str, Report, Report]:
    """The unit of a run and the two reports by it: videos, but frames where these were split."""
    unit = "frame" if config.splits_frames else "video"
    return unit, getattr(network, unit), getattr(pixels, unit)


def print_table(network: Scores, pixels: Scores, config: TrainConfig) -> None:
    """The test results of a run side by side, for people."""
    unit, ours, baseline = _reports(network, pixels, config)
    title = f"{config.out}: test split, {ours.n} {unit}s, {ours.positives} abnormal"
    rows = [(text, str(ours.metrics[key]), str(baseline.metrics[key])) for key, text in METRIC_NAMES.items()]
    published = [
        (f"as published: {text}", f"{ours.paper[key]:.3f}", f"{baseline.paper[key]:.3f}")
        for key, text in PAPER_NAMES.items()
    ]
    regression = []
    if network.regression is not None and network.regression.n:
        unit_of_target = {"width": "cm", "ef": "percent"}[config.regression_target]
        error = f"{network.regression.mae:.2f} {unit_of_target}"
        regression = [(f"mean absolute error of {config.regression_target}", error, "")]
    first = "with 95 % interval" if config.bootstrap else ""
    _print(title, (first, network_name(config), PIXELS_NAME), rows, published, regression)
    for note in (*ours.notes, *(f"{metric}: {why}" for metric, why in ours.undefined.items())):
        say(f"note: {note}")


def print_means(runs: Sequence[tuple[Scores, Scores, TrainConfig]]) -> None:
    """Mean and standard deviation over several runs, of both models."""
    from statistics import fmean, stdev

    reports = [_reports(*run)[1:] for run in runs]

    def over_runs(key: str, which: int) -> str:
        values = [report[which].metrics[key].value for report in reports]
        return f"{fmean(values):.3f} ± {stdev(values):.3f}"

    rows = [(text, over_runs(key, 0), over_runs(key, 1)) for key, text in METRIC_NAMES.items()]
    _print(f"Mean over {len(runs)} runs ± standard deviation", ("", network_name(runs[0][2]), PIXELS_NAME), rows)


def _print(title: str, head: Sequence[str], *sections: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    table = Table(title=title, caption=DISCLAIMER, box=box.HEAVY_HEAD if unicode else box.ASCII)
    table.title_justify = table.caption_justify = "left"
    for column in head:
        table.add_column(column)
    for section in sections:
        for row in section:
            table.add_row(*row)
        table.add_section()
    # To a text first, which `say` gets out whatever has become of the terminal.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 100
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    say(text.getvalue().rstrip())


def write_results(run: RunFolder, network: Scores, pixels: Scores, config: TrainConfig) -> None:
    """metrics.json, predictions.csv and the plots of a run. Raises OutputError."""
    from cardiocaps import plots
    from cardiocaps.files import output_errors, write_csv, write_json
    from cardiocaps.metrics import by_video

    unit, report, _ = _reports(network, pixels, config)
    rows = network.rows
    probability, label, video = ([row[name] for row in rows] for name in ("probability", "label", "video"))
    scores, truth = by_video(probability, label, video) if unit == "video" else (probability, label)
    with output_errors(run.plots):
        run.plots.mkdir(exist_ok=True)
    write_csv(run.predictions_csv, rows)
    plots.confusion_matrix(report.confusion, run.confusion_matrix)
    plots.roc_curve(scores, truth, run.roc_curve, report=report)
    plots.precision_recall_curve(scores, truth, run.precision_recall_curve, report=report)
    # Last, for its presence says that the run is complete.
    results = {
        "network": {"name": network_name(config), **network.as_dict()},
        "pixel_logistic_regression": pixels.as_dict(),
        "use": DISCLAIMER,
    }
    write_json(run.metrics_json, results)


def evaluate_network(
    config: TrainConfig, machine: Machine, run: RunFolder, data: EchoDataModule, results: RunFolder | None
) -> tuple[Scores, Scores]:
    """Evaluate a run's best network beside the pixels' logistic regression; print the table, write into `results`.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or of another configuration. OutputError.
    """
    from cardiocaps.learning import best_network
    from cardiocaps.train import make_trainer

    network = best_network(config, run)
    machine.lay_out(network.model)
    scores = score_network(make_trainer(config, machine), network, data, config.bootstrap)
    pixels = score_pixels(data, config.bootstrap)
    if results:
        write_results(results, scores, pixels, config)
    print_table(scores, pixels, config)
    return scores, pixels


def evaluate_run(path: Path, changed: Mapping[str, Any], out: Path | None = None) -> tuple[Scores, Scores, TrainConfig]:
    """Evaluate the run in folder `path` with some settings `changed`; print the table, and write to `out` if given.

    Raises:
        CardioCapsError: the folder is no run's, its checkpoint or data cannot be used, or `out` cannot be written.
    """
    from cardiocaps.machine import machine_for
    from cardiocaps.run_folder import RunFolder
    from cardiocaps.train import decode, read_study

    run = RunFolder.open(path)
    config = replace(read_run(path), **changed)
    with machine_for(config) as machine:
        results = RunFolder.create(out) if out else None
        data = decode(config, machine, read_study(config))
        scores, pixels = evaluate_network(config, machine, run, data, results)
    if results:
        say(f"written to {results.path}")
    return scores, pixels, config


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `cardiocaps.train.main`."""
    parser = CommandLine(
        prog="python -m cardiocaps.evaluate",
        description="Evaluate a run's best network on its test split once more and print the table; "
        "of several runs, their mean too.",
        epilog=DISCLAIMER,
    )
    data, device, threads = (options()[name] for name in ("data", "device", "threads"))
    path = data.from_text
    parser.add_argument("runs", metavar="RUN", type=path, nargs="+", help="folder of a run")
    parser.add_argument("--data", metavar="PATH", type=path, help="data folder, where it has moved")
    parser.add_argument("--device", type=device.from_text, help=f"{device.allowed} (default: the run's own)")
    parser.add_argument("--threads", metavar="N", type=threads.from_text, help="of the CPU (default: the run's own)")
    parser.add_argument("--out", metavar="PATH", type=path, help="also write the results to this new folder")
    given = parser.parse_args(argv)
    if given.out and len(given.runs) > 1:
        parser.error("argument --out: holds the results of one run; give one RUN")
    changed = {n: getattr(given, n) for n in ("data", "device", "threads") if getattr(given, n) is not None}

    def body(_: Interruption) -> None:
        from cardiocaps.train import quiet

        quiet()
        results = [evaluate_run(run, changed, given.out) for run in given.runs]
        differing = {repr(replace(config, seed=0, out=None)) for _, _, config in results}
        if len(differing) > 1:
            say("note: the runs differ in more than their seed, so there is no mean over them")
        elif len(results) > 1:
            print_means(results)

    return execute(body)


if __name__ == "__main__":
    sys.exit(main())
