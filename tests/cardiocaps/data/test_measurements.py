import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cardiocaps.data import measurements
from cardiocaps.data.measurements import Problem, read_measurements, refuse_many, summarise
from cardiocaps.data.video import Header
from cardiocaps.errors import ConfigError, DataError

from .sample_videos import COLUMNS, measurement, write_table


def reasons(root: Path, *rows: dict[str, Any]) -> list[str]:
    table = read_measurements(write_table(root, [measurement("GOOD"), *rows]), max_bad_share=1)
    assert table.total == 1 + len(rows)
    assert len(table.rows) + len(table.problems) == table.total
    return [problem.reason for problem in table.problems]


def test_a_row_is_read_as_it_stands(tmp_path: Path) -> None:
    rows = [measurement("0XA"), measurement("0XB.avi", "IVSs", "0.95", Frame="11.0", split="TEST ")]
    table = read_measurements(write_table(tmp_path, rows))
    assert table.names == ("0XA", "0XB") and table.total == 2 and table.problems == ()
    row = table.rows[1]
    assert (row.position, row.line, row.name, row.calc, row.cm, row.frame) == (1, 3, "0XB", "IVSs", 0.95, 11)
    assert row.split == "test" and row.claim == Header(12, 64, 48, 50.0)


@pytest.mark.parametrize("name", ["12E5", "NA", "nan", "null", "007", "1e400", "-1", "None", "TRUE"])
def test_names_stay_text(tmp_path: Path, name: str) -> None:
    assert read_measurements(write_table(tmp_path, [measurement(name)])).names == (name,)


def test_both_published_spellings_and_a_byte_order_mark(tmp_path: Path) -> None:
    wanted = read_measurements(write_table(tmp_path, [measurement("0XA")]))
    columns = [{"Frames": "NumFrames", "split": "Split"}.get(column, column) for column in COLUMNS[::-1]]
    row = measurement("0XA", NumFrames=12, Split="train")
    path = write_table(tmp_path, [row], columns)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n\n"))
    got = read_measurements(path)
    assert got.names == wanted.names and got.problems == ()
    assert got.rows == tuple(replace(row, line=3) for row in wanted.rows)  # a blank line stands in between


def test_optional_columns_may_be_absent(tmp_path: Path) -> None:
    needed = ["HashedFileName", "Calc", "CalcValue", "Frame", "Frames"]
    (row,) = read_measurements(write_table(tmp_path, [measurement("0XA")], needed)).rows
    assert row.split == "" and row.claim == Header(12, 0, 0, 0.0)


