"""Evaluates the best network of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cardiocaps.config import TrainConfig, options, read_run, settings_that_affect
from cardiocaps.data.datasets import OWN_SETTINGS
from cardiocaps.data.fingerprint import Fingerprint
from cardiocaps.data.open import RunData, decode_for_run, read_study, with_layout
from cardiocaps.data.splits import SPLITS
from cardiocaps.errors import CardioCapsError, CheckpointError, printable
from cardiocaps.evaluation.calibration import Calibration, read_calibration
from cardiocaps.evaluation.decision import Decision, read_decision, training_mean
from cardiocaps.evaluation.familiarity import Familiarity
from cardiocaps.evaluation.pixel_baseline import PixelBaseline
from cardiocaps.evaluation.predictions import unit_of
from cardiocaps.evaluation.regression import Target, TargetScores, print_target_means
from cardiocaps.evaluation.report import print_means, print_table, results_table, write_results
from cardiocaps.evaluation.scores import Scores, predict
from cardiocaps.runtime.device import Machine, machine_for
from cardiocaps.runtime.files import write_json
from cardiocaps.runtime.program import Interrupted, print_line
from cardiocaps.runtime.quiet import quiet
from cardiocaps.training.checkpoints import best_network, weights_digest
from cardiocaps.training.module import Classifier
from cardiocaps.training.run_folder import RunFolder

_OF_DATA_SET = ("threshold", "group_column", *OWN_SETTINGS)
"""Settings that mean something else, or nothing, for another data set."""

_CHANGED_DATA = "--allow-changed-data evaluates anyway"


def evaluate_network(
    config: TrainConfig, machine: Machine, run: RunFolder, used: RunData, results: RunFolder | None
) -> tuple[Scores, Scores | None]:
    """Evaluate the best network of a run beside its baseline, logistic regression on pixels; print the table.

    The threshold, the calibration and the baseline are those that the run keeps. At the end of training, when `results`
    is the run itself, they are made and kept. What an older run does not keep is made anew, if the run was trained on
    the data.

    Args:
        results: where to write; None: print only.

    Returns:
        The scores of the network and of the baseline; None if there is no baseline.

    Raises:
        CheckpointError: a file of the run is missing, damaged or of another configuration.
        OutputError: a file cannot be written.
    """
    data, own_data = used.data, used.is_own is not False
    training = results is not None and results.path == run.path
    unit, target = unit_of(config), data.target
    regressed = None if target is None else (target, data.study.units[target])
    network = best_network(config, run, Classifier)
    weights = weights_digest(network)
    decision = None if training else read_decision(run.decision, weights)
    calibration = None if training else read_calibration(run.calibration, weights)
    with_validation = own_data and (results is not None or decision is None or calibration is None)
    said = predict(config, machine, network, data, ("test", "val") if with_validation else ("test",))
    if with_validation:
        decision = decision or Decision.choose(said["val"], unit, weights, training_mean(data))
        calibration = calibration or Calibration.fit(config.calibration, said["val"], unit, weights)
    scores = Scores.of(
        said["test"],
        said.get("val"),
        decision or Decision.unknown(unit, weights),
        calibration or Calibration("none", unit, weights),
        config.bootstrap,
    )

    baseline = None if training else PixelBaseline.read(run.pixel_baseline)
    if baseline is None and own_data:
        baseline = PixelBaseline.fit(data, unit)
        if training:
            baseline.write(run.pixel_baseline)
    pixels = None
    if baseline is not None:
        said_by_pixels = baseline.predict(data, "test")
        pixels = Scores.of(said_by_pixels, None, baseline.decision, Calibration("none", unit), config.bootstrap)
    if results:
        # With frames of each video in every split, no validation video is new to the network.
        familiarity = Familiarity.of(said["val"], weights) if with_validation and unit == "video" else None
        write_results(results, scores, pixels, config, regressed, familiarity, data, **_identity(weights, used))
        _write_origin(results, run, weights, used)
    print_table(results_table(scores, pixels, config, regressed), _title(run, weights, used))
    return scores, pixels


def evaluate_target(
    config: TrainConfig, machine: Machine, run: RunFolder, used: RunData, results: RunFolder | None
) -> TargetScores:
    """Evaluate the best network of a run whose task is regression alone; print the table.

    Args:
        config: settings of the run.
        machine: where it runs.
        run: the folder of the run.
        used: the data.
        results: where to write; None: print only.

    Returns:
        The errors. The training mean is that of the run's own data.

    Raises:
        CheckpointError: a file of the run is missing, damaged or of another configuration.
        OutputError: a file cannot be written.
    """
    data, own_data = used.data, used.is_own is not False
    network = best_network(config, run, Classifier)
    weights = weights_digest(network)
    target = Target.of(data) if own_data else Target.read(run.target)
    if target is None:
        raise CheckpointError(f"{printable(run.path)} has no {run.target.name}: its training has not ended")
    with_validation = own_data and results is not None
    said = predict(config, machine, network, data, ("test", "val") if with_validation else ("test",))
    scores = TargetScores.of(said["test"], said.get("val"), target)
    if results:
        by_video = with_validation and unit_of(config) == "video"
        familiarity = Familiarity.of(said["val"], weights) if by_video else None
        scores.write(results, config, familiarity, data, **_identity(weights, used))
        _write_origin(results, run, weights, used)
    print_table(scores.table(config), _title(run, weights, used))
    return scores


def evaluate_task(
    config: TrainConfig, machine: Machine, run: RunFolder, used: RunData, results: RunFolder | None
) -> tuple[Scores | TargetScores, Scores | None]:
    """`evaluate_network`, or `evaluate_target` if the task of the run is regression alone."""
    if config.task == "regression":
        return evaluate_target(config, machine, run, used, results), None
    return evaluate_network(config, machine, run, used, results)


def _identity(weights: str, used: RunData) -> dict[str, str | int | None]:
    """What was evaluated, and on what."""
    return {"weights": weights, "fingerprint": used.fingerprint.digest, "test_videos_left_out": used.left_out}


def _write_origin(results: RunFolder, run: RunFolder, weights: str, used: RunData) -> None:
    """Write which run was evaluated on which data, outside of the run's own folder."""
    if results.path == run.path:
        return
    # Names, not paths: results are shown to others, and paths can identify the user.
    run_name, data_name = (place.resolve().name for place in (run.path, used.data.study.root))
    origin = {"run": run_name, "data": data_name, **_identity(weights, used), "own_data": used.is_own is not False}
    write_json(results.evaluation, origin)


