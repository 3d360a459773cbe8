"""What the header of a video says, the limits that it is checked against, and the error for a video of no use."""

from __future__ import annotations

from dataclasses import dataclass, field

from cardiocaps.errors import DataError

MAX_FRAMES = 100_000
MIN_SIDE, MAX_SIDE = 8, 4096
MAX_PIXELS = 4_000_000_000  # of all frames together, for example 5,000 frames of 1024 × 768
MAX_SECONDS = 300.0  # for one pass through a video; the largest that is allowed takes about 30
MIN_FRAME_BYTES = 4  # an empty frame still has a length field, in AVI, in MP4 and in DICOM

# A JPEG may claim a larger size than its file's header: with `max_pixels` FFmpeg refuses it before it allocates memory.
STRICT_DECODER = {"err_detect": "explode+crccheck+bitstream+buffer", "max_pixels": str(MAX_SIDE * MAX_SIDE)}
"""Options of FFmpeg's decoders, so that they report damage instead of repairing it."""


class VideoError(DataError):
    """A video that cannot be used. `str(error)` is the reason, without the file's name."""


@dataclass(frozen=True)
class Header:
    """The properties of a video, as its file or a table states them; 0: not stated.

    For a file, they are those of the frames that a player shows, in the orientation in which it shows them. For a DICOM
    file, they are those of its ultrasound region.
    """

    frames: int
    width: int
    height: int
    fps: float
    claimed: int = 0  # frames that the container claims, if it shows another number
    turned: bool = False  # by a quarter: stored frames have width and height exchanged
    form: str = field(default="", compare=False)  # container and codec: "avi mjpeg", "dicom RLE"
    stored_width: int = field(default=0, compare=False)  # of a DICOM frame before the crop to its region
    stored_height: int = field(default=0, compare=False)
    cm_x: float = field(default=0.0, compare=False)  # centimetres from one pixel to the next, to the right
    cm_y: float = field(default=0.0, compare=False)  # and downwards
    flags: str = field(default="", compare=False)  # words, see `cardiocaps.data.dicom.FLAGS`

    @property
    def is_plain(self) -> bool:
        """Whether it has EchoNet's own form, for which both readers give the same frames."""
        return self.form == "avi mjpeg" and not self.claimed and self.height % 2 == 0

    @property
    def is_dicom(self) -> bool:
        return self.form.startswith("dicom ")

    def cm_per_pixel(self, size: int) -> tuple[float, float]:
        """Centimetres from one pixel to the next in frames that `resize` has scaled to a square; 0: not stated.

        Args:
            size: side of the scaled frames in pixels.

        Returns:
            To the right, and downwards. They differ, because the square does not keep the aspect.
        """
        return self.cm_x * self.width / size, self.cm_y * self.height / size


def check_side(width: int, height: int) -> None:
    """Raise VideoError unless frames of this size are allowed."""
    if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
        raise VideoError(f"frame size out of range: {width}x{height} (sides of {MIN_SIDE} to {MAX_SIDE} allowed)")


def check_length(frames: int, width: int, height: int) -> None:
    """Raise VideoError unless so many frames of this size are allowed."""
    if frames > MAX_FRAMES or frames * width * height > MAX_PIXELS:
        raise VideoError(
            f"too long: {frames} frames of {width}x{height} or more (at most {MAX_FRAMES} frames and"
            f" {MAX_PIXELS} pixels allowed)"
        )
