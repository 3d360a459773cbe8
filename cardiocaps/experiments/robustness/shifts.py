"""The shifted tests: the test patients of an experiment's phantom, examined otherwise than in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from cardiocaps.config import TrainConfig
from cardiocaps.phantom import Shift, Variant

AXES: Mapping[str, str] = MappingProxyType(
    {
        "angle": "angle, degrees",
        "x": "position along the probe, cm",
        "z": "distance from the probe, cm",
        "depth": "depth of the sector, cm",
        "rate": "heart rate, beats per minute",
        "gain": "gain, dB",
        "speckle": "size of speckle, factor",
        "off_axis": "plane off the axis, cm",
        "machine": "another machine",
    }
)
"""What a test shifts, a field of `phantom.Shift` -> its name and unit for readers."""


@dataclass(frozen=True)
class ShiftedTest:
    """One test.

    Attributes:
        axis: what is shifted, a key of AXES; "" for the unshifted test.
        size: of the shift, in the unit of the axis; 1 for another machine.

    Raises:
        ConfigError: the phantom has no shift of this size.
    """

    axis: str = ""
    size: float = 0.0

    def __post_init__(self) -> None:
        if self.axis not in ("", *AXES):
            raise ValueError(f"ShiftedTest: axis is {self.axis!r}; expected one of {', '.join(AXES)}")
        _ = self.shift

    @property
    def name(self) -> str:
        """For example "angle=20"; "unshifted" without a shift."""
        return f"{self.axis}={self.size:g}" if self.axis else "unshifted"

    @property
    def shift(self) -> Shift:
        size: Any = bool(self.size) if self.axis == "machine" else self.size
        return Shift(**{self.axis: size}) if self.axis else Shift()


UNSHIFTED = ShiftedTest()


def phantom_of(config: TrainConfig, test: ShiftedTest) -> Variant:
    """The phantom of a test: the test patients of the experiment's phantom alone, shifted."""
    return replace(Variant.of(config), shift=test.shift, test_only=True)


def neutral(axis: str) -> float:
    """The size on an axis of what is not shifted: 1 for a factor, else 0."""
    return float(getattr(Shift(), axis))


def _tests(axis: str, *sizes: float) -> tuple[ShiftedTest, ...]:
    return tuple(ShiftedTest(axis, size) for size in sizes)


TESTS: tuple[ShiftedTest, ...] = (
    UNSHIFTED,
    *_tests("angle", 5, 10, 20, 30),
    *_tests("x", -1, 1),
    *_tests("z", -1, 1),
    *_tests("depth", 2),
    *_tests("rate", 30),
    *_tests("gain", -10, 10),
    *_tests("speckle", 0.7, 1.5),
    *_tests("off_axis", 0.5),
    *_tests("machine", 1),
)
"""The unshifted test first. Hearts in training are turned by -15 to 15 degrees, so the largest angle here is 45."""


def with_unshifted(tests: Sequence[ShiftedTest]) -> tuple[ShiftedTest, ...]:
    """These tests in their order, each once, after the unshifted one."""
    return tuple(dict.fromkeys((UNSHIFTED, *tests)))
