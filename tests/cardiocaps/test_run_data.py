"""Which data a run may go on with and be judged by, without a network."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cardiocaps import evaluate
from cardiocaps.config import TrainConfig, read_run, write_run
from cardiocaps.data.fingerprint import Fingerprint
from cardiocaps.data.open import RunData, decode, decode_for_run, read_study
from cardiocaps.data.study import Study
from cardiocaps.errors import CheckpointError, ConfigError, DataError
from cardiocaps.evaluation import run as evaluation
from cardiocaps.runtime.device import Machine
from cardiocaps.runtime.files import write_json
from cardiocaps.training.run_folder import RunFolder
from tests.cardiocaps.data.sample_videos import COLUMNS, encode, measurement, picture, split_of, write_table

MACHINE = Machine("cpu", None, "32", False, False, False, "auto")
VIDEOS, SEED = 40, 1


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for i in range(VIDEOS):
        encode(folder / f"0X{i:016X}.avi", picture(frames=4, seed=i))
    return folder


Number = Callable[[int], str]


@pytest.fixture
def table(videos: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a data folder of some of the videos; even ones are normal, odd ones abnormal."""

    def make(numbers: list[int], split: Number | None = None, patient: Number | None = None, prefix: str = "") -> Path:
        root = tmp_path / f"data {len(list(tmp_path.iterdir()))}"
        rows = []
        for i in numbers:
            name = f"{prefix}0X{i:016X}"
            (root / "Batch1").mkdir(parents=True, exist_ok=True)
            shutil.copy(videos / f"0X{i:016X}.avi", root / "Batch1" / f"{name}.avi")
            row = measurement(name, "IVSd", 1.4 if i % 2 else 0.8, Frames=4)
            row |= {"split": split(i)} if split else {}
            rows.append(row | ({"PatientID": patient(i)} if patient else {}))
        columns = [c for c in COLUMNS if split or c != "split"] + (["PatientID"] if patient else [])
        write_table(root, rows, columns)
        return root

    return make


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder.create(tmp_path / "run")
    folder.last.touch()
    return folder


