"""`python -m cardiocaps.explain` on a phantom."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cardiocaps import explain

from ..killed import killed_before
from ..prediction.test_predict import rows
from ..prediction.test_predict import run as predict


def run(*arguments: Path | str) -> int:
    return explain.main([*map(str, arguments), "--no-progress", "--threads", "1"])


def videos_of(phantom: Path, number: int) -> list[Path]:
    return sorted((phantom / "Batch1").iterdir())[:number]


def test_rows_pictures_and_arrays(runs: list[Path], phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.avi").write_bytes(b"RIFF")
    videos = [*videos_of(phantom, 2), tmp_path / "bad.avi"]
    out = tmp_path / "out"
    assert run(runs[0], *videos, "--out", out, "--arrays") == 0
    assert predict(runs[0], *videos, "--out", tmp_path / "predicted") == 0
    found = rows(out / "explanations.csv")
    assert [row["status"] for row in found] == ["ok", "ok", "failed"]
    for row, predicted in zip(found[:2], rows(tmp_path / "predicted" / "predictions.csv"), strict=False):
        for name in ("input", "frames", "probability", "threshold", "decision"):
            assert row[name] == predicted[name]
        assert row["class"] == ("normal", "abnormal")[int(row["decision"])]
        with np.load(out / row["picture"].replace(".png", ".npz")) as arrays:
            assert arrays["frames"].shape == arrays["probability"].shape == (2,)
            assert arrays["probability"].mean() == pytest.approx(float(row["probability"]), rel=1e-5)
            assert int(arrays["frames"][1]) == int(row["frame"]) and int(arrays["label"]) == int(row["decision"])
            for method in ("capsules", "gradcam"):
                assert arrays[method].shape == (2, 64, 64)
                assert arrays[method][1].sum() == pytest.approx(float(row[f"{method}_sum"]), rel=1e-4)
        with Image.open(out / row["picture"]) as picture:
            picture.load()
            assert min(picture.size) > 300 and not picture.info.get("Title")
            assert np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0).shape[0] > 500
    names = [path.name for path in out.iterdir()]
    assert len(names) == 2 + 2 * 2 and not any(video.stem in name for video in videos for name in names)


def test_the_class_and_the_method_that_were_asked_for(runs: list[Path], phantom: Path, tmp_path: Path) -> None:
    video = videos_of(phantom, 1)[0]
    sums = {}
    for name in ("normal", "abnormal"):
        assert run(runs[0], video, "--out", tmp_path / name, "--class", name, "--method", "capsules") == 0
        (row,) = rows(tmp_path / name / "explanations.csv")
        assert row["class"] == name and "gradcam_sum" not in row
        sums[name] = float(row["capsules_sum"])
        assert not list((tmp_path / name).glob("*.npz"))
    assert sums["normal"] != sums["abnormal"]


def test_killed_at_any_change_of_a_file(runs: list[Path], phantom: Path, tmp_path: Path) -> None:
    arguments = [
        *map(str, (runs[0], *videos_of(phantom, 2))),
        "--no-progress",
        "--threads",
        "1",
        "--method",
        "capsules",
    ]
    whole = tmp_path / "whole"
    assert explain.main([*arguments, "--out", str(whole)]) == 0
    for step in range(1, 100, 3):
        out = tmp_path / str(step)
        was_killed = killed_before(step, lambda out=out: explain.main([*arguments, "--out", str(out)]))
        assert explain.main([*arguments, "--out", str(out)]) == 0
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in whole.iterdir())
        for path in whole.iterdir():
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
        if not was_killed:
            break
    assert step > 4


def test_a_folder_of_something_else_is_refused(
    runs: list[Path], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (video,) = videos_of(phantom, 1)
    out = tmp_path / "out"
    assert run(runs[0], video, "--out", out, "--method", "capsules") == 0
    assert run(runs[0], video, "--out", out) == 4
    assert "explanations with other methods" in capsys.readouterr().err
    assert predict(runs[0], video, "--out", out) == 4
    assert "other files than predictions" in capsys.readouterr().err
    assert run(runs[1], video, "--out", out, "--method", "capsules") == 4
    assert "explanations with other runs" in capsys.readouterr().err


def test_wrong_arguments(
    runs: list[Path],
    phantom: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (video,) = videos_of(phantom, 1)
    out = tmp_path / "out"
    for arguments, message in (
        ([phantom, video], "expected the folder of a run"),
        ([runs[0]], "INPUT is missing"),
        ([runs[0], video, "--method", "lime"], "invalid choice"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments, "--out", out)
        assert message in capsys.readouterr().err
    assert run(runs[0], tmp_path / "none.avi", "--out", out) == 2
    (tmp_path / "bad.avi").write_bytes(b"RIFF")
    assert run(runs[0], tmp_path / "bad.avi", "--out", out) == 3
    shutil.rmtree(out)
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    assert run(runs[0], video, "--out", out) == 2
    assert "cardiocaps[explain]" in capsys.readouterr().err
    assert run(runs[0], video, "--out", tmp_path / "without", "--method", "capsules") == 0
