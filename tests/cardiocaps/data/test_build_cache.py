"""`python -m cardiocaps.data build-cache`: the cache of a training, made here or by the actors of Ray."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from cardiocaps.config import TrainConfig
from cardiocaps.data import __main__ as program
from cardiocaps.data import cache, on_ray
from cardiocaps.data.open import decoded, read_study
from cardiocaps.errors import ConfigError, OutputError
from cardiocaps.phantom import write_phantom

from ..kills import ACTOR, striking
from ..programs import descendants

FRAMES = ["--frames-per-clip", "3", "--no-progress"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom of 40 videos, of which one cannot be read."""
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, 40, 3, processes=1)
    next(folder.glob("Batch1/*.avi")).write_bytes(b"no video")
    return folder


def _built(data: Path, folder: Path, *more: str) -> dict[str, bytes]:
    """The frames in the cache, after the program has built it."""
    assert program.main(["build-cache", str(data), "--cache-dir", str(folder), *FRAMES, *more]) == 0
    return {file.name: file.read_bytes() for file in folder.glob("*.npy")}


@pytest.fixture(scope="module")
def here(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return _built(data, tmp_path_factory.mktemp("cache"))


def test_a_training_finds_its_frames(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = TrainConfig(data=data, cache_dir=tmp_path, frames_per_clip=3, progress=False).resolved()
    assert len(_built(data, tmp_path)) == 39
    said = capsys.readouterr().out
    assert "1 problems:" in said and f"39 videos of {data} are in {tmp_path}, " in said
    assert said.endswith("; 39 of them were decoded now\n")
    monkeypatch.setattr(cache, "read_frames", lambda *_: pytest.fail("decoded again"))
    assert len(decoded(config, read_study(config)).frames) == 39
    _built(data, tmp_path)
    assert capsys.readouterr().out.endswith("; 0 of them were decoded now\n")


def test_the_index_is_kept_while_videos_are_decoded(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a run that is killed loses little of what it has read."""
    monkeypatch.setattr(cache, "_SAVED_EVERY", 0.0)
    counts: list[int] = []
    save = cache._save_index
    monkeypatch.setattr(cache, "_save_index", lambda file, index: (counts.append(len(index)), save(file, index)))
    _built(data, tmp_path)
    assert counts == list(range(1, 40))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_ray_makes_the_same_files_whatever_is_killed(
    data: Path,
    here: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("ray", reason="needs the extra cluster")
    monkeypatch.setattr(on_ray, "_AT_A_TIME", 2)

    def working() -> list[int]:
        return descendants(ACTOR) if any(tmp_path.glob("*.npy")) else []

    with striking(working, random.uniform(0, 0.05)) as killed:
        assert _built(data, tmp_path, "--engine", "ray", "--workers", "1") == here
    assert killed
    said = capsys.readouterr().out
    assert "1 problems:" in said and f"39 videos of {data} are in {tmp_path}, " in said
    monkeypatch.setattr(cache, "read_frames", lambda *_: pytest.fail("decoded again"))
    assert _built(data, tmp_path) == here


def _one(data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[Any, Any], Path]:
    """Decode with actors in place of Ray's: what one of them found of a video, by its path."""

    def mapped(_: Any, items: Any, make: Any, arguments: Any, **options: Any) -> Any:
        return enumerate(make(*arguments)(items))

    monkeypatch.setattr(on_ray, "mapped_on_ray", mapped)
    path = sorted(data.glob("Batch2/*.avi"))[0]
    decoder = cache.Decoder(folder, 16, 3, "spread", "pyav")
    with on_ray.on_ray(None)(decoder, {path: None}) as results:  # type: ignore[arg-type]
        return dict(results), path


def test_a_file_that_comes_late_is_waited_for(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has, asked = cache.Decoder.has, []
    monkeypatch.setattr(cache.Decoder, "has", lambda self, one: asked.append(1) or (len(asked) > 2 and has(self, one)))
    found, path = _one(data, tmp_path, monkeypatch)
    assert len(asked) == 3 and found[path].decoded and found[path].file.parent == tmp_path


def test_a_folder_that_is_not_shared(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "LAG", 0.1)
    with monkeypatch.context() as without, pytest.raises(OutputError, match="not to be seen here after"):
        without.setattr(cache.Decoder, "has", lambda *_: False)
        _one(data, tmp_path, without)
    with pytest.raises(ConfigError, match=r"cache_dir is .*, which .* does not see; expected a folder that all"):
        _one(data, tmp_path / "missing", monkeypatch)


def test_mistakes_in_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        program.main(["build-cache", str(data), "--workers", "2"])
    assert stop.value.code == 2 and "--address and --workers: are of --engine ray" in capsys.readouterr().err
    shutil.copytree(data, tmp_path / "data")
    for video in (tmp_path / "data").glob("Batch*/*.avi"):
        video.write_bytes(b"no video")
    cache_dir = ["--cache-dir", str(tmp_path / "cache")]
    assert program.main(["build-cache", str(tmp_path / "data"), *cache_dir, *FRAMES]) == 3
    assert "40 of 40 videos" in capsys.readouterr().err
