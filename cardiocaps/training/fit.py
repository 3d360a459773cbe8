"""Trains a network with Lightning, from the beginning or from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.strategies import DDPStrategy, Strategy

from cardiocaps import plots
from cardiocaps.config import TrainConfig
from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.errors import CheckpointError, ConfigError
from cardiocaps.runtime.device import Machine, compilation_errors
from cardiocaps.runtime.files import output_errors
from cardiocaps.runtime.program import Interruption, print_line
from cardiocaps.runtime.ranks import ONE, Ranks
from cardiocaps.training.batch_norm import GlobalBatchNorm
from cardiocaps.training.callbacks import Checkpoints, History, Patience
from cardiocaps.training.checkpoint_files import CheckpointFiles, ShardedStrategy
from cardiocaps.training.checkpoints import check_digest, epochs_ended, load_weights, read_checkpoint
from cardiocaps.training.initial import InitialWeights
from cardiocaps.training.module import Classifier
from cardiocaps.training.run_folder import RunFolder


def make_trainer(config: TrainConfig, machine: Machine, ranks: Ranks = ONE, **options: Any) -> Trainer:
    """Lightning's trainer on the run's device and in its precision; `options` are passed to `Trainer`."""
    # Without the first plugin Lightning would read the variables of a cluster.
    cluster = LightningEnvironment() if ranks.world == 1 else TorchElasticEnvironment()
    if ranks.world > 1:
        options |= {"num_nodes": ranks.nodes, "use_distributed_sampler": False, "strategy": _strategy(config, ranks)}
    return Trainer(
        plugins=[cluster, *options.pop("plugins", ())],
        accelerator=machine.device,
        devices=ranks.local_world,
        precision={"32": "32-true", "bf16": "bf16-mixed"}[machine.precision],  # type: ignore[arg-type]
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=_watched(config),
        enable_checkpointing="callbacks" in options,
        num_sanity_val_steps=0,
        deterministic="warn",
        **options,
    )


def check_ranks(config: TrainConfig, machine: Machine, ranks: Ranks) -> None:
    """Raise ConfigError if the machine or the settings do not suit so many processes."""
    assert config.batch_size is not None
    if config.batch_size < ranks.world * config.accumulate:
        raise ConfigError(
            f"batch_size is {config.batch_size}; expected at least {ranks.world * config.accumulate}: each of "
            f"{ranks.world} processes computes {config.accumulate} parts of a batch"
        )
    if machine.device == "cuda" and ranks.local_world > torch.cuda.device_count():
        raise ConfigError(
            f"devices is {ranks.local_world}; expected at most {torch.cuda.device_count()}, the GPUs of this machine"
        )
    if config.strategy == "fsdp" and ranks.world == 1:
        raise ConfigError("strategy is 'fsdp'; expected ddp, because there is one process (--devices)")


def _strategy(config: TrainConfig, ranks: Ranks) -> Strategy:
    if config.strategy == "fsdp":  # see `Classifier.configure_model`
        return ShardedStrategy(ranks.world, tensor_parallel_size=1, save_distributed_checkpoint=False)
    # The buffers are equal on all ranks already: they begin so, and batch normalisation is over the global batch.
    return DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True)


def train(
    config: TrainConfig,
    machine: Machine,
    folder: RunFolder,
    data: EchoDataModule,
    interruption: Interruption,
    callbacks: Sequence[Callback] = (),
    initial: InitialWeights | None = None,
    ranks: Ranks = ONE,
) -> list[dict[str, float]]:
    """Train from the beginning or from last.ckpt; write best.ckpt, metrics.csv and the learning curves.

    Args:
        interruption: signals wait for a save while the network is trained.
        callbacks: further ones, which may keep a state in the checkpoints.
        initial: weights to begin with; not used if there is a last.ckpt.
        ranks: the processes of the training, all of which call this. Rank 0 writes.

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
    history = History(folder, network.loss.parts, network.regresses_alone, ranks)
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
        initial.load(network, folder, record=ranks.is_first)
    if ended:
        print_line(f"this run's training has ended: {ended}; to continue, give a larger value. Now evaluating")
    else:
        if ranks.world * config.accumulate > 1:
            GlobalBatchNorm.replace_in(network.model)
        if config.strategy != "fsdp":  # which takes contiguous parameters alone
            machine.lay_out(network.model)
        if machine.compile:  # only for training: in one pass over the test split it would take longer than it saves
            network.model.compile()  # in place, which keeps the names in the state dict
        bar = [RichProgressBar()] if _watched(config) else []
        own = [history, patience, Checkpoints(folder, history, interruption, ranks), *bar, *callbacks]
        trainer = make_trainer(
            config,
            machine,
            ranks,
            max_epochs=config.epochs,
            accumulate_grad_batches=config.accumulate,
            gradient_clip_val=config.clip,
            callbacks=own,
            plugins=[CheckpointFiles()],
        )
        with compilation_errors():
            trainer.fit(network, datamodule=data, ckpt_path=start, weights_only=True)
    if ranks.is_first:
        with output_errors(folder.plots):
            folder.plots.mkdir(exist_ok=True)
        plots.learning_curves(history.rows, folder.learning_curves, history.judged_by)
    return history.rows


def _watched(config: TrainConfig) -> bool:
    """Whether to show progress bars: they are wanted, and standard error is a terminal."""
    return config.progress and sys.stderr.isatty()
