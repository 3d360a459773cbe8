"""How a network learns, for Lightning: the module, and the callbacks that keep its history and its checkpoints.

A checkpoint holds everything that the rest of the run depends on, in the middle of an epoch too, so that a run that was
cut off ends like one that was not. No generator's state is among it, the CPU's or a GPU's: once the weights are drawn,
what is drawn depends on (seed, epoch, item) alone.
"""

from __future__ import annotations

import hashlib
import math
import reprlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from cardiocaps.config import TRAINING_DEFAULTS, TrainConfig, settings_that_affect
from cardiocaps.errors import CardioCapsError, CheckpointError
from cardiocaps.models import build, make_loss
from cardiocaps.models.losses import SpreadLoss, class_weights
from cardiocaps.models.prediction import RECONSTRUCTED_CHANNELS, Prediction
from cardiocaps.runtime.files import atomic_write, write_csv
from cardiocaps.runtime.program import Interrupted, Interruption, print_line
from cardiocaps.training.run_folder import RunFolder

_SHAPE_OF_OLDER = {"model": "cardiocaps", "affine": "matrices"}  # checkpoints, which have no word of these

# Longest stretch of work, in seconds, that a killed run can lose.
_SAVE_EVERY = 600.0


class Classifier(LightningModule):
    """A network with its loss and optimiser.

    Args:
        config: of the run, resolved.
        class_counts: int64 [2], training frames of each class.
        target_mean: of the regression target in training, where the regression head starts.
    """

    def __init__(self, config: TrainConfig, class_counts: Tensor, target_mean: float) -> None:
        super().__init__()
        self.config = config
        self.model = build(config, target_mean)
        self.loss: Any = make_loss(config, class_weights(class_counts, config.class_weight))

    def _losses(self, batch: Mapping[str, Tensor], label: Tensor | None) -> tuple[Prediction, dict[str, Tensor]]:
        out: Prediction = self.model(batch["image"], label)
        image = None if out.reconstruction is None else batch["image"][:, :RECONSTRUCTED_CHANNELS]
        target = None if out.regression is None else batch["target"]
        return out, self.loss(out.scores, batch["label"], out.reconstruction, image, out.regression, target)

    def training_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        if isinstance(self.loss, SpreadLoss):
            assert self.config.epochs is not None
            # At every step, for a run that goes on in mid-epoch is not told that an epoch begins.
            self.loss.begin_epoch(self.current_epoch, self.config.epochs)
        return self._losses(batch, batch["label"] if self.config.decoder_mask == "label" else None)[1]

    def validation_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        out, losses = self._losses(batch, None)
        return {**losses, "probability": out.probability}

    def predict_step(self, batch: dict[str, Tensor], _: int) -> dict[str, Tensor]:
        """The batch without its image, with probability [B] and, of a network that regresses, regression [B]."""
        out: Prediction = self.model(batch["image"])
        rest = {name: x for name, x in batch.items() if name != "image"}
        if out.regression is not None:
            rest["regression"] = out.regression.float()
        return {**rest, "probability": out.probability}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        assert self.config.learning_rate is not None
        # One kernel for all: on a CPU the default takes a tenth of a step of preset tiny.
        return torch.optim.Adam(self.parameters(), lr=self.config.learning_rate, fused=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["cardiocaps"] = _shape(self.config)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_configuration(checkpoint, self.config)


def _shape(config: TrainConfig) -> dict[str, Any]:
    """The network's sizes too, for a preset may change from version to version."""
    sizes = {f"preset.{name}": x for name, x in asdict(config.network).items() if name not in TRAINING_DEFAULTS}
    return {**{name: getattr(config, name) for name in settings_that_affect("shape")}, **sizes}


def check_configuration(checkpoint: Mapping[str, Any], config: TrainConfig) -> None:
    """Raise CheckpointError where a checkpoint belongs to a network of another configuration."""
    has = checkpoint.get("cardiocaps")
    if isinstance(has, dict):
        has = {**_SHAPE_OF_OLDER, **has}
    if not isinstance(has, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise CheckpointError("the checkpoint was not written by cardiocaps.train")
    different = [
        f"{n} is {reprlib.repr(has.get(n))}, the run's is {x!r}"
        for n, x in _shape(config).items()
        if type(has.get(n)) is not type(x) or has[n] != x
    ]
    if different:
        raise CheckpointError(f"the checkpoint is of another configuration: {'; '.join(different)}")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, on the CPU, without executing anything that it might hold.

    Raises:
        CheckpointError: it is not there, or damaged, or holds what a checkpoint has no business to hold.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    # A truncated or foreign file can make torch raise almost anything; what it then says helps nobody.
    except Exception as error:
        raise CheckpointError(f"{path} is damaged, or no checkpoint of this program") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return content


def load_weights(network: Classifier, checkpoint: Mapping[str, Any], path: Path) -> None:
    """Put a checkpoint's weights into the network. Raises CheckpointError where they do not fit."""
    check_configuration(checkpoint, network.config)
    own, weights = network.state_dict(), checkpoint["state_dict"]
    for name in own.keys() & weights.keys():
        wrong = _not_weights(weights[name], own[name])
        if wrong is not None:
            raise CheckpointError(f"{path} does not fit the network: {name} is {wrong}")
    try:
        network.load_state_dict(weights)
    # What keys and values that are no texts and tensors make torch raise can be almost anything.
    except Exception as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{path} does not fit the network: {reason}") from error


def _not_weights(value: Any, own: Tensor) -> str | None:
    """What a value is that cannot be copied into weights as it is; None where it can, but for its shape."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_nested:
        return "no plain tensor"
    if value.is_complex() or value.is_floating_point() != own.is_floating_point():
        return f"of {str(value.dtype).removeprefix('torch.')}, not {str(own.dtype).removeprefix('torch.')}"
    return None


def best_network(config: TrainConfig, run: RunFolder) -> Classifier:
    """The network of a run's least validation loss. Raises CheckpointError where it is missing or does not fit."""
    network = Classifier(config, torch.ones(2), 0.0)
    load_weights(network, read_checkpoint(run.best), run.best)
    return network


def weights_digest(network: Classifier) -> str:
    """SHA-256 of a network's weights by name, in hexadecimal: equal for equal weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, weights in sorted(network.state_dict().items()):
        array = weights.detach().cpu().contiguous()
        digest.update(f"{name} {array.dtype} {list(array.shape)}\n".encode())
        digest.update(memoryview(array.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


class CheckpointFiles(TorchCheckpointIO):
    """Checkpoints appear whole or not at all, and are read without executing code."""

    restoring = False  # whether one has been read for a training that has not begun yet

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_write(Path(path)) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.restoring = True
        return read_checkpoint(Path(path))


class Restored(Callback):
    """Notes when Lightning has taken over what a checkpoint holds."""

    def __init__(self, files: CheckpointFiles) -> None:
        self.files = files

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.files.restoring = False


@contextmanager
def restoring_errors(files: CheckpointFiles, path: Path) -> Iterator[None]:
    """Raise CheckpointError for what Lightning and torch raise while they take over a checkpoint that `files` read."""
    try:
        yield
    except (CardioCapsError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if not files.restoring:
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {reason}") from error


class History(Callback):
    """One row of numbers an epoch: averages of every part of the loss, and the videos' AUROC in validation.

    The averages are kept here and not by Lightning's `log`, because here they survive in a checkpoint in mid-epoch.
    `rows` is written to metrics.csv after every epoch.
    """

    def __init__(self, run: RunFolder, parts: Sequence[str]) -> None:
        self.run, self.parts = run, parts
        self.rows: list[dict[str, float]] = []
        self._sums: Tensor | None = None  # float64 [parts + 1], the last is the number of frames
        self._seconds = 0.0
        self._since = 0.0

    @property
    def is_best(self) -> bool:
        """Whether the last epoch has the least validation loss of all, and is the first that has it."""
        return self.rows[-1] is min(self.rows, key=lambda row: row["val_loss"])

    def state_dict(self) -> dict[str, Any]:
        sums = None if self._sums is None else self._sums.tolist()
        return {"rows": [dict(row) for row in self.rows], "sums": sums, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]
        sums = state_dict["sums"]
        self._sums = None if sums is None else torch.tensor(sums, dtype=torch.float64)
        self._seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._since

    def _add(self, sums: Tensor | None, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        n = len(batch["label"])
        parts = torch.stack([outputs[name].detach().double() for name in self.parts]) * n
        added = torch.cat([parts, parts.new_full((1,), n)])
        return added if sums is None else sums.to(added.device) + added

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._sums = self._add(self._sums, outputs, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation: Tensor | None = None
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._validation = self._add(self._validation, outputs, batch)
        self._seen.append((outputs["probability"].float().cpu(), batch["label"].cpu(), batch["clip"].cpu()))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from cardiocaps.metrics import by_video, evaluate

        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        for stage, sums in (("train", self._sums), ("val", self._validation)):
            assert sums is not None
            *parts, n = sums.tolist()
            row |= {f"{stage}_{name}": part / n for name, part in zip(self.parts, parts, strict=True)}
        if not all(math.isfinite(x) for x in row.values()):
            raise CardioCapsError(
                f"the loss is not finite in epoch {row['epoch']:.0f}: a smaller --learning-rate may help; "
                f"{self.run.best.name} holds the best epoch before"
            )
        probability, label, clip = (torch.cat(x).numpy() for x in zip(*self._seen, strict=True))
        report = evaluate(*by_video(probability, label, clip), bootstrap=0)
        row["val_auroc"] = report.metrics["auroc"].value
        row["seconds"] = round(self._elapsed(), 2)
        self._sums, self._seconds, self._since = None, 0.0, time.monotonic()
        self.rows.append(row)
        # For early stopping, which reads what Lightning calls callback metrics.
        trainer.callback_metrics["val_loss"] = torch.tensor(row["val_loss"], dtype=torch.float64)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        write_csv(self.run.metrics_csv, self.rows)
        row = self.rows[-1]
        print_line(
            f"epoch {row['epoch']:3d}/{trainer.max_epochs}  loss {row['train_loss']:.4f}"
            f"  validation {row['val_loss']:.4f}  AUROC {row['val_auroc']:.3f}"
            f"  {row['seconds']:.1f} s{'  best' if self.is_best else ''}"
        )


class Checkpoints(Checkpoint):
    """`last.ckpt` after every epoch, every ten minutes and on a signal; `best.ckpt` by the least validation loss."""

    def __init__(self, run: RunFolder, history: History, interruption: Interruption) -> None:
        self.run, self.history, self.interruption = run, history, interruption
        self._saved = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.defer(True)
        self._saved = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.defer(False)

    def _save_last(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(self.run.last)
        self._saved = time.monotonic()
        if self.interruption.signum is not None:
            raise Interrupted(self.interruption.signum, f"saved; go on with --resume {self.run.path}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # After the last batch the epoch's end is near, and saves more.
        due = self.interruption.signum is not None or time.monotonic() - self._saved > _SAVE_EVERY
        if due and not trainer.is_last_batch:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.history.is_best:
            trainer.save_checkpoint(self.run.best, weights_only=True)
        self._save_last(trainer)


class Patience(EarlyStopping):
    """Stops when the validation loss has not become smaller for `patience` epochs."""

    def __init__(self, patience: int) -> None:
        super().__init__("val_loss", min_delta=0.0, patience=patience, check_on_train_epoch_end=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """All but the patience, which may be another than before."""
        super().load_state_dict({**state_dict, "patience": self.patience})

    def waited(self, checkpoint: Mapping[str, Any]) -> int:
        """For how many epochs the run of a checkpoint had made no progress."""
        return int(checkpoint["callbacks"][self.state_key]["wait_count"])
