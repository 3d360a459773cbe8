import os
import struct
import time
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cardiocaps.data import header, video
from cardiocaps.data.header import Header, VideoError
from cardiocaps.data.video import allowed_name, probe, read_frames, regular_file, resize

from .sample_videos import Frames, claim_frames, cut, encode, overwrite, packets, picture, remux, within


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
INTER = [("mpeg4", {"g": "20"}), pytest.param("libx264", {"g": "20"}, marks=FORMATS[-1].marks)]


def difference(a: Frames, b: Frames) -> float:
    return float(np.abs(a.astype(int) - b).mean())


@pytest.mark.parametrize("codec, suffix", FORMATS)
def test_frames_are_the_encoded_ones(tmp_path: Path, codec: str, suffix: str) -> None:
    frames = picture(30)
    path = encode(tmp_path / f"a.{suffix}", frames, codec, fps=25)
    assert probe(path) == Header(30, 64, 48, 25.0)
    chosen = [0, 7, 29, 7, 3]
    got = read_frames(path, chosen, 32)
    assert got.shape == (5, 3, 32, 32) and got.dtype == np.uint8
    wanted = resize(frames[chosen], 32)
    assert difference(got, wanted) < 6  # lossy, with colours at half resolution
    assert difference(got[0], got[4]) > 20  # so another frame would not have passed


@pytest.mark.parametrize("codec, pixels", [("ffv1", "bgr0"), ("png", "rgb24"), ("rawvideo", "bgr24")])
@pytest.mark.parametrize("width", [8, 12, 16, 24, 48, 50, 64])
def test_narrow_videos_and_lossless_ones(tmp_path: Path, codec: str, pixels: str, width: int) -> None:
    frames = picture(3, 32, width)
    path = encode(tmp_path / "a.avi", frames, codec, pixels=pixels)
    assert probe(path) == Header(3, width, 32, 50.0)
    np.testing.assert_array_equal(read_frames(path, range(3), 20), resize(frames, 20))


@pytest.mark.parametrize("codec, encoder", INTER)
def test_frames_that_an_edit_list_hides_do_not_count(tmp_path: Path, codec: str, encoder: dict[str, str]) -> None:
    """As `ffmpeg -ss 0.5 -c copy` cuts: a container that holds 60 frames, of which a player shows the last."""
    whole = encode(tmp_path / "whole.mp4", picture(60), codec, encoder=encoder)
    path = remux(whole, tmp_path / "a.mp4", hidden=25)
    header = probe(path)
    with av.open(str(path)) as container:
        assert header.frames == sum(1 for _ in container.decode(video=0)) and header.claimed == 60
    assert 30 < header.frames < 40
    last = range(60 - header.frames, 60)
    np.testing.assert_array_equal(read_frames(path, range(header.frames), 24), read_frames(whole, last, 24))
    with pytest.raises(VideoError, match=f"the video has {header.frames}"):
        read_frames(path, [header.frames], 24)


