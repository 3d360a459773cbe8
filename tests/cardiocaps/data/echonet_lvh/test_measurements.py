import csv
import math
import re
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cardiocaps.data.cells import RowError
from cardiocaps.data.echonet_lvh import measurements
from cardiocaps.data.echonet_lvh.labels import CALCS, LIMITS, THRESHOLDS
from cardiocaps.data.echonet_lvh.measurements import Row, Table, paper_rows, read_measurements
from cardiocaps.data.header import Header
from cardiocaps.data.problems import Problem, refuse_many, summarise
from cardiocaps.errors import ConfigError, DataError

from ..sample_videos import COLUMNS, measurement, write_table


def reasons(root: Path, *rows: dict[str, Any]) -> list[str]:
    table = read_measurements(write_table(root, [measurement("GOOD"), *rows]), max_bad_share=1)
    assert table.total == 1 + len(rows)
    of_rows = [problem for problem in table.problems if problem.where.startswith("line ")]
    assert len(table.rows) + len(of_rows) == table.total
    return [problem.reason for problem in of_rows]


def test_a_row_is_read_as_it_stands(tmp_path: Path) -> None:
    rows = [measurement("0XA"), measurement("0XB.avi", "IVSs", "0.95", Frame="11.0", split="TEST ")]
    table = read_measurements(write_table(tmp_path, rows))
    assert table.lines == {"0XA": 2, "0XB": 3} and table.total == 2 and table.problems == ()
    row = table.rows[1]
    assert (row.position, row.line, row.name, row.calc, row.cm, row.frame) == (1, 3, "0XB", "IVSs", 0.95, 11)
    assert row.split == "test" and table.claims["0XB"] == Header(12, 64, 48, 50.0)


@pytest.mark.parametrize("name", ["12E5", "NA", "nan", "null", "007", "1e400", "-1", "None", "TRUE"])
def test_names_stay_text(tmp_path: Path, name: str) -> None:
    assert list(read_measurements(write_table(tmp_path, [measurement(name)])).lines) == [name]


def test_both_published_spellings_and_a_byte_order_mark(tmp_path: Path) -> None:
    wanted = read_measurements(write_table(tmp_path, [measurement("0XA")]))
    columns = [{"Frames": "NumFrames", "split": "Split"}.get(column, column) for column in COLUMNS[::-1]]
    row = measurement("0XA", NumFrames=12, Split="train")
    path = write_table(tmp_path, [row], columns)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n\n"))
    got = read_measurements(path)
    assert got.claims == wanted.claims and got.problems == ()
    assert got.rows == tuple(row._replace(line=3) for row in wanted.rows)  # a blank line stands in between


