"""DICOM files of an invented patient, written fresh for each test."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydicom import Dataset, FileMetaDataset, Sequence
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

NAME, PATIENT = "Quux^Xaver", "PID-4711-Q"
HEIGHT, WIDTH, FRAMES = 96, 128, 6
Frames = NDArray[np.uint8]


def fan(height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.bool_]:
    """bool [H, W]: the sector, its tip at the top in the middle."""
    y, x = np.mgrid[:height, :width]
    down, side = y - height / 16, x - width / 2
    return (np.hypot(down, side) < 0.8 * height) & (np.abs(side) < 0.8 * down)


def text(value: str = NAME, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.bool_]:
    """bool [H, W]: what a scanner burns in beside the sector, at the top and at the bottom."""
    image = Image.new("L", (width, height))
    draw = ImageDraw.Draw(image)
    draw.text((2, 0), value[:8], fill=255)
    draw.text((2, height - 11), PATIENT[:4], fill=255)
    return np.asarray(image) > 128


def cine(seed: int, frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH, clock: bool = True) -> Frames:
    """uint8 [T, H, W]: speckle in a sector, text beside it, and a clock that changes."""
    rng = np.random.default_rng(seed)
    speckle = rng.integers(20, 200, (frames, height, width), dtype=np.uint8)
    images = np.where(fan(height, width), speckle, np.uint8(0))
    images[:, text(height=height, width=width)] = 230
    if clock:
        images[:, 4:9, -12:-4] = rng.integers(100, 255, (frames, 5, 8), dtype=np.uint8)
    return images


def region(**tags: Any) -> Dataset:
    """A region of 2D tissue that covers the whole frame, with 0.05 cm a pixel; `tags` change it."""
    item = Dataset()
    settings = {
        "RegionSpatialFormat": 1,
        "RegionDataType": 1,
        "RegionFlags": 0,
        "RegionLocationMinX0": 0,
        "RegionLocationMinY0": 0,
        "RegionLocationMaxX1": WIDTH - 1,
        "RegionLocationMaxY1": HEIGHT - 1,
        "PhysicalUnitsXDirection": 3,
        "PhysicalUnitsYDirection": 3,
        "PhysicalDeltaX": 0.05,
        "PhysicalDeltaY": 0.04,
    }
    for tag, value in (settings | tags).items():
        setattr(item, tag, value)
    return item


def dataset(pixels: NDArray[Any], *, regions: list[Dataset] | None = None, **tags: Any) -> Dataset:
    """A dataset of frames [T, H, W] or [T, H, W, 3]; a tag that is None is left out."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.file_meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage
    made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    colours = 3 if pixels.ndim == 4 else 1
    bits = 8 * pixels.dtype.itemsize
    settings = {
        "SOPClassUID": UltrasoundMultiFrameImageStorage,
        "SOPInstanceUID": made.file_meta.MediaStorageSOPInstanceUID,
        "StudyInstanceUID": generate_uid(),
        "PatientName": NAME,
        "PatientID": PATIENT,
        "Modality": "US",
        "FrameTime": 20,
        "NumberOfFrames": len(pixels),
        "Rows": pixels.shape[1],
        "Columns": pixels.shape[2],
        "SamplesPerPixel": colours,
        "PhotometricInterpretation": "RGB" if colours == 3 else "MONOCHROME2",
        "PlanarConfiguration": 0 if colours == 3 else None,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0,
        "SequenceOfUltrasoundRegions": Sequence(regions) if regions else None,
    }
    for tag, value in (settings | tags).items():
        if value is not None:
            setattr(made, tag, value)
    content = pixels.tobytes()
    made.PixelData = content + b"\0" * (len(content) % 2)
    made["PixelData"].VR = "OB" if bits == 8 else "OW"
    return made


def write(path: Path, made: Dataset) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def write_dicom(path: Path, pixels: NDArray[Any], **settings: Any) -> Path:
    """Write frames [T, H, W] or [T, H, W, 3]; `settings` as those of `dataset`."""
    return write(path, dataset(pixels, **settings))


def lossless_jpeg(frame: NDArray[Any], depth: int = 8) -> bytes:
    """Grey values [H, W] of `depth` bits as lossless JPEG: process 14, predictor 1, the value on the left."""
    predicted = np.empty(frame.shape, np.int64)
    predicted[:, 1:], predicted[1:, 0], predicted[0, 0] = frame[:, :-1], frame[:-1, 0], 1 << (depth - 1)
    bits = []
    for difference in (frame - predicted).ravel().tolist():
        size = abs(difference).bit_length()
        value = difference if difference > 0 else difference + (1 << size) - 1
        bits.append(f"{size:04b}" + (f"{value:0{size}b}" if size else ""))
    scan = "".join(bits)
    scan += "1" * (-len(scan) % 8)
    content = int(scan, 2).to_bytes(len(scan) // 8, "big").replace(b"\xff", b"\xff\0")
    # The code of a difference of n bits is n in four bits, for n from 0 to `depth`.
    table = b"\xff\xc4" + (20 + depth).to_bytes(2, "big") + bytes([0, 0, 0, 0, depth + 1, *[0] * 12, *range(depth + 1)])
    height, width = (side.to_bytes(2, "big") for side in frame.shape)
    start = b"\xff\xc3\x00\x0b" + bytes([depth]) + height + width + b"\x01\x01\x11\x00"
    return b"\xff\xd8" + table + start + b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00" + content + b"\xff\xd9"
