"""What a system says of one split, frame by frame, and the tables that are written of it: by frame and by video."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cardiocaps.config import TrainConfig
from cardiocaps.errors import ConfigError
from cardiocaps.metrics import THRESHOLD, Floats, Integers, by_video, mean_by
from cardiocaps.runtime.files import write_csv

if TYPE_CHECKING:
    from cardiocaps.data.study import Clip
    from cardiocaps.training.run_folder import RunFolder

UNITS = ("video", "frame")
"""What a sample of a result is: a video, or a frame where frames of one video are in every split."""
GROUP_KINDS = ("patient", "study")
"""What the table may name that has several videos: a patient, or a study, which is a patient's on one day."""


def unit_of(config: TrainConfig) -> str:
    """Whether results of a run are counted by video or by frame: by frame if the frames of a video were split."""
    return "frame" if config.splits_frames else "video"


@dataclass(frozen=True, eq=False)
class Predictions:
    """A system's probabilities of class 1 in one split, a row a frame: `probability` float64 [n] in [0, 1], `label`
    int64 [n] in {0, 1}, `clip` int64 [n], `video` n names; and, where known, `frame` int64 [n], its number in the
    video, `patient` int64 [n], a number that videos of one patient share (or of one study, as `group_kind` says), and
    of a network that regresses `target` and `regression` float64 [n] (the target NaN where it was not measured).

    Raises ValueError for other shapes and values, and for none at all.
    """

    probability: Floats
    label: Integers
    clip: Integers
    video: tuple[str, ...]
    frame: Integers | None = None
    patient: Integers | None = None
    target: Floats | None = None
    regression: Floats | None = None
    group_kind: str = GROUP_KINDS[0]

    def __post_init__(self) -> None:
        probability = np.asarray(self.probability, np.float64)
        n = probability.size
        if probability.shape != (n,) or not n:
            raise ValueError(f"probability has shape {list(probability.shape)}; expected [n], not empty")
        wrong = ~((probability >= 0) & (probability <= 1))
        if wrong.any():
            raise ValueError(f"probability is {probability[wrong][0]}; expected a number in [0, 1]")
        object.__setattr__(self, "probability", probability)
        for name in ("label", "clip", "frame", "patient"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _integers(getattr(self, name), n, name))
        if not np.isin(self.label, (0, 1)).all():
            raise ValueError(f"label is {np.unique(self.label)[:5].tolist()}; expected 0 or 1")
        if self.group_kind not in GROUP_KINDS:
            raise ValueError(f"group_kind is {self.group_kind!r}; expected one of {', '.join(GROUP_KINDS)}")
        object.__setattr__(self, "video", tuple(self.video))
        if len(self.video) != n:
            raise ValueError(f"video has {len(self.video)} names; expected {n}")
        for name in ("target", "regression"):
            values = getattr(self, name)
            if values is not None:
                if np.shape(values) != (n,):
                    raise ValueError(f"{name} has shape {list(np.shape(values))}; expected [{n}]")
                object.__setattr__(self, name, np.asarray(values, np.float64))

    @classmethod
    def of(cls, out: Mapping[str, Any], clips: Sequence[Clip], group_kind: str = "") -> Predictions:
        """From arrays [n] by name, `clip` counting `clips`, whose patients are of the study's `group_kind`."""
        number = np.asarray(out["clip"])
        patient = _patients(clips)
        return cls(
            out["probability"],
            out["label"],
            number,
            tuple(clips[i].name for i in number),
            patient=None if patient is None else patient[number],
            group_kind=group_kind or GROUP_KINDS[0],
            **{name: out[name] for name in ("frame", "target", "regression") if name in out},
        )

    @property
    def videos(self) -> int:
        """How many videos the frames are of."""
        return len(set(self.video))

    @property
    def group_name(self) -> str:
        """What the bootstrap draws as a whole."""
        return "video" if self.patient is None else self.group_kind

    def samples(self, unit: str) -> tuple[Floats, Integers, NDArray[Any]]:
        """Probability [m], label [m] and group [m] (the video's name, or that of the patient's first video in order) of
        the videos or the frames, whichever `unit` names. Runs that were tested on the same groups call them the same.
        """
        group = np.array(self.video)
        if self.patient is not None:
            # Not by the patients' numbers, which begin at 0 in every split.
            patients = self.patient.tolist()
            first = dict(sorted(zip(patients, self.video, strict=True), reverse=True))
            group = np.array([first[patient] for patient in patients])
        if unit == "frame":
            return self.probability, self.label, group
        return *by_video(self.probability, self.label, self.clip), group[self._first_frames()]

    def frame_rows(self) -> list[dict[str, Any]]:
        """A row a frame."""
        columns = {
            self.group_kind if name == "patient" else name: getattr(self, name)
            for name in ("video", "clip", "patient", "frame", "target", "regression", "label", "probability")
        }
        return _rows(columns)

    def video_rows(self, threshold: float) -> list[dict[str, Any]]:
        """A row a video (of the paper protocol: a clip), with the mean probability of its frames and the decisions, 1
        for abnormal, at the threshold and at 0.5."""
        first = self._first_frames()
        probability, label = by_video(self.probability, self.label, self.clip)
        columns = {
            "video": [self.video[i] for i in first],
            "clip": self.clip[first],
            self.group_kind: None if self.patient is None else self.patient[first],
            "frames": np.unique(self.clip, return_counts=True)[1],
            "target": None if self.target is None else self.target[first],
            "regression": None if self.regression is None else mean_by(self.regression, self.clip),
            "label": label,
            "probability": probability,
            "threshold": [threshold] * first.size,
            "decision": (probability > threshold).astype(int),
            "decision_at_0.5": (probability > THRESHOLD).astype(int),
        }
        return _rows(columns)

    def _first_frames(self) -> Integers:
        """The place of a frame of each clip, in the order of the clips' numbers."""
        return np.unique(self.clip, return_index=True)[1].astype(np.int64)


