"""One video file: its header, checked before anything is decoded, and its frames at one size.

PyAV reads the header first, because decord ends the whole process on an AVI header that claims 2·10⁹
frames. decord then decodes in sequence (it is the faster one), PyAV takes over where decord fails or is not
installed. Both return half of the frames of a file cut in half without a word, so the decoded frames are
counted.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cardiocaps.errors import DataError

MAX_FRAMES = 100_000
MIN_SIDE, MAX_SIDE = 8, 8192
MIN_FRAME_BYTES = 4  # even an empty frame costs a length field in AVI and in MP4
RESIZE_VERSION = 1  # part of the cache key: raise it when `resize` returns other pixels

_NAME = re.compile(r"[\w.-]+")
# Without these a text file renamed to .avi could be a playlist that makes FFmpeg open other files and
# addresses.
_OPTIONS = {"format_whitelist": "avi,mov", "protocol_whitelist": "file"}


class VideoError(DataError):
    """One unusable video. ``str(error)`` is the reason, without the file's name."""


@dataclass(frozen=True)
class Header:
    """What a video, or a table about it, says: frame count, pixels, frames per second (0 = not said)."""

    frames: int
    width: int
    height: int
    fps: float


def allowed_name(name: str) -> bool:
    """Whether ``name`` is a plain file name: letters, digits, ``_ . -``; no ``..``, no folder, no address."""
    return _NAME.fullmatch(name) is not None and ".." not in name and name != "."


def regular_file(path: Path, root: Path, follow_links: bool = False) -> Path:
    """The file's real path: a non-empty regular file inside the folder ``root``.

    Raises:
        VideoError: missing, a folder, FIFO or device (opening one would hang), empty, or a link out of
            ``root``, unless ``follow_links``.
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
    """Read and check a video's header; a header that claims 0 frames is completed by decoding and counting.

    Args:
        path: an AVI or MP4 file.
        root: folder that ``path`` may not leave through links; default the file's own folder.

    Raises:
        VideoError: not a regular file, not a video, or a header that cannot be true.
    """
    import av

    real = regular_file(path, path.parent if root is None else root)
    try:
        with av.open(str(real), options=_OPTIONS) as container:
            if not container.streams.video:
                raise VideoError("no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise VideoError("no decoder for its video stream")
            frames, width, height = stream.frames, stream.width, stream.height
            fps = float(stream.average_rate or 0)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"not a readable video: {getattr(error, 'strerror', None) or 'damaged'}") from None
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise VideoError(f"frame size out of range: {width}x{height} (sides of {MIN_SIDE} to {MAX_SIDE} allowed)")
    if not 0 <= frames <= MAX_FRAMES:
        raise VideoError(f"absurd frame count: header claims {frames} (at most {MAX_FRAMES} allowed)")
    size = real.stat().st_size
    if frames * MIN_FRAME_BYTES > size:
        raise VideoError(f"truncated: header claims {frames} frames, more than its {size} bytes can hold")
    if frames == 0:
        frames = sum(1 for _ in _pyav_frames(real))
        if frames == 0:
            raise VideoError("no frame can be decoded")
    return Header(frames, width, height, fps)


def read_frames(path: Path, indices: Sequence[int] | NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """Decode a video in sequence and keep the frames ``indices`` (0-based, any order), resized.

    Only the frames asked for are resized and kept; all are decoded, because only counting shows a truncated
    file.

    Returns:
        uint8 [T, 3, size, size], RGB.

    Raises:
        VideoError: as `probe`; ``truncated: …`` where fewer frames decode than the header claims; an index
            beyond.
    """
    header = probe(path)
    wanted = [int(i) for i in indices]
    if not wanted or min(wanted) < 0 or max(wanted) >= header.frames:
        asked = f"{min(wanted)} to {max(wanted)}" if wanted else "none"
        raise VideoError(f"frame out of range: asked for {asked}, the video has {header.frames}")
    real, count = path.resolve(), 0
    for decoder in (_decord_frames, _pyav_frames):
        kept, count = _collect(decoder, real, set(wanted), size)
        if count == header.frames:
            return np.stack([kept[i] for i in wanted])
    if count < header.frames:
        raise VideoError(f"truncated: {count} of {header.frames} frames can be decoded")
    raise VideoError(f"wrong frame count: header claims {header.frames}, {count} decoded")


def resize(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The one resize for every source (AVI, MP4, DICOM): bilinear, antialiased, to a square.

    The aspect is not kept, as in the paper. Libraries' resizes differ by up to 150 grey levels, so nothing
    else in the package scales frames to the base size.

    Args:
        frames: uint8 [T, H, W, 3].
        size: side of the result in pixels.

    Returns:
        uint8 [T, 3, size, size]; a frame's pixels depend on that frame alone.
    """
    import torch
    from torch.nn.functional import interpolate

    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], got {frames.dtype} {list(frames.shape)}")
    result = np.empty((len(frames), 3, size, size), np.uint8)
    for frame, out in zip(frames, result, strict=True):
        planes = torch.from_numpy(np.ascontiguousarray(frame.transpose(2, 0, 1), dtype=np.float32))
        scaled = interpolate(planes[None], (size, size), mode="bilinear", antialias=True, align_corners=False)
        out[:] = scaled[0].round_().clamp_(0, 255).to(torch.uint8).numpy()
    return result


def _collect(
    decoder: Callable[[Path], Iterable[NDArray[np.uint8]]], path: Path, wanted: set[int], size: int
) -> tuple[dict[int, NDArray[np.uint8]], int]:
    """The wanted frames, resized, and how many frames decoded before the end or the first failure."""
    kept: dict[int, NDArray[np.uint8]] = {}
    count = 0
    for frame in decoder(path):
        if count in wanted:
            kept[count] = resize(frame[None], size)[0]
        count += 1
    return kept, count


def _decord_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Frames uint8 [H, W, 3] in sequence; ends early where decord fails or is missing: PyAV takes over."""
    try:
        import decord
    except (ImportError, OSError):  # OSError: its shared library does not load on this machine
        return
    decord.logging.set_level(decord.logging.QUIET)
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        while True:
            yield reader.next().asnumpy()
    except (StopIteration, RuntimeError, decord.DECORDError):
        return


def _pyav_frames(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Frames uint8 [H, W, 3] in sequence; a damaged packet is passed over, which the caller's count shows."""
    import av

    try:
        with av.open(str(path), options=_OPTIONS) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for packet in container.demux(stream):
                yield from _decoded(packet)
    except av.FFmpegError:
        return


def _decoded(packet: Any) -> Iterator[NDArray[np.uint8]]:
    import av

    try:
        frames = packet.decode()
    except av.FFmpegError:
        return
    for frame in frames:
        if not frame.is_corrupt:
            yield frame.to_ndarray(format="rgb24")
