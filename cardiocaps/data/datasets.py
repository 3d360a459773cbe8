"""The registry of data sets: a row for each layout of a folder that can be read.

To add a data set, write its reader, a module like `cardiocaps.data.echonet_lvh.reader`, and a row of `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cardiocaps.data.echonet_lvh import reader as echonet_lvh
from cardiocaps.data.study import Study


@dataclass(frozen=True)
class DataSet:
    """A row of the registry.

    Attributes:
        title: what reports call such a folder; begins a sentence.
        read: its reader, with the arguments of `cardiocaps.data.echonet_lvh.reader.read_folder`. It raises ConfigError
            for a setting that its data set has no use for, and DataError for a folder that cannot be used.
    """

    title: str
    read: Callable[..., Study]


PHANTOM = "echonet-lvh"
"""The layout that the phantom is written in."""

DATASETS: Mapping[str, DataSet] = {
    "echonet-lvh": DataSet("A folder in the layout of EchoNet-LVH", echonet_lvh.read_folder),
}
"""The name of a layout -> its row."""
