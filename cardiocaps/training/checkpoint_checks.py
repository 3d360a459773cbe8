"""Checks that a training can go on from a checkpoint.

A checkpoint that can be read may still be damaged or edited. Then a message of one line must say so before training
begins. Otherwise Lightning would crash or, worse, train on wrong values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cardiocaps.errors import CheckpointError

_NEEDED = {
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
}
# Parts of the state of Lightning's loops that exist only while the loops run.
_TRANSIENT = "state_dict"


def check_resumable_state(
    checkpoint: Mapping[str, Any],
    path: Path,
    *,
    optimizer: torch.optim.Optimizer,
    loop: Mapping[str, Any],
    history: str,
    patience: str,
    parts: Sequence[str],
) -> None:
    """Raise CheckpointError unless a training can go on from a checkpoint.

    Args:
        checkpoint: content of the file.
        path: of the file; the error names it.
        optimizer: a new one for the checkpoint's network.
        loop: state of the epoch loop of a new trainer.
        history: key of the state of the callback `History`.
        patience: key of the state of the callback `Patience`.
        parts: names of the parts of the loss.
    """
    problem = next(_problems(checkpoint, optimizer, loop, history, patience, parts), None)
    if problem is not None:
        raise CheckpointError(f"{path} is damaged: {problem}")


def in_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved in the middle of an epoch."""
    batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return not batches["is_last_batch"]


def epochs_ended(checkpoint: Mapping[str, Any]) -> int:
    """The number of epochs that had ended when a checkpoint was saved."""
    return int(checkpoint["epoch"]) + (not in_epoch(checkpoint))


def _problems(
    checkpoint: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    loop: Mapping[str, Any],
    history: str,
    patience: str,
    parts: Sequence[str],
) -> Iterator[str]:
    """The problems of a checkpoint. Stop at the first: the checks after it rely on it."""
    missing = [name for name in _NEEDED if name not in checkpoint]
    if missing:
        yield f"it has no {', '.join(missing)}"
    for name, kind in _NEEDED.items():
        if type(checkpoint[name]) is not kind:
            yield f"its {name} is not of type {kind.__name__}"
    yield from _problems_of_loops(checkpoint, loop)
    yield from _problems_of_optimizer(checkpoint, optimizer)
    states = checkpoint["callbacks"]
    for name in (history, patience):
        if not isinstance(states.get(name), dict):
            yield f"it has no state of {name.partition('{')[0]}"
    yield from _problems_of_history(states[history], epochs_ended(checkpoint), parts)
    yield from _problems_of_patience(states[patience])


def _problems_of_loops(checkpoint: Mapping[str, Any], loop: Mapping[str, Any]) -> Iterator[str]:
    state = checkpoint["loops"].get("fit_loop")
    where = _unlike(state, loop, "fit_loop")
    if where is not None:
        yield f"{where} is missing or of another kind"
    batches = state["epoch_loop.batch_progress"]
    steps = checkpoint["global_step"]
    # In the middle of an epoch the checkpoint is saved before Lightning counts the last step here.
    stepped = state["epoch_loop.state_dict"].get("_batches_that_stepped")
    right = batches["total"]["ready"] == steps and stepped == steps - in_epoch(checkpoint)
    if steps < 0 or checkpoint["epoch"] < 0 or not right:
        yield "its counts of steps differ"
    loaders = state["state_dict"].get("combined_loader")
    right = isinstance(loaders, list) and len(loaders) == 1 and isinstance(loaders[0], dict)
    if not right or not _is_count(loaders[0].get("batches")):
        yield "it does not say how many batches of the epoch are done"
    if loaders[0]["batches"] != batches["current"]["ready"]:
        yield "its counts of the epoch's batches differ"


def _unlike(state: Any, template: Any, where: str) -> str | None:
    """The first place where the structure of a state differs from the template; None if it does not."""
    if isinstance(template, dict):
        if not isinstance(state, dict):
            return where
        for name, inner in template.items():
            found = _unlike(state.get(name), {} if name.endswith(_TRANSIENT) else inner, f"{where}.{name}")
            if found is not None:
                return found
        return None
    return None if type(state) is type(template) and (type(state) is not int or state >= 0) else where


def _problems_of_optimizer(checkpoint: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> Iterator[str]:
    states = checkpoint["optimizer_states"]
    what = "its optimiser's state"
    if len(states) != 1 or not isinstance(states[0], dict):
        yield f"{what} is missing"
    fresh, state = optimizer.state_dict(), states[0]
    groups = state.get("param_groups")
    if not isinstance(groups, list) or len(groups) != len(fresh["param_groups"]):
        yield f"{what} has no param_groups"
    for group, expected in zip(groups, fresh["param_groups"], strict=True):
        if not isinstance(group, dict) or not {"params", "lr", "betas", "eps"} <= set(group):
            yield f"{what} is incomplete"
        for name in expected.keys() & group.keys():
            # Compared as text, because comparing a tensor in place of a number gives a tensor.
            if type(group[name]) is not type(expected[name]) or repr(group[name]) != repr(expected[name]):
                yield f"{what} has another {name} than the run"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments = state.get("state")
    if not isinstance(moments, dict) or not set(moments) <= set(range(len(parameters))):
        yield f"{what} is of other parameters"
    if checkpoint["global_step"] and not moments:
        yield f"{what} is empty"
    for number, moment in moments.items():
        if not isinstance(moment, dict) or not _is_moment(moment, parameters[number]):
            yield f"{what} of parameter {number} does not fit it"


def _is_moment(moment: Mapping[str, Any], parameter: Tensor) -> bool:
    step: Any = moment.get("step")
    if not _is_real(step, torch.Size([])) or not step >= 0:
        return False
    averages: list[Any] = [moment.get(name) for name in ("exp_avg", "exp_avg_sq")]
    return all(_is_real(x, parameter.shape) for x in averages) and bool((averages[1] >= 0).all())


def _is_real(value: Any, shape: torch.Size) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.is_floating_point()
        and value.shape == shape
        and bool(value.isfinite().all())
    )


def _problems_of_history(state: Mapping[str, Any], epochs: int, parts: Sequence[str]) -> Iterator[str]:
    rows: Any = state.get("rows")
    sums: Any = state.get("sums")
    names = {"epoch", "val_auroc", "seconds", *(f"{stage}_{part}" for stage in ("train", "val") for part in parts)}
    if not isinstance(rows, list) or not all(isinstance(row, dict) and names <= set(row) for row in rows):
        yield "its history lacks numbers of an epoch"
    if not all(type(x) in (int, float) for row in rows for x in row.values()):
        yield "its history has something else than numbers"
    if [row["epoch"] for row in rows] != list(range(1, epochs + 1)):
        yield f"its history is of {len(rows)} epochs, {epochs} have ended"
    is_list = isinstance(sums, list) and len(sums) == len(parts) + 1
    if sums is not None and not (is_list and all(type(x) is float and math.isfinite(x) for x in sums)):
        yield "its sums of the losses are not numbers"
    if type(state.get("seconds")) not in (int, float):
        yield "its history has no seconds"


def _problems_of_patience(state: Mapping[str, Any]) -> Iterator[str]:
    counts = [state.get(name) for name in ("wait_count", "stopped_epoch", "stopping_reason")]
    best = state.get("best_score")
    if not all(_is_count(x) for x in counts):
        yield "its counts of epochs without progress are not counts"
    # Infinite before the first epoch has ended.
    if not (isinstance(best, Tensor) and best.shape == () and best.is_floating_point() and not best.isnan()):
        yield "its best loss is not a number"


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0
