"""The registry of data sets: what a reader is asked, and what a study holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cardiocaps.config import TrainConfig, options
from cardiocaps.data import datasets, open
from cardiocaps.data.datasets import DATASETS, PHANTOM, DataSet
from cardiocaps.data.echonet_lvh.reader import read_folder


def test_every_target_of_the_settings_is_one_of_the_phantom(shared_folder: Path) -> None:
    study = read_folder(shared_folder)
    assert set(options()["regression_target"].choices) <= set(study.units)
    assert all(set(clip.targets) == set(study.units) for clip in study.clips)
    assert study.table.is_file()


def test_a_reader_gets_the_settings(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def read(root: Path, **settings: Any) -> Any:
        asked.update(settings, root=root)
        return read_folder(root)

    assert DATASETS[PHANTOM].read is read_folder
    monkeypatch.setattr(datasets, "DATASETS", {PHANTOM: DataSet("Another", read)})
    monkeypatch.setattr(open, "DATASETS", datasets.DATASETS)
    config = TrainConfig(data=shared_folder, threshold={"IVSd": 1.2}, limit=7, seed=3, split_seed=4)
    assert open.read_study(config, needed_splits=("test",)) == read_folder(shared_folder)
    assert (asked["root"], asked["thresholds"], asked["limit"]) == (shared_folder, {"IVSd": 1.2}, 7)
    assert (asked["seed"], asked["needed_splits"]) == (4, ("test",))
