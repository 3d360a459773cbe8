"""The baseline of a run: logistic regression on small grey frames.

It shows how well brightness and position alone predict the label. It is fitted once, to the run's training split, and
kept in the run's folder as numbers in JSON. On other data, network and baseline are then compared as they were trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cardiocaps.data.datamodule import EchoDataModule
from cardiocaps.errors import CheckpointError
from cardiocaps.evaluation.decision import Decision
from cardiocaps.evaluation.predictions import Predictions
from cardiocaps.models.pixel_classifiers import PixelClassifier, fit
from cardiocaps.runtime.files import read_json, write_json

PIXEL_SIDE = 32
"""Side in pixels of the downsized frames that classical classifiers see."""

TITLE = f"logistic regression, {PIXEL_SIDE}×{PIXEL_SIDE} pixels"
"""What tables call the baseline."""

BASELINE = ("logistic-regression", "class-weight")
"""Its classifier and sampling, of `cardiocaps.models.pixel_classifiers`."""

_KIND = "cardiocaps pixel baseline"


@dataclass(frozen=True)
class PixelBaseline:
    """A fitted classifier and its decision, which is chosen on validation like that of the network."""

    classifier: PixelClassifier
    decision: Decision

    @classmethod
    def fit(cls, data: EchoDataModule, unit: str) -> PixelBaseline:
        """Fit to the training frames; choose the threshold by the validation videos or frames (`unit`)."""
        pixels, label, _ = data.pixels("train", PIXEL_SIDE)
        classifier = fit(*BASELINE, pixels, label, seed=0)
        return cls(classifier, Decision.choose(predict_pixels(classifier, data, "val"), unit))

    def predict(self, data: EchoDataModule, split: str) -> Predictions:
        """As `predict_pixels`."""
        return predict_pixels(self.classifier, data, split)

    def write(self, path: Path) -> None:
        """Raises OutputError."""
        content = {"kind": _KIND, "side": PIXEL_SIDE, "decision": self.decision.as_dict()}
        write_json(path, {**content, "logistic_regression": self.classifier.as_dict()})

    @classmethod
    def read(cls, path: Path) -> PixelBaseline | None:
        """Read the file; None if it does not exist. Raises CheckpointError if it is damaged."""

        def make(content: dict[str, Any]) -> PixelBaseline:
            classifier = PixelClassifier.from_dict(content["logistic_regression"])
            if content["side"] != PIXEL_SIDE or classifier.pixels != PIXEL_SIDE**2:
                raise ValueError(f"it is for frames of another size than {PIXEL_SIDE}x{PIXEL_SIDE}")
            return cls(classifier, Decision.from_dict(content["decision"]))

        return read_json(path, _KIND, make, CheckpointError) if path.exists() else None


def predict_pixels(classifier: PixelClassifier, data: EchoDataModule, split: str) -> Predictions:
    """Predictions of a classifier of pixels for every frame of a split."""
    pixels, label, clip = data.pixels(split, PIXEL_SIDE)
    out = {"probability": classifier.probability(pixels), "label": label, "clip": clip}
    return Predictions.of(out, data.clips(split), data.study.group_kind)
