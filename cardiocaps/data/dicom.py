"""One DICOM file of ultrasound: what its tags say, checked before a pixel is touched, and its frames as grey images.

Frames are decoded one after another, cropped to the ultrasound region that the tags name, and blacked out outside of
the sector (`cardiocaps.data.sector`), because scanners burn names and dates into the pixels. That takes two passes: the
first finds the sector. Of a file in which neither the pixels change nor the tags name a region, no frame is given.

The decoders are pinned, so that frames do not depend on which other plug-ins of pydicom are installed. pydicom converts
YBR_FULL and YBR_FULL_422 to RGB, and codecs convert YBR_ICT and YBR_RCT, whatever the tag still says; converting once
more would tint the frames green.

512 bytes of zeros or noise in a real echocardiogram were reported 25 times of 25 each in JPEG baseline, for which each
frame is also given to FFmpeg's strict decoder (Pillow's alone reported 4 and 22), and in JPEG-LS; in RLE 25 and 17
times, in JPEG 2000 once and never.

Messages hold no value of a tag but numbers, because any tag may name a patient.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from cardiocaps.data.header import (
    MAX_FRAMES,
    MAX_SECONDS,
    MIN_FRAME_BYTES,
    MIN_SIDE,
    STRICT_DECODER,
    Header,
    VideoError,
    check_length,
    check_side,
)
from cardiocaps.data.sector import sector_by_change, sector_by_light
from cardiocaps.errors import CardioCapsError
from cardiocaps.runtime.packages import require_package

if TYPE_CHECKING:
    from av import VideoFrame
    from pydicom import Dataset, FileMetaDataset

READER_VERSION = 2  # part of the cache key: raise it when other frames come out, or more files are refused

FLAGS: Mapping[str, str] = {
    "doppler-region": "colour Doppler: the file names a region of colour flow",
    "coloured": "coloured pixels: colour Doppler or a tinted image",
    "still": "a still image",
    "frozen": "a cine that does not change, as of a frozen screen",
    "no-region": "no ultrasound region is named: frames are not cropped and have no scale",
    "misfit-region": "the ultrasound region lies outside of the frame: it is not used",
    "several-regions": "several tissue regions: the largest is used",
    "filled": "the sector fills the ultrasound region: next to nothing was blacked out in it",
    "no-rate": "no frame rate is stated",
}
"""What is noted about a file -> what it means. "coloured", "frozen" and "filled" are seen in the pixels (`Sector`)."""

_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_DEFLATED_SYNTAX = "1.2.840.10008.1.2.1.99"
_FFMPEG = "FFmpeg"  # by PyAV, not a plug-in of pydicom
_SYNTAXES = {
    "1.2.840.10008.1.2": ("uncompressed", "", ""),
    "1.2.840.10008.1.2.1": ("uncompressed", "", ""),
    "1.2.840.10008.1.2.2": ("big endian", "", ""),
    _DEFLATED_SYNTAX: ("deflated", "", ""),
    "1.2.840.10008.1.2.5": ("RLE", "pydicom", ""),
    _JPEG_BASELINE: ("JPEG baseline", "pillow", "PIL"),
    "1.2.840.10008.1.2.4.90": ("JPEG 2000", "pillow", "PIL"),
    "1.2.840.10008.1.2.4.91": ("JPEG 2000", "pillow", "PIL"),
    "1.2.840.10008.1.2.4.80": ("JPEG-LS", "pyjpegls", "jpeg_ls"),
    "1.2.840.10008.1.2.4.81": ("JPEG-LS", "pyjpegls", "jpeg_ls"),
    "1.2.840.10008.1.2.4.51": ("JPEG extended", _FFMPEG, ""),
    "1.2.840.10008.1.2.4.57": ("JPEG lossless", _FFMPEG, ""),
    "1.2.840.10008.1.2.4.70": ("JPEG lossless", _FFMPEG, ""),
}
"""Transfer syntax -> its name, pydicom's plug-in for it ("": pixels are not compressed), the plug-in's module.

