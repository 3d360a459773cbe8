"""`python -m cardiocaps.train`: train CardioCaps on echocardiogram videos, evaluate it and write a run folder.

Without an argument it makes or reuses the phantom data set and trains preset tiny. `--help` lists every setting.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cardiocaps.config import TRAINABLE_PHANTOM, TrainConfig, from_command_line
from cardiocaps.errors import CardioCapsError, CheckpointError, ConfigError, DataError, printable
from cardiocaps.runtime.files import is_missing
from cardiocaps.runtime.program import Interrupted, Interruption, print_line, run_program

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback

    from cardiocaps.data.datamodule import EchoDataModule
    from cardiocaps.data.echonet_lvh import Study
    from cardiocaps.data.fingerprint import Fingerprint
    from cardiocaps.runtime.device import Machine
    from cardiocaps.training.run_folder import RunFolder


_OTHER_DATA = "give --data with the data of then, or begin a new run"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 to 5 for the errors of cardiocaps.errors; 128 + the signal that stopped the run."""

    def body(interruption: Interruption) -> None:
        run(from_command_line(argv, prog="python -m cardiocaps.train"), interruption)

    return run_program(body)


def run(config: TrainConfig, interruption: Interruption) -> None:
    """Train, or go on training, evaluate, and write the run folder.

    Raises:
        CardioCapsError: see cardiocaps.errors; what was reached is saved.
    """
    quiet()
    from cardiocaps.evaluate import evaluate_network
    from cardiocaps.runtime.device import machine_for
    from cardiocaps.runtime.files import lock_folder
    from cardiocaps.training.run_folder import RunFolder

    assert config.out is not None
    with machine_for(config) as machine:
        print_line(f"device: {machine}")
        # A folder that cannot be read should not cost the run that --overwrite replaces, and one that cannot be written
        # should fail before an hour of decoding.
        study = read_study(config, again=config.resume is not None) if config.data else None
        folder = RunFolder.open(config.out) if config.resume else RunFolder.create(config.out, config.overwrite)
        with lock_folder(folder.path):
            folder.remove_leftovers()
            if not config.resume:
                yaml, paths = config.kept()
                folder.begin(yaml, machine.device, paths)
            try:
                study = study or read_study(config, again=folder.data.is_file())
                print_line(study.summary())
                used = decode_for_run(config, machine, folder, study, _OTHER_DATA, keep=True)
                data = used.data
            except (CardioCapsError, Interrupted):
                if not config.resume:
                    folder.discard()
                raise
            if data.study != study:
                print_line(f"after decoding: {data.study.summary()}")
            if config.resume:
                folder.keep(*config.kept(folder.paths))
            train(config, machine, folder, data, interruption)
            evaluate_network(config, machine, folder, data, results=folder, fingerprint=used.fingerprint.digest)
            print_line(f"run folder: {folder.path}")


def read_study(
    config: TrainConfig, *, again: bool = False, needed_splits: Sequence[str] = ("train", "val", "test")
) -> Study:
    """The study of a run: its folder, or the phantom, which is made if it is not there.

    `again`: the run has used it before, so that nothing is made, for that would be something else. `needed_splits`: as
    `read_folder`.

    Raises:
        DataError, OutputError: as `read_folder` and `write_phantom`; and where it is not where it was.
    """
    from cardiocaps.data.echonet_lvh import read_folder
    from cardiocaps.data.labels import THRESHOLDS

    root = config.data
    if again and root is not None and is_missing(root):
        raise DataError(f"data: {printable(root)}, which the run used, is not there; give --data, where it is now")
    if root is None:
        from cardiocaps.phantom import phantom_is_complete, write_phantom

        root = config.phantom_dir
        if not phantom_is_complete(root, config.phantom_videos, config.phantom_seed):
            if again:
                options = f"--videos {config.phantom_videos} --seed {config.phantom_seed}"
                raise DataError(
                    f"phantom_dir: {printable(root)} does not hold the phantom that the run used; give --data, where "
                    f"it is now, or make it again: python -m cardiocaps.phantom {printable(root)} {options}"
                )
            if config.phantom_videos < TRAINABLE_PHANTOM:
                raise ConfigError(
                    f"phantom_videos: {config.phantom_videos} is not allowed; give at least {TRAINABLE_PHANTOM}: fewer "
                    "leave a split without abnormal videos"
                )
            print_line(f"making {config.phantom_videos} phantom videos in {root}")
            write_phantom(root, config.phantom_videos, config.phantom_seed, progress=config.progress)
    return read_folder(
        root,
        protocol=config.protocol,
        split=config.split,
        seed=config.seed if config.split_seed is None else config.split_seed,
        max_bad_share=config.max_bad_share,
        limit=config.limit,
        thresholds={**THRESHOLDS, **(config.threshold or {})},  # type: ignore[dict-item]
        group_column=config.group_column,
        allow_split_patients=config.allow_split_patients,
        follow_links=config.follow_links,
        needed_splits=needed_splits,
    )


