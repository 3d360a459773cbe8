import errno
import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cardiocaps.data import cache
from cardiocaps.data.echonet_lvh.reader import read_folder
from cardiocaps.data.study import Clip, Study
from cardiocaps.data.video import resize
from cardiocaps.errors import DataError, OutputError
from cardiocaps.runtime import progress

from .sample_videos import (
    Frames,
    claim_frames,
    cut,
    encode,
    measurement,
    overwrite,
    picture,
    remux,
    split_of,
    within,
    write_folder,
    write_table,
)

OPTIONS = {"size": 24, "frames_per_clip": 5}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the videos that are decoded from here on."""
    names: list[str] = []
    read_frames = cache.read_frames
    monkeypatch.setattr(cache, "read_frames", lambda p, *rest: names.append(p.stem) or read_frames(p, *rest))
    return names


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 2000 bytes, as on a full disk.

    A context manager and not a fixture: the limit would also stop pytest from writing its report.
    """
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def arrays(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.npy"))


def files(cached: cache.Cached) -> list[Path]:
    return [frames.file for frames in cached.frames.values()]


def all_frames(cached: cache.Cached, clip: Clip) -> Frames:
    """uint8 [T, 3, S, S]"""
    return np.stack([cached.frame(clip, i) for i in range(len(cached.frames[clip.path].numbers))])


def test_spread_frames_by_hand() -> None:
    assert cache.choose_frames(10, 5, "spread").tolist() == [1, 3, 5, 7, 9]
    assert cache.choose_frames(10, 1, "spread").tolist() == [5]
    assert cache.choose_frames(10, 4, "first").tolist() == [0, 1, 2, 3]


@given(st.integers(1, 5000), st.integers(1, 300), st.sampled_from(["spread", "first"]))
def test_chosen_frames_exist_once_each(count: int, wanted: int, choice: str) -> None:
    numbers = cache.choose_frames(count, wanted, choice)
    assert len(numbers) == min(count, wanted)
    assert numbers[0] >= 0 and numbers[-1] < count and (np.diff(numbers) > 0).all()
    if choice == "spread":
        assert abs(int(numbers[0]) - (count - 1 - int(numbers[-1]))) <= 1  # as far from the start as from the end
        assert np.ptp(np.diff(numbers)) <= 1 if len(numbers) > 1 else True


def test_cached_frames_are_the_videos(shared_folder: Path, tmp_path: Path) -> None:
    cached = cache.build(read_folder(shared_folder), folder=tmp_path / "new", **OPTIONS)
    for i, clip in enumerate(cached.study.clips):
        frames = all_frames(cached, clip)
        numbers = cached.frames[clip.path].numbers
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
    assert len(decoded) == 8 and files(first) == files(second) and first.study == second.study


def test_other_settings_have_other_files(shared_folder: Path, tmp_path: Path) -> None:
    study = read_folder(shared_folder)
    changes: list[dict[str, object]] = [{}, {"size": 25}, {"frames_per_clip": 4}, {"frame_choice": "first"}]
    for count, change in enumerate(changes, 1):
        cached = cache.build(study, folder=tmp_path, **(OPTIONS | change))
        assert len(arrays(tmp_path)) == 8 * count
    assert cached.frames[study.clips[0].path].numbers.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("version", ["RESIZE_VERSION", "READER_VERSION"])
def test_another_version_has_other_files(
    version: str, shared_folder: Path, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_folder(shared_folder)
    cache.build(study, folder=tmp_path, **OPTIONS)
    monkeypatch.setattr(cache, version, 99)
    cache.build(study, folder=tmp_path, **OPTIONS)
    assert len(decoded) == 16


def test_frames_of_decord_are_not_taken_for_those_of_pyav(tmp_path: Path) -> None:
    study = read_folder(write_folder(tmp_path / "root", 16))
    damaged = study.clips[2]
    place = damaged.path.read_bytes().index(b"\xff\xda", damaged.path.stat().st_size // 2) + 100
    overwrite(damaged.path, place, bytes(512))
    options = OPTIONS | {"folder": tmp_path / "cache", "max_bad_share": 0.1}
    assert damaged in cache.build(study, reader="decord", **options).study.clips, "decord says nothing of damage"
    strict = cache.build(study, **options).study
    assert damaged not in strict.clips and [problem.where for problem in strict.problems] == [damaged.name]
    assert damaged in cache.build(study, reader="decord", **options).study.clips


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


def test_a_video_changed_at_equal_size_and_time_is_noticed(tmp_path: Path, decoded: list[str]) -> None:
    study = read_folder(write_folder(tmp_path / "root"))
    before = cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    other, *_, clip = sorted(study.clips, key=lambda clip: clip.path.stat().st_size)
    old, status = all_frames(before, clip), clip.path.stat()
    clip.path.write_bytes(other.path.read_bytes().ljust(status.st_size, b"\0"))
    os.utime(clip.path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (clip.path.stat().st_size, clip.path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    assert decoded[8:] == [clip.name] and not np.array_equal(all_frames(after, clip), old)


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_head_middle_and_tail_are_looked_at(tmp_path: Path, place: float) -> None:
    file = tmp_path / "file"
    content = bytearray(np.random.default_rng(0).bytes(100_000))
    file.write_bytes(content)
    before = cache._sample(file, len(content))
    content[round(place * (len(content) - 1))] ^= 1
    file.write_bytes(content)
    assert cache._sample(file, len(content)) != before


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
    file = cached.frames[study.clips[3].path].file
    good = file.read_bytes()
    damage(file)
    cache.build(study, folder=tmp_path, **OPTIONS)
    assert decoded[8:] == [study.clips[3].name] and file.read_bytes() == good


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '"a"', "7", "null", '{"a": 1}', '{"/a": {"size": 1}}', "\udcff", "[" * 100_000, '{"a":' * 100_000],
)
def test_a_damaged_index_only_costs_time(shared_folder: Path, tmp_path: Path, decoded: list[str], text: str) -> None:
    study = read_folder(shared_folder)
    cache.build(study, folder=tmp_path, **OPTIONS)
    (tmp_path / "index.json").write_bytes(text.encode(errors="surrogateescape"))
    cache.build(study, folder=tmp_path, **OPTIONS)
    assert len(decoded) == 8 and len(json.loads((tmp_path / "index.json").read_text())) == 8


WRONG: dict[str, Any] = {
    "size": "7",
    "mtime_ns": 1.5,
    "sha256": None,
    "sample": [],
    "header": {},
    "check": "0" * 64,
    "other": 1,
    "frames": -12,
    "width": "64",
    "height": 10**9,
    "fps": float("nan"),
    "claimed": True,
    "turned": 0,
    "form": 7,
}


@pytest.mark.parametrize("name", WRONG)
def test_a_damaged_entry_of_the_index_only_costs_time(
    name: str, shared_folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    """Wrong values, missing ones (but those that are equal to the default), and entries of another kind."""
    study = read_folder(shared_folder)
    first = cache.build(study, folder=tmp_path, **OPTIONS)
    index = tmp_path / "index.json"
    good = json.loads(index.read_text())
    wrong, missing, nothing, number, kept, *_ = good
    damaged = json.loads(index.read_text())
    for entry in (damaged[wrong], damaged[missing]):
        part = entry["header"] if name in entry["header"] else entry
        part[name] = WRONG[name]
    del part[name]
    damaged |= {nothing: {}, number: 7}
    index.write_text(json.dumps(damaged))
    assert set(cache._read_index(index)) & {Path(wrong), Path(nothing), Path(number), Path(kept)} == {Path(kept)}
    assert (Path(missing) in cache._read_index(index)) == (name in ("other", "claimed", "turned"))
    second = cache.build(study, folder=tmp_path, **OPTIONS)
    assert second.study == first.study and files(second) == files(first)
    assert json.loads(index.read_text()) == good and len(decoded) == 8


@pytest.mark.parametrize("kind", ["fifo", "device", "link"])
@pytest.mark.parametrize("what", ["index.json", "*.npy"])
def test_what_is_no_file_is_replaced(
    shared_folder: Path, tmp_path: Path, decoded: list[str], kind: str, what: str
) -> None:
    study = read_folder(shared_folder)
    folder = tmp_path / "cache"
    before = cache.build(study, folder=folder, **OPTIONS)
    file = next(iter(sorted(folder.glob(what))))
    good = file.read_bytes()
    file.unlink()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(good)
    elsewhere.chmod(0o644)
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else elsewhere)
    with within(30):
        after = cache.build(study, folder=folder, **OPTIONS)
    assert file.is_file() and not file.is_symlink()
    assert {path: found.file for path, found in after.frames.items()} == {
        path: found.file for path, found in before.frames.items()
    }
    assert len(decoded) == (9 if what == "*.npy" else 8)
    assert what == "index.json" or file.read_bytes() == good
    assert elsewhere.read_bytes() == good and mode(elsewhere) == 0o644


def test_a_fifo_in_place_of_a_video_is_its_reason(tmp_path: Path) -> None:
    study = read_folder(write_folder(tmp_path / "root", 16))
    cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    study.clips[0].path.unlink()
    os.mkfifo(study.clips[0].path)
    with within(30):
        cached = cache.build(study, folder=tmp_path / "cache", max_bad_share=0.2, **OPTIONS)
    assert [problem.reason for problem in cached.study.problems] == ["not a regular file"]


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_frames_are_for_their_owner_only(shared_folder: Path, tmp_path: Path) -> None:
    """Also in a cache that others could read before."""
    study, folder = read_folder(shared_folder), tmp_path / "cache"
    old = os.umask(0)
    try:
        for _ in range(2):
            cache.build(study, folder=folder, **OPTIONS)
            assert mode(folder) == 0o700 and {mode(file) for file in folder.iterdir()} == {0o600}
            folder.chmod(0o777)
            for file in folder.iterdir():
                file.chmod(0o644)
    finally:
        os.umask(old)


def test_a_folder_that_holds_other_things_stays_open(shared_folder: Path, tmp_path: Path) -> None:
    """It may be someone's home, or shared on purpose; the frames in it are private all the same."""
    (tmp_path / "notes.txt").touch()
    tmp_path.chmod(0o755)
    cache.build(read_folder(shared_folder), folder=tmp_path, **OPTIONS)
    assert mode(tmp_path) == 0o755 and {mode(file) for file in arrays(tmp_path)} == {0o600}


@pytest.mark.parametrize("which", ["index.json", "frames"])
def test_another_users_file_is_not_replaced(
    which: str, shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated, because tests have one user."""
    study = read_folder(shared_folder)
    cached = cache.build(study, folder=tmp_path, **OPTIONS)
    file = tmp_path / "index.json" if which == "index.json" else cached.frames[study.clips[3].path].file
    before, opened = file.stat().st_ino, os.open

    def opens(path: Path, *rest: int) -> int:
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *rest)

    monkeypatch.setattr(os, "open", opens)
    with pytest.raises(OutputError, match=f"^cache_dir is .*{file.name} in it is not readable; .*--cache-dir$"):
        cache.build(study, folder=tmp_path, **OPTIONS)
    assert file.stat().st_ino == before


def test_frames_that_another_user_has_replaced_are_named(
    shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = read_folder(shared_folder)
    cached = cache.build(study, folder=tmp_path, **OPTIONS)

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(OutputError, match="in it is not readable"):
        cached.frame(study.clips[0], 0)


def test_the_index_keeps_what_other_runs_wrote(tmp_path: Path) -> None:
    studies = [read_folder(write_folder(tmp_path / name)) for name in ("a", "b")]
    for study in studies:
        cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    assert len(json.loads((tmp_path / "cache" / "index.json").read_text())) == 16


def test_the_number_of_workers_changes_nothing(shared_folder: Path, tmp_path: Path) -> None:
    study = read_folder(shared_folder)
    one = cache.build(study, folder=tmp_path / "1", workers=1, **OPTIONS)
    four = cache.build(study, folder=tmp_path / "4", workers=4, **OPTIONS)
    assert one.study == four.study and list(one.frames) == list(four.frames)
    for a, b in zip(arrays(tmp_path / "1"), arrays(tmp_path / "4"), strict=True):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()


def test_a_cache_that_cannot_be_a_folder(shared_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=f"cannot write {folder}"):
            cache.build(read_folder(shared_folder), folder=folder, **OPTIONS)


def test_a_full_disk_is_named_and_leaves_nothing_half(shared_folder: Path, tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OutputError, match=r"cannot write .*File too large"):
        cache.build(read_folder(shared_folder), folder=tmp_path / "cache", **OPTIONS)
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.suffix in (".npy", ".part")] == []


def test_old_leftovers_of_killed_processes_are_removed(shared_folder: Path, tmp_path: Path) -> None:
    old, new, foreign = (tmp_path / name for name in ("a.npy.0123abcd.part", "b.npy.0123abcd.part", "thesis.part"))
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (0, 0))
    cache.build(read_folder(shared_folder), folder=tmp_path, **OPTIONS)
    assert not old.exists() and new.exists() and foreign.exists()


def test_an_error_does_not_wait_for_the_other_videos(
    shared_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[Path] = []

    def slow(path: Path) -> None:
        begun.append(path)
        if len(begun) > 1:
            time.sleep(0.5)
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
    assert set(cached.frames) == {clip.path for clip in cached.study.clips}


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


def test_one_video_under_two_names_is_reported(tmp_path: Path) -> None:
    """Where its labels or splits differ."""
    study = read_folder(write_folder(tmp_path / "root"))
    for copy, original in ((1, 0), (7, 3), (6, 2)):
        study.clips[copy].path.write_bytes(study.clips[original].path.read_bytes())
    for _ in range(2):  # with a warm cache too
        cached = cache.build(study, folder=tmp_path / "cache", **OPTIONS)
        assert len(cached.study.clips) == 8
        assert {(problem.where[-1], problem.reason[:-1]) for problem in cached.study.problems} == {
            ("1", "same video with another label (kept): 0X000000000000000"),
            ("7", "same video in another split (kept): 0X000000000000000"),
            ("6", "same video in another split (kept): 0X000000000000000"),
        }


def test_copies_with_one_label_in_one_split_are_no_problem(tmp_path: Path) -> None:
    study = read_folder(write_folder(tmp_path / "root"))
    study.clips[2].path.write_bytes(study.clips[0].path.read_bytes())
    assert cache.build(study, folder=tmp_path / "cache", **OPTIONS).study.problems == ()


@pytest.mark.parametrize("level", [0, 3, 128])
def test_a_video_that_shows_nothing_is_reported(tmp_path: Path, level: int) -> None:
    study = read_folder(write_folder(tmp_path / "root"))
    dark, spot = np.full((12, 48, 64, 3), level, np.uint8), np.full((12, 48, 64, 3), level, np.uint8)
    spot[7, 2:10, 2:10] = 200  # in one frame, in a corner
    encode(study.clips[1].path, dark)
    encode(study.clips[2].path, spot)
    for _ in range(2):  # with a warm cache too
        cached = cache.build(study, folder=tmp_path / "cache", size=24, frames_per_clip=12)
        (problem,) = cached.study.problems
        assert problem.where == study.clips[1].name and problem.kind == "blank video (kept)"
        assert len(cached.study.clips) == 8


def shown_study(root: Path, path: Path, **claim: int) -> Study:
    """Eight videos, of which the first is `path`, about which the table says `claim`."""
    study = read_folder(write_folder(root))
    first = study.clips[0]
    named = path.rename(first.path.with_suffix(path.suffix))
    said = replace(study.claims[first.name], **claim)
    clips = (replace(first, path=named), *study.clips[1:])
    return replace(study, clips=clips, claims={**study.claims, first.name: said})


@pytest.mark.parametrize("said, note", [(24, False), (30, True), (25, None)])
def test_a_table_may_count_the_frames_that_are_shown_or_all(tmp_path: Path, said: int, note: bool | None) -> None:
    """None of its labels depends on the number of a frame."""
    whole = encode(tmp_path / "whole.mp4", picture(30), "mpeg4", encoder={"g": "10"})
    path = remux(whole, tmp_path / "a.mp4", hidden=6)
    study = shown_study(tmp_path / "root", path, frames=said)
    cached = cache.build(study, folder=tmp_path / "cache", max_bad_share=0.2, **OPTIONS)
    reasons = [problem.reason for problem in cached.study.problems]
    if note is None:
        assert reasons == ["table and file disagree: table says 25 frames, file has 24"]
        return
    expected = "frame counts disagree (kept): table and file say 30 frames, 24 are shown"
    assert reasons == ([expected] if note else [])
    clip = cached.study.clips[0]
    assert len({frame.tobytes() for frame in all_frames(cached, clip)}) == 5
    assert cached.frames[clip.path].numbers.tolist() == [2, 7, 12, 16, 21]


@pytest.mark.parametrize(
    "degrees, claim, right",
    [
        (90, {"width": 64, "height": 48}, True),
        (90, {"width": 48, "height": 64}, True),
        (270, {"width": 48, "height": 0}, True),
        (90, {"width": 48, "height": 48}, False),
        (180, {"width": 64, "height": 48}, True),
        (180, {"width": 48, "height": 64}, False),
        (0, {"width": 48, "height": 64}, False),
    ],
)
def test_a_table_may_describe_a_turned_video_either_way(
    tmp_path: Path, degrees: int, claim: dict[str, int], right: bool
) -> None:
    path = encode(tmp_path / "a.mp4", picture(), "mpeg4", turn={"degrees": degrees})
    study = shown_study(tmp_path / "root", path, **claim)
    for _ in range(2):  # with a warm cache too
        cached = cache.build(study, folder=tmp_path / "cache", max_bad_share=0.2, **OPTIONS)
        assert [problem.kind for problem in cached.study.problems] == ([] if right else ["table and file disagree"])


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


def test_how_far_decoding_is_only_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = read_folder(write_folder(tmp_path / "root"))
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    cache.build(study, folder=tmp_path / "cache", **OPTIONS)
    assert capsys.readouterr() == ("", "")
    cache.build(study, folder=tmp_path / "cache", progress=True, **OPTIONS)
    assert capsys.readouterr() == ("", "".join(f"decoding videos: {i} of 8\n" for i in range(1, 9)))


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
        wanted = resize(echocardiogram[3 * i + cached.frames[clip.path].numbers], 182)
        assert float(np.abs(all_frames(cached, clip).astype(int) - wanted).mean()) < 3
