"""The registry of data sets: what a reader is asked, and what a study holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cardiocaps.config import TrainConfig, options
from cardiocaps.data import open
from cardiocaps.data.datasets import AUTO, DATASETS, OWN_SETTINGS, PHANTOM, TABLE, choose
from cardiocaps.data.echonet_lvh.reader import read_folder
from cardiocaps.errors import ConfigError, DataError

from .sample_videos import folder_of


def test_the_phantoms_layout_has_the_paper_s_target_first(shared_folder: Path) -> None:
    study = read_folder(shared_folder)
    assert list(study.units) == ["width", "ef"] and study.target(None) == "width"
    assert all(set(clip.targets) == set(study.units) for clip in study.clips)
    assert study.table.is_file()


def test_a_reader_gets_the_settings(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def read(root: Path, **settings: Any) -> Any:
        asked.update(settings, root=root)
        return read_folder(root)

    assert DATASETS[PHANTOM].read is read_folder
    monkeypatch.setattr(open, "DATASETS", {PHANTOM: replace(DATASETS[PHANTOM], read=read)})
    config = TrainConfig(data=shared_folder, threshold={"IVSd": 1.2}, limit=7, seed=3, split_seed=4)
    assert open.read_study(config, needed_splits=("test",)) == read_folder(shared_folder)
    assert (asked["root"], asked["thresholds"], asked["limit"]) == (shared_folder, {"IVSd": 1.2}, 7)
    assert (asked["seed"], asked["needed_splits"], asked["protocol"]) == (4, ("test",), "video")


def test_every_data_set_is_a_choice_of_the_setting() -> None:
    assert options()["dataset"].choices == (AUTO, *DATASETS)
    assert all(name in options() for name in OWN_SETTINGS)


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_layout_is_recognised_by_its_files(
    dataset: str, tmp_path: Path, shared_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder_of(dataset, tmp_path) if dataset != PHANTOM else shared_folder
    assert choose(root, AUTO) == choose(root, dataset) == dataset
    config = open.with_layout(TrainConfig(data=root))
    assert config.dataset == dataset and capsys.readouterr().out == f"data: {root} is read as {dataset}\n"
    assert open.with_layout(config) == config and capsys.readouterr().out == ""
    study = open.read_study(config)
    assert study == open.read_study(TrainConfig(data=root))
    assert DATASETS[dataset].target == next(iter(study.units), None)
    for other in set(DATASETS) - {dataset, TABLE}:
        has = "not a folder" if dataset == TABLE else f"has the files of {dataset}; looked for: "
        with pytest.raises(DataError, match=has):
            choose(root, other)


def test_the_layout_of_missing_data_and_of_the_phantom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(data=tmp_path / "none")
    assert open.with_layout(config) == config
    with pytest.raises(DataError, match="none, which the run used, is not there; give --data"):
        open.read_study(config, again=True)
    with pytest.raises(DataError, match="none: no such folder"):
        open.read_study(config)
    assert open.with_layout(TrainConfig()).dataset == PHANTOM and capsys.readouterr().out == ""


def test_a_folder_of_no_layout_or_of_several(tmp_path: Path) -> None:
    root = folder_of("echonet-dynamic", tmp_path)
    (root / "MeasurementsList.csv").touch()
    with pytest.raises(DataError, match=r"has the files of echonet-lvh and of echonet-dynamic; looked for: ") as error:
        choose(root, AUTO)
    assert "--dataset chooses one" in str(error.value)
    assert choose(root, "echonet-dynamic") == "echonet-dynamic"
    assert choose(root, AUTO, "study.csv") == choose(root, TABLE) == TABLE
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "FileList.csv").touch()  # without Videos
    with pytest.raises(DataError, match=r"has the files of no data set that is read; looked for: Measure") as error:
        choose(tmp_path / "other", AUTO)
    for row in DATASETS.values():
        assert row.files in str(error.value)
    with pytest.raises(DataError, match="none: no such folder"):
        choose(tmp_path / "none", AUTO)
    with pytest.raises(DataError, match=r"no such folder \(addresses are not read\)"):
        choose(Path("https://a.b/c"), AUTO)


def test_a_setting_of_another_data_set_is_refused(tmp_path: Path) -> None:
    root = folder_of("echonet-dynamic", tmp_path)
    with pytest.raises(ConfigError, match=r"protocol is 'paper'; expected video, because data set echonet-dynamic has"):
        open.read_study(TrainConfig(data=root, protocol="paper"))
    with pytest.raises(ConfigError, match=r"label_column is 'dx'; expected None, because data set echonet-dynamic has"):
        open.read_study(TrainConfig(data=root, label_column="dx"))
    with pytest.raises(
        ConfigError, match=r"test_fold is 0; expected 9, because data set echonet-dynamic has no such s"
    ):
        open.read_study(TrainConfig(data=root, test_fold=0))


@pytest.mark.parametrize("dataset", DATASETS)
def test_a_target_that_a_data_set_does_not_have(dataset: str, tmp_path: Path, shared_folder: Path) -> None:
    root = folder_of(dataset, tmp_path) if dataset != PHANTOM else shared_folder
    study = open.read_study(TrainConfig(data=root, target_column="mass:g" if dataset == TABLE else None))
    with pytest.raises(ConfigError, match=r"regression_target is 'strain'; expected one of \w"):
        study.target("strain")
    with pytest.raises(ConfigError, match=r"regression_target is 'ef'; expected none, because the data have no t"):
        replace(study, units={}).target("ef")
    assert replace(study, units={}).target(None) is None


@pytest.mark.parametrize(
    ("dataset", "threshold", "message"),
    [
        ("echonet-lvh", {"LVEDP": 12.0}, r"threshold is LVEDP=12; expected a measurement .*: IVSd, IVSs, .*RVDd"),
        ("echonet-lvh", {"IVSD": 1.2}, r"threshold is IVSD=1.2; .*; did you mean IVSd\?"),
        ("echonet-lvh", {"IVSd": 0.0}, r"threshold is IVSd=0; expected from 0.01 to 100 cm"),
        ("echonet-dynamic", {"IVSd": 1.2}, r"threshold is IVSd=1.2; expected a measurement that labels .*: ef"),
        ("echonet-pediatric", {"EF": 50.0}, r"threshold is EF=50; .*: ef; did you mean ef\?"),
        ("echonet-dynamic", {"ef": 120.0}, r"threshold is ef=120; expected from 0.01 to 100 %"),
    ],
)
def test_a_threshold_that_a_data_set_does_not_have(
    dataset: str, threshold: dict[str, float], message: str, tmp_path: Path, shared_folder: Path
) -> None:
    root = folder_of(dataset, tmp_path) if dataset != PHANTOM else shared_folder
    with pytest.raises(ConfigError, match=message):
        open.read_study(TrainConfig(data=root, threshold=threshold))
