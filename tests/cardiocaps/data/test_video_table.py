"""Any table of videos: columns by name, labels of every kind, and each mistake in the table or about it."""

from __future__ import annotations

import math
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cardiocaps.data import cache
from cardiocaps.data.fingerprint import Fingerprint
from cardiocaps.data.study import Study
from cardiocaps.data.video import Header
from cardiocaps.data.video_table import read_folder
from cardiocaps.errors import ConfigError, DataError
from cardiocaps.runtime import packages

from .sample_videos import encode, picture, write_rows, write_videos

Rows = list[dict[str, Any]]
LENIENT: dict[str, Any] = {"max_bad_share": 0.5, "needed_splits": ()}


def _study(root: Path, rows: Rows, **how: Any) -> Study:
    return read_folder(write_rows(root / "study.csv", rows), **{**LENIENT, **how})


def _reasons(root: Path, rows: Rows, **how: Any) -> list[str]:
    """What is said about the rows of a table."""
    return [f"{problem.where}: {problem.reason}" for problem in _study(root, rows, **how).problems]


def test_the_usual_columns(tmp_path: Path) -> None:
    rows = write_videos(tmp_path)
    study = read_folder(tmp_path / "study.csv")
    assert study == read_folder(tmp_path, table="study.csv")
    assert (study.root, study.table, study.split_rule) == (tmp_path, tmp_path / "study.csv", "column")
    assert [clip.label for clip in study.clips] == [0, 1] * 4 and study.problems == ()
    assert [clip.name for clip in study.clips] == [row["path"] for row in rows]
    assert [clip.path for clip in study.clips] == [(tmp_path / row["path"]).resolve() for row in rows]
    assert [len(study.clips_in(split)) for split in ("train", "val", "test")] == [4, 2, 2]
    assert study.units == {} and study.label_rule == {} and study.target(None) is None
    assert set(study.claims.values()) == {Header(0, 0, 0, 0)}
    assert "abnormal: column label is 1" in study.summary()