def decode(config: TrainConfig, machine: Machine, study: Study) -> EchoDataModule:
    """The study's frames, decoded or found in the cache. Raises DataError, OutputError as `cache.build`."""
    from cardiocaps.data.datamodule import EchoDataModule

    data = EchoDataModule(
        study,
        size=config.network.size,
        batch_size=config.batch_size,  # type: ignore[arg-type]
        frames_per_clip=config.frames_per_clip,  # type: ignore[arg-type]
        frame_choice=config.frame_choice,
        target=config.regression_target,
        seed=config.seed,
        split_seed=config.split_seed,
        cache_dir=config.cache_dir,
        num_workers=config.workers,
        max_bad_share=config.max_bad_share,
        decode_workers=config.decode_workers,
        reader=config.video_reader,
        progress=config.progress,
        pin_memory=machine.pin_memory,
        channels_last=machine.channels_last,
    )
    data.setup()
    return data


@dataclass(frozen=True)
class RunData:
    """The decoded study that a run is trained on or judged by."""

    data: EchoDataModule
    fingerprint: Fingerprint
    is_own: bool | None  # whether the run was trained on it; None where the run does not remember
    left_out: int = 0  # videos that were to be tested on, but that the run was trained or validated on


def decode_for_run(
    config: TrainConfig,
    machine: Machine,
    folder: RunFolder,
    study: Study,
    advice: str,
    *,
    allow_changed: bool = False,
    keep: bool = False,
) -> RunData:
    """As `decode`, for a study that must be what the run's folder remembers.

    Args:
        advice: what to do where it is not, for the error.
        allow_changed: say what has changed and go on, without test videos that the run was trained or validated on.
        keep: make the folder remember the study, where it does not yet.

    Raises:
        DataError, OutputError: as `decode`; where something has changed that a network learns or is judged by, or may
            have: a run that remembers no study, whose split is drawn; and where no test video is left.
        ConfigError: what the folder remembers is damaged.
    """
    from cardiocaps.data.fingerprint import Fingerprint, read_fingerprint
    from cardiocaps.runtime.files import write_json

    before, now = read_fingerprint(folder.data), Fingerprint.of(study)
    if before is None and (folder.last.exists() or folder.best.exists()):
        forgotten = "this run kept no fingerprint of its data, as older versions did not"
        if study.split_rule != "stratified":
            print_line(f"note: {forgotten}: nobody knows if they changed")
        elif allow_changed:
            print_line(f"note: {forgotten}, and its split is drawn anew: videos it was trained on may be tested on")
        else:
            # What is left out, whose a video is and the limit decide what is drawn, and versions differ in them.
            raise DataError(
                f"data: {printable(study.root)} may be split in another way than then: the split is drawn, and "
                f"{forgotten}; {'begin a new run' if keep else advice}"
            )
    if before is not None and not allow_changed:
        _refuse_changes(before.differences(now), study, advice)  # the sooner the better
    data = decode(config, machine, study if before is None else before.as_used(study))
    now = now.with_contents(data.contents())
    changes = [] if before is None else before.differences(now)
    if not allow_changed:
        _refuse_changes(changes, study, advice)
    elif changes:
        print_line(f"note: the data of {study.root} are not what the run was trained on: {', '.join(changes)}")
    if before is not None and not changes and before.table != now.table:
        print_line(
            "note: the table's file has changed since the run began; its videos, splits, labels and targets have not"
        )
    if keep and before is None:
        write_json(folder.data, now.as_dict())
    if before is None:
        return RunData(data, now, False if allow_changed else None)
    if not changes:
        return RunData(data, now, True)
    unseen, left_out = _without_seen(data.study, study, before, data.contents())
    if left_out:
        videos = "1 test video is" if left_out == 1 else f"{left_out} test videos are"
        print_line(f"note: {videos} left out: the run was trained or validated on the same ones, or on their patients")
        data = decode(config, machine, unseen)
    return RunData(data, now, False, left_out)


def _without_seen(usable: Study, study: Study, before: Fingerprint, contents: Mapping[str, str]) -> tuple[Study, int]:
    """The `usable` part of a study without the test videos that a run on `before` has seen, or whose patient it has,
    and how many these are. Raises DataError where none is left."""
    seen = {clip.name: clip for clip in study.clips if before.has_seen(clip.name, contents.get(clip.name))}
    patients = {clip.patient for clip in seen.values() if clip.patient is not None}
    tested = {clip.name: clip for clip in usable.clips_in("test")}
    out = {name for name, clip in tested.items() if name in seen or clip.patient in patients}
    if tested and len(out) == len(tested):
        raise DataError(
            f"data: {printable(study.root)} has no test video that is new to the run: it was trained or validated on "
            f"all {len(out)}, or on their patients"
        )
    return replace(usable, clips=tuple(clip for clip in usable.clips if clip.name not in out)), len(out)


