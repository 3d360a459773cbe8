"""Predictions of a system for the frames of a split, and the CSV files that hold them by frame and by video."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cardiocaps.config import TrainConfig
from cardiocaps.errors import ConfigError
from cardiocaps.metrics import THRESHOLD, Floats, Integers, by_video, mean_by
from cardiocaps.runtime.files import READABLE, write_csv

if TYPE_CHECKING:
    from cardiocaps.data.study import Clip
    from cardiocaps.training.run_folder import RunFolder

UNITS = ("video", "frame")
"""What results can be counted by."""
GROUP_KINDS = ("patient", "study")
"""What can have several videos: a patient, or a study of a patient on one day."""


def unit_of(config: TrainConfig) -> str:
    """Whether results of a run are counted by video or by frame: by frame if the frames of a video were split."""
    return "frame" if config.splits_frames else "video"


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions of a system for n frames of a split.

    Raises:
        ValueError: other shapes, probabilities or labels.
    """

    probability: Floats | None  # float64 [n] in [0, 1], of class 1; None if there are no labels
    label: Integers | None  # int64 [n] in {0, 1}; likewise
    clip: Integers  # int64 [n]
    video: tuple[str, ...]  # n names
    frame: Integers | None = None  # int64 [n], number of the frame in its video
    patient: Integers | None = None  # int64 [n], the same for all videos of a patient, or of a study: see group_kind
    target: Floats | None = None  # float64 [n], NaN if not measured
    regression: Floats | None = None  # float64 [n]
    reconstruction_error: Floats | None = None  # float64 [n], mean squared error of a pixel of the frame
    group_kind: str = GROUP_KINDS[0]  # what `patient` counts

    def __post_init__(self) -> None:
        integers, floats = (
            ("label", "clip", "frame", "patient"),
            ("probability", "target", "regression", "reconstruction_error"),
        )
        for name in (*integers, *floats):
            values = getattr(self, name)
            if values is not None:
                if np.shape(values) != (len(self.video),):
                    raise ValueError(f"{name} has shape {list(np.shape(values))}; expected [{len(self.video)}]")
                object.__setattr__(self, name, np.asarray(values, np.int64 if name in integers else np.float64))
        if self.probability is None or self.label is None:
            return
        wrong = ~((self.probability >= 0) & (self.probability <= 1))
        if wrong.any():
            raise ValueError(f"probability is {self.probability[wrong][0]}; expected a number in [0, 1]")
        if not np.isin(self.label, (0, 1)).all():
            raise ValueError(f"label is {np.unique(self.label)[:5].tolist()}; expected 0 or 1")

    @classmethod
    def of(cls, out: Mapping[str, Any], clips: Sequence[Clip], group_kind: str = "") -> Predictions:
        """From arrays [n] by name. `clip` is an index into `clips`; `group_kind` is that of their study."""
        number = np.asarray(out["clip"])
        patient = _patients(clips)
        return cls(
            out.get("probability"),
            out.get("label"),
            number,
            tuple(clips[i].name for i in number),
            patient=None if patient is None else patient[number],
            group_kind=group_kind or GROUP_KINDS[0],
            **{name: out[name] for name in ("frame", "target", "regression", "reconstruction_error") if name in out},
        )

    @property
    def videos(self) -> int:
        """The number of videos."""
        return len(set(self.video))

    @property
    def group_name(self) -> str:
        """What the bootstrap draws: videos, patients or studies."""
        return "video" if self.patient is None else self.group_kind

    def samples(self, unit: str) -> tuple[Floats, Integers, NDArray[Any]]:
        """The samples that results are computed from.

        Args:
            unit: "video" or "frame".

        Returns:
            Probability [m], label [m] and group [m]: the name of the video, or of the patient's first video by name.
            The groups of two runs that were tested on the same videos are equal.
        """
        assert self.probability is not None and self.label is not None
        group = np.array(self.video)
        if self.patient is not None:
            # Not the numbers of the patients, which begin at 0 in every split.
            patients = self.patient.tolist()
            first = dict(sorted(zip(patients, self.video, strict=True), reverse=True))
            group = np.array([first[patient] for patient in patients])
        if unit == "frame":
            return self.probability, self.label, group
        return *by_video(self.probability, self.label, self.clip), group[self._first_frames()]

    def regressed(self, unit: str) -> tuple[Floats, Floats]:
        """The predictions and the targets [m] by `unit`, "video" or "frame"; NaN where a target was not measured."""
        assert self.regression is not None and self.target is not None
        if unit == "frame":
            return self.regression, self.target
        return mean_by(self.regression, self.clip), mean_by(self.target, self.clip)

    def frame_rows(self) -> list[dict[str, Any]]:
        """A row for each frame."""
        columns = {
            self.group_kind if name == "patient" else name: getattr(self, name)
            for name in (
                "video",
                "clip",
                "patient",
                "frame",
                "target",
                "regression",
                "reconstruction_error",
                "label",
                "probability",
            )
        }
        return _rows(columns)

    def video_rows(
        self, threshold: float | None, calibration: Callable[[Floats], Floats] | None = None
    ) -> list[dict[str, Any]]:
        """A row for each video (in the paper protocol: for each clip).

        It has the mean probability of the frames, also calibrated if there is a calibration, and the decisions at the
        threshold and at 0.5 (1: abnormal). Without labels it has none of these.
        """
        first = self._first_frames()
        columns = {
            "video": [self.video[i] for i in first],
            "clip": self.clip[first],
            self.group_kind: None if self.patient is None else self.patient[first],
            "frames": np.unique(self.clip, return_counts=True)[1],
            "target": None if self.target is None else self.target[first],
            "regression": None if self.regression is None else mean_by(self.regression, self.clip),
            "reconstruction_error": None
            if self.reconstruction_error is None
            else mean_by(self.reconstruction_error, self.clip),
        }
        if self.probability is not None and self.label is not None and threshold is not None:
            probability, label = by_video(self.probability, self.label, self.clip)
            columns |= {
                "label": label,
                "probability": probability,
                "calibrated_probability": None if calibration is None else calibration(probability),
                "threshold": [threshold] * first.size,
                "decision": (probability > threshold).astype(int),
                "decision_at_0.5": (probability > THRESHOLD).astype(int),
            }
        return _rows(columns)

    def _first_frames(self) -> Integers:
        """The index of one frame of each clip, in the order of the clips' numbers."""
        return np.unique(self.clip, return_index=True)[1].astype(np.int64)