def _settings(root: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(
        data=root, frames_per_clip=2, split_seed=SEED, cache_dir=tmp_path / "cache", progress=False
    ).resolved()


def _trained(run: RunFolder, root: Path, tmp_path: Path) -> Study:
    """What a run on the folder remembers."""
    config = _settings(root, tmp_path)
    study = read_study(config)
    contents = decode(config, MACHINE, study).contents()
    write_json(run.data, Fingerprint.of(study).with_contents(contents).as_dict())
    return study


def _evaluated(run: RunFolder, root: Path, tmp_path: Path, *, allow_changed: bool = True) -> RunData:
    config = _settings(root, tmp_path)
    study = read_study(config, again=True, needed_splits=("test",))
    return decode_for_run(
        config, MACHINE, study, run.data, "advice", trained=run.is_trained, allow_changed=allow_changed
    )


def _digits(study: Study, *splits: str) -> set[str]:
    """The videos of some splits, by the end of their names."""
    return {clip.name[-4:] for clip in study.clips if clip.split in splits}


@pytest.mark.parametrize("prefix", ["", "renamed-"])
def test_no_video_is_tested_on_that_the_run_has_seen(
    prefix: str, table: Callable[..., Path], run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a column of splits, one video less draws another split; other names do not make videos new."""
    before = _trained(run, table(list(range(VIDEOS))), tmp_path)
    root = table(list(range(1, VIDEOS)), prefix=prefix)
    drawn = _digits(read_study(_settings(root, tmp_path)), "test")
    known = _digits(before, "train", "val")
    assert len(drawn & known) == 2  # what the test is about
    used = _evaluated(run, root, tmp_path)
    assert _digits(used.data.study, "test") == drawn - known == _digits(before, "test") & drawn
    assert used.left_out == len(drawn & known) and used.is_own is False
    assert f"note: {used.left_out} test videos are left out" in capsys.readouterr().out


def test_no_patient_is_tested_on_that_the_run_has_seen(
    table: Callable[..., Path], run: RunFolder, tmp_path: Path
) -> None:
    """New videos 24 and 25 are of the patients of the videos 0 and 1, which stand in train."""
    _trained(run, table(list(range(24)), split_of, lambda i: f"P{i % 8}"), tmp_path)
    root = table([0, 1, 24, 25, 26, 27, 6], lambda i: "train" if i < 2 else "test", lambda i: f"P{i % 24}")
    used = _evaluated(run, root, tmp_path)
    assert {int(digits, 16) for digits in _digits(used.data.study, "test")} == {26, 27, 6}
    assert used.left_out == 2


@pytest.mark.filterwarnings("ignore:a split by frame leaks")
def test_where_frames_are_split_the_run_has_seen_every_video(
    table: Callable[..., Path], run: RunFolder, tmp_path: Path
) -> None:
    config = replace(_settings(table(list(range(12))), tmp_path), split="frames")
    write_json(run.data, Fingerprint.of(read_study(config)).as_dict())
    config = replace(config, data=table(list(range(4, 32))))
    study = read_study(config, again=True, needed_splits=("test",))
    used = decode_for_run(config, MACHINE, study, run.data, "advice", trained=run.is_trained, allow_changed=True)
    assert {int(digits, 16) for digits in _digits(used.data.study, "mixed")} == set(range(12, 32))
    assert used.left_out == 8


def test_nothing_new_to_test_on(table: Callable[..., Path], run: RunFolder, tmp_path: Path) -> None:
    _trained(run, table(list(range(16)), split_of), tmp_path)
    with pytest.raises(DataError, match="has no test video that is new to the run: it was trained or validated on all"):
        _evaluated(run, table([0, 1, 4, 5], lambda _: "test"), tmp_path)


def test_own_data_lose_no_video(table: Callable[..., Path], run: RunFolder, tmp_path: Path) -> None:
    root = table(list(range(VIDEOS)))
    before = _trained(run, root, tmp_path)
    for allow_changed in (False, True):
        used = _evaluated(run, root, tmp_path, allow_changed=allow_changed)
        assert (used.is_own, used.left_out, used.data.study.clips) == (True, 0, before.clips)


def test_a_drawn_split_that_nobody_remembers_is_refused(
    table: Callable[..., Path], run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = table(list(range(VIDEOS)))
    config = _settings(root, tmp_path)
    with pytest.raises(DataError, match=r"no record of its data, .* in other splits; advice$"):
        _evaluated(run, root, tmp_path, allow_changed=False)
    with pytest.raises(DataError, match=r"may now be in other splits; begin a new run$"):
        decode_for_run(config, MACHINE, read_study(config), run.data, "advice", trained=True, keep=True)
    assert not run.data.exists()
    capsys.readouterr()
    assert _evaluated(run, root, tmp_path).is_own is False
    assert "videos it was trained on may be tested on" in capsys.readouterr().out


def test_a_table_of_tests_alone_is_not_the_data_of_an_old_run(
    table: Callable[..., Path], run: RunFolder, tmp_path: Path
) -> None:
    used = _evaluated(run, table([0, 1, 2, 3], lambda _: "test"), tmp_path)
    assert used.is_own is False
    used = _evaluated(run, table(list(range(8)), split_of), tmp_path, allow_changed=False)
    assert used.is_own is None


def _forbidden(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder unreadable; permissions do not stop root, so `stat` is replaced."""
    stat = Path.stat

    def refuse(self: Path, *, follow_symlinks: bool = True) -> os.stat_result:
        if self.is_relative_to(folder):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return stat(self, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(Path, "stat", refuse)


def test_what_may_not_be_looked_at_is_said(
    table: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = table([0, 1])
    config = _settings(root, tmp_path)
    run = RunFolder.create(tmp_path / "run")
    write_run(config, run.path)
    _forbidden(monkeypatch, root)
    assert read_run(run.path).data == root
    with pytest.raises(DataError, match="Permission denied"):
        read_study(config, again=True)
    _forbidden(monkeypatch, run.path)
    with pytest.raises(ConfigError, match=r"cannot read .*Permission denied"):
        read_run(run.path)


def test_a_run_of_an_older_version_may_have_a_smaller_phantom(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run")
    write_run(TrainConfig(phantom_videos=12, phantom_dir=tmp_path / "phantom").resolved(), run.path)
    config = read_run(run.path)
    assert config.phantom_videos == 12
    with pytest.raises(ConfigError, match=r"^phantom_videos is 12; expected at least 18: "):
        read_study(config)
    assert not (tmp_path / "phantom").exists()


@pytest.mark.parametrize("name", ["tab\tbed", "\udcff"])
def test_a_working_folder_that_no_path_may_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    run = RunFolder.create(tmp_path / "run")
    write_run(TrainConfig(data=Path("videos")).resolved(), run.path)
    assert json.loads(run.paths.read_text())["data"] == {"given": "videos"}
    assert read_run(run.path).data == Path("videos")


def test_a_cache_is_where_it_was_given_when_its_disk_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    monkeypatch.chdir(old)
    run = RunFolder.create(tmp_path / "run")
    write_run(TrainConfig(cache_dir=Path("cache")).resolved(), run.path)
    monkeypatch.chdir(new)
    assert read_run(run.path).cache_dir == old / "cache"
    old.rmdir()
    assert read_run(run.path).cache_dir == Path("cache")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Study]:
    """The studies that reach the evaluation, which is replaced, because there is no network."""
    studies = []

    def take(config: TrainConfig, machine: Machine, run: RunFolder, used: RunData, results: object) -> None:
        studies.append(used.data.study)
        raise CheckpointError("no network here")

    monkeypatch.setattr(evaluation, "evaluate_network", take)
    return studies


def test_other_data_are_read_as_their_own_table_says(
    table: Callable[..., Path], run: RunFolder, tmp_path: Path, read: list[Study], capsys: pytest.CaptureFixture[str]
) -> None:
    """The split and the limit of the run do not apply; the options decide about links, patients and bad videos."""
    root = table(list(range(16)))
    config = replace(_settings(root, tmp_path), split="stratified", limit=12, bootstrap=0)
    write_run(config, run.path)
    write_json(run.data, Fingerprint.of(read_study(config)).as_dict())
    other = table(list(range(20, 36)), split_of, lambda i: f"P{i % 5}")  # divided patients
    videos = (other / "Batch1").rename(tmp_path / "elsewhere")
    (other / "Batch1").mkdir()
    for video in videos.iterdir():
        (other / "Batch1" / video.name).symlink_to(video)
    (videos / f"0X{20:016X}.avi").write_bytes(b"no video")
    typed = [str(run.path), "--data", str(other), "--allow-changed-data", "--out", str(tmp_path / "out")]
    assert evaluate.main(typed) == 3
    assert "--follow-links" in capsys.readouterr().err
    assert evaluate.main([*typed, "--follow-links"]) == 3
    typed += ["--follow-links", "--max-bad-share", "0.5", "--cache-dir", str(tmp_path / "new cache")]
    assert not read and evaluate.main(typed) == 5
    (study,) = read
    assert study.split_rule == "column" and len(study.clips) == 15 and study.group_column == "PatientID"
    assert any((tmp_path / "new cache").iterdir())
    assert not (tmp_path / "out").exists()


def test_runs_of_other_seeds_and_machines_have_a_mean() -> None:
    def key(of: Fingerprint, **changes: object) -> str:
        return evaluation.but_for_the_seed(replace(TrainConfig().resolved(), **changes), of)  # type: ignore[arg-type]

    videos = {"a": ("train", "0", "x", "-"), "b": ("test", "1", "y", "-")}
    data = Fingerprint(videos, {"IVSd": 1.1}, "table", "video", "stratified")
    same = key(data)
    elsewhere = {"data": Path("there"), "workers": 2, "device": "cpu", "cache_dir": Path("x"), "progress": False}
    assert key(data, seed=3, out=Path("other"), **elsewhere) == same
    drawn = {"b": ("train", "1", "y", "-"), "a": ("val", "0", "x", "-")}
    assert key(replace(data, videos=drawn)) == same
    for changes in ({"epochs": 3}, {"patience": 1}, {"routing": "dynamic"}, {"regression_target": "ef"}):
        assert key(data, **changes) != same
    relabelled = {**videos, "a": ("train", "1", "x", "-")}
    for other in (replace(data, videos=relabelled), replace(data, label_rule={"IVSd": 1.2})):
        assert key(other) != same