GDCM, which pydicom takes for JPEG lossless and for JPEG extended of 12 bits, ends the whole process at some damaged
files. FFmpeg gives the same pixels; of JPEG extended they differ by at most 1 of 4,096 from those of libjpeg-turbo. A
small deflated file may unfold to any size, so it is unfolded as far as it is read: the tags, then frame by frame.
"""

_GREY, _COLOUR = ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"), ("RGB", "YBR_FULL", "YBR_FULL_422")
_BY_CODEC = ("YBR_ICT", "YBR_RCT")  # JPEG 2000 has these colours inside, and gives RGB
_ULTRASOUND = ("US", "OT", "")  # OT: other, as screenshots have
_VOLUME = "1.2.840.10008.5.1.4.1.1.6.2"  # enhanced ultrasound volume: its frames are slices
_IMAGES = (*(f"1.2.840.10008.5.1.4.1.1.{kind}" for kind in ("3", "3.1", "6", "6.1")), _VOLUME)  # of ultrasound
_TISSUE, _FLOW = 1, 2  # RegionDataType
_META_AT = 144  # bytes before the file meta information but its first element, which says how long it is
_PLANE = 1  # RegionSpatialFormat: a 2D image, not M-mode, a spectrum or a waveform
_CENTIMETRES = 3  # PhysicalUnitsXDirection
_INSIDE = 0.5  # the least share of a region that a frame must hold; less, and the region is of another image size
_MAX_FPS = 10_000.0
_COLOURFUL = 40  # the least difference of a pixel's channels, of 255: more than the codec's noise
_COLOURED_SHARE = 0.005  # of the sector's pixels
_FILLED = 0.95  # share of the frame, or of its region
_PYDICOM = r"pydicom(\.|$)"  # its modules
_LONGEST_HEADER = 1 << 21  # bytes before the pixels of a deflated file
_LONGEST_VALUE = 1 << 20  # bytes; a longer value of a tag is not read
_TAGS = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "PatientID", "IssuerOfPatientID", "Modality"),
    *("FrameTime", "FrameTimeVector", "CineRate", "RecommendedDisplayFrameRate", "SequenceOfUltrasoundRegions"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"),
    *(
        "ModalityLUTSequence",
        "VOILUTSequence",
        "WindowCenter",
        "WindowWidth",
        "VOILUTFunction",
        "EncryptedAttributesSequence",
    ),
    *(
        f"{colour}PaletteColorLookupTable{what}"
        for colour in ("Red", "Green", "Blue")
        for what in ("Descriptor", "Data")
    ),
    *(f"Segmented{colour}PaletteColorLookupTableData" for colour in ("Red", "Green", "Blue")),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
)


class NoPixelsError(VideoError):
    """A DICOM file that is no image at all, such as a report or a DICOMDIR."""


@dataclass(frozen=True)
class Box:
    """A rectangle of a frame, in pixels."""

    x: int
    y: int
    width: int
    height: int


@dataclass(frozen=True)
class Cine:
    """The tags of a DICOM file, checked. No pixel has been read.

    Attributes:
        path: the file.
        header: as `cardiocaps.data.video.probe` gives it: frames, size and scale of the ultrasound region.
        box: the ultrasound region in the stored frame; the whole frame without one.
        has_region: whether the file names a region that can be used.
        patient: identifier of the patient with its issuer; "" if the file has none. Never shown or written.
        study: identifier of the study, likewise.
        instance: identifier of the image, likewise.
    """

    path: Path
    header: Header
    box: Box
    has_region: bool
    patient: str = field(repr=False)
    study: str = field(repr=False)
    instance: str = field(repr=False)
    _dataset: Dataset = field(repr=False)
    _place: int = 0  # of the pixel data's element in the file
    _deflated_at: int = 0  # where the deflated part of the file begins, in which _place then counts; 0: none is
    _pixel_type: str = "OW"  # of that element: in big-endian files the bytes of "OW" are swapped in pairs


@dataclass(frozen=True)
class Sector:
    """What a pass through a cine has shown.

    Attributes:
        inside: bool [H, W] of the cropped frame: True in the sector.
        flags: those of `FLAGS` that only pixels show.
    """

    inside: NDArray[np.bool_]
    flags: tuple[str, ...]


def is_dicom(path: Path) -> bool:
    """Whether a file has the mark of DICOM, whatever its name says; no, if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_tags(path: Path) -> Cine:
    """Read and check the tags of a DICOM file; no pixel is touched.

    Args:
        path: a regular file.

    Raises:
        VideoError: not a DICOM file of ultrasound that can be decoded; beyond the limits of `cardiocaps.data.header`;
            or shorter than its own tags say. `NoPixelsError` if it is no image.
        ConfigError: pydicom is not installed.
    """
    require_package("pydicom", "pydicom", "reading DICOM", extra="dicom")
    with _one_line(), path.open("rb") as file:
        from pydicom import dcmread
        from pydicom.filereader import read_file_meta_info

        _keep_quiet()
        if not is_dicom(path):
            raise VideoError("not a DICOM file")
        meta = read_file_meta_info(path)
        syntax = _syntax(meta.get("TransferSyntaxUID"))
        source: BinaryIO = file
        end: float = path.stat().st_size
        deflated_at = before = 0
        if meta.TransferSyntaxUID == _DEFLATED_SYNTAX:
            deflated_at = _META_AT + _whole(meta, "FileMetaInformationGroupLength")
            source, end, before = _unfolded(file, meta, deflated_at)
        dataset = dcmread(source, stop_before_pixels=True, specific_tags=list(_TAGS), defer_size=_LONGEST_VALUE)
        place = source.tell()
        if "EncryptedAttributesSequence" in dataset:
            raise VideoError("encrypted: the patient's tags cannot be read")
        if "Rows" not in dataset and "Columns" not in dataset:
            if _text(dataset, "SOPClassUID") in _IMAGES:
                raise VideoError("truncated: the header ends before the size of the image")
            raise NoPixelsError("no pixels: a DICOM file of another kind, such as a report")
        if _text(dataset, "Modality") not in _ULTRASOUND:
            raise VideoError("not ultrasound: its modality is another one")
        if _text(dataset, "SOPClassUID") == _VOLUME:
            raise VideoError("not a cine: its frames are the slices of a volume")
        frames, width, height = _sizes(dataset)
        _check_pixel_format(dataset, compressed=bool(syntax[1]))
        pixel_type = _check_bytes(source, dataset, compressed=bool(syntax[1]), rest=end - place)
        box, scale, flags = _region(dataset, width, height)
        fps = _frame_rate(dataset)
        flags += ["still"] if frames == 1 else [] if fps else ["no-rate"]
        return Cine(
            path=path,
            header=Header(
                frames,
                box.width,
                box.height,
                fps if frames > 1 else 0.0,
                form=f"dicom {syntax[0]}",
                stored_width=width,
                stored_height=height,
                cm_x=scale[0],
                cm_y=scale[1],
                flags=" ".join(flags),
            ),
            box=box,
            has_region=not {"no-region", "misfit-region"} & set(flags),
            patient=_patient(dataset),
            study=_text(dataset, "StudyInstanceUID"),
            instance=_text(dataset, "SOPInstanceUID"),
            _dataset=dataset,
            _place=place - before,
            _deflated_at=deflated_at,
            _pixel_type=pixel_type,
        )


