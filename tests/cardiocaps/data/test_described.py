"""`python -m cardiocaps.data`: what it says of folders and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cardiocaps.config import TrainConfig
from cardiocaps.data import __main__ as program
from cardiocaps.data import cache
from cardiocaps.data.open import read_study
from cardiocaps.data.views import base_side

from .sample_videos import write_dynamic, write_rows, write_videos


def _said(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    assert program.main([*map(str, arguments), "--json"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)
    return found


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_dynamic(tmp_path / "data")
    rows[0]["EF"] = "x"
    write_rows(tmp_path / "data" / "FileList.csv", rows)
    (found,) = _said(capsys, tmp_path / "data", "--max-bad-share", "0.2")
    assert found["dataset"] == "echonet-dynamic" and found["refused"] is None and found["videos"] == 7
    assert found["splits"]["train"] == {"clips": 3, "normal": 1, "abnormal": 2}
    assert found["splits"]["test"] == {"clips": 2, "normal": 1, "abnormal": 1}
    ef = [row["EF"] for row in rows[1:]]
    expected = {"n": 7, "mean": np.mean(ef), "sd": np.std(ef), "min": min(ef), "max": max(ef)}
    assert {name: x for name, x in found["targets"]["ef"].items() if name != "unit"} == pytest.approx(expected)
    assert sum(found["problems"].values()) == 1 and found["patients"] is None
    assert program.main([str(tmp_path / "data"), "--max-bad-share", "0.2"]) == 0
    text = capsys.readouterr().out
    assert "(echonet-dynamic), 7 videos\n" in text and "target ef, percentage points, of 7 clips: " in text
    assert "1 problems:" in text and "refuses" not in text


def test_the_size_of_the_cache_is_what_a_training_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_dynamic(tmp_path / "data")
    for frames in (8, 100):  # fewer than a video has, and more
        (found,) = _said(capsys, tmp_path / "data", "--frames-per-clip", frames)
        config = TrainConfig(data=tmp_path / "data", frames_per_clip=frames).resolved()
        folder = tmp_path / f"cache{frames}"
        cached = cache.build(
            read_study(config),
            size=base_side(config.network.size),
            frames_per_clip=frames,
            frame_choice="spread",
            folder=folder,
            max_bad_share=0,
            workers=1,
            progress=False,
        )
        assert found["cache_bytes"] == sum(np.load(x.file).nbytes for x in cached.frames.values()) > 0


def test_what_a_training_refuses_is_described_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_dynamic(tmp_path)
    for i, row in enumerate(rows):
        row["patient_id"] = f"Mustermann{i // 4}"
    write_rows(tmp_path / "FileList.csv", rows)
    (found,) = _said(capsys, tmp_path)
    assert found["patients"]["number"] == 2 and found["patients"]["of"] == "patients"
    assert found["patients"]["in_several_splits"] > 0 and "patient" in found["refused"]
    assert "Mustermann" not in json.dumps(found)
    assert _said(capsys, tmp_path, "--allow-split-patients")[0]["refused"] is None

    for row in rows:
        row["Split"] = "TRAIN"
        row["patient_id"] = row["FileName"]
    write_rows(tmp_path / "FileList.csv", rows)
    (found,) = _said(capsys, tmp_path)
    assert found["splits"]["test"]["clips"] == 0 and found["refused"] is not None
    assert program.main([str(tmp_path)]) == 0
    assert f"a training refuses these data: {found['refused']}" in capsys.readouterr().out


def test_several_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_dynamic(tmp_path)
    table = [{"path": f"Videos/{row['FileName']}.avi", "label": i % 2, "mass": i / 2} for i, row in enumerate(rows)]
    for name in ("a.csv", "b.csv"):
        write_rows(tmp_path / name, table)
    first, second = _said(capsys, tmp_path / "a.csv", tmp_path / "b.csv", "--target-column", "mass:g")
    assert first["dataset"] == second["dataset"] == "table" and first["data"] != second["data"]
    assert first["targets"]["mass"]["unit"] == "g" and first["targets"]["mass"]["max"] == 3.5


def test_a_table_without_labels_for_a_regression_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_videos(tmp_path)
    masses = [{"path": row["path"], "split": row["split"], "mass": row["mass"]} for row in rows]
    masses[0]["mass"] = ""
    table = write_rows(tmp_path / "masses.csv", masses)
    options = ["--task", "regression", "--target-column", "mass:g"]
    (found,) = _said(capsys, table, *options)
    assert found["videos"] == 7 and found["refused"] is None and found["all"] == {"clips": 7}
    assert found["rule"] == "no labels: regression of mass alone" and found["targets"]["mass"]["n"] == 7
    cache_folder = tmp_path / "cache"
    build = ["build-cache", str(table), *options, "--cache-dir", str(cache_folder), "--no-progress"]
    assert program.main(build) == 0
    assert "7 of them were decoded now" in capsys.readouterr().out and len(list(cache_folder.glob("*.npy"))) == 7
    assert program.main([str(table), "--target-column", "mass:g"]) == 2  # as a training that needs labels
    assert "label_column is None" in capsys.readouterr().err


def test_the_target_is_that_of_a_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_dynamic(tmp_path)
    rows[1]["ESV"] = ""
    write_rows(tmp_path / "FileList.csv", rows)
    (found,) = _said(capsys, tmp_path, "--task", "regression", "--regression-target", "esv")
    assert found["videos"] == 7 and found["rule"] == "no labels: regression of esv alone"
    for command in ([], ["build-cache"]):
        assert program.main([*command, str(tmp_path), "--regression-target", "width"]) == 2
        assert "regression_target is 'width'; expected one of ef, esv, edv" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["NONE"], 3, "none"),
        (["EMPTY"], 3, "has the files of no data set"),
        ([], 2, "DATA"),
        (["EMPTY", "--view", "both", "--dataset", "echonet"], 2, "--dataset"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], status: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    given = [str(tmp_path / x.lower()) if x.isupper() else x for x in arguments]
    try:
        found = program.main(given)
    except SystemExit as ended:
        found = int(str(ended.code))
    error = capsys.readouterr().err
    assert found == status and message in error and error.count("\n") == 1
