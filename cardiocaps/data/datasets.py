"""The registry of data sets: a row for each layout of a folder that can be read.

To add a data set, write its reader, a module like `cardiocaps.data.echonet_lvh`, and a row of `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cardiocaps.data import echonet_lvh
from cardiocaps.data.study import Study


class Reader(Protocol):
    """Reads a folder into a `Study`: its clips with labels, targets and splits, the units and the label rule.

    The arguments are settings of `TrainConfig` by name; `thresholds` is its `threshold`. A reader raises ConfigError
    for a setting that its data set has no use for, and DataError for a folder that cannot be used.
    """

    def __call__(
        self,
        root: Path,
        *,
        protocol: str,
        split: str,
        seed: int,
        max_bad_share: float,
        limit: int | None,
        thresholds: Mapping[str, float] | None,
        group_column: str | None,
        allow_split_patients: bool,
        follow_links: bool,
        needed_splits: Sequence[str],
    ) -> Study: ...


@dataclass(frozen=True)
class DataSet:
    """A row of the registry.

    Attributes:
        title: what reports call such a folder; begins a sentence.
        read: its reader.
    """

    title: str
    read: Reader


PHANTOM = "echonet-lvh"
"""The layout that the phantom is written in."""

DATASETS: Mapping[str, DataSet] = {
    "echonet-lvh": DataSet("A folder in the layout of EchoNet-LVH", echonet_lvh.read_folder),
}
"""The name of a layout -> its row."""