def test_columns_by_name(tmp_path: Path) -> None:
    rows = write_videos(tmp_path)
    spelled = {"path": "File name", "label": "y", "split": "fold", "dx": "dx", "mass": "LV mass: g"}
    renamed = [{spelled.get(name, name): value for name, value in row.items()} for row in rows]
    study = _study(
        tmp_path,
        renamed,
        path_column="File name",
        label_column="y",
        split_column="fold",
        target_column="LV mass: g:g",
        needed_splits=("train", "val", "test"),
    )
    assert [clip.label for clip in study.clips] == [0, 1] * 4 and study.split_rule == "column"
    assert dict(study.units) == {"LV mass: g": "g"}
    assert [clip.targets["LV mass: g"] for clip in study.clips] == [row["mass"] for row in rows]
    whole = _study(tmp_path, renamed, path_column="File name", label_column="y", target_column="LV mass: g")
    assert dict(whole.units) == {"LV mass: g": ""}  # a column's name may have a colon


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"path_column": "Path"}, r"path_column is 'Path'; expected one of study.csv's columns; did you mean path\?"),
        ({"path_column": "xyz"}, r"path_column is 'xyz'; expected one of study.csv's columns$"),
        ({"label_column": "lable"}, r"label_column is 'lable'; .*; did you mean label\?"),
        ({"split_column": "splits"}, r"split_column is 'splits'; .*; did you mean split\?"),
        ({"target_column": "masss:g"}, r"target_column is 'masss'; .*; did you mean mass\?"),
        ({"target_column": "masss"}, r"target_column is 'masss'; .*; did you mean mass\?"),
        ({"group_column": "agey"}, r"group_column is agey; expected a column of study.csv, which has none of it"),
        ({"positive": "stenosis"}, r"positive is 'stenosis'; expected a word of the column label of study.csv, none"),
        ({"abnormal": "below"}, r"abnormal is 'below'; expected none without a threshold"),
        ({"thresholds": {"mass": 120}}, r"threshold is mass=120; .* \(target_column is None\)"),
        ({"thresholds": {"mas": 120}, "target_column": "mass"}, r"is mas=120; .* \(it is for mass, the target_column"),
        ({"thresholds": {"mass": 120}, "target_column": "mass"}, r"abnormal is None; expected below or above, because"),
        (
            {"thresholds": {"mass": 120}, "target_column": "mass", "abnormal": "above", "label_column": "label"},
            r"label_column is 'label'; expected none, because threshold makes the labels",
        ),
        (
            {"thresholds": {"mass": 120}, "target_column": "mass", "abnormal": "above", "positive": "1"},
            r"positive is '1'; expected none, because threshold makes the labels",
        ),
        ({"table": "study.csv"}, r"table is 'study.csv'; expected none, because data is a table itself"),
    ],
)
def test_settings_that_do_not_fit_the_table(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    write_videos(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_folder(tmp_path / "study.csv", **how)


def test_a_table_without_labels_says_what_to_give(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "label"} for row in write_videos(tmp_path)]
    with pytest.raises(
        ConfigError, match=r"label_column is None; expected a column of study.csv, .* or a threshold of t"
    ):
        _study(tmp_path, rows)


@pytest.mark.parametrize("table", ["other.csv", "../study.csv", "notes.txt", "site 0", "/study.csv"])
def test_the_name_of_a_table_in_a_folder(tmp_path: Path, table: str) -> None:
    root = tmp_path / "root"
    write_videos(root)
    shutil.copy(root / "study.csv", tmp_path)
    (root / "notes.txt").touch()
    with pytest.raises(
        (ConfigError, DataError), match=r"table is .* expected the name of a file|other.csv: no such file"
    ):
        read_folder(root, table=table)
    with pytest.raises(DataError, match="none: no such folder"):
        read_folder(tmp_path / "none", table="study.csv")


@pytest.mark.parametrize("words", [("0", "1"), ("0.0", "1.0"), (" 0 ", "1"), ("0e0", "1")])
def test_labels_that_are_numbers(tmp_path: Path, words: tuple[str, str]) -> None:
    rows = write_videos(tmp_path)
    for row in rows:
        row["label"] = words[row["label"]]
    assert [clip.label for clip in _study(tmp_path, rows, max_bad_share=0).clips] == [0, 1] * 4


def test_labels_that_are_words(tmp_path: Path) -> None:
    rows = write_videos(tmp_path)
    study = _study(tmp_path, rows, label_column="dx", positive="stenosis")
    assert [clip.label for clip in study.clips] == [0, 1] * 4
    assert "abnormal: column dx is stenosis" in study.summary()
    turned = _study(tmp_path, rows, label_column="dx", positive="none")
    assert [clip.label for clip in turned.clips] == [1, 0] * 4
    assert Fingerprint.of(study).differences(Fingerprint.of(turned)) == ["8 videos changed their label"]
    rows[5]["dx"] = "Doe, Jane"
    with pytest.raises(
        DataError, match=r"study.csv: column dx has more than two words; expected two, of which"
    ) as error:
        _study(tmp_path, rows, label_column="dx", positive="stenosis")
    assert "Doe" not in str(error.value)
    with pytest.raises(
        DataError, match=r"8 of 8 rows .* label is not 0 or 1; .* Note: positive names the abnormal one"
    ):
        _study(tmp_path, rows, label_column="dx")


@pytest.mark.parametrize(
    ("abnormal", "labels", "text"),
    [("above", [0, 1, 1, 1], "mass at least 120"), ("below", [1, 0, 0, 0], "mass below 120")],
)
def test_a_threshold_makes_the_labels(tmp_path: Path, abnormal: str, labels: list[int], text: str) -> None:
    rows = write_videos(tmp_path, 5)
    for row, mass in zip(rows, (119.999, 120, 121, 1e3, " "), strict=True):
        row["mass"] = mass
    how: dict[str, Any] = {"target_column": "mass:g", "thresholds": {"mass": 120.0}, "abnormal": abnormal}
    study = _study(tmp_path, rows, **how)
    assert [clip.label for clip in study.clips] == labels and study.label_rule == {"mass": 120.0}
    assert f"abnormal: {text}" in study.summary()
    assert [(problem.where, problem.reason) for problem in study.problems] == [("line 6", "mass is blank")]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"path": ""}, "path is blank"),
        ({"path": "../outside.avi"}, "path leaves the folder: expected one relative to the table"),
        ({"path": "site 0/../../outside.avi"}, "path leaves the folder: expected one relative to the table"),
        ({"path": "/etc/passwd"}, "path leaves the folder: expected one relative to the table"),
        ({"path": "a\nb.avi"}, "path not allowed: expected at most 1000 printable characters"),
        ({"path": "x" * 1001}, "path not allowed: expected at most 1000 printable characters"),
        ({"path": "https://a.b/c.avi"}, "no such file"),
        ({"path": "Doe.avi"}, "no such file"),
        ({"path": "site 0"}, "not a regular file"),
        ({"path": "link.avi"}, "a link that leaves the data folder: --follow-links allows it"),
        ({"label": ""}, "label is blank"),
        ({"label": "yes"}, "label is not 0 or 1"),
        ({"label": 2}, "label is not 0 or 1"),
        ({"label": "nan"}, "label is not 0 or 1"),
        ({"mass": "heavy"}, "mass is not a number"),
        ({"mass": "1e999"}, "mass out of range"),
        ({"mass": ""}, None),  # not measured
        ({"split": "holdout"}, "split unknown: allowed are train, val, test"),
        ({"split": ""}, "split blank: allowed are train, val, test"),
        ({"split": "Validation"}, None),
    ],
)
def test_a_wrong_cell_is_counted(tmp_path: Path, changes: dict[str, Any], reason: str | None) -> None:
    root = tmp_path / "root"
    rows = write_videos(root)
    (root / "link.avi").symlink_to(encode(tmp_path / "outside.avi", picture(2)))
    rows[-1] |= changes
    line = 10 if "\n" in str(changes.get("path")) else 9
    assert _reasons(root, rows, target_column="mass") == ([f"line {line}: {reason}"] if reason else [])
    clips = _study(root, rows, target_column="mass").clips
    assert len(clips) == (7 if reason else 8)
    if changes == {"mass": ""}:
        assert math.isnan(clips[-1].targets["mass"])
    if changes == {"path": "link.avi"}:
        assert _reasons(root, rows, follow_links=True) == []


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    rows = write_videos(tmp_path)
    rows[2]["path"] = "Doe.avi"
    write_rows(tmp_path / "study.csv", rows)
    with pytest.raises(DataError, match=r"1 of 8 rows of study.csv .*first: line 4: no such file") as error:
        read_folder(tmp_path / "study.csv")
    assert "Doe" not in str(error.value)