def write_predictions(run: RunFolder, test: Predictions, validation: Predictions | None, threshold: float) -> None:
    """Write the predictions of the test split, and of the validation split if given, by frame and by video. Raises
    OutputError."""
    for split, by_frame, by_video_csv in (
        (validation, run.validation_csv, run.validation_by_video_csv),
        (test, run.predictions_csv, run.predictions_by_video_csv),
    ):
        if split is not None:
            write_csv(by_frame, split.frame_rows())
            write_csv(by_video_csv, split.video_rows(threshold))


def read_predictions(path: Path) -> Predictions:
    """The predictions by frame that `write_predictions` has written, without targets and regressions.

    Raises:
        ConfigError: the file is missing or damaged.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            names = reader.fieldnames or ()
            missing = [name for name in ("video", "clip", "label", "probability") if name not in names]
            if missing:
                raise ConfigError(f"{path} is damaged: it has no column {', '.join(missing)}")
            rows = list(reader)
        if any(None in row or None in row.values() for row in rows):
            raise ConfigError(f"{path} is damaged: not all of its rows have the same number of columns")
        columns: dict[str, list[str]] = {name: [row[name] for row in rows] for name in names}
        kind = next((kind for kind in GROUP_KINDS if kind in columns), None)

        def whole(name: str) -> Integers:
            return np.array([int(text) for text in columns[name]], np.int64)

        return Predictions(
            probability=np.array([float(text) for text in columns["probability"]]),
            label=whole("label"),
            clip=whole("clip"),
            video=tuple(columns["video"]),
            frame=whole("frame") if "frame" in columns else None,
            patient=whole(kind) if kind else None,
            group_kind=kind or GROUP_KINDS[0],
        )
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise ConfigError(f"{path} is damaged: {error}") from error


def _patients(clips: Sequence[Clip]) -> Integers | None:
    """A number for each clip, the same for one patient's; None where no clip names a patient. Nothing of what a patient
    is called goes into it."""
    if all(clip.patient is None for clip in clips):
        return None
    # A clip without a patient is a patient by itself, with all clips of its video.
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


def _integers(values: ArrayLike, n: int, name: str) -> Integers:
    array = np.asarray(values)
    if array.shape != (n,) or array.dtype.kind not in "biu":
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; expected integers [{n}]")
    return array.astype(np.int64)
