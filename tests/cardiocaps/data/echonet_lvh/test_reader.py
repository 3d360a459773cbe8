import math
import os
import shutil
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cardiocaps.config import TrainConfig
from cardiocaps.data import cache
from cardiocaps.data.echonet_lvh.labels import THRESHOLDS
from cardiocaps.data.echonet_lvh.reader import read_folder
from cardiocaps.data.header import Header
from cardiocaps.data.open import read_study
from cardiocaps.data.study import Study
from cardiocaps.errors import ConfigError, DataError

from ..sample_videos import COLUMNS, encode, measurement, picture, split_of, write_folder, write_table


def found(study: Study, name: str) -> list[str]:
    return [problem.reason for problem in study.problems if problem.where == name]


def test_a_good_folder(shared_folder: Path) -> None:
    study = read_folder(shared_folder)
    assert len(study.clips) == 8 and study.problems == () and study.unlisted == 0
    assert study.split_rule == "column" and study.protocol == "video"
    clip = study.clips[5]
    assert clip.name == "0X0000000000000005" and clip.split == "val" and clip.label == 1
    assert clip.path == (shared_folder / "Batch2" / f"{clip.name}.avi").resolve()
    assert (
        clip.measurements == {"IVSd": 1.4, "LVIDd": 4.75}
        and clip.targets["width"] == 4.75
        and math.isnan(clip.targets["ef"])
    )
    assert [len(study.clips_in(split)) for split in ("train", "val", "test")] == [4, 2, 2]
    assert study.claims[clip.name] == Header(12, 64, 48, 50.0)


def test_the_summary_says_what_counts(shared_folder: Path) -> None:
    text = read_folder(str(shared_folder)).summary()
    assert "8 clips, protocol video, split by video, the table's own column" in text
    assert "train      4 clips, 2 abnormal" in text
    assert "names no patients" in text


@pytest.mark.parametrize("suffix, codec, folder", [("mp4", "mpeg4", "Batch3"), ("avi", "mjpeg", "."), ("AVI", "", "")])
def test_where_videos_may_be(tmp_path: Path, suffix: str, codec: str, folder: str) -> None:
    root = write_folder(tmp_path)
    old = root / "Batch1" / "0X0000000000000000.avi"
    old.unlink()
    path = root / folder / f"0X0000000000000000.{suffix}"
    if codec:
        encode(path, picture(), codec)
    else:
        shutil.copy(root / "Batch2" / "0X0000000000000001.avi", path)
    assert read_folder(root, max_bad_share=0).clips[0].path == path.resolve()


def test_nothing_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    write_table(tmp_path / "table", [measurement("0XA")])
    encode(tmp_path / "video" / "a.avi", picture(2))
    for name, reason in (
        ("none", "no such folder"),
        ("file", "not a folder"),
        ("empty", "no .avi, .mp4 or .dcm file"),
        ("video/MeasurementsList.csv", "no such file"),
        ("table", "no .avi, .mp4 or .dcm file"),
    ):
        with pytest.raises(DataError, match=rf"{name}: {reason}"):
            read_folder(tmp_path / name.partition("/")[0])


