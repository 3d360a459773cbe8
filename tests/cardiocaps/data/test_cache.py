import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cardiocaps.data import Clip, Study, cache, read_folder
from cardiocaps.data.video import resize
from cardiocaps.errors import ConfigError, DataError, OutputError

from .sample_videos import (
    Frames,
    claim_frames,
    cut,
    encode,
    measurement,
    picture,
    split_of,
    write_folder,
    write_table,
)

OPTIONS = {"size": 24, "frames_per_clip": 5}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are decoded from here on."""
    names: list[str] = []
    read_frames = cache.read_frames
    monkeypatch.setattr(cache, "read_frames", lambda p, i, s: names.append(p.stem) or read_frames(p, i, s))
    return names


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 2000 bytes, as on a disk that is full. Nor the test report, hence no fixture."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def arrays(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"))


def all_frames(cached: cache.Cached, clip: Clip) -> Frames:
    """uint8 [T, 3, S, S]"""
    return np.stack([cached.frame(clip, i) for i in range(len(cached.numbers[clip.path]))])


def test_spread_frames_by_hand() -> None:
    assert cache.choose_frames(10, 5, "spread").tolist() == [1, 3, 5, 7, 9]
    assert cache.choose_frames(10, 1, "spread").tolist() == [5]
    assert cache.choose_frames(10, 4, "first").tolist() == [0, 1, 2, 3]


@given(st.integers(1, 5000), st.integers(1, 300), st.sampled_from(cache.FRAME_CHOICES))
def test_chosen_frames_exist_once_each(count: int, wanted: int, choice: str) -> None:
    numbers = cache.choose_frames(count, wanted, choice)
    assert len(numbers) == min(count, wanted)
    assert numbers[0] >= 0 and numbers[-1] < count and (np.diff(numbers) > 0).all()
    if choice == "spread":
        assert abs(int(numbers[0]) - (count - 1 - int(numbers[-1]))) <= 1  # as far from the start as from the end
        assert np.ptp(np.diff(numbers)) <= 1 if len(numbers) > 1 else True


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"frames_per_clip": 0}, "frames_per_clip must be at least 1, got 0"),
        ({"frame_choice": "random"}, "frame_choice must be one of spread, first, got 'random'"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_options_are_checked(shared_folder: Path, tmp_path: Path, options: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        cache.build(read_folder(shared_folder), folder=tmp_path, **(OPTIONS | options))


def test_cached_frames_are_the_videos(shared_folder: Path, tmp_path: Path) -> None:
    cached = cache.build(read_folder(shared_folder), folder=tmp_path / "new", **OPTIONS)
    for i, clip in enumerate(cached.study.clips):
        frames = all_frames(cached, clip)
        numbers = cached.numbers[clip.path]
        assert frames.dtype == np.uint8 and frames.shape == (5, 3, 24, 24)
        assert numbers.tolist() == [1, 3, 6, 8, 10]
        difference = frames.astype(int) - resize(picture(seed=i)[numbers], 24)
        assert float(np.abs(difference).mean()) < 6
    assert not list((tmp_path / "new").glob("*.part"))
    assert (tmp_path / "new").stat().st_mode & 0o077 == 0


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_frames_leave_no_file_open(shared_folder: Path, tmp_path: Path) -> None:
    """Thousands of videos would be more than a process may have open."""
    cached = cache.build(read_folder(shared_folder), folder=tmp_path, **OPTIONS)
    before = len(list(Path("/proc/self/fd").iterdir()))
    frames = [all_frames(cached, clip) for clip in cached.study.clips]
    assert len(list(Path("/proc/self/fd").iterdir())) == before and len(frames) == 8


def test_a_second_run_decodes_and_reads_nothing(
    shared_folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_folder(shared_folder)
    first = cache.build(study, folder=tmp_path, **OPTIONS)
    assert len(decoded) == 8
    monkeypatch.setattr(cache, "probe", lambda path: pytest.fail("the index knows this video"))
    monkeypatch.setattr(cache.hashlib, "file_digest", lambda *a: pytest.fail("the index knows this video"))
    second = cache.build(study, folder=tmp_path, **OPTIONS)
    assert len(decoded) == 8 and first.files == second.files and first.study == second.study


def test_other_settings_have_other_files(shared_folder: Path, tmp_path: Path) -> None:
    study = read_folder(shared_folder)
    changes: list[dict[str, object]] = [{}, {"size": 25}, {"frames_per_clip": 4}, {"frame_choice": "first"}]
    for count, change in enumerate(changes, 1):
        cached = cache.build(study, folder=tmp_path, **(OPTIONS | change))
        assert len(arrays(tmp_path)) == 8 * count
    assert cached.numbers[study.clips[0].path].tolist() == [0, 1, 2, 3, 4]


def test_another_resize_has_other_files(
    shared_folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_folder(shared_folder)
    cache.build(study, folder=tmp_path, **OPTIONS)
    monkeypatch.setattr(cache, "RESIZE_VERSION", 99)
    cache.build(study, folder=tmp_path, **OPTIONS)
    assert len(decoded) == 16


def test_a_changed_video_is_decoded_anew(tmp_path: Path, decoded: list[str]) -> None:
    study = read_folder(write_folder(tmp_path / "root"))
    before = cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    clip = study.clips[2]
    old = all_frames(before, clip)
    encode(clip.path, picture(seed=77))
    os.utime(clip.path, ns=(1, time.time_ns() + 1))
    after = cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    assert decoded[8:] == [clip.name]
    assert not np.array_equal(all_frames(after, clip), old)


def test_a_touched_or_moved_video_is_not_decoded_anew(tmp_path: Path, decoded: list[str]) -> None:
    root = write_folder(tmp_path / "root")
    cache.build(read_folder(root), folder=tmp_path / "cache", **OPTIONS)
    moved = root.rename(tmp_path / "moved")
    os.utime(moved / "Batch1" / "0X0000000000000000.avi", ns=(1, 1))
    cache.build(read_folder(moved), folder=tmp_path / "cache", **OPTIONS)
    assert len(decoded) == 8


def damage_by_cutting(file: Path) -> None:
    cut(file, 0.7)


def damage_by_emptying(file: Path) -> None:
    file.write_bytes(b"")


def damage_by_text(file: Path) -> None:
    file.write_text("no array")


def damage_by_pickle(file: Path) -> None:
    np.save(file.with_suffix(".npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)


def damage_by_shape(file: Path) -> None:
    np.save(file, np.zeros((4, 3, 24, 24), np.uint8))


@pytest.mark.parametrize(
    "damage",
    [damage_by_cutting, damage_by_emptying, damage_by_text, damage_by_pickle, damage_by_shape, Path.unlink],
)
def test_a_damaged_file_is_rebuilt(
    shared_folder: Path, tmp_path: Path, decoded: list[str], damage: Callable[[Path], None]
) -> None:
    study = read_folder(shared_folder)
    cached = cache.build(study, folder=tmp_path, **OPTIONS)
    file = cached.files[study.clips[3].path]
    good = file.read_bytes()
    damage(file)
    cache.build(study, folder=tmp_path, **OPTIONS)
    assert decoded[8:] == [study.clips[3].name] and file.read_bytes() == good


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', '{"/a": {"size": 1}}', "\udcff"])
def test_a_damaged_index_only_costs_time(shared_folder: Path, tmp_path: Path, decoded: list[str], text: str) -> None:
    study = read_folder(shared_folder)
    cache.build(study, folder=tmp_path, **OPTIONS)
    (tmp_path / "index.json").write_bytes(text.encode(errors="surrogateescape"))
    cache.build(study, folder=tmp_path, **OPTIONS)
    assert len(decoded) == 8 and len(json.loads((tmp_path / "index.json").read_text())) == 8


def test_the_index_keeps_what_other_runs_wrote(tmp_path: Path) -> None:
    studies = [read_folder(write_folder(tmp_path / name)) for name in ("a", "b")]
    for study in studies:
        cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    assert len(json.loads((tmp_path / "cache" / "index.json").read_text())) == 16


def test_the_number_of_workers_changes_nothing(shared_folder: Path, tmp_path: Path) -> None:
    study = read_folder(shared_folder)
    one = cache.build(study, folder=tmp_path / "1", workers=1, **OPTIONS)
    four = cache.build(study, folder=tmp_path / "4", workers=4, **OPTIONS)
    assert one.study == four.study and list(one.files) == list(four.files)
    for a, b in zip(arrays(tmp_path / "1"), arrays(tmp_path / "4"), strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()


def test_a_cache_that_cannot_be_a_folder(shared_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=f"cannot write {folder}"):
            cache.build(read_folder(shared_folder), folder=folder, **OPTIONS)


def test_a_full_disk_is_named_and_leaves_nothing_half(shared_folder: Path, tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OutputError, match=r"cannot write .*(no space left|size limit)"):
        cache.build(read_folder(shared_folder), folder=tmp_path / "cache", **OPTIONS)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix in (".npy", ".part")] == []


def test_an_error_does_not_wait_for_the_other_videos(
    shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []

    def slow(path: Path) -> None:
        begun.append(path)
        time.sleep(0.1)
        raise OutputError("the first one")

    monkeypatch.setattr(cache, "probe", slow)
    with pytest.raises(OutputError, match="the first one"):
        cache.build(read_folder(shared_folder), folder=tmp_path, workers=1, **OPTIONS)
    assert len(begun) < 5


@pytest.fixture
def half_bad(tmp_path: Path) -> Study:
    """Sixteen videos, of which the first four turn out unusable."""
    root = write_folder(tmp_path / "root", 16)
    study = read_folder(root)
    paths = [clip.path for clip in study.clips]
    cut(paths[0])
    paths[1].write_text("not a video " * 40)
    claim_frames(paths[2], 2_000_000_000)
    encode(paths[3], picture(7))
    return study


def test_videos_that_do_not_decode_are_left_out_with_a_reason(half_bad: Study, tmp_path: Path) -> None:
    cached = cache.build(half_bad, folder=tmp_path / "cache", max_bad_share=0.25, **OPTIONS)
    assert [clip.name for clip in cached.study.clips] == [clip.name for clip in half_bad.clips[4:]]
    problems = [(problem.where[-1], problem.kind) for problem in cached.study.problems]
    assert problems == [
        ("0", "truncated"),
        ("1", "not a readable video"),
        ("2", "absurd frame count"),
        ("3", "table and file disagree"),
    ]
    assert cached.study.problems[3].reason == "table and file disagree: table says 12 frames, file has 7"
    assert set(cached.files) == {clip.path for clip in cached.study.clips}


def test_too_many_of_them_stop_the_run(half_bad: Study, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"4 of 16 videos .* allows 3; the first: 0X0+: truncated: \d+ of 12 frames"):
        cache.build(half_bad, folder=tmp_path / "cache", max_bad_share=0.2, **OPTIONS)


def test_a_split_that_loses_a_class_stops_the_run(tmp_path: Path) -> None:
    study = read_folder(write_folder(tmp_path / "root"))
    cut(study.clips[4].path)
    with pytest.raises(DataError, match="val: 0 normal, 1 abnormal"):
        cache.build(study, folder=tmp_path / "cache", max_bad_share=1, **OPTIONS)


@pytest.mark.parametrize(
    "claim, reason",
    [
        ({"width": 32}, "table and file disagree: table says 32 pixels width, file has 64"),
        (
            {"frames": 60, "height": 64},
            "disagree: table says 60 frames, file has 12, 64 pixels height, file has 48",
        ),
    ],
)
def test_a_table_that_disagrees_with_its_video(
    shared_folder: Path, tmp_path: Path, claim: dict[str, int], reason: str
) -> None:
    study = read_folder(shared_folder)
    name = study.clips[0].name
    study = replace(study, claims={**study.claims, name: replace(study.claims[name], **claim)})
    for _ in range(2):  # with a warm cache too
        cached = cache.build(study, folder=tmp_path, max_bad_share=0.2, **OPTIONS)
        (problem,) = cached.study.problems
        assert problem.where == name and problem.reason.endswith(reason) and len(cached.study.clips) == 7


def test_a_wrong_frame_rate_is_worth_a_note(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "root")
    rows = [
        measurement(f"0X{i:016X}", "IVSd", 1.4 if i % 2 else 0.8, split=split_of(i), FPS=30 if i == 2 else 49.8)
        for i in range(8)
    ]
    write_table(root, rows)
    cached = cache.build(read_folder(root), folder=tmp_path / "cache", max_bad_share=0, **OPTIONS)
    assert len(cached.study.clips) == 8
    (problem,) = cached.study.problems
    assert problem.reason == "frame rates disagree (kept): table says 30 a second, file has 50"


def test_one_video_under_two_names_in_two_splits_is_reported(tmp_path: Path) -> None:
    study = read_folder(write_folder(tmp_path / "root"))
    for copy, original in ((1, 0), (7, 2)):
        study.clips[copy].path.write_bytes(study.clips[original].path.read_bytes())
    cached = cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    (problem,) = cached.study.problems  # the other copy stands in the same split
    assert problem.where == study.clips[7].name
    assert problem.reason == f"same video in another split (kept): {study.clips[2].name}"


@pytest.mark.parametrize(
    "environment, wanted",
    [
        ({"CARDIOCAPS_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/cardiocaps"),
        ({"HOME": "/c"}, "/c/.cache/cardiocaps"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CARDIOCAPS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.default_folder() == Path(wanted)


def test_the_bar_waits_two_seconds(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(cache._shown(iter("abc"), 3, True)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
    clock = iter(range(0, 100, 3))
    monkeypatch.setattr(cache.time, "monotonic", lambda: next(clock))
    assert list(cache._shown(iter("abc"), 3, True)) == ["a", "b", "c"]
    output = capsys.readouterr()
    assert output.out == "" and "3/3" in output.err
    assert list(cache._shown(iter("abc"), 3, False)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_real_echocardiogram_goes_through(tmp_path: Path, echocardiogram: Frames) -> None:
    root, rows = tmp_path / "root", []
    for i in range(8):
        frames = echocardiogram[3 * i : 3 * i + 9]
        codec, suffix = ("mjpeg", "avi") if i % 2 else ("mpeg4", "mp4")
        encode(root / f"Batch{1 + i % 4}" / f"0X{i}.{suffix}", frames, codec)
        size = {"Frames": len(frames), "Width": 320, "Height": 240}
        rows.append(measurement(f"0X{i}", "IVSd", 1.4 if i in (1, 2, 4, 6) else 0.8, split=split_of(i), **size))
    write_table(root, rows)
    cached = cache.build(
        read_folder(root), size=182, frames_per_clip=3, frame_choice="spread", folder=tmp_path / "cache"
    )
    assert cached.study.problems == () and len(cached.study.clips) == 8
    for i, clip in enumerate(cached.study.clips):
        wanted = resize(echocardiogram[3 * i + cached.numbers[clip.path]], 182)
        assert float(np.abs(all_frames(cached, clip).astype(int) - wanted).mean()) < 3
