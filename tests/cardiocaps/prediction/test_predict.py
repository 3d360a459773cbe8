"""`python -m cardiocaps.predict` on invented videos."""

from __future__ import annotations

import csv
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import pytest

from cardiocaps import predict
from cardiocaps.evaluation.calibration import read_calibration
from cardiocaps.evaluation.decision import Decision
from cardiocaps.evaluation.familiarity import read_familiarity
from cardiocaps.prediction.inputs import find
from cardiocaps.prediction.run import predictions
from cardiocaps.runtime.files import read_json

from ..data.sample_dicom import HEIGHT, WIDTH, cine, region, write_dicom
from ..killed import killed_before
from ..programs import start, wait_for


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, strict=True))


def run(*arguments: Path | str) -> int:
    return predict.main([*map(str, arguments), "--no-progress", "--threads", "1"])


@pytest.fixture(scope="module")
def predicted(runs: list[Path], phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("predicted") / "out"
    assert run(runs[0], phantom, "--out", out, "--by-frame") == 0
    return out


def test_a_prediction_does_not_wait_for_what_only_training_needs() -> None:
    names = {"lightning", "sklearn", "matplotlib", "pandas", "torchmetrics"}
    program = f"import sys, cardiocaps.prediction.run; print(sorted(sys.modules.keys() & {names}))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_test_videos_get_the_numbers_of_the_evaluation(predicted: Path, runs: list[Path]) -> None:
    found = {Path(row["input"]).stem: row for row in rows(predicted / "predictions.csv")}
    evaluated = rows(runs[0] / "predictions_by_video.csv")
    assert len(evaluated) >= 8
    for row in evaluated:
        mine = found[row["video"]]
        names = {name: name for name in ("probability", "calibrated_probability", "threshold", "decision")}
        for name, own in {**names, "regression": "width_cm", "frames": "frames_used"}.items():
            assert mine[own] == row[name], name
    frames = {(Path(row["input"]).stem, row["frame"]): row for row in rows(predicted / "frames.csv")}
    for row in rows(runs[0] / "predictions.csv"):
        mine = frames[row["video"], row["frame"]]
        assert float(mine["probability"]) == pytest.approx(float(row["probability"]), rel=1e-5)
        assert float(mine["width_cm"]) == pytest.approx(float(row["regression"]), rel=1e-5)


def test_the_p_value_is_the_rank_among_the_validation_videos(predicted: Path, runs: list[Path]) -> None:
    errors = {row["video"]: float(row["reconstruction_error"]) for row in rows(runs[0] / "validation_by_video.csv")}
    found = {Path(row["input"]).stem: row for row in rows(predicted / "predictions.csv")}
    for video, error in errors.items():
        rank = (1 + sum(other >= error for other in errors.values())) / (1 + len(errors))
        assert float(found[video]["p_like_training_data"]) == pytest.approx(rank, rel=1e-5)


def test_an_ensemble_has_the_means_of_its_runs(
    predicted: Path, runs: list[Path], phantom: Path, tmp_path: Path
) -> None:
    one, two, both = predicted, tmp_path / "two", tmp_path / "both"
    assert run(runs[1], phantom / "Batch1", "--out", two) == 0
    assert run(*runs, phantom / "Batch1", "--out", both) == 0
    of_one = {row["input"]: row for row in rows(one / "predictions.csv")}
    of_two = {row["input"]: row for row in rows(two / "predictions.csv")}
    together = rows(both / "predictions.csv")
    assert {row["input"] for row in together} == of_two.keys()
    for row in together:
        pair = [of_one[row["input"]], of_two[row["input"]]]
        for name in ("probability", "calibrated_probability", "threshold", "width_cm"):
            assert float(row[name]) == pytest.approx(fmean(float(x[name]) for x in pair), rel=1e-4)
        sd = pstdev(float(x["probability"]) for x in pair)
        assert float(row["probability_sd"]) == pytest.approx(sd, rel=1e-2, abs=1e-6)
        least = min(float(x["p_like_training_data"]) for x in pair)
        assert float(row["p_like_training_data"]) == pytest.approx(min(1, 2 * least), rel=1e-4)


def test_the_rows_from_python(predicted: Path, runs: list[Path], phantom: Path) -> None:
    videos = sorted((phantom / "Batch2").iterdir())[:5]
    found = list(predictions([runs[0]], [*videos, phantom / "MeasurementsList.csv"], device="cpu"))
    of_all = {row["input"]: row for row in rows(predicted / "predictions.csv")}
    for row in found[:5]:
        said = {name: f"{x:.6g}" if isinstance(x, float) else str(x) for name, x in row.items() if x is not None}
        assert said == {name: x for name, x in of_all[row["input"]].items() if name in said}
        assert len(said) >= 11
    assert len(found) > 5 and {row["status"] for row in found[5:]} == {"failed"}  # names without a suffix


def test_a_bad_file_costs_its_own_row_only(
    predicted: Path, runs: list[Path], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    good = sorted((phantom / "Batch1").iterdir())[:3]
    for path in good:
        shutil.copy(path, folder)
    content = good[0].read_bytes()
    (folder / "cut.avi").write_bytes(content[: len(content) // 2])
    (folder / "empty.avi").touch()
    (folder / "notes.txt").write_text("not a video")
    assert run(runs[0], folder, "--out", tmp_path / "out") == 0
    found = {Path(row["input"]).name: row for row in rows(tmp_path / "out" / "predictions.csv")}
    assert found.keys() == {*(path.name for path in good), "cut.avi", "empty.avi"}
    of_all = {Path(row["input"]).name: row for row in rows(predicted / "predictions.csv")}
    for path in good:
        assert found[path.name]["probability"] == of_all[path.name]["probability"]
    for name, reason in {"cut.avi": "truncated", "empty.avi": "empty file"}.items():
        assert found[name]["status"] == "failed" and reason in found[name]["reason"]
        assert found[name]["probability"] == ""
    assert "2 could not be read" in capsys.readouterr().out

    # The file is mended.
    shutil.copy(good[0], folder / "cut.avi")
    assert run(runs[0], folder, "--out", tmp_path / "out") == 0
    assert "5 of 5 videos have their rows already" in capsys.readouterr().out
    assert run(runs[0], folder, "--out", tmp_path / "out", "--retry-failed") == 0
    found = {Path(row["input"]).name: row for row in rows(tmp_path / "out" / "predictions.csv")}
    assert len(found) == 5 and found["cut.avi"]["status"] == "ok" and found["empty.avi"]["status"] == "failed"
    assert found["cut.avi"]["probability"] == found[good[0].name]["probability"]


def test_only_bad_files_are_an_error(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.avi").write_bytes(b"RIFF")
    assert run(runs[0], tmp_path / "a.avi", "--out", tmp_path / "out") == 3
    assert "none of the 1 videos could be read" in capsys.readouterr().err


def test_it_goes_on_after_a_kill_and_repeats_nothing(
    predicted: Path, runs: list[Path], phantom: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = [*map(str, (runs[0], phantom, "--out", out)), "--by-frame", "--no-progress", "--threads", "1"]
    process = start("cardiocaps.predict", *arguments)
    table = out / "predictions.csv"
    wait_for(lambda: table.exists() and table.read_text().count("\n") > 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # until its output is closed: then it has ended and left the folder
    before = table.read_text()
    whole = before[: before.rfind("\n") + 1]
    with table.open("a") as file:
        file.write(f"{phantom}/Batch9/cut off,ok")  # as a machine that loses power can leave it
    with (out / "frames.csv").open("a") as file:
        file.write(f"{phantom}/Batch9/another.avi,3,0.5,2\n")  # whose video has no row
    assert predict.main(arguments) == 0
    assert table.read_text().startswith(whole)
    for name in ("predictions.csv", "frames.csv"):
        assert rows(out / name) == rows(predicted / name)


def test_killed_at_any_change_of_a_file(runs: list[Path], phantom: Path, tmp_path: Path) -> None:
    videos = sorted((phantom / "Batch1").iterdir())[:2]
    arguments = [*map(str, (runs[0], *videos)), "--no-progress", "--threads", "1"]
    whole = tmp_path / "whole"
    assert predict.main([*arguments, "--out", str(whole)]) == 0
    for step in range(1, 100):
        out = tmp_path / str(step)
        was_killed = killed_before(step, lambda out=out: predict.main([*arguments, "--out", str(out)]))
        assert predict.main([*arguments, "--out", str(out)]) == 0
        assert (out / "predictions.csv").read_text() == (whole / "predictions.csv").read_text()
        if not was_killed:
            break
    assert step > 3


def test_dicom_files_by_their_content(runs: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    (folder / "study").mkdir(parents=True)
    write_dicom(folder / "study" / "IM0001", cine(1))
    write_dicom(folder / "still.dcm", cine(2)[:1], regions=[region()])
    (folder / "study" / "README").write_text("x" * 200)
    assert run(runs[0], folder, "--out", tmp_path / "out") == 0
    found = {Path(row["input"]).name: row for row in rows(tmp_path / "out" / "predictions.csv")}
    assert found.keys() == {"IM0001", "still.dcm"}
    assert {row["status"] for row in found.values()} == {"ok"}
    assert "no-region" in found["IM0001"]["flags"].split() and "still" not in found["IM0001"]["flags"].split()
    assert found["still.dcm"]["flags"].split().count("still") == 1


def test_flags_that_only_the_pixels_of_a_dicom_file_show(runs: list[Path], tmp_path: Path) -> None:
    folder, flow = tmp_path / "videos", np.repeat(cine(3)[..., None], 3, axis=3)
    flow[2, 40:50, 60:70] = (200, 20, 20)
    write_dicom(folder / "coloured.dcm", flow)
    write_dicom(folder / "frozen.dcm", np.repeat(cine(4, frames=1), 6, axis=0), regions=[region()])
    noise = np.random.default_rng(5).integers(60, 256, (6, HEIGHT, WIDTH), dtype=np.uint8)
    corners = {"RegionLocationMinX0": 40, "RegionLocationMaxX1": 87, "RegionLocationMinY0": 30}
    write_dicom(folder / "filled.dcm", noise, regions=[region(**corners, RegionLocationMaxY1=69)])
    assert run(*runs, folder, "--out", tmp_path / "out") == 0
    shown_by_pixels = {"coloured", "frozen", "filled"}
    for row in rows(tmp_path / "out" / "predictions.csv"):
        flags = row["flags"].split()
        assert shown_by_pixels & set(flags) == {Path(row["input"]).stem} and len(flags) == len(set(flags))


def test_a_table_of_paths(runs: list[Path], phantom: Path, predicted: Path, tmp_path: Path) -> None:
    videos = sorted((phantom / "Batch2").iterdir())[:2]
    table = tmp_path / "list.csv"
    table.write_text("study,clip\n" + "".join(f"{i},{path}\n" for i, path in enumerate([*videos, videos[0], "no.avi"])))
    assert run(runs[0], table, "--path-column", "clip", "--out", tmp_path / "out") == 0
    found = rows(tmp_path / "out" / "predictions.csv")
    assert [row["input"] for row in found] == [*map(str, videos), "no.avi"]
    assert found[2]["reason"] == "no such file"
    of_all = {row["input"]: row for row in rows(predicted / "predictions.csv")}
    assert found[0]["probability"] == of_all[str(videos[0])]["probability"]


def test_each_video_has_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "1.avi").touch()
        Path(folder, "t.csv").write_text("path\n1.avi\nmemory://bucket/1.avi\n")
    Path("b", "t.csv").write_text("path\n1.avi\nb/1.avi\n")
    Path("a", "twice.csv").write_text("path\n1.avi\n1.avi\n")
    found = find([Path("a/t.csv"), Path("a/twice.csv"), Path("b/t.csv"), Path("b"), Path("a/1.avi")])
    places = {one.name: one.url or str(one.path) for one in found}
    assert places == {
        "1.avi": "a/1.avi",
        "memory://bucket/1.avi": "memory://bucket/1.avi",
        "b/1.avi": "b/1.avi",
        "b/b/1.avi": "b/b/1.avi",
    }
    assert len(found) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.joinpath("decision.json").unlink(), "the threshold is 0.5"),
        (lambda run: run.joinpath("calibration.json").unlink(), "keeps no calibration"),
        (lambda run: run.joinpath("familiarity.json").unlink(), "cannot tell videos that are unlike its data"),
    ],
)
def test_what_an_older_run_lacks_is_said(
    change, message: str, runs: list[Path], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    older = tmp_path / "older"
    shutil.copytree(runs[0], older)
    change(older)
    video = sorted((phantom / "Batch1").iterdir())[0]
    assert run(older, video, "--out", tmp_path / "out") == 0
    assert message in capsys.readouterr().out
    (row,) = rows(tmp_path / "out" / "predictions.csv")
    assert row["status"] == "ok"
    assert (row["p_like_training_data"] == "") == ("unlike" in message)
    assert (row["calibrated_probability"] == row["probability"]) == ("calibration" in message)


def test_a_folder_of_other_results_is_refused(
    predicted: Path, runs: list[Path], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (predicted / "predictions.csv").read_text()
    assert run(runs[1], phantom, "--out", predicted, "--by-frame") == 4
    assert "predictions with other runs; choose a new folder" in capsys.readouterr().err
    assert run(runs[0], phantom, "--out", predicted) == 4
    assert "predictions with other by_frame" in capsys.readouterr().err
    assert (predicted / "predictions.csv").read_text() == before
    (tmp_path / "mine.txt").touch()
    assert run(runs[0], phantom, "--out", tmp_path) == 4
    assert "holds other files" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_wrong_arguments(runs: list[Path], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[tuple[list[Path | str], int, str]] = [
        ([runs[0], tmp_path / "none.avi"], 2, "none.avi does not exist"),
        ([runs[0], runs[0], phantom], 2, "the same weights"),
        ([runs[0], runs[0].parent / "cache"], 3, "no video in "),
    ]
    for arguments, status, message in cases:
        assert run(*arguments, "--out", tmp_path / "out") == status
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
        assert not (tmp_path / "out").exists()
    for arguments, message in (([phantom], "expected the folder of a run"), ([runs[0]], "INPUT is missing")):
        with pytest.raises(SystemExit, match="2"):
            run(*arguments, "--out", tmp_path / "out")
        assert message in capsys.readouterr().err


def test_links_that_leave_a_folder(runs: list[Path], phantom: Path, tmp_path: Path) -> None:
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "a.avi").symlink_to(sorted((phantom / "Batch1").iterdir())[0])
    assert run(runs[0], folder, "--out", tmp_path / "one") == 3
    assert "--follow-links" in rows(tmp_path / "one" / "predictions.csv")[0]["reason"]
    assert run(runs[0], folder, "--out", tmp_path / "two", "--follow-links") == 0


def test_a_run_keeps_its_calibration_and_its_errors(runs: list[Path]) -> None:
    weights = read_json(runs[0] / "decision.json", "cardiocaps decision", Decision.from_dict, AssertionError).weights
    calibration, familiarity = (
        read(runs[0] / name, weights)
        for read, name in ((read_calibration, "calibration.json"), (read_familiarity, "familiarity.json"))
    )
    assert calibration is not None and calibration.method == "temperature" and calibration.scale != 1
    assert familiarity is not None and len(familiarity.errors) == len(rows(runs[0] / "validation_by_video.csv"))
    assert read_calibration(runs[0] / "calibration.json", "other weights") is None
