"""The registry of data sets: a row for each layout of a folder that can be read.

To add a data set, write its reader, a module like `cardiocaps.data.file_list`, and a row of `DATASETS`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cardiocaps.config import OF_TABLE
from cardiocaps.data import file_list, video_table
from cardiocaps.data.echonet_lvh import measurements
from cardiocaps.data.echonet_lvh import reader as echonet_lvh
from cardiocaps.data.listing import check_folder
from cardiocaps.data.study import Study
from cardiocaps.errors import DataError, printable


@dataclass(frozen=True)
class DataSet:
    """A row of the registry.

    Attributes:
        title: what reports call such a folder; begins a sentence.
        read: its reader, with the arguments of `file_list.read_dynamic` and those that `settings` names. It raises
            ConfigError for a setting that its data set has no use for, and DataError for a folder that cannot be used.
        files: what a folder is recognised by, in words.
        recognise: whether a folder has these files.
        target: the regression target if none is given; None: that depends on the folder.
        settings: names of the settings that this data set has and some others do not.
    """

    title: str
    read: Callable[..., Study]
    files: str
    recognise: Callable[[Path], bool]
    target: str | None = None
    settings: tuple[str, ...] = ()


def _has(folder: Path, *names: str) -> bool:
    """Whether a folder has entries of all these names, of whatever kind: the reader says what is wrong with them."""
    return all(os.path.lexists(folder / name) for name in names)


PHANTOM = "echonet-lvh"
"""The layout that the phantom is written in."""

TABLE = "table"
"""The name of any table that is given as such."""

AUTO = "auto"
"""The value of the setting `dataset` with which a folder's layout is recognised by its files."""

DATASETS: Mapping[str, DataSet] = {
    "echonet-lvh": DataSet(
        "A folder in the layout of EchoNet-LVH",
        echonet_lvh.read_folder,
        measurements.FILE_NAME,
        lambda folder: _has(folder, measurements.FILE_NAME),
        target="width",
        settings=("protocol",),
    ),
    "echonet-dynamic": DataSet(
        "A folder in the layout of EchoNet-Dynamic",
        file_list.read_dynamic,
        f"{file_list.FILE_NAME} and {file_list.VIDEOS}",
        lambda folder: _has(folder, file_list.FILE_NAME, file_list.VIDEOS),
        target="ef",
    ),
    "echonet-pediatric": DataSet(
        "A folder in the layout of EchoNet-Pediatric",
        file_list.read_pediatric,
        " or ".join(f"{view}/{file_list.FILE_NAME}" for view in file_list.VIEWS),
        lambda folder: any(_has(folder / view, file_list.FILE_NAME) for view in file_list.VIEWS),
        target="ef",
        settings=("view", "val_fold", "test_fold"),
    ),
    TABLE: DataSet(
        "A table of videos",
        video_table.read_folder,
        f"a table ({', '.join(video_table.SUFFIXES)}) as --data FILE or --table NAME",
        lambda folder: False,
        settings=OF_TABLE,
    ),
}
"""The name of a layout, as the setting `dataset` gives it -> its row."""

OWN_SETTINGS = tuple(dict.fromkeys(name for row in DATASETS.values() for name in row.settings))
"""Names of the settings that some data sets do not have."""


def choose(place: Path, dataset: str, table: str | None = None) -> str:
    """The name of the layout that data are read in.

    Args:
        place: the data's folder, or a table.
        dataset: a name of `DATASETS`, or AUTO: the one whose files the folder has; TABLE if a table is given.
        table: the name of a table in the folder.

    Raises:
        DataError: there is no such folder; with AUTO, it has the files of no layout, or of several; otherwise, it
            has the files of other layouts alone.
    """
    if dataset == TABLE or (dataset == AUTO and (table is not None or video_table.is_table(place))):
        return TABLE
    check_folder(place)
    found = [name for name, row in DATASETS.items() if row.recognise(place)]
    if dataset == AUTO and len(found) == 1:
        return found[0]
    if dataset == AUTO or (found and dataset not in found):
        known = "; ".join(f"{row.files} ({name})" for name, row in DATASETS.items())
        what = f"has the files of {' and of '.join(found)}" if found else "has the files of no data set that is read"
        raise DataError(
            f"dataset is {dataset!r}, but {printable(place)} {what}; looked for: {known}; --dataset chooses one"
        )
    return dataset
