"""Callbacks of the training: the history of a run, its checkpoints, early stopping and progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping
from numpy.typing import NDArray
from torch import Tensor

from cardiocaps.data.datamodule import samples_of
from cardiocaps.errors import CardioCapsError
from cardiocaps.metrics import by_video, evaluate, mean_by, regression_report
from cardiocaps.runtime.files import READABLE, write_csv
from cardiocaps.runtime.program import Interrupted, Interruption, print_line
from cardiocaps.runtime.ranks import ONE, Ranks
from cardiocaps.training.run_folder import RunFolder

Watch = Callable[[float, str], None]
"""Called with the share of a job that is done, from 0 to 1, and what is being done."""

_SAVE_EVERY = 600.0  # seconds: a killed run loses no more work than this


class History(Callback):
    """Keeps a row of numbers for each epoch: the mean of every part of the loss, and the validation AUROC by video.

    Of a regression alone it keeps the mean absolute error by video in place of the AUROC, and this error decides which
    epoch is the best and when training stops; else the validation loss does.

    It does not use Lightning's `log`, whose sums are not part of a checkpoint in the middle of an epoch. `rows` is
    written to metrics.csv after every epoch, by rank 0. All ranks have the same rows, so they decide alike.
    """

    def __init__(self, run: RunFolder, parts: Sequence[str], regresses_alone: bool = False, ranks: Ranks = ONE) -> None:
        self.run, self.parts, self.regresses_alone, self.ranks = run, parts, regresses_alone, ranks
        self.judged_by = "val_mae" if regresses_alone else "val_loss"
        self.rows: list[dict[str, float]] = []
        # float64 [parts + 1] of this rank, the last is the number of frames
        self._sums: Tensor | None = None
        self._seconds = 0.0
        self._since = 0.0

    @property
    def is_best(self) -> bool:
        """Whether the last epoch is the first with the least `judged_by`."""
        return self.rows[-1] is min(self.rows, key=lambda row: row[self.judged_by])

    def state_dict(self) -> dict[str, Any]:
        sums = None if self._sums is None else self._sums.tolist()
        return {"rows": [dict(row) for row in self.rows], "sums": sums, "seconds": self._elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = [dict(row) for row in state_dict["rows"]]
        sums = state_dict["sums"]
        self._sums = None if sums is None or not self.ranks.is_first else torch.tensor(sums, dtype=torch.float64)
        self._seconds = state_dict["seconds"]

    def _elapsed(self) -> float:
        return self._seconds + time.monotonic() - self._since

    def _add(self, sums: Tensor | None, outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
        n = samples_of(batch)
        parts = torch.stack([outputs[name].detach().double() for name in self.parts]) * n
        added = torch.cat([parts, n * parts.new_ones(1)])
        return added if sums is None else sums.to(added.device) + added

    def gather(self) -> None:
        """Give rank 0, which writes the checkpoints, the sums of all ranks. Every rank must call it."""
        if self.ranks.world > 1:
            total = self._over_ranks(self._sums)
            self._sums = torch.tensor(total, dtype=torch.float64) if total and self.ranks.is_first else None

    def _over_ranks(self, sums: Tensor | None) -> list[float]:
        """The sums over all ranks."""
        own = self.ranks.gathered(None if sums is None else sums.tolist())
        return [sum(values) for values in zip(*(x for x in own if x is not None), strict=True)]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning divides what is minimised by the number of parts that are computed one after another.
        loss = outputs["loss"] * trainer.accumulate_grad_batches
        self._sums = self._add(self._sums, {**outputs, "loss": loss}, batch)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation: Tensor | None = None
        self._seen: list[tuple[Tensor, ...]] = []

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
        said, truth = ("regressed", "target") if self.regresses_alone else ("probability", "label")
        seen = (outputs[said].float(), batch[truth], batch["clip"], batch["frame"])
        counts = batch.get("counts", slice(None))
        self._seen.append(tuple(x[counts].cpu() for x in seen))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row: dict[str, float] = {"epoch": trainer.current_epoch + 1}
        for stage, sums in (("train", self._sums), ("val", self._validation)):
            *parts, n = self._over_ranks(sums)
            row |= {f"{stage}_{name}": part / n for name, part in zip(self.parts, parts, strict=True)}
        if not all(math.isfinite(x) for x in row.values()):
            raise CardioCapsError(
                f"the loss is not finite in epoch {row['epoch']:.0f}: a smaller --learning-rate may help; "
                f"{self.run.best.name} holds the best epoch before"
            )
        said, truth, clip = self._seen_by_all()
        if self.regresses_alone:
            row["val_mae"] = regression_report(mean_by(said, clip), mean_by(truth, clip)).mae
        else:
            row["val_auroc"] = evaluate(*by_video(said, truth, clip), bootstrap=0).metrics["auroc"].value
        row["seconds"] = round(self._elapsed(), 2)
        self._sums, self._seconds, self._since = None, 0.0, time.monotonic()
        self.rows.append(row)
        # Early stopping reads Lightning's callback metrics.
        trainer.callback_metrics[self.judged_by] = torch.tensor(row[self.judged_by], dtype=torch.float64)

    def _seen_by_all(self) -> Sequence[NDArray[Any]]:
        """Prediction, truth and clip of every validation frame, in the same order for any number of ranks."""
        own = [torch.cat(x).numpy() for x in zip(*self._seen, strict=True)]
        if self.ranks.world == 1:
            return own[:3]
        *columns, clip, frame = (np.concatenate(x) for x in zip(*self.ranks.gathered(own), strict=True))
        order = np.lexsort((frame, clip))
        return [x[order] for x in (*columns, clip)]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.ranks.is_first:
            return
        write_csv(self.run.metrics_csv, self.rows, digits=READABLE)
        row = self.rows[-1]
        judged = (
            f"mean absolute error {row['val_mae']:.4g}" if self.regresses_alone else f"AUROC {row['val_auroc']:.3f}"
        )
        print_line(
            f"epoch {row['epoch']:3d}/{trainer.max_epochs}  loss {row['train_loss']:.4f}"
            f"  validation {row['val_loss']:.4f}  {judged}"
            f"  {row['seconds']:.1f} s{'  best' if self.is_best else ''}"
        )


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` after every epoch, every ten minutes and on a signal, and `best.ckpt` after the best epoch.

    All ranks take part in a save, which rank 0 writes. So they agree on it: a signal to one of them stops all.
    """

    def __init__(self, run: RunFolder, history: History, interruption: Interruption, ranks: Ranks = ONE) -> None:
        self.run, self.history, self.interruption, self.ranks = run, history, interruption, ranks
        self._saved = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.defer(True)
        self._saved = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.interruption.defer(False)

    def _signum(self) -> int:
        """The signal that has arrived at a rank; 0 if none has."""
        return self.ranks.largest(self.interruption.signum or 0)

    def _save_last(self, trainer: Trainer, signum: int) -> None:
        self.history.gather()
        trainer.save_checkpoint(self.run.last)
        self._saved = time.monotonic()
        if signum:
            raise Interrupted(signum, f"saved; go on with --resume {self.run.path}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not after the last batch: the end of the epoch saves anyway. Not between parts of a batch: no checkpoint holds
        # their gradients.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        late = self.ranks.is_first and time.monotonic() - self._saved > _SAVE_EVERY
        due = self.ranks.largest(2 * (self.interruption.signum or 0) + late)
        if due:
            self._save_last(trainer, due // 2)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.history.is_best:
            trainer.save_checkpoint(self.run.best, weights_only=True)
        self._save_last(trainer, self._signum())


class Patience(EarlyStopping):
    """Stops when `monitor` of the validation split has not decreased for `patience` epochs."""

    def __init__(self, patience: int, monitor: str = "val_loss") -> None:
        super().__init__(monitor, min_delta=0.0, patience=patience, check_on_train_epoch_end=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything but the patience, which may have been changed."""
        super().load_state_dict({**state_dict, "patience": self.patience})


class Progress(Callback):
    """Tells `watch` the share of the epochs that is done."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert trainer.max_epochs is not None
        done = trainer.current_epoch + (trainer.fit_loop.batch_idx + 1) / trainer.num_training_batches
        self.watch(done / trainer.max_epochs, f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")