def write_predictions(
    run: RunFolder,
    test: Predictions,
    validation: Predictions | None,
    threshold: float | None,
    calibration: Callable[[Floats], Floats] | None = None,
) -> None:
    """Write the predictions of the test split, and of the validation split if given, by frame and by video.

    `read_predictions` reads the tables by frame, so these are exact; those by video are for people.
    """
    for split, by_frame, by_video_csv in (
        (validation, run.validation_csv, run.validation_by_video_csv),
        (test, run.predictions_csv, run.predictions_by_video_csv),
    ):
        if split is not None:
            write_csv(by_frame, split.frame_rows())
            write_csv(by_video_csv, split.video_rows(threshold, calibration), digits=READABLE)


def read_predictions(path: Path) -> Predictions:
    """The predictions by frame in a file of `write_predictions`, without targets and regressions.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, strict=True))

        def column(name: str, kind: type) -> NDArray[Any]:
            return np.array([kind(row[name]) for row in rows])

        names = rows[0] if rows else {}
        group_kind = next((kind for kind in GROUP_KINDS if kind in names), None)
        return Predictions(
            probability=column("probability", float),
            label=column("label", int),
            clip=column("clip", int),
            video=tuple(row["video"] for row in rows),
            frame=column("frame", int) if "frame" in names else None,
            patient=column(group_kind, int) if group_kind else None,
            group_kind=group_kind or GROUP_KINDS[0],
        )
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def _patients(clips: Sequence[Clip]) -> Integers | None:
    """A number for each clip, the same for all clips of a patient; None if no clip has a patient.

    The numbers do not depend on the patients' names.
    """
    if all(clip.patient is None for clip in clips):
        return None
    # A video without a patient counts as a patient of its own.
    names = [("video", clip.name) if clip.patient is None else ("patient", clip.patient) for clip in clips]
    numbers: dict[tuple[str, str], int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], np.int64)


def _rows(columns: Mapping[str, Any]) -> list[dict[str, Any]]:
    known = {
        name: values.tolist() if isinstance(values, np.ndarray) else values
        for name, values in columns.items()
        if values is not None
    }
    return [dict(zip(known, values, strict=True)) for values in zip(*known.values(), strict=True)]