@pytest.mark.parametrize("column", ["HashedFileName", "Calc", "CalcValue", "Frame", "Frames"])
def test_a_missing_column_is_named(tmp_path: Path, column: str) -> None:
    path = write_table(tmp_path, [measurement("0XA")], [c for c in COLUMNS if c != column])
    with pytest.raises(DataError, match=rf"MeasurementsList.csv: no column {column}.*columns there: .*FPS"):
        read_measurements(path)


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "MeasurementsList.csv: empty file"),
        (b"\xef\xbb\xbf", "empty, expected the columns HashedFileName"),
        (b"HashedFileName,Calc,CalcValue,Frame,Frames\n", "a header and no rows"),
        (b"HashedFileName;Calc\n1;2\n", "no column HashedFileName; columns there: HashedFileName;Calc"),
        (b"HashedFileName,Calc,CalcValue,Frame,Frames,NumFrames\n1", "column Frames .* stands there 2 times"),
        (b"HashedFileName,Calc\n\xff\xfe", "not UTF-8 text, byte 20 is 0xff"),
        ("HashedFileName,Calc".encode("utf-16"), "not UTF-8 text, byte 0 is 0xff"),
        (b'HashedFileName,Calc\n"open', "line 2: not a CSV table"),
        (b"HashedFileName," + b"x" * 200_000, "not a CSV table"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "MeasurementsList.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        read_measurements(path)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.csv: no such file"):
        read_measurements(tmp_path / "none.csv")


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"CalcValue": ""}, "CalcValue is blank"),
        ({"CalcValue": " "}, "CalcValue is blank"),
        ({"CalcValue": "NaN"}, "CalcValue is not a number"),
        ({"CalcValue": "inf"}, "CalcValue is not a number"),
        ({"CalcValue": "1_0"}, "CalcValue is not a number"),
        ({"CalcValue": "4,5"}, "CalcValue is not a number"),
        ({"CalcValue": "١"}, "CalcValue is not a number"),
        ({"CalcValue": 0}, "CalcValue out of range: 0 cm"),
        ({"CalcValue": -3}, "CalcValue out of range: -3 cm"),
        ({"CalcValue": 45}, "CalcValue out of range: 45 cm"),
        ({"CalcValue": "1e999"}, "CalcValue out of range: inf cm"),
        ({"Calc": "LVEDP"}, "unknown Calc"),
        ({"Calc": "lvidd"}, "unknown Calc"),
        ({"Calc": ""}, "unknown Calc"),
        ({"Frame": 12}, r"Frame out of range: 12 \(allowed: 0 to 11\)"),
        ({"Frame": -1}, "Frame out of range: -1"),
        ({"Frame": "x"}, "Frame is not a number"),
        ({"Frame": 1.5}, "Frame is not a whole number"),
        ({"Frame": "1e999"}, "Frame is not a whole number"),
        ({"Frames": 0}, "Frames out of range: 0"),
        ({"Frames": 2_000_000_000}, "Frames out of range: 2000000000"),
        ({"Frames": ""}, "Frames is blank"),
        ({"Width": -64}, "Width out of range: -64"),
        ({"FPS": "fast"}, "FPS is not a number"),
        ({"HashedFileName": ""}, "HashedFileName not allowed"),
        ({"HashedFileName": "../../etc/passwd"}, "HashedFileName not allowed"),
        ({"HashedFileName": "http://host/a.avi"}, "HashedFileName not allowed"),
        ({"HashedFileName": "concat:a|b"}, "HashedFileName not allowed"),
        ({"HashedFileName": "..avi"}, "HashedFileName not allowed"),
    ],
)
def test_a_bad_row_is_left_out_and_reported(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    (got,) = reasons(tmp_path, measurement("0XA") | change)
    assert re.match(reason, got)


def test_messages_repeat_no_text_of_a_shifted_table(tmp_path: Path) -> None:
    secret = "DOE^JANE 1950"
    for column in COLUMNS[1:5] + COLUMNS[9:13]:
        for reason in reasons(tmp_path, measurement("0XA") | {column: secret}):
            assert "DOE" not in reason and "JANE" not in reason


def test_a_row_of_another_length_is_reported(tmp_path: Path) -> None:
    path = write_table(tmp_path, [measurement("0XA")])
    path.write_text(path.read_text() + "1,0XB,LVIDd\n")
    (problem,) = read_measurements(path, max_bad_share=1).problems
    assert problem == Problem("line 3", "wrong number of fields: 3 (the header has 14)")


def test_repeated_rows_count_once(tmp_path: Path) -> None:
    assert reasons(tmp_path, measurement("0XA"), measurement("0XA"), measurement("0XA.avi")) == [
        "duplicate row: as line 3",
        "duplicate row: as line 3",
    ]


def test_the_same_measurement_on_another_frame_or_elsewhere_is_no_repetition(tmp_path: Path) -> None:
    assert reasons(tmp_path, *[measurement("0XA") | change for change in ({}, {"Frame": 4}, {"X1": 11})]) == []


def test_of_two_values_neither_is_believed(tmp_path: Path) -> None:
    got = reasons(tmp_path, measurement("0XA", cm=4.5), measurement("0XA", cm=6.5), measurement("0XA", "IVSd", 1))
    assert got == ["conflicting values of one measurement: lines 3, 4"] * 2


@pytest.mark.parametrize("change", [{"Frames": 13}, {"Width": 65}, {"FPS": 25}])
def test_two_descriptions_of_one_video_are_reported(tmp_path: Path, change: dict[str, Any]) -> None:
    got = reasons(tmp_path, measurement("0XA"), measurement("0XA", "IVSd", 1.0) | change)
    assert got == ["Frames, Width, Height or FPS contradict another row: line 3"]


def test_too_many_bad_rows_stop_the_run(tmp_path: Path) -> None:
    rows = [measurement(f"0X{i}", cm=99 if i < 3 else 4.5) for i in range(30)]
    path = write_table(tmp_path, rows)
    assert len(read_measurements(path, max_bad_share=0.1).rows) == 27
    with pytest.raises(DataError, match=r"3 of 30 rows of .*allows 1; the first: line 2: CalcValue out of range: 99"):
        read_measurements(path, max_bad_share=0.05)
    with pytest.raises(ConfigError, match=r"max_bad_share must be from 0 to 1, got 1\.5"):
        read_measurements(path, max_bad_share=1.5)


def test_the_share_is_a_bound_and_not_a_count() -> None:
    refuse_many(5, 100, 0.05, "videos", [])
    refuse_many(0, 0, 0.0, "videos", [])
    with pytest.raises(DataError, match="6 of 100 videos"):
        refuse_many(6, 100, 0.05, "videos", [])


def test_problems_are_counted_by_kind() -> None:
    problems = [Problem("line 4", "odd: 1"), Problem("line 5", "rare"), Problem("line 9", "odd: 2")]
    assert summarise(problems).splitlines() == [
        "     2 × odd (first: line 4)",
        "     1 × rare (first: line 5)",
    ]


@given(st.text(max_size=20))
def test_any_value_is_a_length_or_a_problem(text: str) -> None:
    record = {"Calc": "LVIDd", "CalcValue": text, "Frame": "0", "Frames": "5"}
    try:
        row = measurements._row(0, 2, "0XA", record)
    except measurements._RowError:
        return
    assert 0 < row.cm <= 20 and math.isclose(row.cm, float(text.strip()))


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_exactly_the_allowed_lengths_pass(cm: float) -> None:
    record = {"Calc": "LVIDd", "CalcValue": repr(cm), "Frame": "0", "Frames": "5"}
    if 0 < cm <= 20:
        assert measurements._row(0, 2, "0XA", record).cm == cm
    else:
        with pytest.raises(measurements._RowError):
            measurements._row(0, 2, "0XA", record)


@given(st.integers(), st.integers())
def test_exactly_the_frames_of_the_video_pass(frame: int, frames: int) -> None:
    record = {"Calc": "LVIDd", "CalcValue": "4", "Frame": str(frame), "Frames": str(frames)}
    if 0 <= frame < frames <= 100_000:
        assert measurements._row(0, 2, "0XA", record).frame == frame
    else:
        with pytest.raises(measurements._RowError):
            measurements._row(0, 2, "0XA", record)