def find_sector(cine: Cine) -> Sector:
    """Decode all frames of a cine and find its sector.

    The sector is where pixels change. In a still image, or a cine that does not change, it is the largest area that is
    lit within the ultrasound region.

    Raises:
        VideoError: a frame cannot be decoded; or no sector is found: nothing changes and the file names no region, too
            little is lit, or all of the stored frame changes or is lit.
    """
    shape = (cine.header.height, cine.header.width)
    darkest, brightest = np.full(shape, 255, np.uint8), np.zeros(shape, np.uint8)
    coloured = np.zeros(shape, bool)
    for grey, colourful in _decoded(cine):
        np.minimum(darkest, grey, out=darkest)
        np.maximum(brightest, grey, out=brightest)
        coloured |= colourful
    flags = []
    inside = sector_by_change(darkest, brightest) if cine.header.frames > 1 else None
    if inside is None:
        if cine.header.frames > 1:
            flags.append("frozen")
        if not cine.has_region:
            raise VideoError(
                "no sector found: nothing changes and no ultrasound region is named, so text in it may name the patient"
            )
        inside = sector_by_light(brightest)
        if inside is None:
            raise VideoError("no sector found: too little of the image is lit")
    if inside.sum() >= _FILLED * cine.header.stored_width * cine.header.stored_height:
        raise VideoError("no sector found: all of the frame changes or is lit, so text in it may name the patient")
    if coloured[inside].mean() >= _COLOURED_SHARE:
        flags.append("coloured")
    if inside.mean() >= _FILLED:
        flags.append("filled")
    return Sector(inside, tuple(flags))


def grey_frames(cine: Cine, sector: Sector) -> Iterator[NDArray[np.uint8]]:
    """The frames of a cine in sequence, uint8 [H, W]: cropped to its region, black outside of the sector.

    A VOI LUT or a window that the file states is applied to monochrome pixels; without one, the full range of the
    stored bits becomes 0 to 255. Colours become their luma (ITU-R BT.601).

    Raises:
        VideoError: at the first frame that cannot be decoded; at the end, if frames are missing.
    """
    for grey, _ in _decoded(cine):
        yield np.where(sector.inside, grey, np.uint8(0))


@contextmanager
def _one_line() -> Iterator[None]:
    """Turn everything that goes wrong in the block into a VideoError that repeats nothing of the file."""
    try:
        yield
    except CardioCapsError:
        raise
    except Exception as error:
        kind = type(error).__name__
        reason = error.strerror if isinstance(error, OSError) and error.errno else None
        # `from None`: pydicom's own messages repeat values of tags.
        raise VideoError(f"not a readable DICOM file: {reason or f'{kind} in its decoder'}") from None


