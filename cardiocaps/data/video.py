"""One video file: what its header says, checked before anything is decoded, and its frames at one size.

`cardiocaps.data.dicom` reads DICOM files, which are recognised by their content. PyAV reads every other file from its
first frame to its last, in one thread, without seeking. On request decord reads EchoNet's own form. The frames of a
video are those that a player shows: an edit list can hide frames that the container claims, and a display matrix can
turn them. Any error of the decoder makes the video unusable, because a repaired or invented frame looks like any other.

How much damage is detected was measured on a real echocardiogram. A sector of 512 bytes overwritten with zeros or
noise was detected every time in Motion JPEG, MPEG-4, H.264 and PNG. A single flipped bit that changes the picture was
detected every time in H.264 and PNG, 20 times of 27 in MPEG-4 and 8 times of 21 in Motion JPEG. In videos of noise
less is detected: half of the zeroed sectors in Motion JPEG, a third in H.264. The decoders of FFV1 and raw video
detect only missing bytes.
"""

from __future__ import annotations

import re
import stat
import struct
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cardiocaps.data import dicom
from cardiocaps.data.header import (
    MAX_FRAMES,
    MAX_SECONDS,
    MIN_FRAME_BYTES,
    STRICT_DECODER,
    Header,
    VideoError,
    check_length,
    check_side,
)

if TYPE_CHECKING:
    import av

RESIZE_VERSION = 1  # part of the cache key: raise it when `resize` returns other pixels
READER_VERSION = 2  # likewise: raise it when PyAV's reader gives other frames, or refuses more videos

# Codecs whose decoder reports damage, or in which a damaged frame does not affect the others.
CODECS = ("mjpeg", "h264", "mpeg4", "png", "ffv1", "rawvideo")
_FRAME_A_PACKET = ("mjpeg", "png", "ffv1", "rawvideo")

_NAME = re.compile(r"[\w.-]+")
_OPTIONS = {
    # Without these three a file could be a playlist that makes FFmpeg open other files and addresses.
    "protocol_whitelist": "file",
    "format_whitelist": "avi,mov",
    "codec_whitelist": ",".join(CODECS),
    "max_pixels": STRICT_DECODER["max_pixels"],
}

_MP4_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide")
_OTHER_CONTAINERS = (
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "ASF (WMV)"),
    (0, b"\0\0\1\xba", "an MPEG program stream"),
    (0, b"GIF8", "GIF"),
    (0, b"OggS", "Ogg"),
    (0, b"FLV", "Flash video"),
)
_ENCRYPTED = (
    b"\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03"  # the object identifier of enveloped data, near the file's beginning
)
_MAX_TABLE_BYTES = 1 << 26
_MAX_SAMPLES = 4_000_000  # of one stream, sound included; FFmpeg allocates 36 bytes for each before it reads a frame


def allowed_name(name: str) -> bool:
    """Whether `name` is a plain file name of letters, digits and `_ . -`: not `..`, a path or an address."""
    return _NAME.fullmatch(name) is not None and ".." not in name and name != "."


def regular_file(path: Path, root: Path, follow_links: bool = False) -> Path:
    """The real path of a non-empty regular file inside the folder `root`.

    Raises:
        VideoError: the file is missing, empty, a folder, or a FIFO or device (opening one would hang); or it is a link
            that leaves `root`, and `follow_links` is False.
    """
    try:
        real = path.resolve(strict=True)
        status = real.stat()
        outside = not real.is_relative_to(root.resolve(strict=True))
    except FileNotFoundError:
        raise VideoError("a link to nothing" if path.is_symlink() else "no such file") from None
    except (
        OSError,
        RuntimeError,
        ValueError,
    ) as error:  # a loop of links is a RuntimeError before Python 3.13
        raise VideoError(f"unreadable: {getattr(error, 'strerror', None) or 'not a path'}") from None
    if not stat.S_ISREG(status.st_mode):
        raise VideoError("not a regular file")
    if outside and not follow_links:
        raise VideoError("a link that leaves the data folder: --follow-links allows it")
    if status.st_size == 0:
        raise VideoError("empty file")
    return real


