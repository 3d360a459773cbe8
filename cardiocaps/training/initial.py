"""The weights that a training begins with (`--init`): of a run's best network, or of a safetensors file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cardiocaps.config import TrainConfig
from cardiocaps.errors import CheckpointError, ConfigError, printable
from cardiocaps.models import build, is_frozen
from cardiocaps.models.pretrained import (
    WEIGHTS,
    Fit,
    digest_of,
    is_network_folder,
    read_description,
    read_safetensors,
)
from cardiocaps.runtime.files import is_missing, read_json, write_json
from cardiocaps.runtime.program import print_line
from cardiocaps.training.checkpoints import check_digest, read_checkpoint, weights_digest
from cardiocaps.training.module import Classifier
from cardiocaps.training.run_folder import RunFolder

_KIND = "cardiocaps initial weights"
_OF_TARGET = "regression."  # parameters with numbers in the unit of the target
_SHOWN = 4  # names in a line of the report


@dataclass(frozen=True, eq=False)
class InitialWeights:
    """Weights from outside of the run, checked against its network.

    Attributes:
        source: what was given as `--init`.
        weights: name in the network -> tensor.
        target: what their network regresses; None if that is unknown.
    """

    source: Path
    weights: Mapping[str, Tensor]
    target: str | None

    @classmethod
    def read(cls, config: TrainConfig) -> InitialWeights:
        """Read `config.init` and check that it can begin a training.

        Raises:
            ConfigError: there is nothing of the kind that `init` takes.
            CheckpointError: a file is damaged, holds numbers that are not finite, fits the network nowhere, or does not
                have what `config.freeze` freezes.
        """
        path = config.init
        assert path is not None
        if RunFolder(path).is_run():
            found = cls(path, *_of_run(RunFolder(path)))
        elif is_network_folder(path):
            described, _ = read_description(path)
            found = cls(path, read_safetensors(path / WEIGHTS)[0], described.regression_target)
        elif path.suffix == ".safetensors" and path.is_file():
            found = cls(path, *_of_file(path))
        else:
            reason = "does not exist" if is_missing(path) else "is something else"
            raise ConfigError(
                f"init is {str(path)!r}; expected the folder of a run, a folder with config.json and "
                f"model.safetensors, or a .safetensors file, but it {reason}"
            )
        with torch.device("meta"):  # shapes without numbers, so that a mistake shows before videos are decoded
            network = build(config)
        found._fit(network.state_dict(), config)
        return found

    def load(self, network: Classifier, folder: RunFolder, *, record: bool = True) -> None:
        """Copy what fits into the network of a new run, print what does, and keep digests in `initial.json`.

        A run that was stopped before its first checkpoint begins again here; it must begin with the same weights.

        Args:
            record: print and keep it; another process may do that.

        Raises:
            CheckpointError: see `read`; or these are not the weights that the run began with.
            OutputError: the file cannot be written.
        """
        config = network.config
        own = network.model.state_dict()
        fit = self._fit(own, config)
        source = digest_of(self.weights)
        if folder.initial.exists():
            began = read_json(folder.initial, _KIND, lambda content: str(content["source"]), CheckpointError)
            if began != source:
                raise CheckpointError(
                    f"init: {printable(self.source)} has other weights than when the run began; start a new run"
                )
        with torch.no_grad():
            for name in fit.fits:
                own[name].copy_(self.weights[name])
        if not record:
            return
        write_json(
            folder.initial,
            {
                "kind": _KIND,
                "source": source,
                "weights": weights_digest(network),
                "loaded": fit.fits,
                "not_loaded": [name for name in own if name not in fit.fits],
            },
        )
        print_line("\n".join(self._report(fit, len(own), source)))

    def _fit(self, own: Mapping[str, Tensor], config: TrainConfig) -> Fit:
        """Which of the weights the network takes. Raises CheckpointError, see `read`."""
        fit = Fit.of(own, self._of_same_target(config), exact_dtype=False)
        place = printable(self.source)
        if not any(own[name].dim() for name in fit.fits):
            reasons = "; ".join([*fit.differs.values(), *(f"{name} is missing" for name in fit.missing)][:_SHOWN])
            raise CheckpointError(f"init: nothing in {place} fits the network of model {config.model!r}: {reasons}")
        for name in fit.fits:
            if not torch.isfinite(self.weights[name]).all():
                raise CheckpointError(f"init: {name} in {place} is not finite: its training diverged")
        frozen = [name for name in own if name not in fit.fits and is_frozen(config, name)]
        if frozen:
            raise CheckpointError(
                f"freeze is {config.freeze!r}; expected null, because init does not fit there: {_listed(frozen)}"
            )
        return fit

    def _of_same_target(self, config: TrainConfig) -> Mapping[str, Tensor]:
        """The weights without those of the regression, if it is of another quantity."""
        if None in (self.target, config.regression_target) or self.target == config.regression_target:
            return self.weights
        return {name: x for name, x in self.weights.items() if not name.startswith(_OF_TARGET)}

    def _report(self, fit: Fit, own: int, source: str) -> Iterator[str]:
        """What was loaded and what not, in lines of bounded length."""
        yield f"init: {len(fit.fits)} of {own} tensors are from {self.source} (weights {source[:12]})"
        other = [name for name in fit.missing if name in self.weights]
        reasons = {
            "of another shape": list(fit.differs.values()),
            f"of another target ({self.target})": other,
            "missing there": [name for name in fit.missing if name not in other],
            "unknown here": [name[:60] for name in fit.unknown],
        }
        for reason, names in reasons.items():
            if names:
                yield f"  {reason}: {_listed(names)}"


def _listed(names: Sequence[str]) -> str:
    """The first of the names, and the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return "; ".join(names[:_SHOWN]) + more


def _of_run(run: RunFolder) -> tuple[dict[str, Tensor], str | None]:
    """The weights of a run's best network, and its target."""
    checkpoint = read_checkpoint(run.best)
    check_digest(checkpoint, run.best)
    try:
        weights = {
            name.removeprefix("model."): x for name, x in checkpoint["state_dict"].items() if name.startswith("model.")
        }
        target = checkpoint["cardiocaps"].get("regression_target")
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{printable(run.best)} was not written by cardiocaps.train") from error
    if not all(isinstance(x, Tensor) for x in weights.values()):
        raise CheckpointError(f"{printable(run.best)} is damaged: its weights are not tensors")
    return weights, target


def _of_file(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a safetensors file, and the target if cardiocaps wrote it."""
    weights, description = read_safetensors(path)
    settings = description.get("settings")
    target = settings.get("regression_target") if isinstance(settings, dict) else None
    return weights, target if isinstance(target, str) else None
