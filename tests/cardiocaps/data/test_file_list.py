"""EchoNet-Dynamic and -Pediatric: what a table says becomes labels, targets, splits; each mistake in it is counted."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cardiocaps.data import cache
from cardiocaps.data.file_list import read_dynamic, read_pediatric
from cardiocaps.data.fingerprint import Fingerprint
from cardiocaps.data.header import Header
from cardiocaps.data.study import Study
from cardiocaps.errors import ConfigError, DataError

from .sample_videos import encode, picture, write_dynamic, write_pediatric, write_rows

Rows = list[dict[str, Any]]


def _reasons(root: Path, rows: Rows, **how: Any) -> list[str]:
    """What is said about the rows of a table."""
    write_rows(root / "FileList.csv", rows)
    study = read_dynamic(root, max_bad_share=0.5, needed_splits=(), **how)
    return [f"{problem.where}: {problem.reason}" for problem in study.problems]


def test_what_the_table_says(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path)
    study = read_dynamic(tmp_path)
    assert study.problems == () and study.unlisted == 0 and study.split_rule == "column"
    assert dict(study.units) == {"ef": "percentage points", "esv": "mL", "edv": "mL"}
    assert [clip.label for clip in study.clips] == [0, 1] * 4
    assert [len(study.clips_in(split)) for split in ("train", "val", "test")] == [4, 2, 2]
    for clip, row in zip(study.clips, rows, strict=True):
        assert clip.name == row["FileName"] and clip.path == (tmp_path / "Videos" / f"{clip.name}.avi").resolve()
        assert dict(clip.targets) == {"ef": row["EF"], "esv": row["ESV"], "edv": row["EDV"]}
        assert study.claims[clip.name] == Header(12, 64, 48, 50.0)
    text = study.summary()
    assert "abnormal: an ejection fraction below 50 %" in text and " cm" not in text
    assert "train      4 clips, 2 abnormal" in text and "names no patients" in text


def test_the_threshold_is_the_smallest_normal_value(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path)
    for row, ef in zip(rows, (50, 49.999, 50, 49, 51, 20, 90, 10), strict=True):
        row["EF"] = ef
    write_rows(tmp_path / "FileList.csv", rows)
    study = read_dynamic(tmp_path)
    assert [clip.label for clip in study.clips] == [0, 1] * 4
    low = read_dynamic(tmp_path, thresholds={"ef": 20.5}, needed_splits=())
    assert [clip.label for clip in low.clips] == [0, 0, 0, 0, 0, 1, 0, 1]
    assert low.label_rule == {"ef": 20.5} and "below 20.5 %" in low.summary()
    changes = Fingerprint.of(study).differences(Fingerprint.of(low))
    assert changes == ["2 videos changed their label", "the thresholds of the labels changed (ef is 20.5, was 50.0)"]


def test_names_with_suffix_and_videos_that_the_table_does_not_name(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path)
    for row in rows[::2]:
        row["FileName"] += ".avi"
    write_rows(tmp_path / "FileList.csv", rows)
    encode(tmp_path / "Videos" / "another.avi", picture(2))
    (tmp_path / "Videos" / "notes.txt").write_text("no video")
    study = read_dynamic(tmp_path)
    assert [clip.name for clip in study.clips] == [row["FileName"].removesuffix(".avi") for row in rows]
    assert study.unlisted == 1 and study.problems == ()


def test_volumes_may_be_blank_and_the_ejection_fraction_not(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path)
    rows[2]["ESV"], rows[3]["EF"] = "", " "
    assert _reasons(tmp_path, rows) == ["line 5: EF is blank"]
    study = read_dynamic(tmp_path, max_bad_share=0.5)
    assert math.isnan(study.clips[2].targets["esv"]) and study.clips[2].targets["edv"] == 92.0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"EF": "high"}, "EF is not a number"),
        ({"EF": "0.55 "}, None),  # strange, but possible
        ({"EF": 0}, "EF out of range: 0 % (allowed: above 0, at most 100)"),
        ({"EF": "1e999"}, "EF out of range: inf % (allowed: above 0, at most 100)"),
        ({"EDV": -3}, "EDV out of range: -3 mL (allowed: above 0, at most 2000)"),
        ({"ESV": "?"}, "ESV is not a number"),
        ({"ESV": 120}, "ESV above EDV (kept)"),
        ({"NumberOfFrames": 1.5}, "NumberOfFrames is not a whole number"),
        ({"FrameWidth": 0}, "FrameWidth out of range: 0 (allowed: above 0, at most 4096)"),
        ({"FPS": "fast"}, "FPS is not a number"),
        ({"FileName": "../secret"}, "FileName not allowed (letters, digits, _ . - only)"),
        ({"FileName": "Doe^Jane"}, "FileName not allowed (letters, digits, _ . - only)"),
        ({"FileName": ""}, "FileName not allowed (letters, digits, _ . - only)"),
        ({"FileName": "0XABC"}, "no video file"),
        ({"Split": "HOLDOUT"}, "split unknown: allowed are train, val, test"),
        ({"Split": ""}, "split blank: allowed are train, val, test"),
    ],
)
def test_a_wrong_cell_is_counted(tmp_path: Path, changes: dict[str, Any], reason: str | None) -> None:
    rows = write_dynamic(tmp_path)
    rows[3] |= changes
    assert _reasons(tmp_path, rows) == ([f"line 5: {reason}"] if reason else [])


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path)
    rows[1]["EF"] = rows[2]["EF"] = ""
    write_rows(tmp_path / "FileList.csv", rows)
    with pytest.raises(DataError, match=r"2 of 8 rows of FileList.csv cannot be used, .*first: line 3: EF is blank; l"):
        read_dynamic(tmp_path)


def test_repeated_rows(tmp_path: Path) -> None:
    """The same row twice does no harm; of rows that contradict each other none is used."""
    rows = write_dynamic(tmp_path)
    same, other = dict(rows[0]), {**rows[1], "EF": 61}
    assert _reasons(tmp_path, [*rows, same, other]) == [
        "line 10: duplicate row: as line 2",
        "line 3: rows of one video contradict each other: line 3, line 11",
        "line 11: rows of one video contradict each other: line 3, line 11",
    ]
    names = [clip.name for clip in read_dynamic(tmp_path, max_bad_share=0.5).clips]
    assert names == [row["FileName"] for row in rows if row is not rows[1]]
    leak = {**rows[0], "Split": "TEST"}
    assert _reasons(tmp_path, [*rows, leak])[0].endswith("contradict each other: line 2, line 10")


def test_links_and_other_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    rows = write_dynamic(root)
    paths = [root / "Videos" / f"{row['FileName']}.avi" for row in rows]
    paths[0].rename(tmp_path / "outside.avi")
    paths[0].symlink_to(tmp_path / "outside.avi")
    paths[1].unlink()
    os.mkfifo(paths[1])
    shutil.copy(paths[2], paths[2].with_suffix(".MP4"))
    assert _reasons(root, rows) == [
        "line 2: a link that leaves the data folder: --follow-links allows it",
        "line 3: not a regular file",
        "line 4: several files: 2 of this name",
    ]
    assert len(_reasons(root, rows, follow_links=True)) == 2


@pytest.mark.parametrize("column", ["FileName", "EF", "ESV", "EDV"])
def test_a_column_is_missing_or_there_twice(tmp_path: Path, column: str) -> None:
    rows = write_dynamic(tmp_path)
    table = tmp_path / "FileList.csv"
    header, *lines = table.read_text().splitlines()
    table.write_text("\n".join([header.replace(column, "Doe", 1), *lines]))
    with pytest.raises(DataError, match=rf"FileList.csv: no column {column} in its first line; .*1 of other") as error:
        read_dynamic(tmp_path)
    assert "Doe" not in str(error.value)
    table.write_text("\n".join([header.replace("FPS", column), *lines]))
    with pytest.raises(DataError, match=f"FileList.csv: column {column} stands there 2 times"):
        read_dynamic(tmp_path)
    assert rows


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    write_dynamic(tmp_path)
    table = tmp_path / "FileList.csv"
    header = table.read_text().splitlines()[0]
    for content, message in (
        (b"", "FileList.csv: empty file"),
        (b"\n", "FileList.csv: empty, expected the columns FileName, EF, ESV, EDV"),
        (header.encode(), "FileList.csv: a header and no rows"),
        (header.encode() + b"\n\xff", r"FileList.csv: not UTF-8 text"),
        (header.encode() + b'\n"a', "FileList.csv, line 2: not a CSV table"),
        (header.encode() + b"\na,b", r"1 of 1 rows .*: line 2: wrong number of fields: 2 \(the header has 9\)"),
    ):
        table.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_dynamic(tmp_path)
    table.unlink()
    with pytest.raises(DataError, match=r"FileList.csv: no such file"):
        read_dynamic(tmp_path)
    write_dynamic(tmp_path)
    shutil.rmtree(tmp_path / "Videos")
    with pytest.raises(DataError, match="Videos: No such file"):
        read_dynamic(tmp_path)


def test_no_usable_row_at_all(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path, EF="")
    assert rows
    with pytest.raises(
        DataError, match=r"FileList.csv: none of its 8 rows can be used; the first: line 2: EF is blank"
    ):
        read_dynamic(tmp_path, max_bad_share=1)


def test_other_splits(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path, 20)
    drawn = read_dynamic(tmp_path, split="stratified", seed=3)
    assert drawn.split_rule == "stratified" and [len(drawn.clips_in(s)) for s in ("train", "val", "test")] == [12, 4, 4]
    assert drawn.clips == read_dynamic(tmp_path, split="stratified", seed=3).clips
    with pytest.warns(UserWarning, match="a split by frame leaks"):
        assert {clip.split for clip in read_dynamic(tmp_path, split="frames").clips} == {"mixed"}
    write_rows(tmp_path / "FileList.csv", [{k: v for k, v in row.items() if k != "Split"} for row in rows])
    assert read_dynamic(tmp_path, seed=3).clips == drawn.clips
    with pytest.raises(
        ConfigError, match=r"split is 'column'; expected auto or stratified, because FileList.csv has no"
    ):
        read_dynamic(tmp_path, split="column")


def test_a_limit_keeps_splits_and_classes(tmp_path: Path) -> None:
    write_dynamic(tmp_path, 16)
    study = read_dynamic(tmp_path, limit=8)
    assert [len(study.clips_in(split)) for split in ("train", "val", "test")] == [4, 2, 2]
    assert sum(clip.label for clip in study.clips) == 4


def test_a_column_of_patients(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path, 16)
    for i, row in enumerate(rows):
        row["Patient"] = f"Doe{i // 8}{row['Split']}"
    write_rows(tmp_path / "FileList.csv", rows)
    study = read_dynamic(tmp_path)
    assert study.group_kind == "patient" and len({clip.patient for clip in study.clips}) == 6
    assert "each of 6 patients of the column Patient stands in one split" in study.summary()
    rows[0]["Patient"] = rows[4]["Patient"]
    write_rows(tmp_path / "FileList.csv", rows)
    with pytest.raises(
        DataError, match=r"its split divides 1 of 6 patients .* line 2 in train and line 6 in val; "
    ) as e:
        read_dynamic(tmp_path)
    assert "Doe" not in str(e.value)
    assert len(read_dynamic(tmp_path, allow_split_patients=True).clips) == 16
    with pytest.raises(ConfigError, match=r"group_column is Patinet; expected a column .*; did you mean Patient\?"):
        read_dynamic(tmp_path, group_column="Patinet")


def test_a_damaged_video_is_named_by_its_line(tmp_path: Path) -> None:
    rows = write_dynamic(tmp_path, 16)
    damaged = tmp_path / "Videos" / f"{rows[0]['FileName']}.avi"
    damaged.write_bytes(damaged.read_bytes()[:3000])
    rows[1]["NumberOfFrames"] = 13
    write_rows(tmp_path / "FileList.csv", rows)
    cached = cache.build(
        read_dynamic(tmp_path), size=16, frames_per_clip=2, folder=tmp_path / "cache", max_bad_share=0.2
    )
    found = {problem.where: problem.reason for problem in cached.study.problems}
    assert found.keys() == {"line 2", "line 3"}
    assert found["line 3"] == "table and file disagree: table says 13 frames, file has 12"
    assert len(cached.study.clips) == 14


def _splits(study: Study) -> list[str]:
    return [clip.split for clip in study.clips]


def test_what_a_table_of_a_view_says(tmp_path: Path) -> None:
    rows = write_pediatric(tmp_path)["A4C"]
    study = read_pediatric(tmp_path)
    assert study.problems == () and study.unlisted == 0 and study.split_rule == "column"
    assert [clip.name for clip in study.clips] == [f"A4C/CR{i:04}" for i in range(20)]
    assert [clip.path for clip in study.clips] == [(tmp_path / "A4C/Videos" / r["FileName"]).resolve() for r in rows]
    assert _splits(study) == ["train"] * 16 + ["val"] * 2 + ["test"] * 2
    assert [clip.label for clip in study.clips] == [0, 1] * 10
    assert [dict(clip.targets) for clip in study.clips] == [{"ef": row["EF"]} for row in rows]
    assert dict(study.units) == {"ef": "percentage points"} and study.claims["A4C/CR0003"] == Header(6, 64, 48, 50.0)
    assert "abnormal: an ejection fraction below 55 %" in study.summary()
    assert study.table == tmp_path / "A4C" / "FileList.csv" and study.further_tables == ()


def test_both_views(tmp_path: Path) -> None:
    tables = write_pediatric(tmp_path)
    study = read_pediatric(tmp_path, view="both")
    assert len(study.clips) == 40 and len({clip.name for clip in study.clips}) == 40
    assert [clip.targets["ef"] for clip in study.clips] == [row["EF"] for rows in tables.values() for row in rows]
    alone = [read_pediatric(tmp_path, view=view) for view in ("A4C", "PSAX")]
    assert study.clips == (*alone[0].clips, *alone[1].clips)
    assert (study.table, *study.further_tables) == tuple(one.table for one in alone)
    before = Fingerprint.of(study)
    table = tmp_path / "PSAX" / "FileList.csv"
    table.write_text(table.read_text() + "\n")
    now = Fingerprint.of(study)
    assert len(before.table) == 64 and now.table != before.table and now.differences(before) == []
    tables["PSAX"][2]["EF"] = ""
    write_rows(table, tables["PSAX"])
    (problem,) = read_pediatric(tmp_path, view="both").problems
    assert (problem.where, problem.reason) == ("PSAX line 4", "EF is blank")


def test_the_folds_and_the_threshold_can_be_set(tmp_path: Path) -> None:
    write_pediatric(tmp_path)
    study = read_pediatric(tmp_path, val_fold=0, test_fold=4, thresholds={"ef": 48.5}, needed_splits=())
    assert _splits(study) == ["val"] * 2 + ["train"] * 6 + ["test"] * 2 + ["train"] * 10
    assert sum(clip.label for clip in study.clips) == 0 and study.label_rule == {"ef": 48.5}
    with pytest.raises(ConfigError, match="val_fold is 3; expected another one than test_fold, which is the same"):
        read_pediatric(tmp_path, val_fold=3, test_fold=3)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("8.0", None),
        ("10", "Split out of range: allowed are the folds 0 to 9"),
        ("-1", "Split out of range: allowed are the folds 0 to 9"),
        ("1.5", "Split is not a whole number"),
        ("TRAIN", "Split is not a number"),
        ("", "split blank: allowed are train, val, test"),
    ],
)
def test_a_fold_that_is_none(tmp_path: Path, cell: str, reason: str | None) -> None:
    rows = write_pediatric(tmp_path)["A4C"]
    rows[0]["Split"] = cell
    write_rows(tmp_path / "A4C" / "FileList.csv", rows)
    study = read_pediatric(tmp_path)
    assert [(p.where, p.reason) for p in study.problems] == ([("A4C line 2", reason)] if reason else [])
    assert reason or study.clips[0].split == "val"


def test_a_view_that_is_missing_or_has_other_columns(tmp_path: Path) -> None:
    rows = write_pediatric(tmp_path)["PSAX"]
    write_rows(tmp_path / "PSAX" / "FileList.csv", [{**row, "Patient": i} for i, row in enumerate(rows)])
    with pytest.raises(
        DataError, match=r"FileList.csv: the tables of A4C and PSAX differ in their columns of splits or"
    ):
        read_pediatric(tmp_path, view="both")
    shutil.rmtree(tmp_path / "A4C")
    with pytest.raises(DataError, match=r"A4C/FileList.csv: no such file"):
        read_pediatric(tmp_path)
    assert len(read_pediatric(tmp_path, view="PSAX").clips) == 20
    write_rows(tmp_path / "PSAX" / "FileList.csv", [{"FileName": row["FileName"]} for row in rows])
    with pytest.raises(DataError, match=r"PSAX/FileList.csv: no column EF in its first line"):
        read_pediatric(tmp_path, view="PSAX")


def test_a_patient_with_videos_of_both_views(tmp_path: Path) -> None:
    tables = write_pediatric(tmp_path)
    for view, rows in tables.items():
        write_rows(tmp_path / view / "FileList.csv", [{**row, "Patient": f"Doe{i // 2}"} for i, row in enumerate(rows)])
    study = read_pediatric(tmp_path, view="both")
    assert study.group_kind == "patient" and len({clip.patient for clip in study.clips}) == 10
    tables["PSAX"][0]["Split"] = 9
    rows = [{**row, "Patient": f"Doe{i // 2}"} for i, row in enumerate(tables["PSAX"])]
    write_rows(tmp_path / "PSAX" / "FileList.csv", rows)
    with pytest.raises(DataError, match=r"divides 1 of 10 patients .* A4C line 2 in train and PSAX line 2 in test"):
        read_pediatric(tmp_path, view="both")