class _Deflated:
    """The deflated part of an open file, read from its beginning; no more is unfolded than what is read."""

    def __init__(self, file: BinaryIO, at: int) -> None:
        file.seek(at)
        self._file, self._inflate = file, zlib.decompressobj(-zlib.MAX_WBITS)

    def read(self, size: int) -> bytes:
        """At most `size` bytes; fewer at the end alone."""
        content = bytearray()
        while len(content) < size and not self._inflate.eof:
            packed = self._inflate.unconsumed_tail or self._file.read(1 << 16)
            unfolded = self._inflate.decompress(packed, size - len(content))
            if not packed and not unfolded:
                break
            content += unfolded
        return bytes(content)

    def skip(self, size: int) -> None:
        while size and (passed := len(self.read(min(size, 1 << 20)))):
            size -= passed


def _unfolded(file: BinaryIO, meta: FileMetaDataset, at: int) -> tuple[BinaryIO, float, int]:
    """The beginning of a deflated file as a file that is not.

    Args:
        file: the file.
        meta: its file meta information.
        at: where the deflated part begins.

    Returns:
        The file; where it would end, infinite if that is not known; where the deflated part begins in it.
    """
    from pydicom.filewriter import write_file_meta_info
    from pydicom.uid import ExplicitVRLittleEndian

    plain = BytesIO()
    plain.write(b"\0" * 128 + b"DICM")
    meta = deepcopy(meta)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # pydicom writes to any file.
    write_file_meta_info(cast("Any", plain), meta, enforce_standard=False)
    before = plain.tell()
    head = _Deflated(file, at).read(_LONGEST_HEADER)
    plain.write(head)
    plain.seek(0)
    return plain, math.inf if len(head) == _LONGEST_HEADER else before + len(head), before


def _keep_quiet() -> None:
    """Silence pydicom's log and warnings in this process: they repeat values of tags, such as an invalid identifier."""
    # Not twice: every change of the filters makes all warnings of the process new.
    if not any(getattr(rule[3], "pattern", None) == _PYDICOM for rule in warnings.filters):
        warnings.filterwarnings("ignore", module=_PYDICOM)
    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def _text(dataset: Dataset, tag: str) -> str:
    value = dataset.get(tag)
    return "" if value is None else str(value).strip().strip("\0")


def _patient(dataset: Dataset) -> str:
    """PatientID, after IssuerOfPatientID and a backslash if there is an issuer; "" without a PatientID."""
    patient, issuer = _text(dataset, "PatientID"), _text(dataset, "IssuerOfPatientID")
    return f"{issuer}\\{patient}" if patient and issuer else patient


