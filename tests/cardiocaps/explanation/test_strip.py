"""Maps in the report of a prediction: `python -m cardiocaps.predict --report --maps`."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cardiocaps import predict
from cardiocaps.explanation import strip as strips
from cardiocaps.explanation.strip import over_time, strip
from cardiocaps.prediction.report import maps_of, picture_of

from ..killed import killed_before


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(content)).convert("RGB")).astype(int)


def test_a_map_is_laid_over_each_frame_at_its_place() -> None:
    rng = np.random.default_rng()
    frames = np.repeat(rng.integers(30, 90, (12, 1, 1, 1), np.uint8), 3, axis=1).repeat(32, 2).repeat(32, 3)
    here = np.zeros((12, 32, 32), np.float32)
    here[:, :16, :16] = 2.0
    here[6, :16, :16] = 4.0
    picture = decoded(strip(frames, {"capsules": here, "gradcam": -here}, aspect=1.5))
    assert picture.shape == (288, 216 + 4 * 108, 3)
    brightest = np.array([253, 231, 37])  # the last colour of viridis
    grey = frames[:, 0, 0, 0].astype(float)
    middle = 0.25 * grey[6] + 0.75 * brightest
    assert picture[30, 50] == pytest.approx(middle, abs=6), "the largest value of the video"
    assert picture[110, 170] == pytest.approx([grey[6]] * 3, abs=3), "nothing where the map is 0"
    chosen = over_time(12)
    assert (len(chosen), chosen[0], chosen[-1], sorted(set(chosen))) == (8, 0, 11, chosen)
    for place, frame in enumerate(chosen):
        top, left = 72 * (place // 4), 216 + 108 * (place % 4)
        assert picture[top + 60, left + 90] == pytest.approx([grey[frame]] * 3, abs=3)
        assert picture[144 + top + 15, left + 25] == pytest.approx([grey[frame]] * 3, abs=3), "negative values"
        if frame != 6:  # half of the largest value: half as opaque, in the colour of the middle
            mixed = 0.625 * grey[frame] + 0.375 * np.array([33, 145, 140])
            assert picture[top + 15, left + 25] == pytest.approx(mixed, abs=8)


def test_few_frames_are_all_shown() -> None:
    assert [list(over_time(n)) for n in (1, 2, 8)] == [[0], [0, 1], list(range(8))]


def videos_of(phantom: Path) -> list[Path]:
    return sorted((phantom / "Batch2").iterdir())[:2]


def run(*arguments: Path | str) -> int:
    return predict.main([*map(str, arguments), "--report", "--maps", "--threads", "1", "--no-progress"])


def test_the_report_shows_the_maps(
    runs: list[Path], phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = tmp_path / "damaged.avi"
    damaged.write_bytes(b"RIFF0000AVI ")
    videos = [*videos_of(phantom), damaged]
    out = tmp_path / "out"
    assert run(runs[0], *videos, "--out", out) == 0
    assert json.loads((out / "predict.json").read_text())["maps"] == ["capsules", "gradcam"]
    page = (out / "report.html").read_text()
    assert "Research use only" in page and "its Grad-CAM" in page
    for video in videos[:2]:
        with Image.open(out / maps_of(str(video))) as image:
            assert image.height == 288
            size = f'width="{image.width // 2}" height="144"'
        shown = f'<img class="maps" loading="lazy" decoding="async" {size} src="{maps_of(str(video))}"'
        assert page.count(shown) == 1 and (out / picture_of(str(video))).is_file()
    assert len(list((out / "maps").iterdir())) == 2 and page.count('class="maps"') == 2
    assert not any(video.stem in path.name for video in videos for path in out.rglob("*"))
    assert decoded((out / maps_of(str(videos[0]))).read_bytes()).std() > 5
    # Without captum the other method is left, and that is another folder.
    monkeypatch.setattr(strips, "find_spec", lambda name: None)
    assert run(runs[0], *videos, "--out", out) == 4
    assert run(runs[0], *videos, "--out", tmp_path / "without") == 0
    with Image.open(tmp_path / "without" / maps_of(str(videos[0]))) as image:
        assert image.height == 144
    assert "Grad-CAM" not in (tmp_path / "without" / "report.html").read_text()


def test_killed_at_any_change_of_a_file(
    runs: list[Path], phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "find_spec", lambda name: None)
    arguments = (runs[0], *videos_of(phantom))
    whole = tmp_path / "whole"
    assert run(*arguments, "--out", whole) == 0
    wanted = {path.relative_to(whole): path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    for step in range(1, 100, 4):
        out = tmp_path / str(step)
        was_killed = killed_before(step, lambda out=out: run(*arguments, "--out", out))
        assert run(*arguments, "--out", out) == 0
        found = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
        assert found == wanted
        if not was_killed:
            break
    assert step > 4


def test_wrong_arguments(runs: list[Path], phantom: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (video, _), out = videos_of(phantom), str(tmp_path / "out")
    with pytest.raises(SystemExit):
        predict.main([str(runs[0]), str(video), "--out", out, "--maps"])
    assert "--maps: shown in the report; give --report too" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(*runs, video, "--out", out)
    assert "--maps: explains one network; give one RUN" in capsys.readouterr().err
    assert not Path(out).exists()