def test_two_rows_with_the_same_video(tmp_path: Path) -> None:
    rows = write_videos(tmp_path)
    again = {**rows[0], "path": f"./{rows[0]['path']}"}
    (tmp_path / "link.avi").symlink_to(tmp_path / rows[1]["path"])
    other = {**rows[1], "path": "link.avi", "label": 0}
    assert _reasons(tmp_path, [*rows, again, other]) == [
        "line 10: duplicate row: as line 2",
        "line 3: rows of one video contradict each other: line 3, line 11",
        "line 11: rows of one video contradict each other: line 3, line 11",
    ]
    assert [clip.name for clip in _study(tmp_path, [*rows, again, other]).clips] == [
        row["path"] for row in rows if row is not rows[1]
    ]


def test_patients_stay_together(tmp_path: Path) -> None:
    rows = write_videos(tmp_path, 40)
    for i, row in enumerate(rows):
        row["Patient ID"] = f"Doe{i // 4}"
        del row["split"]
    study = _study(tmp_path, rows)
    assert study.split_rule == "stratified" and study.group_kind == "patient"
    of = {clip.patient: {c.split for c in study.clips if c.patient == clip.patient} for clip in study.clips}
    assert len(of) == 10 and all(len(splits) == 1 for splits in of.values())
    assert {clip.split for clip in study.clips} == {"train", "val", "test"}
    assert "Doe" not in study.summary() + repr(study.clips)
    with pytest.raises(ConfigError, match=r"group_column is Patient; .* did you mean Patient ID\?"):
        _study(tmp_path, rows, group_column="Patient")


def test_a_patient_in_two_splits(tmp_path: Path) -> None:
    rows = write_videos(tmp_path)
    for i, row in enumerate(rows):
        row["who"] = f"Doe{i % 6}"
    how: dict[str, Any] = {"group_column": "who", "needed_splits": ("train", "val", "test")}
    with pytest.raises(
        DataError, match=r"study.csv: its split divides 2 of 6 patients \(column who\).*line 2 in"
    ) as error:
        _study(tmp_path, rows, **how)
    assert "Doe" not in str(error.value)
    assert len(_study(tmp_path, rows, allow_split_patients=True, **how).clips) == 8
    assert _study(tmp_path, rows, split="stratified", **{**how, "needed_splits": ()}).split_rule == "stratified"


def test_paths_may_have_any_suffix_and_letters(tmp_path: Path) -> None:
    """What is a video, decoding decides: a file of DICOM often has no suffix."""
    rows = write_videos(tmp_path)
    for row, name in zip(
        rows, ("a.dcm", "IM00001", "b.mov", unicodedata.normalize("NFD", "Jürgen 1.avi")), strict=False
    ):
        (tmp_path / row["path"]).rename(tmp_path / name)
        row["path"] = name
    assert [clip.name for clip in _study(tmp_path, rows).clips] == [row["path"] for row in rows]
    assert _reasons(tmp_path, rows) == []


