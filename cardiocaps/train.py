"""`python -m cardiocaps.train`: train CardioCaps on echocardiogram videos, evaluate it and write a run folder.

Without an argument it makes or reuses the phantom data set and trains preset tiny. `--help` lists every setting.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cardiocaps.config import TrainConfig, from_command_line
from cardiocaps.errors import CardioCapsError, CheckpointError
from cardiocaps.program import Interrupted, Interruption, execute, say

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import Callback

    from cardiocaps.data.datamodule import EchoDataModule
    from cardiocaps.data.echonet import Study
    from cardiocaps.machine import Machine
    from cardiocaps.run_folder import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 to 5 for the errors of cardiocaps.errors; 128 + the signal that stopped the run."""

    def body(interruption: Interruption) -> None:
        run(from_command_line(argv, prog="python -m cardiocaps.train"), interruption)

    return execute(body)


def run(config: TrainConfig, interruption: Interruption) -> None:
    """Train, or go on training, evaluate, and write the run folder.

    Raises:
        CardioCapsError: see cardiocaps.errors; what was reached is saved.
    """
    quiet()
    from cardiocaps.evaluate import evaluate_network
    from cardiocaps.files import exclusive
    from cardiocaps.machine import machine_for
    from cardiocaps.run_folder import RunFolder

    assert config.out is not None
    with machine_for(config) as machine:
        say(f"device: {machine}")
        # A folder that cannot be read should not cost the run that --overwrite replaces, and one that cannot be written
        # should fail before an hour of decoding.
        study = read_study(config) if config.data else None
        folder = RunFolder.open(config.out) if config.resume else RunFolder.create(config.out, config.overwrite)
        with exclusive(folder.path):
            folder.remove_leftovers()
            if not config.resume:
                folder.begin(config.to_yaml(), machine.device)
            try:
                data = decode(config, machine, study or read_study(config))
            except (CardioCapsError, Interrupted):
                if not config.resume:
                    folder.discard()
                raise
            say(data.study.summary())
            train(config, machine, folder, data, interruption)
            evaluate_network(config, machine, folder, data, results=folder)
            say(f"run folder: {folder.path}")


def read_study(config: TrainConfig, *, needed_splits: Sequence[str] = ("train", "val", "test")) -> Study:
    """The study of a run: its folder, or the phantom, which is made if it is not there.

    `needed_splits`: as `read_folder`.

    Raises:
        DataError, OutputError: as `read_folder` and `write_phantom`.
    """
    from cardiocaps.data.echonet import read_folder
    from cardiocaps.data.labels import THRESHOLDS

    root = config.data
    if root is None:
        from cardiocaps.data.phantom import phantom_is_complete, write_phantom

        root = config.phantom_dir
        if not phantom_is_complete(root, config.phantom_videos, config.phantom_seed):
            say(f"making {config.phantom_videos} phantom videos in {root}")
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
        progress=config.progress,
        pin_memory=machine.pin_memory,
        channels_last=machine.channels_last,
    )
    data.setup()
    return data


def make_trainer(config: TrainConfig, machine: Machine, **options: Any) -> Trainer:
    """Lightning's trainer on the run's device and in its precision; `options` are Trainer's own."""
    from lightning.pytorch import Trainer

    return Trainer(
        accelerator=machine.device,
        devices=1,
        precision={"32": "32-true", "bf16": "bf16-mixed"}[machine.precision],  # type: ignore[arg-type]
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=_watched(config),
        enable_checkpointing=bool(options),
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
    from cardiocaps.files import output_errors
    from cardiocaps.learning import (
        CheckpointFiles,
        Checkpoints,
        Classifier,
        History,
        Patience,
        check_resumable_state,
        load_weights,
        read_checkpoint,
    )
    from cardiocaps.machine import compilation_errors

    seed_everything(config.seed, workers=True, verbose=False)
    # It would cost time and change no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    network = Classifier(config, data.train_class_counts(), data.train_target_mean())
    history, start, ended = History(folder, network.loss.parts), None, False
    assert config.patience is not None and config.epochs is not None
    if config.resume and folder.last.exists():
        start = folder.last
        checkpoint = read_checkpoint(start)
        load_weights(network, checkpoint, start)
        check_resumable_state(checkpoint, start)
        epochs = checkpoint["epoch"] + (not _in_epoch(checkpoint))
        if epochs and not folder.best.exists():
            raise CheckpointError(f"{folder.best} does not exist, though {epochs} epochs have ended")
        ended = epochs >= config.epochs or Patience.is_over(checkpoint, config.patience)
        for callback in (history, *callbacks):
            if callback.state_key in checkpoint["callbacks"]:
                callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
    elif config.resume:
        say("this run has no checkpoint yet; it starts from the beginning")
    if ended:
        say("this run's training has ended; evaluating it")
    else:
        bar = [RichProgressBar()] if _watched(config) else []
        machine.lay_out(network.model)
        machine.compile_for_training(network.model)
        trainer = make_trainer(
            config,
            machine,
            max_epochs=config.epochs,
            callbacks=[
                history,
                Patience(config.patience),
                Checkpoints(folder, history, interruption),
                *bar,
                *callbacks,
            ],
            plugins=[CheckpointFiles()],
        )
        with compilation_errors():
            trainer.fit(network, datamodule=data, ckpt_path=start, weights_only=True)
    with output_errors(folder.plots):
        folder.plots.mkdir(exist_ok=True)
    plots.learning_curves(history.rows, folder.learning_curves)
    return history.rows


def _in_epoch(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint was saved in the middle of an epoch."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return not batches["is_last_batch"]


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
