import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cardiocaps.data import video
from cardiocaps.data.video import Header, VideoError, allowed_name, probe, read_frames, regular_file, resize

from .sample_videos import Frames, claim_frames, cut, encode, picture


def has_encoder(codec: str) -> bool:
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        return False
    return True


FORMATS = [
    ("mjpeg", "avi"),
    ("mpeg4", "avi"),
    ("mpeg4", "mp4"),
    pytest.param("libx264", "mp4", marks=pytest.mark.skipif(not has_encoder("libx264"), reason="PyAV without libx264")),
]


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail, instead of hanging for ever."""

    def late(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def difference(a: Frames, b: Frames) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("codec, suffix", FORMATS)
@pytest.mark.parametrize("decoder", ["decord", "pyav"])
def test_frames_are_the_encoded_ones(
    tmp_path: Path, codec: str, suffix: str, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if decoder == "pyav":
        monkeypatch.setitem(sys.modules, "decord", None)
    else:
        monkeypatch.setattr(video, "_pyav_frames", lambda path: pytest.fail("decord should have been enough"))
    frames = picture(30)
    path = encode(tmp_path / f"a.{suffix}", frames, codec, fps=25)
    assert probe(path) == Header(30, 64, 48, 25.0)
    chosen = [0, 7, 29, 7, 3]
    got = read_frames(path, chosen, 32)
    assert got.shape == (5, 3, 32, 32) and got.dtype == np.uint8
    wanted = resize(frames[chosen], 32)
    assert difference(got, wanted) < 6  # lossy, with colours at half resolution
    assert difference(got[0], got[4]) > 20  # so another frame would not have passed


def test_both_decoders_give_the_same_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.avi", picture(6))
    first = read_frames(path, range(6), 40)
    monkeypatch.setitem(sys.modules, "decord", None)
    np.testing.assert_array_equal(read_frames(path, range(6), 40), first)


def test_pyav_takes_over_where_decord_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import decord

    path = encode(tmp_path / "a.avi", picture(6))
    wanted = read_frames(path, [1, 5], 24)
    real = decord.VideoReader

    class Failing:
        def __init__(self, *args: object, **options: object) -> None:
            self.reader, self.count = real(*args, **options), 0

        def next(self) -> object:
            self.count += 1
            if self.count > 3:
                raise decord.DECORDError("bad packet")
            return self.reader.next()

    monkeypatch.setattr(decord, "VideoReader", Failing)
    np.testing.assert_array_equal(read_frames(path, [1, 5], 24), wanted)


@pytest.mark.parametrize("frames, asked", [(6, [6]), (6, [-1]), (6, [])])
def test_an_index_outside_is_refused(tmp_path: Path, frames: int, asked: list[int]) -> None:
    path = encode(tmp_path / "a.avi", picture(frames))
    with pytest.raises(VideoError, match=r"frame out of range: .* the video has 6"):
        read_frames(path, asked, 16)


def test_only_frames_asked_for_are_resized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.avi", picture(20))
    resized = []
    monkeypatch.setattr(video, "resize", lambda f, size: resized.append(len(f)) or resize(f, size))
    read_frames(path, [2, 9], 16)
    assert resized == [1, 1]


@pytest.mark.parametrize("share", [0.5, 0.8])
@pytest.mark.parametrize("codec, suffix", [("mjpeg", "avi"), ("mpeg4", "mp4")])
def test_a_file_cut_short_is_truncated(tmp_path: Path, codec: str, suffix: str, share: float) -> None:
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = cut(encode(tmp_path / f"a.{suffix}", picture(40), codec, **options), share)
    with pytest.raises(VideoError, match=r"^truncated: \d+ of 40 frames"):
        read_frames(path, [0], 16)


def test_an_mp4_without_its_table_is_no_video(tmp_path: Path) -> None:
    path = cut(encode(tmp_path / "a.mp4", picture(40), "mpeg4"))
    with pytest.raises(VideoError, match="not a readable video"):
        probe(path)


def test_a_header_without_a_count_is_counted(tmp_path: Path) -> None:
    path = claim_frames(encode(tmp_path / "a.avi", picture(9)), 0)
    assert probe(path).frames == 9
    assert read_frames(path, [8], 16).shape == (1, 3, 16, 16)


@pytest.mark.parametrize(
    "claim, reason",
    [
        (2_000_000_000, "absurd frame count: header claims 2000000000"),
        (90_000, "truncated: header claims 90000 frames, more than"),
        (40, "truncated: 9 of 40 frames"),
        (5, "wrong frame count: header claims 5, 9 decoded"),
    ],
)
def test_a_false_frame_count_is_refused(tmp_path: Path, claim: int, reason: str) -> None:
    path = claim_frames(encode(tmp_path / "a.avi", picture(9)), claim)
    with pytest.raises(VideoError, match=reason):
        read_frames(path, [0], 16)


def test_what_is_not_a_video_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.avi"
    text.write_text("not a video\n" * 100)
    empty = tmp_path / "empty.avi"
    empty.touch()
    folder = tmp_path / "folder.avi"
    folder.mkdir()
    for path, reason in (
        (text, "not a readable video"),
        (empty, "empty file"),
        (folder, "not a regular file"),
        (tmp_path / "none.avi", "no such file"),
        (Path("/dev/zero"), "not a regular file"),
        (Path("http://localhost/a.avi"), "no such file"),
        (Path("concat:a.avi|b.avi"), "no such file"),
        (tmp_path / "nul\0.avi", "unreadable: not a path"),
    ):
        with within(10), pytest.raises(VideoError, match=reason):
            probe(path)


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.avi")
    with within(5), pytest.raises(VideoError, match="not a regular file"):
        read_frames(tmp_path / "a.avi", [0], 16)


def test_a_playlist_in_disguise_opens_nothing(tmp_path: Path) -> None:
    encode(tmp_path / "other.avi", picture(9))
    (tmp_path / "list.avi").write_text("ffconcat version 1.0\nfile other.avi\n")
    with av.open(str(tmp_path / "list.avi")) as container:  # what FFmpeg does when nobody forbids it
        assert sum(1 for _ in container.decode(video=0)) == 9
    with pytest.raises(VideoError, match="not a readable video"):
        probe(tmp_path / "list.avi")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match="no video stream"):
        probe(tmp_path / "a.mp4")


def test_a_link_may_not_leave_the_folder(tmp_path: Path) -> None:
    outside = encode(tmp_path / "elsewhere" / "a.avi", picture(3))
    root = tmp_path / "root"
    (root / "Batch1").mkdir(parents=True)
    inside = encode(root / "a.avi", picture(3))
    (root / "Batch1" / "out.avi").symlink_to(outside)
    (root / "Batch1" / "in.avi").symlink_to(inside)
    (root / "loop.avi").symlink_to(root / "loop.avi")
    assert regular_file(root / "Batch1" / "in.avi", root) == inside.resolve()
    with pytest.raises(VideoError, match="a link that leaves"):
        probe(root / "Batch1" / "out.avi", root)
    with pytest.raises(VideoError, match="a link that leaves"):
        probe(root / "Batch1" / "in.avi")  # without a root its own folder counts
    with pytest.raises(VideoError, match="a link that leaves"):
        probe(root / ".." / "elsewhere" / "a.avi", root)
    with pytest.raises(VideoError, match="unreadable"):
        probe(root / "loop.avi")


@pytest.mark.parametrize("name", ["0X1017398D3C3F5FF9", "12E5", "NA", "nan", "a-b_c.d", "-rf", "1e400"])
def test_plain_names_are_allowed(name: str) -> None:
    assert allowed_name(name)


@given(st.text(max_size=12))
def test_an_allowed_name_stays_in_its_folder(name: str) -> None:
    if allowed_name(name):
        assert Path("/data", name).resolve().parent == Path("/data")
        assert not set(name) & set("/\\:|\0\n\r \t")


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", "../a", "a/b", "/etc/passwd", "http://h/a", "a\n", "a b"])
def test_other_names_are_refused(name: str) -> None:
    assert not allowed_name(name)


@pytest.mark.parametrize("height, width, size", [(48, 64, 16), (48, 64, 100), (768, 1024, 182), (7, 5, 3)])
def test_resize_is_the_antialiased_one(height: int, width: int, size: int) -> None:
    frame = np.random.default_rng(0).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
    wanted = np.asarray(Image.fromarray(frame[0]).resize((size, size), Image.Resampling.BILINEAR))
    got = resize(frame, size)[0].transpose(1, 2, 0)
    assert np.abs(got.astype(int) - wanted).max() <= 1  # Pillow rounds after each of its two passes


def test_resize_keeps_constants_and_the_same_size() -> None:
    frames = picture(2, 20, 20)
    np.testing.assert_array_equal(resize(frames, 20), frames.transpose(0, 3, 1, 2))
    assert (resize(np.full((1, 9, 33, 3), 255, np.uint8), 14) == 255).all()


def test_resize_of_a_frame_depends_on_it_alone() -> None:
    frames = picture(5, 90, 120)
    together = resize(frames, 33)
    strided = resize(frames[::-1][:, :, ::-1], 33)  # memory order is no matter either
    np.testing.assert_array_equal(strided, resize(np.ascontiguousarray(frames[::-1][:, :, ::-1]), 33))
    np.testing.assert_array_equal(together[3:4], resize(frames[3:4], 33))


@pytest.mark.parametrize("bad", [np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 3), np.float32)])
def test_resize_names_what_it_was_given(bad: Frames) -> None:
    with pytest.raises(ValueError, match=r"frames must be uint8 \[T, H, W, 3\], got"):
        resize(bad, 8)


@pytest.mark.parametrize("codec, suffix, most", [("mjpeg", "avi", 1.5), ("mpeg4", "mp4", 3.0)])
def test_a_real_echocardiogram_survives(
    tmp_path: Path, echocardiogram: Frames, codec: str, suffix: str, most: float
) -> None:
    path = encode(tmp_path / f"echo.{suffix}", echocardiogram, codec, fps=30)
    assert probe(path) == Header(30, 320, 240, 30.0)
    got, wanted = read_frames(path, range(30), 182), resize(echocardiogram, 182)
    assert difference(got, wanted) < most
    for i, frame in enumerate(got):  # nearer to its own original than to any other that differs from it
        others = [difference(frame, other) for other in wanted if difference(other, wanted[i]) > 0.1]
        assert len(others) > 25 and difference(frame, wanted[i]) < min(others)
    tint = np.abs(got.mean((0, 2, 3)) - wanted.mean((0, 2, 3)))
    assert tint.max() < 2  # the well-known green tint would be tens of grey levels