def probe(path: Path, root: Path | None = None) -> Header:
    """The header of a video. Reads the whole file, and decodes it if only decoding tells how many frames it shows.

    Of a DICOM file it reads the tags alone.

    Args:
        path: an AVI, MP4 or DICOM file.
        root: folder that `path` may not leave through links; default the file's own folder.

    Raises:
        VideoError: not a regular file, not a supported video, beyond the limits of `cardiocaps.data.header`, or with
            frames missing.
        ConfigError: it is a DICOM file, and pydicom is not installed.
    """
    real = regular_file(path, path.parent if root is None else root)
    if dicom.is_dicom(real):
        return dicom.read_tags(real).header
    with _opened(real) as video:
        return video.header(frames=sum(1 for _ in video.frames(decode=video.codec not in _FRAME_A_PACKET)))


def read_frames(
    path: Path,
    indices: Sequence[int] | NDArray[np.int64],
    size: int,
    reader: str = "pyav",
    flags: list[str] | None = None,
) -> NDArray[np.uint8]:
    """Decode a whole video, which shows whether it is damaged, and resize some of its frames.

    Args:
        path: an AVI, MP4 or DICOM file.
        indices: numbers of the frames to keep, from 0 among those shown, in any order.
        size: side of the result in pixels.
        reader: "decord" decodes videos of EchoNet's own form with decord: to the same pixels, but it repairs damaged
            frames silently.
        flags: gets the flags of a DICOM file that only its pixels show (`cardiocaps.data.dicom.Sector`).

    Returns:
        uint8 [T, 3, size, size], RGB. Frames of a DICOM file are grey, cropped to its region and black outside of the
        sector (`cardiocaps.data.dicom`).

    Raises:
        VideoError: as `probe`; any frame that cannot be decoded; an index beyond the last frame.
    """
    wanted = {int(i) for i in indices}
    kept: dict[int, NDArray[np.uint8]] = {}
    count = 0
    flags = [] if flags is None else flags
    for count, pixels in enumerate(_shown_frames(path, wanted, reader, flags), 1):
        if pixels is not None:
            kept[count - 1] = resize(pixels[None], size)[0]
    if not wanted or min(wanted) < 0 or max(wanted) >= count:
        asked = f"{min(wanted)} to {max(wanted)}" if wanted else "none"
        raise VideoError(f"frame out of range: asked for {asked}, the video has {count}")
    return np.stack([kept[int(i)] for i in indices])


def _shown_frames(
    path: Path, wanted: Container[int], reader: str, flags: list[str]
) -> Iterator[NDArray[np.uint8] | None]:
    """Every frame that is shown, in sequence: uint8 [H, W, 3] if its number is wanted, else None. `flags`: see
    `read_frames`."""
    real = regular_file(path, path.parent)
    if dicom.is_dicom(real):
        cine = dicom.read_tags(real)
        sector = dicom.find_sector(cine)
        flags += sector.flags
        for number, grey in enumerate(dicom.grey_frames(cine, sector)):
            yield np.repeat(grey[..., None], 3, axis=2) if number in wanted else None
        return
    if reader == "decord" and (header := probe(path)).is_plain:
        count = 0
        for count, pixels in enumerate(_decord_frames(path.resolve()), 1):
            yield pixels if count - 1 in wanted else None
        if count != header.frames:
            raise VideoError(f"truncated: decord decodes {count} of {header.frames} frames")
        return
    with _opened(real) as video:
        for number, frame in enumerate(video.frames()):
            yield video.pixels(frame) if number in wanted else None


def _decord_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Frames uint8 [H, W, 3] in sequence; ends early if decord fails.

    Call `probe` first: some damaged headers make decord end the whole process.
    """
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        while True:
            yield reader.next().asnumpy()
    except (StopIteration, RuntimeError, decord.DECORDError):
        return


def resize(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize frames to a square: bilinear, antialiased, without keeping the aspect, as in the paper.

    Everything that scales frames to the base size must call this, because the results of different libraries differ by
    up to 150 grey levels.

    Args:
        frames: uint8 [T, H, W, 3].
        size: side of the result in pixels.

    Returns:
        uint8 [T, 3, size, size]; a frame's pixels depend on that frame alone.
    """
    import torch
    from torch.nn.functional import interpolate

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames is {frames.dtype} {list(frames.shape)}; expected uint8 [T, H, W, 3]")
    result = np.empty((len(frames), 3, size, size), np.uint8)
    for frame, out in zip(frames, result, strict=True):
        planes = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1), dtype=np.float32))
        scaled = interpolate(planes[None], (size, size), mode="bilinear", antialias=True, align_corners=False)
        out[:] = scaled[0].round_().clamp_(0, 255).to(torch.uint8).numpy()
    return result