def _number(value: Any) -> float:
    """A finite number; 0 for everything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) else 0.0


def _whole(dataset: Dataset, tag: str, missing: int = 0) -> int:
    """A tag that must be a whole number. Raises VideoError."""
    value = dataset.get(tag)
    if value is None or value == "":
        return missing
    try:
        return int(str(value))
    except ValueError:
        raise VideoError(f"damaged header: {tag} is not a whole number") from None


def _syntax(uid: Any) -> tuple[str, str, str]:
    """The row of `_SYNTAXES`. Raises VideoError if the transfer syntax is not read or its plug-in is missing."""
    if uid is None:
        raise VideoError("damaged header: no transfer syntax")
    if uid not in _SYNTAXES:
        from pydicom.uid import UID

        name = UID(uid).name if UID(uid).name != uid else "an unknown one"
        allowed = ", ".join(dict.fromkeys(name for name, _, _ in _SYNTAXES.values()))
        raise VideoError(f"transfer syntax not read: {name} (allowed: {allowed})")
    name, plugin, module = _SYNTAXES[uid]
    if module:
        try:
            import_module(module)
        except ImportError:
            raise VideoError(f"no decoder for {name}: pip install 'cardiocaps[dicom]'") from None
    return name, plugin, module


def _sizes(dataset: Dataset) -> tuple[int, int, int]:
    """Number of frames, width and height. Raises VideoError if they are beyond the limits."""
    width, height = _whole(dataset, "Columns"), _whole(dataset, "Rows")
    check_side(width, height)
    frames = _whole(dataset, "NumberOfFrames", missing=1)
    if not 1 <= frames <= MAX_FRAMES:
        raise VideoError(f"absurd frame count: header claims {frames} (1 to {MAX_FRAMES} allowed)")
    check_length(frames, width, height)
    return frames, width, height


def _check_pixel_format(dataset: Dataset, compressed: bool) -> None:
    samples, colours = _whole(dataset, "SamplesPerPixel", missing=1), _text(dataset, "PhotometricInterpretation")
    allowed = {1: _GREY, 3: (*_COLOUR, *(_BY_CODEC if compressed else ()))}
    if colours not in allowed.get(samples, ()):
        raise VideoError(
            f"colours not read: {samples} samples a pixel of another kind than allowed (1 of {', '.join(_GREY)}; 3 of "
            f"{', '.join(_COLOUR)}; in JPEG 2000 also {', '.join(_BY_CODEC)})"
        )
    bits, stored = _whole(dataset, "BitsAllocated"), _stored_bits(dataset)
    if bits not in (8, 16) or not 1 <= stored <= bits or _whole(dataset, "HighBit", missing=stored - 1) != stored - 1:
        raise VideoError(f"depth not read: {stored} of {bits} bits (allowed: the lower bits of 8 or 16)")
    if samples == 3 and _whole(dataset, "PixelRepresentation"):
        raise VideoError("colours not read: signed ones")


def _stored_bits(dataset: Dataset) -> int:
    return _whole(dataset, "BitsStored", missing=_whole(dataset, "BitsAllocated"))


def _check_bytes(file: BinaryIO, dataset: Dataset, *, compressed: bool, rest: float) -> str:
    """The type of the element of pixels, "OB" or "OW".

    Raises VideoError unless the element is there, and large enough for what the tags claim.

    Args:
        file: at that element.
        dataset: the tags.
        compressed: whether they are compressed.
        rest: bytes from there to the end of the file.
    """
    head = file.read(6)
    mark = head[:4]
    if not mark:
        raise VideoError("no pixels: the file ends before them")
    if mark not in (b"\xe0\x7f\x10\x00", b"\x7f\xe0\x00\x10"):
        raise VideoError("pixels not read: floating-point ones, or a damaged file")
    if compressed:
        frames = _whole(dataset, "NumberOfFrames", missing=1)
        if frames * MIN_FRAME_BYTES > rest:
            raise VideoError(f"truncated: header claims {frames} frames, more than its {rest} bytes can hold")
        return "OB"
    needed = _whole(dataset, "NumberOfFrames", missing=1) * _frame_bytes(dataset)
    if needed > rest:
        raise VideoError(f"truncated: header claims {needed} bytes of pixels, {max(rest, 0)} are there")
    return "OB" if head[4:] == b"OB" else "OW"


def _frame_bytes(dataset: Dataset) -> int:
    """Bytes of an uncompressed frame."""
    halved = _text(dataset, "PhotometricInterpretation") == "YBR_FULL_422"  # two pixels share their colour
    samples = 2 if halved else _whole(dataset, "SamplesPerPixel", missing=1)
    return int(dataset.Rows) * int(dataset.Columns) * samples * (_whole(dataset, "BitsAllocated") // 8)


def _region(dataset: Dataset, width: int, height: int) -> tuple[Box, tuple[float, float], list[str]]:
    """The ultrasound region to crop to, the centimetres a pixel to the right and downwards (0: not stated), and flags.

    Regions may exceed the frame by a little, and are cut to it. If most of a region lies outside, the frame was scaled
    after the region was named: neither its place nor its scale is right.

    Raises:
        VideoError: the file names regions, and none of them is a 2D image.
    """
    whole = Box(0, 0, width, height)
    regions = list(dataset.get("SequenceOfUltrasoundRegions") or ())
    if not regions:
        return whole, (0.0, 0.0), ["no-region"]
    planes = [region for region in regions if _whole(region, "RegionSpatialFormat") == _PLANE]
    flow = [region for region in planes if _whole(region, "RegionDataType") == _FLOW]
    tissue = [region for region in planes if _whole(region, "RegionDataType") == _TISSUE]
    if not tissue and not flow:
        raise VideoError("no 2D image: its ultrasound regions are M-mode, spectra or waveforms")
    flags = ["doppler-region"] if flow else []
    flags += ["several-regions"] if len(tissue) > 1 else []
    corners = [_corners(region) for region in tissue or flow]
    areas = [max(x1 - x0, 0) * max(y1 - y0, 0) for x0, y0, x1, y1 in corners]
    largest = areas.index(max(areas))
    x0, y0, x1, y1 = corners[largest]
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    inside = max(right - left, 0) * max(bottom - top, 0)
    if inside < _INSIDE * areas[largest] or min(right - left, bottom - top) < MIN_SIDE:
        return whole, (0.0, 0.0), [*flags, "misfit-region"]
    return Box(left, top, right - left, bottom - top), _scale((tissue or flow)[largest]), flags


def _corners(region: Dataset) -> tuple[int, int, int, int]:
    """Left, top, and right, bottom, the latter two exclusive: the tags name the last pixel inside."""
    x0, y0, x1, y1 = (_whole(region, f"RegionLocation{corner}") for corner in ("MinX0", "MinY0", "MaxX1", "MaxY1"))
    return x0, y0, x1 + 1, y1 + 1


def _scale(region: Dataset) -> tuple[float, float]:
    """Centimetres from one pixel to the next, to the right and downwards; 0: not stated."""
    cm = []
    for axis in "XY":
        stated = _whole(region, f"PhysicalUnits{axis}Direction") == _CENTIMETRES
        cm.append(abs(_number(region.get(f"PhysicalDelta{axis}"))) if stated else 0.0)
    return cm[0], cm[1]


def _frame_rate(dataset: Dataset) -> float:
    """Frames a second, as acquired if the file says so, else as it wants to be shown; 0: not stated."""
    vector = dataset.get("FrameTimeVector")  # milliseconds before each frame; the first is 0
    times = [_number(ms) for ms in vector[1:]] if vector is not None and not isinstance(vector, str | float) else []
    for milliseconds in (_number(dataset.get("FrameTime")), sum(times) / len(times) if times else 0.0):
        if milliseconds > 0 and 1000 / milliseconds <= _MAX_FPS:
            return 1000 / milliseconds
    for tag in ("CineRate", "RecommendedDisplayFrameRate"):
        if 0 < (rate := _number(dataset.get(tag))) <= _MAX_FPS:
            return rate
    return 0.0


def _decoded(cine: Cine) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.bool_]]]:
    """Each frame of the region: grey values uint8 [H, W], and which pixels are coloured. Raises VideoError."""
    end = time.monotonic() + MAX_SECONDS
    rows = slice(cine.box.y, cine.box.y + cine.box.height)
    columns = slice(cine.box.x, cine.box.x + cine.box.width)
    frames, count = cine.header.frames, 0
    with _one_line():
        _keep_quiet()
        convert = _converter(cine._dataset)
        for pixels in _stored_frames(cine):
            if time.monotonic() > end:
                raise VideoError(f"too slow: not read within {MAX_SECONDS:g} seconds")
            if pixels.shape[:2] != (cine.header.stored_height, cine.header.stored_width):
                raise VideoError(f"frames of several sizes: frame {count} has another one than the header")
            count += 1
            if count > frames:
                raise VideoError(f"damaged: header claims {frames} frames, more are there")
            yield convert(pixels[rows, columns])
        if count < frames:
            raise VideoError(f"truncated: {count} of {frames} frames are there")


def _stored_frames(cine: Cine) -> Iterator[NDArray[Any]]:
    """The frames as pydicom gives them: [H, W] of stored values, or [H, W, 3] of RGB."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.pixels.utils import as_pixel_options

    dataset = cine._dataset
    syntax = dataset.file_meta.TransferSyntaxUID
    _, plugin, _ = _SYNTAXES[syntax]
    options = as_pixel_options(dataset, number_of_frames=1, pixel_keyword="PixelData")
    options["pixel_vr"] = cine._pixel_type
    options.pop("extended_offsets", None)
    decoder = get_decoder(syntax)
    # One frame at a time: pydicom 3.0.2 looks for further frames of uncompressed YBR_FULL_422 in the wrong place.
    for number, content in enumerate(_contents(cine, compressed=bool(plugin))):
        # A codec allocates memory for the size that its own data claim.
        claims = _claims(content) if plugin else None
        if claims is not None and claims[:2] != (dataset.Columns, dataset.Rows):
            raise VideoError(f"frames of several sizes: frame {number} claims another one than the header")
        try:
            if syntax == _JPEG_BASELINE:
                _ffmpeg_frame(content)  # Pillow fills what is missing with grey
            if plugin == _FFMPEG:
                pixels = _ffmpeg_values(content, dataset, claims[2] if claims else 0)
            else:
                encoded = encapsulate([content], has_bot=False) if plugin else content
                pixels = decoder.as_array(encoded, decoding_plugin=plugin, **options)[0]
        except VideoError:
            raise
        except Exception:
            raise VideoError(f"damaged: frame {number} cannot be decoded") from None
        yield pixels


