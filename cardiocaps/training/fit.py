"""Trains a network with Lightning, from the beginning or from a checkpoint."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, RichProgressBar

from cardiocaps import plots
from cardiocaps.config import TrainConfig
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.errors import CheckpointError
from cardiocaps.runtime.device import Machine, compilation_errors
from cardiocaps.runtime.files import output_errors
from cardiocaps.runtime.program import Interruption, print_line
from cardiocaps.training.callbacks import Checkpoints, History, Patience
from cardiocaps.training.checkpoints import CheckpointFiles, check_digest, epochs_ended, load_weights, read_checkpoint
from cardiocaps.training.initial import InitialWeights
from cardiocaps.training.module import Classifier
from cardiocaps.training.run_folder import RunFolder


def make_trainer(config: TrainConfig, machine: Machine, **options: Any) -> Trainer:
    """Lightning's trainer on the run's device and in its precision; `options` are passed to `Trainer`."""
    # Without this plugin Lightning would read the variables of a cluster; there is only one process.
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
    initial: InitialWeights | None = None,
) -> list[dict[str, float]]:
    """Train from the beginning or from last.ckpt; write best.ckpt, metrics.csv and the learning curves.

    Args:
        interruption: signals wait for a save while the network is trained.
        callbacks: further ones, which may keep a state in the checkpoints.
        initial: weights to begin with; not used if there is a last.ckpt.

    Returns:
        The rows of metrics.csv.

    Raises:
        CheckpointError: the checkpoint to go on from is missing, damaged or of another configuration.
        CardioCapsError: the loss is not finite.
        OutputError: a file cannot be written.
    """
    seed_everything(config.seed, workers=True, verbose=False)
    # Filling it would cost time and change no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    network = Classifier(config, data.train_class_counts(), data.train_target_mean() or 0.0)
    assert config.patience is not None and config.epochs is not None
    history = History(folder, network.loss.parts, network.regresses_alone)
    patience = Patience(config.patience, history.judged_by)
    start = folder.last if config.resume and folder.last.exists() else None
    ended = ""  # why there is nothing left to train
    if start is not None:
        checkpoint = read_checkpoint(start)
        load_weights(network, checkpoint, start)
        check_digest(checkpoint, start)
        try:
            epochs = epochs_ended(checkpoint)
            network.configure_optimizers().load_state_dict(checkpoint["optimizer_states"][0])
            for callback in (history, patience, *callbacks):
                if callback.state_key in checkpoint["callbacks"]:
                    callback.load_state_dict(checkpoint["callbacks"][callback.state_key])
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{start} is damaged: training cannot go on from it ({error!r})") from error
        if epochs and not folder.best.exists():
            raise CheckpointError(f"{folder.best} does not exist, though {epochs} epochs have ended")
        if epochs >= config.epochs:
            ended = f"{epochs} epochs are done, and --epochs is {config.epochs}"
        elif patience.wait_count >= config.patience:
            ended = (
                f"the validation {'error' if network.regresses_alone else 'loss'} has not become smaller for "
                f"{patience.wait_count} epochs, and --patience is {config.patience}"
            )
    elif config.resume:
        print_line("this run has no checkpoint yet; it starts from the beginning")
    if start is None and initial is not None:
        initial.load(network, folder)
    if ended:
        print_line(f"this run's training has ended: {ended}; to continue, give a larger value. Now evaluating")
    else:
        machine.lay_out(network.model)
        if machine.compile:  # only for training: in one pass over the test split it would take longer than it saves
            network.model.compile()  # in place, which keeps the names in the state dict
        bar = [RichProgressBar()] if _watched(config) else []
        own = [history, patience, Checkpoints(folder, history, interruption), *bar, *callbacks]
        trainer = make_trainer(config, machine, max_epochs=config.epochs, callbacks=own, plugins=[CheckpointFiles()])
        with compilation_errors():
            trainer.fit(network, datamodule=data, ckpt_path=start, weights_only=True)
    with output_errors(folder.plots):
        folder.plots.mkdir(exist_ok=True)
    plots.learning_curves(history.rows, folder.learning_curves, history.judged_by)
    return history.rows


def _watched(config: TrainConfig) -> bool:
    """Whether to show progress bars: they are wanted, and standard error is a terminal."""
    return config.progress and sys.stderr.isatty()


def quiet() -> None:
    """Silence notes of Lightning and torch; errors and messages of this program stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in (r"lightning\..*", r"torch\.jit\..*", r"torchmetrics\..*"):
        warnings.filterwarnings("ignore", module=module)