def test_an_edit_list_hides_frames_of_motion_jpeg(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", picture(30))
    path = remux(whole, tmp_path / "a.mp4", hidden=10)
    assert (probe(path).frames, probe(path).claimed) == (20, 30)
    np.testing.assert_array_equal(read_frames(path, range(20), 24), read_frames(whole, range(10, 30), 24))


@pytest.mark.skipif(not has_encoder("libx264"), reason="PyAV without libx264")
def test_leading_frames_without_their_reference_do_not_count(tmp_path: Path) -> None:
    """The cut begins at a keyframe. The next frames are shown before it and refer to a frame that was cut off."""
    parameters = "open-gop=1:keyint=28:min-keyint=28:bframes=3:b-adapt=0:scenecut=0:b-pyramid=none"
    whole = encode(tmp_path / "whole.mp4", picture(60), "libx264", encoder={"x264-params": parameters})
    with av.open(str(whole)) as container:
        keys = [i for i, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    path = remux(whole, tmp_path / "a.mp4", keep=range(keys[1], 60))
    header = probe(path)
    leading = 60 - keys[1] - header.frames
    assert leading > 0 and header.claimed == 60 - keys[1]
    last = range(60 - header.frames, 60)
    np.testing.assert_array_equal(read_frames(path, range(header.frames), 24), read_frames(whole, last, 24))


@pytest.mark.parametrize("codec, encoder", INTER)
def test_a_video_that_starts_between_keyframes_is_refused(tmp_path: Path, codec: str, encoder: dict[str, str]) -> None:
    whole = encode(tmp_path / "whole.mp4", picture(60), codec, encoder=encoder)
    path = remux(whole, tmp_path / "a.mp4", keep=range(7, 60))
    for read in (probe, lambda path: read_frames(path, [0], 16)):
        with pytest.raises(VideoError, match="starts in the middle"):
            read(path)


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg4"])
def test_empty_chunks_of_an_avi_are_no_frames(tmp_path: Path, codec: str) -> None:
    """An AVI that shows each frame for 20 ticks claims the ticks, and has empty chunks between the frames."""
    whole = encode(tmp_path / "whole.avi", picture(30), codec)
    path = remux(whole, tmp_path / "a.avi", ticks=20)
    header = probe(path)
    assert header.frames == 30 and header.claimed > 500
    assert abs(header.fps - 50 / 20) < 0.1
    np.testing.assert_array_equal(read_frames(path, range(30), 24), read_frames(whole, range(30), 24))
    cut(path, 0.3)
    with pytest.raises(VideoError, match=r"^truncated: \d+ of \d+ frames"):
        probe(path)


@pytest.mark.parametrize("codec, encoder", INTER)
def test_another_container_is_the_same_video(tmp_path: Path, codec: str, encoder: dict[str, str]) -> None:
    encoder = encoder | {"bf": "0"}
    first = encode(tmp_path / "a.mp4", picture(30), codec, encoder=encoder)
    second = encode(tmp_path / "b.avi", picture(30), codec, encoder=encoder)
    disguised = first.rename(tmp_path / "first.avi")
    assert probe(disguised).frames == probe(second).frames == 30
    np.testing.assert_array_equal(read_frames(disguised, range(30), 24), read_frames(second, range(30), 24))


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("flips", [{}, {"hflip": True}, {"vflip": True}])
@pytest.mark.parametrize("codec, pixels", [("png", "rgb24"), ("mpeg4", None)])
def test_a_display_matrix_turns_the_frames(
    tmp_path: Path, codec: str, pixels: str | None, degrees: int, flips: dict[str, bool]
) -> None:
    frames = picture(3)
    plain = encode(tmp_path / "plain.mp4", frames, codec, pixels=pixels)
    path = encode(tmp_path / "a.mp4", frames, codec, pixels=pixels, turn={"degrees": degrees, **flips})
    turned = degrees in (90, 270)
    assert probe(path) == Header(3, *((48, 64) if turned else (64, 48)), 50.0, turned=turned)
    images = read_frames(plain, range(3), 24).transpose(0, 2, 3, 1)
    images = np.rot90(images, degrees // 90, (1, 2))  # counterclockwise, as FFmpeg's own player
    images = images[:, :: -1 if "vflip" in flips else 1, :: -1 if "hflip" in flips else 1]
    got = read_frames(path, range(3), 24).transpose(0, 2, 3, 1)
    assert np.abs(got.astype(int) - images).max() <= 1  # the resize rounds rows and columns in another order


def test_a_slanting_display_matrix_is_refused(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", picture(3), "mpeg4", turn={"degrees": 37})
    with pytest.raises(VideoError, match="not a multiple of 90 degrees"):
        probe(path)


@pytest.mark.parametrize(
    "codec, suffix, pixels", [("mjpeg", "avi", None), ("mpeg4", "mp4", None), ("png", "avi", "rgb24")]
)
@pytest.mark.parametrize("content", ["zeros", "noise"])
def test_a_damaged_sector_is_noticed(
    tmp_path: Path, echocardiogram: Frames, codec: str, suffix: str, pixels: str | None, content: str
) -> None:
    """Damage at every place is noticed, because a frame that a decoder has repaired looks like any other."""
    rng = np.random.default_rng(0)
    path = encode(tmp_path / f"a.{suffix}", echocardiogram[:8], codec, pixels=pixels)
    good, found = path.read_bytes(), packets(path)
    read_frames(path, range(8), 16)
    for start, end in found[1:]:
        place = int(rng.integers(start, end - 512))
        overwrite(path, place, bytes(512) if content == "zeros" else rng.bytes(512))
        with pytest.raises(VideoError, match=r"^(damaged|truncated)"):
            read_frames(path, [0], 16)
        path.write_bytes(good)


@pytest.mark.parametrize("codec, suffix", FORMATS)
def test_the_zeroed_half_of_one_frame_is_noticed(
    tmp_path: Path, echocardiogram: Frames, codec: str, suffix: str
) -> None:
    path = encode(tmp_path / f"a.{suffix}", echocardiogram[:8], codec)
    start, end = packets(path)[5]
    overwrite(path, (start + end) // 2, bytes((end - start) // 2))
    with pytest.raises(VideoError, match=r"^damaged: frame"):
        read_frames(path, [0], 16)


def test_a_decoder_that_fails_in_any_way_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.avi", picture(3))
    for failure in (ValueError("x"), KeyError("x"), MemoryError(), av.FFmpegError(1, "x"), RuntimeError("x")):

        def fail(*_: object, failure: Exception = failure) -> None:
            raise failure

        monkeypatch.setattr(video._Video, "pixels", fail)
        with pytest.raises(VideoError, match="not a readable video"):
            read_frames(path, [0], 16)


def test_what_is_too_large_or_too_long_is_refused_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = encode(tmp_path / "a.avi", picture(9))
    monkeypatch.setattr(video._Video, "frames", lambda *_, **__: pytest.fail("it was read"))
    monkeypatch.setattr(header, "MAX_PIXELS", 8 * 64 * 48)
    with pytest.raises(VideoError, match="too long: 9 frames of 64x48"):
        probe(path)
    monkeypatch.setattr(header, "MAX_SIDE", 50)
    with pytest.raises(VideoError, match="frame size out of range: 64x48"):
        probe(path)


def test_what_shows_its_length_only_when_read_is_stopped_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = claim_frames(encode(tmp_path / "a.avi", picture(9)), 0)
    monkeypatch.setattr(header, "MAX_PIXELS", 10 * 64 * 48)
    assert probe(path).frames == 9
    monkeypatch.setattr(header, "MAX_PIXELS", 8 * 64 * 48)
    with pytest.raises(VideoError, match="too long: 9 frames of 64x48"):
        probe(path)


def test_a_slow_video_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.avi", picture(9))
    clock = iter(range(0, 1000, 50))
    monkeypatch.setattr(video.time, "monotonic", lambda: next(clock))
    with pytest.raises(VideoError, match="too slow: not read within 300 seconds"):
        read_frames(path, [0], 16)


def test_a_picture_larger_than_its_file_says_is_refused(tmp_path: Path) -> None:
    """The decoder would make room for it before anyone could look at the frame."""
    path = encode(tmp_path / "a.avi", picture(3))
    for start, _ in packets(path):
        place = path.read_bytes().index(b"\xff\xc0", start)  # of the JPEG: length, bits, height, width
        overwrite(path, place + 5, struct.pack(">HH", 20000, 20000))
    with pytest.raises(VideoError, match=r"^(damaged|not a readable video|frame size)"):
        read_frames(path, [0], 16)


def test_a_small_file_that_claims_millions_of_frames_costs_nothing(tmp_path: Path) -> None:
    """FFmpeg would take 2 GB and 20 s for the table alone."""
    path = encode(tmp_path / "a.mp4", picture(9), "mpeg4")
    claims = {b"stsz": (8, (1, 60_000_000)), b"stts": (8, (60_000_000,)), b"stsc": (12, (60_000_000,))}
    for box, (place, values) in claims.items():
        start = path.read_bytes().index(box)
        overwrite(path, start + place, struct.pack(f">{len(values)}I", *values))
    begin = time.process_time()
    with pytest.raises(VideoError, match="absurd frame count: header claims 60000000"):
        probe(path)
    assert time.process_time() - begin < 2


def test_a_fragmented_mp4_is_named(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", picture(9), "mpeg4", movflags="frag_keyframe+empty_moov")
    with pytest.raises(VideoError, match="container not read: a fragmented MP4"):
        probe(path)


@pytest.mark.parametrize(
    "suffix, name", [("mkv", "Matroska or WebM"), ("ogv", "Ogg"), ("flv", "Flash"), ("gif", "GIF")]
)
def test_another_container_is_named_whatever_its_name(tmp_path: Path, suffix: str, name: str) -> None:
    codec = {"mkv": "mpeg4", "ogv": "libvpx", "flv": "flv", "gif": "gif"}[suffix]
    pixels = "rgb8" if codec == "gif" else None
    path = encode(tmp_path / f"a.{suffix}", picture(3), codec, pixels=pixels).rename(tmp_path / "a.mp4")
    with pytest.raises(VideoError, match=f"container not read: {name}"):
        probe(path)


def test_a_codec_that_is_not_on_the_list_is_named(tmp_path: Path) -> None:
    path = encode(tmp_path / "a.avi", picture(3), "msvideo1", pixels="rgb555le")
    with pytest.raises(VideoError, match=r"codec not read: msvideo1 \(allowed: mjpeg, h264"):
        probe(path)


def test_only_echonets_own_form_is_plain(tmp_path: Path) -> None:
    assert probe(encode(tmp_path / "a.avi", picture(3))).is_plain
    for other in (
        encode(tmp_path / "a.mp4", picture(3), "mpeg4"),
        encode(tmp_path / "odd.avi", picture(3, 49, 64)),
        claim_frames(encode(tmp_path / "b.avi", picture(3)), 2),
    ):
        assert not probe(other).is_plain


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
    with pytest.raises(VideoError, match=r"truncated: an MP4 without its table of frames"):
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
    ],
)
def test_a_false_frame_count_is_refused(tmp_path: Path, claim: int, reason: str) -> None:
    path = claim_frames(encode(tmp_path / "a.avi", picture(9)), claim)
    with pytest.raises(VideoError, match=reason):
        read_frames(path, [0], 16)


def test_a_header_that_claims_too_few_frames_shows_all(tmp_path: Path) -> None:
    path = claim_frames(encode(tmp_path / "a.avi", picture(9)), 5)
    assert (probe(path).frames, probe(path).claimed) == (9, 5)
    assert read_frames(path, [8], 16).shape == (1, 3, 16, 16)


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
        with within(30), pytest.raises(VideoError, match=reason):
            probe(path)


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.avi")
    with within(30), pytest.raises(VideoError, match="not a regular file"):
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
    with pytest.raises(ValueError, match=r"frames is .*; expected uint8 \[T, H, W, 3\]"):
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


def decord_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that decord is asked for from now on."""
    import decord

    calls: list[str] = []
    real = decord.VideoReader

    def reader(path: str, **options: object) -> object:
        calls.append(path)
        return real(path, **options)

    monkeypatch.setattr(decord, "VideoReader", reader)
    return calls


@pytest.mark.parametrize("height, width", [(48, 64), (112, 112), (96, 70)])
def test_decord_gives_the_same_pixels(tmp_path: Path, height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "a.avi", picture(12, height, width), "mjpeg")
    calls = decord_calls(monkeypatch)
    by_decord = read_frames(path, [0, 5, 11], 32, reader="decord")
    assert calls == [str(path)]
    np.testing.assert_array_equal(by_decord, read_frames(path, [0, 5, 11], 32))
    assert calls == [str(path)]


def test_decord_reads_no_other_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = decord_calls(monkeypatch)
    odd = encode(tmp_path / "odd.avi", picture(4, 49, 64), "mjpeg")
    for path in (odd, encode(tmp_path / "a.mp4", picture(4), "mpeg4"), encode(tmp_path / "b.avi", picture(4), "mpeg4")):
        np.testing.assert_array_equal(read_frames(path, [0, 3], 32, reader="decord"), read_frames(path, [0, 3], 32))
    assert calls == []