@contextmanager
def _opened(path: Path) -> Iterator[_Video]:
    """A regular file, open for one pass. Raises VideoError for everything that goes wrong with it in the block."""
    import av

    try:
        container = _container_of(path)
        with av.open(str(path), format=container, options=_OPTIONS) as opened:
            yield _Video(opened, path.stat().st_size)
    except VideoError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"not a readable video: {error.strerror or 'damaged'}") from None
    except Exception as error:
        raise VideoError(f"not a readable video: {type(error).__name__} in its decoder") from error


class _Video:
    """An open video, for one pass.

    Raises:
        VideoError: it has no supported stream, or its header claims more than the limits.
    """

    def __init__(self, container: av.container.InputContainer, size: int) -> None:
        from av.video.reformatter import VideoReformatter

        if not container.streams.video:
            raise VideoError("no video stream")
        self.container, self.stream = container, container.streams.video[0]
        context = self.stream.codec_context
        self.codec = context.name if context else "an unknown one"
        if self.codec not in CODECS:
            raise VideoError(f"codec not read: {self.codec} (allowed: {', '.join(CODECS)})")
        context.thread_count = 1  # every further thread would hold frames of its own
        context.options = STRICT_DECODER
        self.is_avi = container.format.name == "avi"
        self.claimed, self.indexed = self.stream.frames, len(self.stream.index_entries)
        self.width, self.height = self.stream.width, self.stream.height
        check_side(self.width, self.height)
        if not 0 <= self.claimed <= MAX_FRAMES:
            raise VideoError(f"absurd frame count: header claims {self.claimed} (at most {MAX_FRAMES} allowed)")
        if self.claimed * MIN_FRAME_BYTES > size:
            raise VideoError(f"truncated: header claims {self.claimed} frames, more than its {size} bytes can hold")
        check_length(self.indexed or self.claimed, self.width, self.height)
        self._reformatter = VideoReformatter()
        self._first: av.VideoFrame | None = None

    def header(self, frames: int) -> Header:
        """The header, after a pass that showed `frames` frames."""
        assert self._first is not None
        (height, width), turned = (self._first.height, self._first.width), self._orientation[0]
        fps = float(self.stream.average_rate or 0)
        if self.is_avi and self.claimed > frames:
            fps *= frames / self.claimed  # the other frames only repeat the one before them
        return Header(
            frames,
            *((height, width) if turned else (width, height)),
            fps,
            claimed=0 if self.claimed == frames else self.claimed,
            turned=turned,
            form=f"{'avi' if self.is_avi else 'mp4'} {self.codec}",
        )

    def frames(self, decode: bool = True) -> Iterator[av.VideoFrame]:
        """The frames that are shown, in sequence.

        With `decode` False the first frame stands for every other one, which is enough to count them. Only for codecs
        with one frame in each packet.

        Raises:
            VideoError: at the first damaged frame; at the end, if frames are missing or there is none.
        """
        end = time.monotonic() + MAX_SECONDS
        shown = packets = longest = 0
        start: int | None = None  # the first keyframe's time
        last, whole = -1, True
        for packet in self.container.demux(self.stream):
            if time.monotonic() > end:
                raise VideoError(f"too slow: not read within {MAX_SECONDS:g} seconds")
            if packet.is_corrupt:  # the file ends inside the packet
                whole = False
                break
            if packet.dts is not None:
                packets += 1
                longest, last = max(longest, packet.dts - last), packet.dts
                if not packet.size:
                    continue  # empty: the frame before is shown for longer. A decoder would take it for the end
                if start is None:
                    if not packet.is_keyframe and self.codec not in _FRAME_A_PACKET:
                        raise VideoError("starts in the middle: its first frame needs earlier ones")
                    start = packet.pts
                elif packet.pts is not None and packet.pts < start:
                    continue  # shown before the first keyframe: it refers to a frame that is missing
            if not decode and self._first and packet.size:
                frames = iter(() if packet.is_discard else (self._first,))
            else:
                frames = self._decoded(packet, shown)
            for frame in frames:
                shown += 1
                check_length(shown, self.width, self.height)
                yield frame
        if not self.is_avi and packets < self.indexed:
            raise VideoError(f"truncated: {packets} of {self.indexed} frames are there")
        if self.is_avi and packets < self.indexed:
            raise VideoError(f"damaged: {packets} of the {self.indexed} frames of its index are there")
        if not packets:
            raise VideoError("no frame in it")
        # The time in an AVI counts all frames, also empty ones, which have no packet and repeat the frame before.
        if self.is_avi and last + longest < self.claimed:
            raise VideoError(f"truncated: {packets} of {self.claimed} frames are there")
        if not whole:
            raise VideoError(f"truncated: frame {shown} is incomplete")
        if not shown:
            raise VideoError("no frame can be decoded")

    def pixels(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] RGB, oriented as a player shows it."""
        pixels = np.asarray(self._reformatter.reformat(frame, format="rgb24").to_ndarray(), np.uint8)
        turned, mirrored, upside_down = self._orientation
        if turned:
            pixels = pixels.transpose(1, 0, 2)
        return pixels[:: -1 if upside_down else 1, :: -1 if mirrored else 1]

    def _decoded(self, packet: av.Packet[Any], shown: int) -> Iterator[av.VideoFrame]:
        """The frames that the decoder returns for a packet."""
        import av

        try:
            frames = packet.decode()
        except av.FFmpegError:
            raise VideoError(f"damaged: frame {shown} or one soon after cannot be decoded") from None
        for frame in frames:
            if frame.is_corrupt:
                raise VideoError(f"damaged: frame {shown} is decoded incompletely")
            if self._first is None:
                check_side(frame.width, frame.height)
                self._first, self._orientation = frame, _orientation(frame)
            elif (frame.width, frame.height) != (self._first.width, self._first.height):
                raise VideoError(f"frames of several sizes: frame {shown} is {frame.width}x{frame.height}")
            yield frame


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """How a player orients frames: exchange rows and columns, then mirror left to right, then top to bottom."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("<9i", bytes(matrix))[:5]  # a pixel (x, y) is shown at (ax + cy, bx + dy)
    if b == c == 0 and a and d:
        return False, a < 0, d < 0
    if a == d == 0 and b and c:
        return True, c < 0, b < 0
    raise VideoError("display matrix not supported: its angle is not a multiple of 90 degrees")