def _ffmpeg_frame(content: bytes) -> VideoFrame:
    """The image in a JPEG. Raises an error of FFmpeg if it is damaged, ValueError if there is not exactly one."""
    import av

    context = av.CodecContext.create("mjpeg", "r")
    assert isinstance(context, av.VideoCodecContext)
    context.thread_count = 1
    context.options = STRICT_DECODER
    (frame,) = [*context.decode(av.Packet(content)), *context.decode(None)]
    return frame


def _ffmpeg_values(content: bytes, dataset: Dataset, bits: int) -> NDArray[Any]:
    """The stored values of a JPEG, lossless or extended: [H, W] of up to 16 bits, or [H, W, 3] of RGB.

    Raises as `_ffmpeg_frame`.

    Args:
        content: the JPEG.
        dataset: the tags.
        bits: of a value, as the JPEG says.
    """
    frame = _ffmpeg_frame(content)
    colours = dataset.get("SamplesPerPixel") == 3
    allowed = {8: ("bgr24", "rgb24", "gbrp") if colours else ("gray",), 16: () if colours else ("gray16le",)}
    tinted = colours and _text(dataset, "PhotometricInterpretation") != "RGB"
    if tinted or frame.format.name not in allowed[dataset.BitsAllocated]:
        raise VideoError(
            "colours not read: a JPEG of another kind than grey of up to 16 bits and lossless RGB of 8 bits"
        )
    values: NDArray[Any] = frame.to_ndarray(format="rgb24" if colours else frame.format.name)
    if values.dtype == np.uint16:
        values = values >> (16 - bits)  # FFmpeg gives the upper bits of 16
    return values.view(f"int{8 * values.dtype.itemsize}") if _whole(dataset, "PixelRepresentation") else values


