"""What may differ between phantoms of one seed: the difficulty, the sizes and shares of the splits, and a shift."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING

from cardiocaps.errors import ConfigError

if TYPE_CHECKING:
    from cardiocaps.config import TrainConfig

EASY, MODERATE, HARD = "easy", "moderate", "hard"
ABNORMAL_PART = 0.2


@dataclass(frozen=True)
class Difficulty:
    """How hard the patients of a phantom are to classify. Lengths in cm, end-diastolic.

    The population is a mixture of healthy, hypertrophic and dilated hearts, whose lengths run over the thresholds of
    the label rule without a gap. The label is that of a reader's measurements, which err (`patients.READER_ERROR`).
    Healthy means are those of Lang and coauthors (J Am Soc Echocardiogr 2015;28:1-39: walls 0.6 to 1.0, LVIDd 3.8 to
    5.8); their spread, the ranges of disease and all shares are choices of this project.

    Attributes:
        reader: the reader's error, as a share of the published variability.
        wall: mean and standard deviation of a healthy wall.
        thick: smallest and largest wall of a hypertrophic heart, uniform between.
        diameter: standard deviation of a healthy diameter, whose mean is 4.55 at average body size.
        wide: smallest and largest diameter of a dilated heart, uniform between.
        diseased: shares of hypertrophic and of dilated hearts in the population that patients are drawn from.
        depth: smallest and largest depth of the sector, uniform between. A laboratory's protocol fixes it. The rule has
            thresholds in centimetres, and in a frame of 64 pixels the ticks of the scale cannot be read, so a wide
            range would hide the label from every small network.
        image: strength of all effects on the image (`effects.draw_effects`) and of off-axis planes, from 0 to 1.
    """

    reader: float
    wall: tuple[float, float]
    thick: tuple[float, float]
    diameter: float
    wide: tuple[float, float]
    diseased: tuple[float, float]
    depth: tuple[float, float]
    image: float


DIFFICULTIES: Mapping[str, Difficulty | None] = MappingProxyType(
    {
        EASY: None,
        MODERATE: Difficulty(0.5, (0.77, 0.09), (1.10, 1.80), 0.26, (5.6, 7.2), (0.12, 0.12), (15.5, 16.5), 0.3),
        HARD: Difficulty(1.0, (0.79, 0.10), (1.06, 1.80), 0.30, (5.5, 7.2), (0.12, 0.12), (15.5, 16.5), 0.85),
    }
)
"""Name -> difficulty; None: hearts with a distance from the thresholds, and one machine."""


@dataclass(frozen=True)
class Shift:
    """A change of the examination, not of the patient: the same hearts, with the labels of the unshifted examination.

    `SHIFT_HELP` says what each value is, `SHIFT_BOUNDS` which are allowed.
    """

    angle: float = 0.0
    x: float = 0.0
    z: float = 0.0
    depth: float = 0.0
    rate: float = 0.0
    gain: float = 0.0
    speckle: float = 1.0
    off_axis: float = 0.0
    machine: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in SHIFT_BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise ConfigError(f"shift: {name} is {value:.10g}; expected a number from {low:g} to {high:g}")

    def changes(self) -> Iterator[tuple[str, float | bool]]:
        """Name and value of everything that is shifted."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                yield field.name, value


SHIFT_BOUNDS: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "angle": (-45.0, 45.0),
        "x": (-4.0, 4.0),
        "z": (-3.0, 4.0),
        "depth": (-3.0, 8.0),
        "rate": (-30.0, 80.0),
        "gain": (-30.0, 30.0),
        "speckle": (0.5, 3.0),
        "off_axis": (0.0, 0.8),
    }
)
"""The allowed values of a shift: those that leave the ventricle in the sector."""

SHIFT_HELP: Mapping[str, str] = MappingProxyType(
    {
        "angle": "turn the heart in the image by X degrees; positive turns its base away from the probe",
        "x": "move it along the probe by X cm",
        "z": "move it away from the probe by X cm",
        "depth": "add X cm to the depth of the sector",
        "rate": "add X beats per minute to the heart rate",
        "gain": "add X dB to the gain",
        "speckle": "multiply the size of speckle by X",
        "off_axis": "move the plane off the axis of the ventricle by X cm",
        "machine": "another machine, with a probe and a grey map that no phantom has without this",
    }
)

NO_SHIFT = Shift()


@dataclass(frozen=True)
class Variant:
    """What makes a phantom beside its number of videos and its seed.

    Attributes:
        difficulty: a name of DIFFICULTIES.
        test_videos: number of test videos. They are the first patients, so they stay the same whatever the number of
            videos is, and a phantom of more videos adds patients to the training and validation of a smaller one.
            None: 30 % of the videos.
        abnormal: share of abnormal videos in training and validation; in the test it is always 20 %.
        shift: of every examination.
        test_only: leave the patients of training and validation out.
    """

    difficulty: str = EASY
    test_videos: int | None = None
    abnormal: float = ABNORMAL_PART
    shift: Shift = NO_SHIFT
    test_only: bool = False

    def __post_init__(self) -> None:
        if self.difficulty not in DIFFICULTIES:
            raise ConfigError(f"phantom: difficulty is {self.difficulty!r}; expected one of {', '.join(DIFFICULTIES)}")
        if self.test_videos is not None and self.test_videos < 1:
            raise ConfigError(f"phantom: test_videos is {self.test_videos}; expected at least 1")
        if not 0 < self.abnormal < 1:
            raise ConfigError(f"phantom: abnormal is {self.abnormal:.10g}; expected a number between 0 and 1")
        if self.abnormal != ABNORMAL_PART and self.test_videos is None:
            raise ConfigError(
                f"phantom: abnormal is {self.abnormal:.10g}; expected {ABNORMAL_PART} without a number of test videos, "
                "which keeps the test the same"
            )

    @classmethod
    def of(cls, config: TrainConfig) -> Variant:
        """The variant that the settings of a run name."""
        return cls(config.phantom_difficulty, config.phantom_test, config.phantom_abnormal)

    @property
    def difficulty_settings(self) -> Difficulty | None:
        return DIFFICULTIES[self.difficulty]

    def as_dict(self) -> dict[str, object]:
        """The values that differ from the usual ones, for the phantom's marker."""
        found: dict[str, object] = {}
        if self.difficulty != EASY:
            found["difficulty"] = self.difficulty
        if self.test_videos is not None:
            found["test_videos"] = self.test_videos
        if self.abnormal != ABNORMAL_PART:
            found["abnormal"] = self.abnormal
        if self.shift != NO_SHIFT:
            found["shift"] = dict(self.shift.changes())
        if self.test_only:
            found["test_only"] = True
        return found

    def command(self) -> str:
        """The options of `python -m cardiocaps.phantom` that make it; empty for the usual phantom."""
        found = self.as_dict()
        shift = found.pop("shift", {})
        assert isinstance(shift, dict)
        names = {"test_videos": "test"}
        return "".join(
            f" --{names.get(name, name).replace('_', '-')}" + ("" if value is True else f" {value}")
            for name, value in {**found, **shift}.items()
        )


USUAL = Variant()


def normal_cdf(x: float) -> float:
    """The standard normal distribution function."""
    return 0.5 * math.erfc(-x / math.sqrt(2))