def _container_of(path: Path) -> str:
    """FFmpeg's name for the container, found from the file's content.

    The tables of an MP4 are checked first, because FFmpeg allocates memory for as many frames as they claim.

    Raises:
        VideoError: neither AVI nor MP4; an MP4 without a table, in fragments, or with an absurd table.
    """
    with path.open("rb") as file:
        start = file.read(132)
        if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
            return "avi"
        if start[4:8] in _MP4_BOXES:
            _check_mp4_tables(file, path.stat().st_size)
            return "mov"
    for place, mark, name in _OTHER_CONTAINERS:
        if start[place : place + len(mark)] == mark:
            raise VideoError(f"container not read: {name}, whatever the file's name says (allowed: AVI, MP4, DICOM)")
    if _ENCRYPTED in start:
        raise VideoError("encrypted: a file in a CMS envelope, as of a secure DICOM medium")
    raise VideoError("not a readable video: neither AVI, MP4 nor DICOM")


def _check_mp4_tables(file: BinaryIO, size: int) -> None:
    place, has_table = 0, False
    while place + 8 <= size:
        file.seek(place)
        head = file.read(16)
        length, kind = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        end = size if length == 0 else place + max(length, 8)
        if kind == b"moof":
            raise VideoError("container not read: a fragmented MP4 (ffmpeg -i IN -c copy OUT.mp4 makes it whole)")
        if kind != b"mdat" and end <= size:
            if end - place > _MAX_TABLE_BYTES:
                raise VideoError(f"absurd table of frames: {end - place} bytes (at most {_MAX_TABLE_BYTES} allowed)")
            file.seek(place)
            content = file.read(end - place)
            has_table |= kind == b"moov"
            if b"cmov" in content:
                raise VideoError("container not read: an MP4 with a compressed table of frames")
            for table in re.finditer(rb"stsz.{8}(.{4})", content, re.DOTALL):
                samples = int.from_bytes(table[1], "big")
                if samples > _MAX_SAMPLES:
                    raise VideoError(
                        f"absurd frame count: header claims {samples} samples (at most {_MAX_SAMPLES} allowed)"
                    )
        place = end
    if not has_table:
        raise VideoError("truncated: an MP4 without its table of frames (moov)")
