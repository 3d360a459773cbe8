"""What a system and a table or figure of the paper are. The list of them is another module's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class System:
    """Something that classifies echocardiograms: its key (for example "resnet18"), its name for readers, and what makes
    it: settings of TrainConfig, or `classifier` and `sampling` of `models.pixel_classifiers.fit`."""

    key: str
    title: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Exhibit:
    """A table or figure: its name, which is that of its files ("table1" to "table6", "fig3" to "fig6", "leakage",
    "efficiency", "calibration"), its title, and the keys of its systems in the order of its rows."""

    name: str
    title: str
    systems: tuple[str, ...]