def _refuse_changes(changes: Sequence[str], study: Study, advice: str) -> None:
    if changes:
        raise DataError(
            f"data: {printable(study.root)} is not what the run was trained on: {', '.join(changes)}; {advice}"
        )


def make_trainer(config: TrainConfig, machine: Machine, **options: Any) -> Trainer:
    """Lightning's trainer on the run's device and in its precision; `options` are Trainer's own."""
    from lightning.fabric.plugins.environments.lightning import LightningEnvironment
    from lightning.pytorch import Trainer

    # Not whatever Lightning makes of the variables of a cluster, for there is one process.
    plugins = [LightningEnvironment(), *options.pop("plugins", ())]
    return Trainer(
        plugins=plugins,
        accelerator=machine.device,
        devices=1,
        precision={"32": "32-true", "bf16": "bf16-mixed"}[machine.precision],  # type: ignore[arg-type]
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=_watched(config),
        enable_checkpointing="callbacks" in options,
        num_sanity_val_steps=0,
        deterministic="warn",
        **options,
    )


def train(
    config: TrainConfig,
    machine: Machine,
    folder: RunFolder,
    data: EchoDataModule,
    interruption: Interruption,
    callbacks: Sequence[Callback] = (),
) -> list[dict[str, float]]:
    """Train from the beginning or from last.ckpt, to best.ckpt, metrics.csv and the learning curves.

    Returns the rows of metrics.csv. Further `callbacks` may keep a state in the checkpoints.
    """
    import torch
    from lightning.pytorch import seed_everything
    from lightning.pytorch.callbacks import RichProgressBar

    from cardiocaps import plots
    from cardiocaps.runtime.device import compilation_errors
    from cardiocaps.runtime.files import output_errors
    from cardiocaps.training.checkpoints import check_resumable_state, epochs_ended
    from cardiocaps.training.module import (
        CheckpointFiles,
        Checkpoints,
        Classifier,
        History,
        Patience,
        Restored,
        load_weights,
        read_checkpoint,
        restoring_errors,
    )

    seed_everything(config.seed, workers=True, verbose=False)
    # It would cost time and change no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    network = Classifier(config, data.train_class_counts(), data.train_target_mean())
    assert config.patience is not None and config.epochs is not None
    history, patience, files = History(folder, network.loss.parts), Patience(config.patience), CheckpointFiles()
    start, ended = folder.last, ""  # why there is nothing left to train
    bar = [RichProgressBar()] if _watched(config) else []
    own = [history, patience, Checkpoints(folder, history, interruption), Restored(files), *bar, *callbacks]
    trainer = make_trainer(config, machine, max_epochs=config.epochs, callbacks=own, plugins=[files])
    if config.resume and start.exists():
        checkpoint = read_checkpoint(start)
        load_weights(network, checkpoint, start)
        check_resumable_state(
            checkpoint,
            start,
            optimizer=network.configure_optimizers(),
            loop=trainer.fit_loop.state_dict(),
            history=history.state_key,
            patience=patience.state_key,
            parts=network.loss.parts,
        )
        epochs = epochs_ended(checkpoint)
        if epochs and not folder.best.exists():
            raise CheckpointError(f"{folder.best} does not exist, though {epochs} epochs have ended")
        if epochs >= config.epochs:
            ended = f"{epochs} epochs are done, and --epochs is {config.epochs}"
        elif patience.waited(checkpoint) >= config.patience:
            ended = (
                f"the validation loss has not become smaller for {patience.waited(checkpoint)} epochs, and --patience "
                f"is {config.patience}"
            )
        files.restoring = True
        with restoring_errors(files, start):
            for callback in (history, *callbacks):
                if callback.state_key in checkpoint["callbacks"]:
                    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    elif config.resume:
        print_line("this run has no checkpoint yet; it starts from the beginning")
    if ended:
        print_line(f"this run's training has ended: {ended}; a larger one goes on. Evaluating it")
    else:
        machine.lay_out(network.model)
        machine.compile_for_training(network.model)
        resumed = start if config.resume and start.exists() else None
        with compilation_errors(), restoring_errors(files, start):
            trainer.fit(network, datamodule=data, ckpt_path=resumed, weights_only=True)
    with output_errors(folder.plots):
        folder.plots.mkdir(exist_ok=True)
    plots.learning_curves(history.rows, folder.learning_curves)
    return history.rows


def _watched(config: TrainConfig) -> bool:
    """Whether somebody looks who wants progress bars."""
    return config.progress and sys.stderr.isatty()


def quiet() -> None:
    """Silence what Lightning and torch say about themselves; errors and our own words stay."""
    import logging
    import warnings

    import lightning.pytorch  # noqa: F401  (sets its own levels when it is imported)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (r"lightning\..*", r"torch\.jit\..*", r"torchmetrics\..*"):
        warnings.filterwarnings("ignore", module=module)


if __name__ == "__main__":
    sys.exit(main())