def _title(run: RunFolder, weights: str, used: RunData) -> str:
    """The title of the printed table."""
    place, source = printable(run.path), printable(used.data.study.root)
    return f"{place} (weights {weights[:12]}) on {source} (fingerprint {used.fingerprint.digest})"


def evaluate_run(
    path: Path, changed: Mapping[str, Any], out: Path | None = None, *, allow_changed_data: bool = False
) -> tuple[Scores | TargetScores, Scores | None, TrainConfig, Fingerprint]:
    """Evaluate a run and print the table.

    Args:
        changed: settings that differ from the run's. With another `dataset`, the run's settings of its own data set do
            not apply.
        out: new folder for the results.
        allow_changed_data: also evaluate on data that differ from those of the training. Data of another folder are
            then read whole, with the splits of their own table.

    Returns:
        The scores of network and baseline, the settings, and the fingerprint of the data.

    Raises:
        CardioCapsError: `path` is not a run, its checkpoint or data cannot be used, or `out` cannot be written.
    """
    run = RunFolder.open(path)
    config = read_run(path)
    if "dataset" in changed:
        config = replace(config, **{name: options()[name].default for name in _OF_DATA_SET})
    config = with_layout(replace(config, **changed))
    with machine_for(config) as machine:
        # Making anew what an older run does not keep needs all splits; other data only need the test split.
        needed = ("test",) if allow_changed_data or "data" in changed else SPLITS
        reading = config
        if allow_changed_data and "data" in changed and not config.splits_frames:
            reading = replace(config, limit=None, split="auto")
        study = read_study(reading, again=True, needed_splits=needed)
        if allow_changed_data and config.task != "regression" and config.regression_target not in study.units:
            study, reading = replace(study, units={}), replace(reading, regression_target=None)
            if config.regression_target is not None:
                print_line(f"note: the data have no {printable(config.regression_target)}: no regression is judged")
        used = decode_for_run(
            reading, machine, study, run.data, _CHANGED_DATA, trained=run.is_trained, allow_changed=allow_changed_data
        )
        if used.is_own is None:
            used = replace(used, is_own="data" not in changed)  # data of the run may have moved
        results = RunFolder.create(out) if out else None
        try:
            scores, pixels = evaluate_task(config, machine, run, used, results)
        except (CardioCapsError, Interrupted):
            if results:
                results.discard()
            raise
    if results:
        print_line(f"written to {printable(results.path)}")
    return scores, pixels, config, used.fingerprint


def but_for_the_seed(config: TrainConfig, data: Fingerprint) -> str:
    """A text that is equal for runs that may be averaged: those with the same data and the same settings.

    Seed, machine and places of the data may differ.
    """
    ignored = {"seed", *settings_that_affect("rounding", "machine", "display", "place")}
    settings = {name: value for name, value in config.as_dict().items() if name not in ignored}
    # With a limit, another split has other videos.
    return repr((settings, data.digest_without_splits if config.limit is None else data.table))


def evaluate_runs(
    runs: Sequence[Path], changed: Mapping[str, Any], out: Path | None = None, *, allow_changed_data: bool = False
) -> None:
    """Evaluate each run as `evaluate_run`; for several runs that differ only in their seed print the mean too."""
    quiet()
    results = [evaluate_run(run, changed, out, allow_changed_data=allow_changed_data) for run in runs]
    differing = {but_for_the_seed(config, data) for _, _, config, data in results}
    if len(differing) > 1:
        print_line("note: the runs differ in more than their seed, so there is no mean over them")
    elif len(results) > 1:
        alone = [(scores, config) for scores, _, config, _ in results if isinstance(scores, TargetScores)]
        if alone:
            print_target_means(alone)
        else:
            print_means([(s, pixels, config) for s, pixels, config, _ in results if isinstance(s, Scores)])