def test_unusable_videos_are_left_out_with_a_reason(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root", 16)
    names = [f"0X{i:016X}" for i in range(16)]
    paths = [root / f"Batch{1 + i % 4}" / f"{name}.avi" for i, name in enumerate(names)]
    outside = encode(tmp_path / "outside.avi", picture())
    paths[0].unlink()
    paths[1].write_bytes(b"")
    paths[2].unlink()
    os.mkfifo(paths[2])
    paths[3].unlink()
    paths[3].symlink_to(outside)
    shutil.copy(paths[4], root / "Batch2")
    paths[5].unlink()
    paths[5].mkdir()
    encode(root / "extra.avi", picture(2))
    with pytest.raises(DataError, match=r"6 of 16 videos of .* cannot be used.*line 2: no video file; 0X0+1: empty"):
        read_folder(root)
    study = read_folder(root, max_bad_share=0.5)
    assert [clip.name for clip in study.clips] == names[6:]
    assert [found(study, where) for where in ("line 2", *names[1:6])] == [
        ["no video file"],
        ["empty file"],
        ["not a regular file"],
        ["a link that leaves the data folder: --follow-links allows it"],
        ["several files: 2 of this name"],
        ["not a regular file"],
    ]
    assert study.unlisted == 1 and names[0] not in study.summary()  # it could be anybody's
    assert "2 × not a regular file (first: 0X0000000000000002)" in study.summary()
    assert "videos in the folder that the table does not name: 1" in study.summary()


def test_a_video_whose_rows_are_all_bad_is_bad(tmp_path: Path) -> None:
    root = write_folder(tmp_path, 16)
    table = root / "MeasurementsList.csv"
    table.write_text(table.read_text().replace(",0X000000000000000F,IVSd,1.4", ",0X000000000000000F,IVSd,-1"))
    study = read_folder(root, max_bad_share=0.1)
    assert study.clips[15].measurements == {"LVIDd": 5.25}  # what is left counts
    table.write_text(table.read_text().replace(",0X000000000000000F,LVIDd,5.25", ",0X000000000000000F,LVIDd,"))
    study = read_folder(root, max_bad_share=0.1)
    assert found(study, "0X000000000000000F") == ["no usable row in the table"]
    assert len(read_folder(root, max_bad_share=1 / 16).clips) == 15
    with pytest.raises(DataError, match="2 of 32 rows"):
        read_folder(root)


def test_labels_come_from_all_rows_of_a_video(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    names = [f"0X{i:016X}" for i in range(8)]
    rows = [measurement(name, "LVPWd", 1.2 if i % 2 else 0.9, split=split_of(i)) for i, name in enumerate(names)]
    rows += [
        measurement(names[0], "LVIDd", 5.0, split="train"),
        measurement(names[0], "LVIDd", 5.2, Frame=7, split="train"),
        measurement(names[0], "LVIDs", 3.0, Frame=5, split="train"),
    ]
    write_table(root, rows)
    clip = read_folder(root).clips[0]
    assert clip.label == 0 and clip.targets["width"] == pytest.approx(5.1)
    d, s = (7 * x**3 / (2.4 + x) for x in (5.1, 3.0))
    assert clip.targets["ef"] == pytest.approx(100 * (d - s) / d)
    assert math.isnan(read_folder(root).clips[1].targets["width"])
    low = {**THRESHOLDS, "LVIDs": 2.0}
    assert read_folder(root, thresholds=low).clips[0].label == 1


def test_without_a_split_column_classes_are_dealt_out(tmp_path: Path) -> None:
    root = write_folder(tmp_path, 10)
    rows = [measurement(f"0X{i:016X}", "IVSd", 1.4 if i % 2 else 0.8, split="") for i in range(10)]
    write_table(root, rows)
    study = read_folder(root)
    assert study.split_rule == "stratified"
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        labels = [clip.label for clip in study.clips_in(split)]
        assert labels.count(0) == labels.count(1) == count
    assert "drawn at random" in study.summary()
    assert any(read_folder(root, seed=seed).clips != study.clips for seed in (1, 2, 3))
    with pytest.raises(DataError, match=r"10 of 10 videos.*split blank"):
        read_folder(root, split="column")


def test_a_split_can_be_drawn_in_spite_of_the_column(shared_folder: Path) -> None:
    study = read_folder(shared_folder, split="stratified")
    assert study.split_rule == "stratified" and len(study.clips_in("train")) == 4


WHO = ("ANNA", "ANNA", "BERT", "BERT", "CARL", "CARL", "DORA", "DORA")  # within the splits of write_folder


def whose(root: Path, people: Sequence[str], split: bool = True, column: str = "PatientID") -> Path:
    """Give every video of a folder of `write_folder` to somebody; odd videos are abnormal."""
    rows = [
        measurement(f"0X{i:016X}", "IVSd", 1.4 if i % 2 else 0.8, split=split_of(i) if split else "") | {column: who}
        for i, who in enumerate(people)
    ]
    write_table(root, rows, [*COLUMNS, column])
    return root


def test_videos_of_a_patient_share_a_key_that_says_nothing(tmp_path: Path) -> None:
    study = read_folder(whose(write_folder(tmp_path), WHO))
    keys = [clip.patient for clip in study.clips]
    assert None not in keys and [keys.index(key) for key in keys] == [0, 0, 2, 2, 4, 4, 6, 6]
    text = study.summary()
    assert "each of 4 patients of the column PatientID stands in one split" in text and "names no patients" not in text
    for name in WHO:
        assert name not in text + repr(study) + repr(keys)
    assert not any(str(key) in text + repr(study) for key in keys)


def test_without_patients_no_clip_has_one(shared_folder: Path) -> None:
    study = read_folder(shared_folder)
    assert {clip.patient for clip in study.clips} == {None} and study.group_column is None
    assert "the table names no patients: videos of one patient may stand in different splits" in study.summary()


def test_drawn_splits_keep_a_patient_whole(tmp_path: Path) -> None:
    root = write_folder(tmp_path, 20)
    people = [f"P{i // 2 % 9}" for i in range(20)]  # each has a normal and an abnormal video, P0 two of both
    whose(root, people, split=False)
    different = set()
    for seed in range(5):
        study = read_folder(root, seed=seed)
        assert study.split_rule == "stratified"
        at = {}
        for clip in study.clips:
            assert at.setdefault(clip.patient, clip.split) == clip.split
        assert len(at) == 9 and set(at.values()) == {"train", "val", "test"}
        different.add(tuple(clip.split for clip in sorted(study.clips, key=lambda clip: clip.name)))
        assert "each of 9 patients" in study.summary()
    assert len(different) > 1


def test_patients_of_one_video_each_change_no_split(tmp_path: Path) -> None:
    root = whose(write_folder(tmp_path, 10), [f"P{i}" for i in range(10)], split=False)
    one = {clip.name: clip.split for clip in read_folder(root).clips}
    whose(root, [""] * 10, split=False, column="note")
    assert {clip.name: clip.split for clip in read_folder(root).clips} == one


def test_a_split_that_divides_a_patient_is_refused_unless_told(tmp_path: Path) -> None:
    root = whose(write_folder(tmp_path), ["ANNA", "BERT", "CARL", "DORA", "ANNA", "EMIL", "FRED", "BERT"])
    with pytest.raises(DataError) as caught:
        read_folder(root)
    assert str(caught.value) == (
        "MeasurementsList.csv: its split divides 2 of 6 patients (column PatientID), as one with the videos"
        " 0X0000000000000000 in train and 0X0000000000000004 in val; --split stratified keeps the patients whole,"
        " --allow-split-patients takes the split as it is"
    )
    study = read_folder(root, allow_split_patients=True)
    assert [clip.split for clip in study.clips] == [split_of(i) for i in range(8)]
    assert "2 of 6 patients of the column PatientID stand in several splits" in study.summary()
    assert len({clip.patient for clip in study.clips}) == 6


def test_the_column_can_be_named(tmp_path: Path) -> None:
    root = whose(write_folder(tmp_path), WHO, column="who it was")
    assert read_folder(root).group_column is None
    study = read_folder(root, group_column="who it was")
    assert study.group_column == "who it was" and len({clip.patient for clip in study.clips}) == 4
    with pytest.raises(ConfigError, match="group_column is MRN; expected a column of Meas"):
        read_folder(root, group_column="MRN")


def test_a_study_is_not_a_patient(tmp_path: Path) -> None:
    study = read_folder(whose(write_folder(tmp_path), WHO, column="study"))
    assert "each of 4 studies of the column study stands in one split; the table names no patients" in study.summary()
    divided = ["S1", "S2", "S3", "S4", "S1", "S5", "S6", "S7"]
    with pytest.raises(DataError, match="its split divides 1 of 7 studies"):
        read_folder(whose(tmp_path, divided, column="study"))


def test_a_column_that_says_the_same_of_all_is_not_used(tmp_path: Path) -> None:
    root = whose(write_folder(tmp_path), ["EchoNet"] * 8, column="study")
    study = read_folder(root)
    assert study.group_column is None and {clip.patient for clip in study.clips} == {None}
    assert found(study, "column study") == ["not used, for it says the same of all videos"]
    assert "the table names no patients" in study.summary()
    with pytest.raises(DataError, match="its split divides 1 of 1 studies"):
        read_folder(root, group_column="study")


def test_a_video_of_nobody_counts_by_itself_and_one_of_two_people_is_bad(tmp_path: Path) -> None:
    root = whose(write_folder(tmp_path), ["", "", *WHO[2:]])
    study = read_folder(root)
    assert len({clip.patient for clip in study.clips}) == 5 and None not in {clip.patient for clip in study.clips}
    assert found(study, "column PatientID") == ["2 of 8 videos name no patient; each counts as one of its own"]
    table = root / "MeasurementsList.csv"
    table.write_text(table.read_text() + ",0X0000000000000002,LVIDd,4.5,3,,,,,12,50,64,48,train,DORA\n")
    study = read_folder(root, max_bad_share=0.2)
    assert found(study, "0X0000000000000002") == ["its rows name several patients"] and len(study.clips) == 7


def test_more_in_systole_than_in_diastole_is_reported(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    table = root / "MeasurementsList.csv"
    table.write_text(table.read_text() + ",0X0000000000000002,LVIDs,5.2,7,,,,,12,50,64,48,train\n")
    study = read_folder(root, max_bad_share=0)
    reason = "LVIDs above LVIDd (kept, without ejection fraction): 5.2 cm and 4.6 cm"
    assert found(study, "0X0000000000000002") == [reason]
    assert math.isnan(study.clips[2].targets["ef"]) and len(study.clips) == 8
    assert "1 notes:\n     1 × LVIDs above LVIDd" in study.summary()


def test_the_rule_of_the_labels_is_part_of_the_study(shared_folder: Path) -> None:
    study = read_folder(shared_folder, thresholds={"IVSd": 1.3})
    assert study.label_rule == {**THRESHOLDS, "IVSd": 1.3} and type(study.label_rule) is dict
    assert "smallest abnormal lengths in cm: IVSd 1.3, IVSs 1.1, LVPWd 1.1, " in study.summary()


def test_videos_without_a_used_measurement_are_no_problem(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    encode(root / "Batch1" / "0XE.avi", picture(2))
    table = root / "MeasurementsList.csv"
    table.write_text(table.read_text() + ",0XE,E/A,0.8,3,,,,,12,50,64,48,train\n")
    study = read_folder(root, max_bad_share=0)
    assert len(study.clips) == 8 and study.unlisted == 0
    assert found(study, "0XE") == ["no measurement of a type that is used"]


def annexed(root: Path, away: Path) -> Path:
    """A folder whose table, one whole batch and one video are links to another place, as clusters have them."""
    write_folder(root)
    away.mkdir()
    for name in ("MeasurementsList.csv", "Batch2", f"Batch1/0X{0:016X}.avi"):
        (root / name).rename(away / Path(name).name)
        (root / name).symlink_to(away / Path(name).name)
    return root


def test_links_that_leave_the_folder_are_followed_where_told(tmp_path: Path) -> None:
    root = annexed(tmp_path / "data", tmp_path / "other disk")
    with pytest.raises(DataError, match="a link that leaves the data folder: --follow-links allows it"):
        read_folder(root)
    study = read_folder(root, follow_links=True)
    assert len(study.clips) == 8 and study.problems == ()
    assert study.clips[0].path == (tmp_path / "other disk" / "0X0000000000000000.avi").resolve()
    cached = cache.build(study, size=16, frames_per_clip=2, folder=tmp_path / "cache")
    assert len(cached.frames) == 8


def test_a_run_reads_its_data_as_its_settings_say(tmp_path: Path) -> None:
    root = annexed(tmp_path / "data", tmp_path / "other disk")
    people = ["ANNA", "BERT", "CARL", "DORA", "ANNA", "EMIL", "FRED", "BERT"]
    (root / "MeasurementsList.csv").unlink()
    whose(root, people, column="who")
    settings = TrainConfig(
        data=root, threshold={"IVSd": 1.35}, group_column="who", follow_links=True, allow_split_patients=True
    )
    study = read_study(settings)
    assert study.label_rule == {**THRESHOLDS, "IVSd": 1.35}
    assert study.group_column == "who" and len({clip.patient for clip in study.clips}) == 6
    for less in ({"follow_links": False}, {"allow_split_patients": False}):
        with pytest.raises(DataError, match=r"--follow-links|--allow-split-patients"):
            read_study(replace(settings, **less))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="train: 4 normal, 0 abnormal"):
        read_study(replace(settings, threshold={"IVSd": 1.5}))


def test_a_link_to_nothing_is_called_so(tmp_path: Path) -> None:
    """As git-annex leaves a file that was not fetched."""
    root = write_folder(tmp_path, 16)
    path = root / "Batch1" / "0X0000000000000000.avi"
    path.unlink()
    path.symlink_to(Path("..", ".git", "annex", "objects", "SHA256E-s1--0.avi"))
    study = read_folder(root, max_bad_share=0.1, follow_links=True)
    assert found(study, path.stem) == ["a link to nothing"]


def test_two_names_of_one_file_are_one_video(tmp_path: Path) -> None:
    root = write_folder(tmp_path, 16)
    second = root / "Batch2" / "0X0000000000000001.avi"
    second.unlink()
    second.symlink_to(Path("..", "Batch1", "0X0000000000000000.avi"))
    study = read_folder(root, max_bad_share=0.1)
    assert len(study.clips) == 15
    assert found(study, second.stem) == ["a link to the file of another video: 0X0000000000000000"]


@pytest.mark.parametrize("in_table, on_disk", [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_letters_with_marks_meet_in_whatever_form(tmp_path: Path, in_table: Any, on_disk: Any) -> None:
    root = write_folder(tmp_path)
    old, name = "0X0000000000000003", "Müller-é"
    (root / "Batch4" / f"{old}.avi").rename(root / "Batch4" / f"{unicodedata.normalize(on_disk, name)}.avi")
    table = root / "MeasurementsList.csv"
    table.write_text(table.read_text().replace(old, unicodedata.normalize(in_table, name)), encoding="utf-8")
    study = read_folder(root, max_bad_share=0)
    assert study.clips[3].name == unicodedata.normalize("NFC", name) and study.unlisted == 0


def test_a_folder_of_any_name_is_named_without_its_codes(tmp_path: Path) -> None:
    for kind in ("none", "file", "empty", "table"):
        root = tmp_path / f"{kind}\x1b[31m\n\u202e"
        if kind == "file":
            root.touch()
        elif kind != "none":
            root.mkdir()
        if kind == "table":
            write_table(root, [measurement("0XA")])
        with pytest.raises(DataError) as caught:
            read_folder(root)
        assert str(caught.value).isprintable() and rf"{kind}\x1b[31m\n\u202e" in str(caught.value)


def test_conflicting_splits_and_single_classes_stop_the_run(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    rows = [measurement(f"0X{i:016X}", "IVSd", 1.4, split=split_of(i)) for i in range(8)]
    write_table(root, rows)
    with pytest.raises(DataError, match="val: 0 normal, 2 abnormal; test: 0 normal, 2 abnormal"):
        read_folder(root)
    write_table(root, [*rows, measurement("0X0000000000000000", split="test")])
    with pytest.raises(DataError, match="video 0X0000000000000000 stands in the splits test and train at once"):
        read_folder(root)


def test_a_table_with_a_test_split_alone_can_be_evaluated(tmp_path: Path) -> None:
    root = write_folder(tmp_path)
    write_table(root, [measurement(f"0X{i:016X}", "IVSd", 1.4 if i % 2 else 0.8, split="test") for i in range(8)])
    with pytest.raises(DataError, match="train: 0 normal, 0 abnormal; val: 0 normal, 0 abnormal; test: 4 normal"):
        read_folder(root)
    study = read_folder(root, needed_splits=("test",))
    assert [len(study.clips_in(split)) for split in ("train", "val", "test")] == [0, 0, 8]
    write_table(root, [measurement(f"0X{i:016X}", "IVSd", 0.8, split="test") for i in range(8)])
    with pytest.raises(DataError, match="this data has test: 8 normal, 0 abnormal"):
        read_folder(root, needed_splits=["test"])


def test_a_limit_keeps_splits_and_classes(tmp_path: Path, shared_folder: Path) -> None:
    study = read_folder(shared_folder, limit=6)
    assert len(study.clips) == 6
    assert [len(study.clips_in(split)) for split in ("train", "val", "test")] == [2, 2, 2]
    assert read_folder(shared_folder, limit=100).clips == read_folder(shared_folder).clips


def test_the_paper_protocol_has_a_clip_per_row(shared_folder: Path) -> None:
    with pytest.warns(UserWarning) as caught:
        study = read_folder(shared_folder, protocol="paper")
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2 and "leaks" in messages[0] and "this one has 16 rows" in messages[1]
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}
    assert len(study.clips) == 16 and {clip.split for clip in study.clips} == {"mixed"}
    septum, ventricle = study.clips[2:4]
    assert septum.path == ventricle.path
    assert (septum.label, ventricle.label) == (1, 0)  # contradictory labels of one video, as published
    assert (septum.targets["width"], ventricle.targets["width"]) == (1.4, 4.55)
    assert study.clips_in("train") == study.clips_in("test") == study.clips
    assert "it leaks" in study.summary()


def test_a_split_by_frame_leaks_with_the_labels_of_videos(shared_folder: Path) -> None:
    with pytest.warns(UserWarning, match="a split by frame leaks") as caught:
        study = read_folder(shared_folder, split="frames")
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}
    assert {clip.split for clip in study.clips} == {"mixed"}
    by_video = {clip.name: clip.label for clip in read_folder(shared_folder).clips}
    assert {clip.name: clip.label for clip in study.clips} == by_video