def test_optional_columns_may_be_absent(tmp_path: Path) -> None:
    needed = ["HashedFileName", "Calc", "CalcValue", "Frame", "Frames"]
    table = read_measurements(write_table(tmp_path, [measurement("0XA")], needed))
    (row,) = table.rows
    assert row.split == "" and table.claims == {"0XA": Header(12, 0, 0, 0.0)}


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
        (b"HashedFileName;Calc\n1;2\n", "no column HashedFileName .*there: 1 of other names; one field: .* commas"),
        (b"HashedFileName,Calc,CalcValue,Frame,Frames,NumFrames\n1", "column Frames stands there 2 times"),
        (b"HashedFileName,Calc\n\xff\xfe", "not UTF-8 text, byte 20 is 0xff"),
        ("HashedFileName,Calc".encode("utf-16"), "not UTF-8 text, byte 0 is 0xff"),
        (b'HashedFileName,Calc,CalcValue,Frame,Frames\n"open', "line 2: not a CSV table"),
        (b"HashedFileName,Calc,CalcValue,Frame,Frames\n" + b"a" * 9_000 + b"\xff", "byte 9043 is 0xff"),
        (b"HashedFileName,Calc,CalcValue,Frame,Frames\nA,LVIDd,45,1,9\n", "1 of 1 rows .*: line 2: CalcValue out"),
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
        ({"CalcValue": 45}, "CalcValue out of range: 45 cm, LVIDd is from 0.5 to 12"),
        ({"Calc": "IVSd", "CalcValue": 9.0}, "CalcValue out of range: 9 cm, IVSd is from 0.1 to 6"),
        ({"CalcValue": "9" * 65}, "CalcValue out of range: 1e[+]65 cm"),
        ({"CalcValue": "1e999"}, "CalcValue out of range: inf cm"),
        ({"Calc": "lvidd"}, "Calc is spelled otherwise than LVIDd"),
        ({"Calc": " "}, "Calc is blank"),
        ({"Calc": "4.5"}, "Calc is not a type of measurement: used are IVSd, "),
        ({"Calc": "E/A", "CalcValue": "low"}, "Calc is not a type of measurement"),
        ({"Frame": 12}, r"Frame out of range: 12 \(allowed: 0 to 11\)"),
        ({"Frame": -1}, "Frame out of range: -1"),
        ({"Frame": "x"}, "Frame is not a number"),
        ({"Frame": 1.5}, "Frame is not a whole number"),
        ({"Frame": "1e999"}, "Frame is not a whole number"),
        ({"Frames": 0}, "Frames out of range: 0"),
        ({"Frames": 2_000_000_000}, "Frames out of range: 2000000000"),
        ({"Frames": "x"}, "Frames is not a number"),
        ({"Width": -64}, "Width out of range: -64"),
        ({"FPS": "fast"}, "FPS is not a number"),
        ({"HashedFileName": ""}, "HashedFileName not allowed"),
        ({"HashedFileName": "../../etc/passwd"}, "HashedFileName not allowed"),
        ({"HashedFileName": "http://host/a.avi"}, "HashedFileName not allowed"),
        ({"HashedFileName": "concat:a|b"}, "HashedFileName not allowed"),
        ({"HashedFileName": "..avi"}, "HashedFileName not allowed"),
        ({"HashedFileName": "a" * 256}, "HashedFileName not allowed"),
    ],
)
def test_a_bad_row_is_left_out_and_reported(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = write_table(tmp_path, [measurement("GOOD"), measurement("0XA") | change])
    table = read_measurements(path, max_bad_share=1)
    (problem,) = (problem for problem in table.problems if problem.where != "the whole table")
    assert problem.where == "line 3" and re.match(reason, problem.reason) and not problem.harmless
    assert [row.name for row in table.rows] == ["GOOD"] and not table.unmeasured


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


def test_the_share_is_a_bound_and_not_a_count() -> None:
    bad = [Problem("line 1", "odd")]
    refuse_many(5 * bad, 100, 0.05, "videos")
    refuse_many([], 0, 0.0, "videos")
    with pytest.raises(DataError, match="6 of 100 videos"):
        refuse_many(6 * bad, 100, 0.05, "videos")


def test_problems_are_counted_by_kind() -> None:
    problems = [Problem("line 4", "odd: 1"), Problem("line 5", "rare"), Problem("line 9", "odd: 2")]
    assert summarise(problems).splitlines() == [
        "     2 × odd (first: line 4)",
        "     1 × rare (first: line 5)",
    ]


def read_row(**cells: Any) -> Row:
    """The row of these cells, or RowError."""
    header = ["HashedFileName", "Calc", "CalcValue", "Frame", "Frames"]
    record = {"HashedFileName": "0XA", "Calc": "LVIDd", "CalcValue": "4", "Frame": "0", "Frames": "5"} | cells
    return measurements._Reader(header, "table", None).row(0, 2, [record[name] for name in header])


@given(st.text(max_size=20))
@example("4\x1f")
def test_any_value_is_a_length_or_a_problem(text: str) -> None:
    try:
        row = read_row(CalcValue=text)
    except RowError:
        return
    assert 0.5 <= row.cm <= 12 and math.isclose(row.cm, float(text.strip()))


@given(st.floats(allow_nan=True, allow_infinity=True), st.sampled_from(CALCS))
def test_exactly_the_allowed_lengths_pass(cm: float, calc: str) -> None:
    low, high = LIMITS[calc]
    for value in (cm, low, high, math.nextafter(low, 0), math.nextafter(high, 99)):
        if low <= value <= high:
            assert read_row(Calc=calc, CalcValue=repr(value)).cm == value
        else:
            with pytest.raises(RowError):
                read_row(Calc=calc, CalcValue=repr(value))


@given(st.integers(), st.integers())
def test_exactly_the_frames_of_the_video_pass(frame: int, frames: int) -> None:
    if 0 <= frame < frames <= 100_000:
        assert read_row(Frame=str(frame), Frames=str(frames)).frame == frame
    else:
        with pytest.raises(RowError):
            read_row(Frame=str(frame), Frames=str(frames))


def test_limits_have_room_for_every_heart_on_record() -> None:
    assert LIMITS.keys() == THRESHOLDS.keys()
    for calc, (low, high) in LIMITS.items():
        assert low < THRESHOLDS[calc] < high
    for calc, cm in (("LVPWd", 5.5), ("IVSd", 4.9), ("LVIDd", 3.1), ("LVIDd", 8.0), ("LVIDd", 0.9), ("IVSd", 0.2)):
        assert LIMITS[calc][0] <= cm <= LIMITS[calc][1]


@pytest.mark.parametrize("calc, cm", [("IVSd", 10.5), ("LVPWs", 9), ("LVIDd", 48), ("RVDd", 25)])
def test_a_table_in_millimetres_is_told_so_in_one_note(tmp_path: Path, calc: str, cm: float) -> None:
    rows = [measurement(f"0X{i}", calc, cm + i / 10) for i in range(5)]
    path = write_table(tmp_path, [*rows, measurement("0XA", calc, 0.9)])
    with pytest.raises(DataError, match=r"5 of 6 rows .*Note: CalcValue looks like millimetres .* cm .*median"):
        read_measurements(path)
    table = read_measurements(path, max_bad_share=1)
    (note,) = (problem for problem in table.problems if problem.harmless)
    assert "millimetres" in note.reason


def test_a_table_in_centimetres_gets_no_note(tmp_path: Path) -> None:
    rows = [measurement(f"0X{calc}", calc, 1.4 * cm) for calc, cm in THRESHOLDS.items()]  # all of them abnormal
    assert read_measurements(write_table(tmp_path, rows)).problems == ()


def test_frame_and_frames_may_be_blank(tmp_path: Path) -> None:
    rows = [
        measurement("0XA", Frame="", Frames=""),
        measurement("0XA", "IVSd", 1.0, Frame=11, FPS=""),
        measurement("0XA", "IVSs", 1.0, Frame="", Frames=" "),
        measurement("0XB", cm="", Frame=""),
        measurement("0XC", cm="", Frame=""),
        measurement("0XC", "IVSd", 1.0),
    ]
    table = read_measurements(write_table(tmp_path, rows), max_bad_share=0)
    assert [(row.name, row.calc, row.frame) for row in table.rows] == [
        ("0XA", "LVIDd", None),
        ("0XA", "IVSd", 11),
        ("0XA", "IVSs", None),
        ("0XC", "IVSd", 3),
    ]
    assert table.claims["0XA"] == Header(12, 64, 48, 50.0)  # each row says what it knows
    assert table.unmeasured == {"0XB"}
    assert [(p.where, p.kind, p.harmless) for p in table.problems] == [
        ("line 5", "nothing measured", True),
        ("line 6", "nothing measured", True),
    ]


def test_values_of_unknown_frames_contradict_nothing(tmp_path: Path) -> None:
    rows = [measurement("0XA", cm=cm, Frame="") for cm in (4.5, 4.7, 4.5)]
    assert reasons(tmp_path, *rows) == ["duplicate row: as line 3"]


def test_harmless_rows_do_not_count_as_bad(tmp_path: Path) -> None:
    good = measurement("0XA")
    rows = [
        good,
        good,
        good,
        measurement("0XA", "E/A", 0.8),
        measurement("0XA", "MV DecT", ""),
        measurement("0XB", "AoD"),
    ]
    table = read_measurements(write_table(tmp_path, rows), max_bad_share=0)
    assert len(table.rows) == 1 and table.unmeasured == {"0XB"}
    assert [problem.kind for problem in table.problems if problem.harmless] == [
        *["Calc is of a type that is not used"] * 3,
        *["duplicate row"] * 2,
    ]
    with pytest.raises(DataError, match="1 of 7 rows"):
        read_measurements(write_table(tmp_path, [*rows, measurement("0XA", cm=-1)]), max_bad_share=0)
    with pytest.raises(DataError, match="none of its 1 rows can be used; the first: line 2: Calc is of a type that"):
        read_measurements(write_table(tmp_path, [measurement("0XA", "AoD")]))


def groups(root: Path, columns: dict[str, Sequence[str]], **options: Any) -> Table:
    """The table of a video for each cell of the further columns."""
    cells = zip(*columns.values(), strict=True)
    rows = [measurement(f"0X{i}") | dict(zip(columns, row, strict=True)) for i, row in enumerate(cells)]
    return read_measurements(write_table(root, rows, [*COLUMNS, *columns]), **options)


@pytest.mark.parametrize(
    "column, kind",
    [
        *[(name, "patient") for name in ("PatientID", "patient_id", "Patient", "Patient ID", "subject", "SubjectID")],
        *[(name, "study") for name in ("study", "Study_ID")],
    ],
)
def test_a_column_of_patients_is_found(tmp_path: Path, column: str, kind: str) -> None:
    table = groups(tmp_path, {column: ["MEIER", "MÜLLER", " MEIER", ""]})
    assert (table.group_column, table.group_kind) == (column, kind)
    assert [row.group for row in table.rows] == [1, 2, 1, 0]
    assert "MEIER" not in repr(table)


def test_which_column_names_the_patients(tmp_path: Path) -> None:
    two = {"study": ["A", "B"], "PatientID": ["X", "X"]}
    table = groups(tmp_path, two)
    assert (table.group_column, [row.group for row in table.rows]) == ("PatientID", [1, 1])  # the coarser one
    table = groups(tmp_path, {**two, "Person": ["U", "V"]}, group_column="Person")
    assert (table.group_column, table.group_kind, [row.group for row in table.rows]) == ("Person", "patient", [1, 2])
    table = groups(tmp_path, two, group_column="study")
    assert (table.group_column, table.group_kind, [row.group for row in table.rows]) == ("study", "study", [1, 2])
    with pytest.raises(DataError, match="columns Patient and subject may each name the patient; choose with --group"):
        groups(tmp_path, {"Patient": ["A"], "subject": ["A"]})
    with pytest.raises(ConfigError, match=r"group_column is X\\x1b\[31m; expected a column of MeasurementsList.csv"):
        groups(tmp_path, two, group_column="X\x1b[31m")
    assert groups(tmp_path, {"note": ["A"]}).group_column is None


SPY = "\x1b[31mSMITH\r\nJOHN\u202e"


def test_a_table_without_a_header_does_not_show_its_first_patient(tmp_path: Path) -> None:
    (tmp_path / "MeasurementsList.csv").write_text(f'0,"{SPY}",Mary,FPS,4.5\n')
    with pytest.raises(DataError) as caught:
        read_measurements(tmp_path / "MeasurementsList.csv")
    text = "MeasurementsList.csv: no column HashedFileName in its first line; columns there: FPS, 4 of other names"
    assert str(caught.value) == text


@pytest.mark.parametrize("column", [column for column in COLUMNS if column] + ["PatientID"])
def test_no_cell_is_repeated(tmp_path: Path, column: str) -> None:
    """Wherever a name has slipped, neither it nor a code for the terminal is in a message."""
    rows = [measurement("GOOD", PatientID="1"), *(measurement("0XA", cm=cm, PatientID="1") for cm in (4.5, 4.6, 4.5))]
    rows += [measurement("0XB", PatientID="1") | {column: SPY}, measurement("0XB", PatientID="1") | {column: "SMITH"}]
    path = write_table(tmp_path, rows, [*COLUMNS, "PatientID"])
    table = read_measurements(path, max_bad_share=1)
    texts = [f"{problem.where} {problem.reason}" for problem in table.problems]
    assert texts and not any("SMITH" in text or "\x1b" in text or not text.isprintable() for text in texts)
    with pytest.raises(DataError) as caught:
        read_measurements(path, max_bad_share=0)
    assert "SMITH" not in str(caught.value) and str(caught.value).isprintable()


def test_the_file_itself_may_have_any_name(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read_measurements(tmp_path / "\x1b]0;title\x07\n.csv")
    assert str(caught.value).endswith(r"\x1b]0;title\x07\n.csv: no such file")


@pytest.mark.parametrize("column", ["HashedFileName", "Calc", "CalcValue", "Frame", "Frames", "Width", "FPS", "split"])
@pytest.mark.parametrize("cell", ["9" * 120_000 + "x", " " * 120_000, "1" + "e9" * 60_000, "a\u0301\u0316" * 40_000])
def test_a_long_cell_takes_no_time(tmp_path: Path, column: str, cell: str) -> None:
    path = write_table(tmp_path, [measurement("0XA"), measurement("0XB") | {column: cell}])
    begin = time.process_time()
    table = read_measurements(path, max_bad_share=1)
    assert time.process_time() - begin < 1  # 16,000 digits took ten seconds
    assert all(len(problem.reason) < 200 for problem in table.problems)


def many(root: Path, count: int, conflicting: bool) -> Path:
    path = root / f"{count}{conflicting}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for i in range(count):
            name, value = ("0XA", 4 + i / count) if conflicting else (f"0X{i // 4:X}", 4.5)
            writer.writerow([i, name, "LVIDd", f"{value:.6f}", i % 4, 1, 2, 3, 4, 12, 50, 64, 48, "train"])
    return path


@pytest.mark.parametrize("conflicting", [False, True])
def test_memory_grows_with_the_table_and_no_faster(tmp_path: Path, conflicting: bool) -> None:
    """A table whose rows all contradict each other kept every line in every reason: 6.6 GB for 32,000 rows."""
    sizes = []
    for count in (1_000, 4_000):
        path = many(tmp_path, count, conflicting)
        tracemalloc.start()
        table = read_measurements(path, max_bad_share=1) if not conflicting else None
        if conflicting:
            with pytest.raises(DataError, match=r"lines 2, 6, 10, 14 and (246|996) more"):
                read_measurements(path, max_bad_share=1)
        sizes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert table is None or len(table.rows) == count
    assert sizes[1] < 5 * sizes[0] and sizes[1] < 2_000 * 4_000


def _rows(count: int) -> list[Row]:
    return [Row(i, i + 2, f"V{i}", "LVIDd", 4.0, 0, "") for i in range(count)]


def test_the_paper_takes_its_rows() -> None:
    chosen = paper_rows(_rows(11800), 11800)
    assert [chosen[0].position, chosen[-1].position, len(chosen)] == [11464, 11763, 300]


def test_the_paper_takes_all_rows_of_a_short_table() -> None:
    with pytest.warns(UserWarning, match=r"rows 11464 to 11763 .* this one has 11763 rows: all are used"):
        assert len(paper_rows(_rows(11763), 11763)) == 11763


def test_positions_count_left_out_rows_too() -> None:
    chosen = paper_rows(_rows(11800)[5:11500], 11800)
    assert [chosen[0].position, chosen[-1].position] == [11464, 11499]