def test_a_damaged_video_is_named_by_its_line(tmp_path: Path) -> None:
    rows = write_videos(tmp_path, 16)
    (tmp_path / rows[0]["path"]).write_bytes(b"no video")
    study = _study(tmp_path, rows)
    cached = cache.build(study, size=16, frames_per_clip=2, folder=tmp_path / "cache", max_bad_share=0.2)
    assert [problem.where for problem in cached.study.problems] == ["line 2"]
    assert rows[0]["path"] not in cached.study.summary()
    before = Fingerprint.of(study).with_contents({c.name: "f" * 64 for c in cached.study.clips})
    assert [problem.where for problem in before.as_used(study).problems] == ["line 2"]


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    table = tmp_path / "study.csv"
    for content, message in (
        (b"", "study.csv: empty file"),
        (b"\n\n", "study.csv: empty, expected a line with the names of its columns"),
        (b"path,label", "study.csv: a header and no rows"),
        (b"path,label\n\xff", "study.csv: not UTF-8 text"),
        (b'path,label\n"a', "study.csv, line 2: not a CSV table"),
        (b"path,label,label\na,0,1", "study.csv: column label stands there 2 times"),
        (b"path,label\na,0,1", r"1 of 1 rows .* line 2: wrong number of fields: 3 \(the header has 2\)"),
    ):
        table.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_folder(table)
    table.unlink()
    with pytest.raises(DataError, match=r"study.csv: no such file"):
        read_folder(table)
    # The names of columns are shown only where they are similar: without a header they are data of a patient.
    table.write_text("Doe,1\n")
    with pytest.raises(ConfigError, match=r"label_column is None; expected a column of study.csv") as error:
        read_folder(table)
    assert "Doe" not in str(error.value)


_CELLS = st.sampled_from(
    ["path", "label", "split", "ef", "0", "1", "a.avi", "../a.avi", "train", "nan", "1e9", "é", ""]
)


@given(
    rows=st.lists(st.lists(_CELLS | st.text(max_size=6), min_size=1, max_size=4), max_size=6),
    end=st.binary(max_size=3),
    how=st.sampled_from(
        [{}, {"positive": "1"}, {"target_column": "ef", "thresholds": {"ef": 0.5}, "abnormal": "below"}]
    ),
)
@settings(max_examples=300, deadline=None)
def test_any_file_is_read_or_refused(rows: list[list[str]], end: bytes, how: dict[str, Any], tmp_path_factory) -> None:  # type: ignore[no-untyped-def]
    table = tmp_path_factory.getbasetemp() / "any" / "any.csv"
    if not table.parent.exists():
        encode(table.parent / "a.avi", picture(2))
    text = "\n".join([",".join(cells) for cells in [["path", "label", "ef"], *rows]])
    table.write_bytes(text.encode("utf-8", "surrogatepass") + end)
    try:
        study = read_folder(table, max_bad_share=1, needed_splits=(), **how)
    except (ConfigError, DataError) as error:
        assert "\n" not in str(error)
    else:
        assert [clip.name for clip in study.clips] == ["a.avi"]


def _parquet(rows: Rows, path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra parquet")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


def test_a_parquet_file_is_read_as_a_csv_file(tmp_path: Path) -> None:
    rows = write_videos(tmp_path)
    how: dict[str, Any] = {"target_column": "mass:g"}
    text, binary = (
        read_folder(tmp_path / "study.csv", **how),
        read_folder(_parquet(rows, tmp_path / "a.parquet"), **how),
    )
    assert binary.clips == text.clips and binary.units == text.units
    rows[2]["mass"], rows[3]["mass"] = None, math.nan
    for row in rows:
        row["label"] = bool(row["label"])
    rows[7]["label"] = None
    study = read_folder(_parquet(rows, tmp_path / "b.PQ"), **how, **LENIENT)
    assert [clip.label for clip in study.clips] == [0, 1, 0, 1, 0, 1, 0]
    assert [math.isnan(clip.targets["mass"]) for clip in study.clips] == [i in (2, 3) for i in range(7)]
    assert [f"{problem.where}: {problem.reason}" for problem in study.problems] == ["row 8: label is blank"]


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    rows = write_videos(tmp_path)
    path = _parquet(rows, tmp_path / "a.parquet")
    content = path.read_bytes()
    for damaged in (b"PAR1", content[: len(content) // 2], b"path,label\n"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet: not a readable Parquet file"):
            read_folder(path)
    path.write_bytes(content[:4] + bytes(200) + content[204:])
    with pytest.raises(DataError, match=r"a\.parquet: not readable after row 0"):
        read_folder(path)
    with pytest.raises(DataError, match=r"none\.parquet: no such file"):
        read_folder(tmp_path / "none.parquet")


def test_parquet_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(packages, "import_module", missing)
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"data: a\.parquet needs the package pyarrow; pip .*cardiocaps\[parquet\]"):
        read_folder(tmp_path / "a.parquet")