def _contents(cine: Cine, compressed: bool) -> Iterator[bytes]:
    """The bytes of each frame in the file."""
    from pydicom.encaps import generate_frames

    dataset, frames = cine._dataset, cine.header.frames
    with cine.path.open("rb") as file:
        # The element of pixels begins with its tag, its type (unless that is implicit) and its length.
        place = cine._place + (8 if dataset.file_meta.TransferSyntaxUID.is_implicit_VR else 12)
        source: BinaryIO | _Deflated = file
        if cine._deflated_at:
            source = _Deflated(file, cine._deflated_at)
            source.skip(place)
        else:
            file.seek(place)
        if compressed:
            offsets = None
            if "ExtendedOffsetTable" in dataset and "ExtendedOffsetTableLengths" in dataset:
                offsets = (dataset.ExtendedOffsetTable, dataset.ExtendedOffsetTableLengths)
            yield from generate_frames(file, number_of_frames=frames, extended_offsets=offsets)
            return
        length = _frame_bytes(dataset)
        for number in range(frames):
            content = source.read(length)
            if len(content) < length:
                raise VideoError(f"truncated: {number} of {frames} frames are there")
            yield content


def _claims(encoded: bytes) -> tuple[int, int, int] | None:
    """Width, height and bits that a JPEG or JPEG-LS image claims, of JPEG 2000 width, height and 0.

    None if it is of another kind, or damaged.
    """
    if encoded[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: SIZ has the image's end and its beginning
        x1, y1, x0, y0 = (int.from_bytes(encoded[place : place + 4], "big") for place in range(8, 24, 4))
        return x1 - x0, y1 - y0, 0
    place = 2
    while encoded[:2] == b"\xff\xd8" and place + 9 <= len(encoded) and encoded[place] == 0xFF:
        kind = encoded[place + 1]
        if kind == 0xF7 or (0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)):  # JPEG-LS, JPEG: frame header
            height, width = (int.from_bytes(encoded[at : at + 2], "big") for at in (place + 5, place + 7))
            return width, height, encoded[place + 4]
        place += 1 if kind == 0xFF else 2 + int.from_bytes(encoded[place + 2 : place + 4], "big")
    return None


