import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from cardiocaps.errors import ConfigError, OutputError
from cardiocaps.evaluation.predictions import Predictions
from cardiocaps.experiments.results import Result, is_finished, read_result, write_result
from tests.cardiocaps.experiments.invented import predictions, result


def _assert_same(one: Predictions, other: Predictions) -> None:
    for name in ("probability", "label", "clip"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert one.video == other.video
    assert one.group_name == other.group_name
    for name in ("frame", "patient"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None) and (a is None or a.tolist() == b.tolist())


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"unit": "frame", "parameters": None, "epochs": None, "best_epoch": None, "seconds_per_epoch": None},
        {"peak_memory": None, "device": "NVIDIA H100"},
        {"test": replace(predictions(1), frame=None)},
        {"test": replace(predictions(1), patient=predictions(1).clip // 2)},
        {"test": replace(predictions(1), patient=predictions(1).clip // 2, group_kind="study")},
    ],
)
def test_a_result_comes_back_as_it_was_written(changed: dict[str, Any], tmp_path: Path) -> None:
    written = result(**changed)
    assert not is_finished(tmp_path)
    write_result(tmp_path, written)
    assert is_finished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "predictions.csv",
        "predictions_by_video.csv",
        "result.json",
        "validation.csv",
        "validation_by_video.csv",
    ]
    read = read_result(tmp_path)
    for field in fields(Result):
        if field.name not in ("validation", "test"):
            assert getattr(read, field.name) == getattr(written, field.name)
    _assert_same(read.validation, written.validation)
    _assert_same(read.test, written.test)


def test_the_tables_have_the_columns_that_readers_expect(tmp_path: Path) -> None:
    write_result(tmp_path, result())
    for name in ("validation.csv", "predictions.csv"):
        assert (tmp_path / name).read_text().splitlines()[0] == "video,clip,frame,label,probability"
    # Further columns are ignored.
    path = tmp_path / "predictions.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{head},regression", *(f"{line},4.5" for line in lines)]) + "\n")
    assert read_result(tmp_path).test.probability.tolist() == result().test.probability.tolist()


def test_a_job_that_was_cut_off_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cardiocaps.experiments import results

    def full(path: Path, *_: Any) -> None:
        raise OutputError(f"cannot write {path}: no space left on the disk")

    monkeypatch.setattr(results, "write_json", full)
    with pytest.raises(OutputError):
        write_result(tmp_path, result())
    assert not is_finished(tmp_path)


def _json(**changed: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder / "result.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return damage


def _table(old: str, new: str) -> Any:
    def damage(folder: Path) -> None:
        path = folder / "predictions.csv"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


def _cut(folder: Path) -> None:
    path = folder / "validation.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-3]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "result.json").write_text("{"), r"result\.json is damaged: Expecting property name"),
        (_json(kind="another"), r"result\.json is damaged: it is not a file of this program"),
        (lambda folder: (folder / "result.json").unlink(), r"cannot read .*result\.json: No such file"),
        (lambda folder: (folder / "predictions.csv").unlink(), r"cannot read .*predictions\.csv: No such file"),
        (lambda folder: (folder / "predictions.csv").write_bytes(b"\xff\xfe"), r"predictions\.csv is damaged"),
        (_json(sed=1), r"result\.json is damaged: .*unexpected keyword argument 'sed'"),
        (_json(unit="patient"), r"result\.json is damaged: unit .*; expected one of video, frame"),
        (_json(rows=None), r"result\.json is damaged: 'NoneType'"),
        (_cut, r"validation\.csv is damaged: it has 157 rows, result\.json says 160"),
        (_table("label", "class"), r"predictions\.csv is damaged: 'label'"),
        (_table("0X0000,0,0,1,", "0X0000,0,0,2,"), r"predictions\.csv is damaged: label .*; expected 0 or 1"),
        (_table("0X0000,0,0,1,", "0X0000,0,0,1,7"), r"predictions\.csv is damaged: probability"),
        (_table("0X0000,0,0,1,", "0X0000,0,0,1,much"), r"predictions\.csv is damaged: could not convert"),
        (_table("0X0000,0,0,1,", "0X0000,0,1,"), r"predictions\.csv is damaged: float\(\) argument must be"),
    ],
)
def test_damage_is_named_with_the_file(damage: Any, message: str, tmp_path: Path) -> None:
    write_result(tmp_path, result())
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        read_result(tmp_path)


def test_an_unknown_unit_is_named() -> None:
    with pytest.raises(ValueError, match="unit is 'patient'; expected one of video, frame"):
        result(unit="patient")