def _converter(dataset: Dataset) -> Any:
    """A function from a frame of `_stored_frames` to its grey values and its coloured pixels."""
    bits = _stored_bits(dataset)
    if _whole(dataset, "SamplesPerPixel", missing=1) == 3:
        return lambda pixels: _luma(pixels >> (bits - 8) if bits > 8 else pixels << (8 - bits))
    signed = _whole(dataset, "PixelRepresentation") == 1
    low = -(1 << (bits - 1)) if signed else 0
    values = np.arange(low, low + (1 << bits), dtype=np.int32)
    grey, coloured = _palette(dataset, values) if _is_palette(dataset) else (_windowed(dataset, values), None)

    def look_up(pixels: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        places = np.clip(pixels.astype(np.int32) - low, 0, len(values) - 1)
        return grey[places], np.zeros(pixels.shape, bool) if coloured is None else coloured[places]

    return look_up


def _is_palette(dataset: Dataset) -> bool:
    return _text(dataset, "PhotometricInterpretation") == "PALETTE COLOR"


def _luma(rgb: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Luma of colours [..., 3] of 0 to 255, and which of them are colourful."""
    red, green, blue = (np.ascontiguousarray(rgb[..., channel]) for channel in range(3))
    grey = (299 * red.astype(np.uint32) + 587 * green.astype(np.uint32) + 114 * blue.astype(np.uint32) + 500) // 1000
    # Minimum and maximum of planes: np.ptp over the last axis takes far longer.
    spread = np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)
    return grey.astype(np.uint8), spread >= _COLOURFUL


def _palette(dataset: Dataset, values: NDArray[np.int32]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Grey value of each index, and whether its colour is colourful."""
    from pydicom.pixels.processing import apply_color_lut

    if "RedPaletteColorLookupTableData" in dataset:
        colours = np.stack([_channel(dataset, colour, values) for colour in ("Red", "Green", "Blue")], axis=-1)
    else:  # in segments
        colours = apply_color_lut(values, dataset)
    return _luma(colours >> 8 if colours.max() > 255 else colours)


def _channel(dataset: Dataset, colour: str, values: NDArray[np.int32]) -> NDArray[np.uint16]:
    """One channel of a palette for each index.

    pydicom 3.0.2 takes the tables of a big-endian file for little-endian ones, and mixes up indices beyond 255 if the
    entries have 8 bits.
    """
    entries, first, _ = dataset[f"{colour}PaletteColorLookupTableDescriptor"].value
    entries = entries or 1 << 16
    content: bytes = dataset[f"{colour}PaletteColorLookupTableData"].value
    if not dataset.file_meta.TransferSyntaxUID.is_little_endian:
        content = np.frombuffer(content, ">u2").astype("<u2").tobytes()
    table = np.frombuffer(content, "<u2" if len(content) >= 2 * entries else np.uint8, entries)
    return table.astype(np.uint16)[np.clip(values - first, 0, entries - 1)]


def _windowed(dataset: Dataset, values: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Grey value of each stored value: by the file's first VOI LUT, else by its first window, else by the full range of
    the stored bits."""
    from pydicom import Dataset
    from pydicom.pixels.processing import apply_modality_lut, apply_windowing

    if dataset.get("VOILUTSequence"):
        table, first, bits = _voi_table(dataset)
        rescaled = np.rint(apply_modality_lut(values, dataset)).astype(np.int64)
        grey = table[np.clip(rescaled - first, 0, len(table) - 1)] * (255 / ((1 << bits) - 1))
    elif (width := _first(dataset, "WindowWidth")) and "WindowCenter" in dataset:
        window = Dataset()  # of 8 bits, so that the result is 0 to 255
        window.PhotometricInterpretation, window.BitsStored, window.PixelRepresentation = "MONOCHROME2", 8, 0
        window.WindowCenter, window.WindowWidth = _first(dataset, "WindowCenter"), width
        if "VOILUTFunction" in dataset:
            window.VOILUTFunction = dataset.VOILUTFunction
        grey = apply_windowing(apply_modality_lut(values, dataset).astype(np.float64), window)
    else:
        grey = np.linspace(0, 255, len(values))
    grey = np.clip(np.rint(grey), 0, 255).astype(np.uint8)
    return 255 - grey if _text(dataset, "PhotometricInterpretation") == "MONOCHROME1" else grey


def _voi_table(dataset: Dataset) -> tuple[NDArray[np.uint16], int, int]:
    """The entries of the first VOI LUT, the value that gets the first one, and the bits of an entry.

    pydicom 3.0.2 takes the wrong ones of a table with more than 256 entries of 8 bits.
    """
    item = dataset.VOILUTSequence[0]
    entries, first, bits = (int(number) for number in item.LUTDescriptor)
    if not 8 <= bits <= 16:
        raise VideoError(f"VOI LUT not read: entries of {bits} bits (allowed: 8 to 16)")
    content = item.LUTData
    if isinstance(content, bytes):
        little = dataset.file_meta.TransferSyntaxUID.is_little_endian
        content = np.frombuffer(content, "<u2" if little else ">u2")
    table = np.asarray(content, np.uint16)
    if table.size != (entries or 1 << 16):
        raise VideoError("damaged header: a VOI LUT of another length than it says")
    return table, first, bits


def _first(dataset: Dataset, tag: str) -> float:
    """The first value of a tag that may have several."""
    value = dataset.get(tag)
    several = value is not None and not isinstance(value, str | float | int)
    return _number(value[0] if several and len(value) else value)
