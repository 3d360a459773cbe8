"""DICOM files: real ones that come with pydicom, and invented ones whose every pixel is known."""

from __future__ import annotations

import io
import logging
import sys
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom import Dataset, Sequence, dcmread
from pydicom.data import external_data_sources, get_testdata_file
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import apply_color_lut, convert_color_space
from pydicom.uid import (
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cardiocaps.data import cache, dicom, header
from cardiocaps.data.dicom import Cine, NoPixelsError, find_sector, grey_frames, is_dicom, read_tags
from cardiocaps.data.header import Header, VideoError
from cardiocaps.data.video import probe, read_frames, resize
from cardiocaps.errors import ConfigError

from .sample_dicom import (
    FRAMES,
    HEIGHT,
    NAME,
    PATIENT,
    WIDTH,
    Frames,
    cine,
    dataset,
    fan,
    lossless_jpeg,
    region,
    text,
    write,
    write_dicom,
)
from .sample_videos import within, write_folder

SAMPLES = sorted(Path(pydicom.data.__file__).parent.glob("test_files/*.dcm"))
for _source in external_data_sources().values():  # the package pydicom-data, if it is installed
    SAMPLES += sorted(Path(_source.data_path).rglob("*.dcm"))
CORE = fan()  # speckle of the whole sector changes, so it is all kept
TEXT = text()


def sample(name: str) -> Path:
    path = get_testdata_file(name, download=False)
    assert path is not None
    return Path(path)


def frames_of(path: Path) -> Frames:
    tags = read_tags(path)
    return np.stack(list(grey_frames(tags, find_sector(tags))))


def reason(path: Path, read: Callable[[Path], object] = frames_of) -> str:
    """The error for a file, which is one line, names no patient and is the only thing that is said."""
    with warnings.catch_warnings(record=True) as said, pytest.raises(VideoError) as error:
        read(path)
    assert said == []
    message = str(error.value)
    assert "\n" not in message and len(message) < 300
    for secret in (NAME, PATIENT, "Quux", "QUUX", "4711", str(path)):
        assert secret not in message
    return message


def compressed(made: Dataset, syntax: UID, frames: list[bytes], colours: str | None = None) -> Dataset:
    made.PixelData = encapsulate(frames)
    made["PixelData"].VR = "OB"
    made.file_meta.TransferSyntaxUID = syntax
    if colours:
        made.PhotometricInterpretation = colours
    return made


def pillow(frame: NDArray[np.uint8], kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind, **options)
    return file.getvalue()


def colours_of(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[..., None], 3, axis=-1)


# Real files


def test_a_real_cine_is_the_luma_of_its_sector(echocardiogram: Frames) -> None:
    path = sample("examples_ybr_color.dcm")
    found = probe(path)
    assert (found.frames, found.width, found.height, found.form) == (30, 320, 240, "dicom JPEG baseline")
    assert found.fps == pytest.approx(1000 / 33.333)
    # Its region was named for 640 × 480, so neither its place nor its scale is used.
    assert found.flags == "misfit-region" and (found.cm_x, found.cm_y) == (0, 0)
    got, inside = frames_of(path), find_sector(read_tags(path)).inside
    luma = np.rint(echocardiogram.astype(float) @ [0.299, 0.587, 0.114])
    assert np.abs(got[:, inside] - luma[:, inside]).max() <= 1
    assert not got[:, ~inside].any() and 0.2 < inside.mean() < 0.4
    corner = np.s_[:, :40, :40]  # the name of the preset
    assert echocardiogram[corner].max() > 100 and not got[corner].any()
    assert inside[60:170, 130:210].all()  # the left ventricle and the septum


def test_read_frames_resizes_as_for_every_video() -> None:
    path = sample("examples_ybr_color.dcm")
    got = read_frames(path, [29, 0, 7], 64)
    assert got.shape == (3, 3, 64, 64)
    np.testing.assert_array_equal(got, resize(colours_of(frames_of(path)[[29, 0, 7]]), 64))


def test_there_is_no_green_tint() -> None:
    """pydicom converts YBR to RGB although the tag still says YBR_FULL_422; converting again makes grey green."""
    path = sample("examples_ybr_color.dcm")
    tags = read_tags(path)
    assert "coloured" not in find_sector(tags).flags
    first = next(dicom._stored_frames(tags))
    again = convert_color_space(first.copy(), "YBR_FULL", "RGB")
    share = [float((np.ptp(image, axis=-1) >= dicom._COLOURFUL).mean()) for image in (first, again)]
    assert share[0] < 0.001 and share[1] > 0.5


def test_a_lossless_jpeg_of_colours_is_the_image_that_rle_has() -> None:
    """pydicom itself has no decoder for the first."""
    lossless, rle = (next(dicom._decoded(read_tags(sample(f"SC_rgb_{form}.dcm")))) for form in ("jpeg_gdcm", "rle"))
    np.testing.assert_array_equal(lossless[0], rle[0])
    assert np.ptp(rle[0]) > 200


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
def test_every_file_of_pydicom_is_read_or_refused_in_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of other modalities too, so that more of the formats are met. Grey values are compared with pydicom's."""
    monkeypatch.setattr(dicom, "_ULTRASOUND", ("US", "OT", "", "CT", "MR", "NM"))
    try:
        tags = read_tags(path)
        got = [grey for grey, _ in dicom._decoded(tags)]
    except VideoError:
        assert reason(path)
        return
    assert len(got) == tags.header.frames
    if tags.header.form in ("dicom JPEG lossless", "dicom JPEG extended"):
        return  # tests of their own
    loaded = dcmread(path)
    if "PixelData" not in loaded:
        return  # all frames are there, but not the mark after them
    wanted = loaded.pixel_array if tags.header.frames > 1 else loaded.pixel_array[None]
    if loaded.PhotometricInterpretation == "PALETTE COLOR":
        if not loaded.file_meta.TransferSyntaxUID.is_little_endian:
            return  # pydicom 3.0.2 mixes up the bytes; a test of its own
        wanted = apply_color_lut(wanted, loaded) >> 8
    elif loaded.SamplesPerPixel == 1 and "WindowWidth" not in loaded:
        low = -(2 ** (loaded.BitsStored - 1)) if loaded.PixelRepresentation else 0
        wanted = (wanted.astype(float) - low) * 255 / (2**loaded.BitsStored - 1)
    elif loaded.SamplesPerPixel == 1:
        return  # a test of its own
    wanted = wanted @ np.array([0.299, 0.587, 0.114]) if wanted.ndim == 4 else wanted
    wanted = wanted / (257 if loaded.SamplesPerPixel == 3 and loaded.BitsStored == 16 else 1)
    box = tags.box
    wanted = wanted[:, box.y : box.y + box.height, box.x : box.x + box.width]
    assert np.abs(np.stack(got) - wanted).max() <= 1.01  # from 16 bits, rounding down


def test_a_palette_is_applied_and_text_beside_a_still_sector_is_gone() -> None:
    path = sample("examples_palette.dcm")
    tags = read_tags(path)
    sector = find_sector(tags)
    assert tags.header.flags == "still" and (tags.header.width, tags.header.height) == (680, 290)
    assert tags.header.cm_x == pytest.approx(0.0262288)
    assert "coloured" not in sector.flags
    (grey,) = grey_frames(tags, sector)
    assert not grey[20:45, :190].any(), "a measurement is written there"
    assert (grey > 0).mean() > 0.05


# The same grey frames in every form


def _palette(made: Dataset, entries: NDArray[Any]) -> Dataset:
    made.PhotometricInterpretation = "PALETTE COLOR"
    for colour in ("Red", "Green", "Blue"):
        setattr(made, f"{colour}PaletteColorLookupTableDescriptor", [len(entries), 0, 8 * entries.dtype.itemsize])
        setattr(made, f"{colour}PaletteColorLookupTableData", entries.tobytes())
        made[f"{colour}PaletteColorLookupTableDescriptor"].VR = "US"
        made[f"{colour}PaletteColorLookupTableData"].VR = "OW"
    return made


def _inverted_palette(grey: Frames) -> Dataset:
    return _palette(dataset(255 - grey), np.arange(255, -1, -1, dtype=np.uint8))


def _deep_palette(grey: Frames) -> Dataset:
    """Of 1,024 entries of 8 bits, which pydicom's own function mixes up."""
    entries = np.repeat(np.arange(256, dtype=np.uint8), 4)
    return _palette(dataset(grey.astype(np.uint16) * 4 + 3, BitsStored=10, HighBit=9), entries)


def _big_endian(grey: Frames) -> Dataset:
    made = dataset(grey.astype(">u2") * 257)
    made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    return made


def _big_endian_palette(grey: Frames) -> Dataset:
    made = _palette(dataset(grey.astype(">u2")), (np.arange(256) * 256 + 255).astype(">u2"))
    made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    return made


def _swapped_pairs(grey: Frames) -> Dataset:
    made = dataset(grey)
    made.PixelData = np.frombuffer(grey.tobytes(), ">u2").astype("<u2").tobytes()
    made["PixelData"].VR = "OW"
    made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    return made


def _big_endian_bytes(grey: Frames) -> Dataset:
    made = dataset(grey)
    made.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    return made


def _implicit(grey: Frames) -> Dataset:
    made = dataset(grey)
    made.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    return made


def _planes(grey: Frames) -> Dataset:
    made = dataset(colours_of(grey), PlanarConfiguration=1)
    made.PixelData = np.ascontiguousarray(colours_of(grey).transpose(0, 3, 1, 2)).tobytes()
    return made


def _ybr_full(grey: Frames) -> Dataset:
    ybr = np.full((*grey.shape, 3), 128, np.uint8)
    ybr[..., 0] = grey
    return dataset(ybr, PhotometricInterpretation="YBR_FULL")


def _ybr_full_422(grey: Frames) -> Dataset:
    made = dataset(colours_of(grey), PhotometricInterpretation="YBR_FULL_422")
    pairs = np.full((*grey.shape[:2], grey.shape[2] // 2, 4), 128, np.uint8)
    pairs[..., 0], pairs[..., 1] = grey[..., ::2], grey[..., 1::2]
    made.PixelData = pairs.tobytes()
    return made


def _twelve_bits(grey: Frames) -> Dataset:
    """The window lies within the range of 12 bits, and the stored values are rescaled before it."""
    stored = grey.astype(np.uint16) * 4 + 1000
    window = {"RescaleSlope": 0.25, "RescaleIntercept": -250, "WindowCenter": [128, 7], "WindowWidth": [256, 9]}
    return dataset(stored, BitsStored=12, HighBit=11, **window)


def _signed(grey: Frames) -> Dataset:
    return dataset((grey.astype(np.int32) * 257 - 32768).astype(np.int16), PixelRepresentation=1)


def _encoded(syntax: UID) -> Callable[[Frames], Dataset]:
    def encode(grey: Frames) -> Dataset:
        made = dataset(grey)
        made.compress(syntax, generate_instance_uid=False)
        return made

    return encode


def _coloured_rle(grey: Frames) -> Dataset:
    made = dataset(colours_of(grey))
    made.compress(RLELossless, generate_instance_uid=False)
    return made


def _jpeg_lossless(grey: Frames) -> Dataset:
    return compressed(dataset(grey), JPEGLosslessSV1, [lossless_jpeg(frame) for frame in grey])


def _deep_jpeg_lossless(grey: Frames) -> Dataset:
    deep = ((grey.astype(np.uint32) * 4095 + 127) // 255).astype(np.uint16)
    return compressed(dataset(deep, BitsStored=12, HighBit=11), JPEGLosslessSV1, [lossless_jpeg(x, 12) for x in deep])


def _jpeg_2000(grey: Frames) -> Dataset:
    frames = [pillow(frame, "JPEG2000", irreversible=False, no_jp2=True) for frame in grey]
    return compressed(dataset(grey), JPEG2000Lossless, frames)


def _coloured_jpeg_2000(grey: Frames) -> Dataset:
    frames = [pillow(frame, "JPEG2000", irreversible=False, no_jp2=True, mct=1) for frame in colours_of(grey)]
    return compressed(dataset(colours_of(grey)), JPEG2000, frames, "YBR_RCT")


FORMS: list[Callable[[Frames], Dataset]] = [
    dataset,
    lambda grey: dataset(255 - grey, PhotometricInterpretation="MONOCHROME1"),
    lambda grey: dataset(grey.astype(np.uint16) * 257),
    lambda grey: dataset(colours_of(grey)),
    lambda grey: dataset(colours_of(grey).astype(np.uint16) * 257),
    _implicit,
    _planes,
    _ybr_full,
    _ybr_full_422,
    _twelve_bits,
    _signed,
    _big_endian,
    _big_endian_bytes,
    _swapped_pairs,
    _inverted_palette,
    _deep_palette,
    _big_endian_palette,
    _encoded(RLELossless),
    _encoded(JPEGLSLossless),
    _coloured_rle,
    _jpeg_lossless,
    _deep_jpeg_lossless,
    _jpeg_2000,
    _coloured_jpeg_2000,
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_frames(form: Callable[[Frames], Dataset], tmp_path: Path) -> None:
    grey = cine(seed=int(np.random.default_rng().integers(1 << 30)))
    path = write(tmp_path / "a.dcm", form(grey))
    got, sector = frames_of(path), find_sector(read_tags(path))
    np.testing.assert_array_equal(got[:, CORE], grey[:, CORE])
    assert not got[:, ~sector.inside].any() and not got[:, TEXT].any()
    assert "coloured" not in sector.flags


def test_jpeg_is_close(tmp_path: Path) -> None:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [100 + 80 * np.sin(x / 9 + step) * np.cos(y / 7) for step in range(FRAMES)]
    grey = np.where(CORE, np.stack(waves), 0).astype(np.uint8)
    frames = [pillow(frame, "JPEG", quality=95, subsampling="4:2:2") for frame in colours_of(grey)]
    got = frames_of(
        write(tmp_path / "a", compressed(dataset(colours_of(grey)), JPEGBaseline8Bit, frames, "YBR_FULL_422"))
    )
    assert np.abs(got[:, CORE].astype(int) - grey[:, CORE]).mean() < 2


def test_a_window_clips_and_without_one_the_full_range_is_used(tmp_path: Path) -> None:
    stored = (np.arange(HEIGHT * WIDTH * FRAMES) % 4096).reshape(FRAMES, HEIGHT, WIDTH).astype(np.uint16)
    deep = {"BitsStored": 12, "HighBit": 11}

    def grey(**tags: Any) -> NDArray[np.uint8]:
        tags_of = read_tags(write_dicom(tmp_path / "a", stored, **deep, **tags))
        return np.stack([frame for frame, _ in dicom._decoded(tags_of)])

    assert np.abs(grey() - stored * (255 / 4095)).max() <= 0.5
    window = np.clip(((stored - (2048 - 0.5)) / (1000 - 1) + 0.5) * 255, 0, 255)  # PS3.3 C.11.2.1.2.1
    assert np.abs(grey(WindowCenter=2048, WindowWidth=1000) - window).max() <= 0.5
    exact = np.clip(((stored - 2048.0) / 1000 + 0.5) * 255, 0, 255)
    assert np.abs(grey(WindowCenter=2048, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT") - exact).max() <= 0.5


# Sector and region


def test_text_in_a_region_is_gone_and_a_clock_too(tmp_path: Path) -> None:
    grey = cine(1)
    got = frames_of(write_dicom(tmp_path / "a", grey, regions=[region()]))
    assert grey[:, TEXT].min() == 230 and not got[:, TEXT].any()
    assert np.ptp(grey[:, 4:9, -12:-4], axis=0).any() and not got[:, 4:9, -12:-4].any()


def test_a_clip_is_cropped_to_its_tissue_and_keeps_the_scale(tmp_path: Path) -> None:
    grey = cine(2)
    other = {"RegionLocationMinX0": 0, "RegionLocationMinY0": 80, "RegionLocationMaxX1": 127}
    spectrum = region(RegionSpatialFormat=3, RegionDataType=3, **other)
    corners = {"RegionLocationMinX0": 16, "RegionLocationMinY0": 8, "RegionLocationMaxX1": 200}
    path = write_dicom(tmp_path / "a", grey, regions=[spectrum, region(**corners, RegionLocationMaxY1=71)])
    found = probe(path)
    # Clamped to the frame. The stored size is kept, for tables that state it.
    assert found == Header(FRAMES, WIDTH - 16, 64, 50.0)
    assert (found.stored_width, found.stored_height, found.flags) == (WIDTH, HEIGHT, "")
    assert (found.cm_x, found.cm_y) == (0.05, 0.04)
    assert found.cm_per_pixel(28) == pytest.approx((0.05 * 112 / 28, 0.04 * 64 / 28))
    got = frames_of(path)
    inside = CORE[8:72, 16:]
    np.testing.assert_array_equal(got[:, inside], grey[:, 8:72, 16:][:, inside])


def test_the_largest_tissue_is_taken(tmp_path: Path) -> None:
    small = region(RegionLocationMaxX1=40, RegionLocationMaxY1=40, PhysicalDeltaX=0.01)
    flow = region(RegionDataType=2)
    found = probe(write_dicom(tmp_path / "a", cine(3), regions=[small, region(), flow]))
    assert (found.width, found.height, found.cm_x) == (WIDTH, HEIGHT, 0.05)
    assert found.flags == "doppler-region several-regions"


@pytest.mark.parametrize(
    "tags",
    [
        {"RegionLocationMaxX1": 2 * WIDTH, "RegionLocationMaxY1": 2 * HEIGHT},
        {"RegionLocationMinX0": WIDTH + 5, "RegionLocationMaxX1": WIDTH + 90},
        {"RegionLocationMinX0": 90, "RegionLocationMaxX1": 20},
        {"RegionLocationMaxX1": 3},
    ],
)
def test_a_region_of_another_image_is_not_used(tags: dict[str, int], tmp_path: Path) -> None:
    found = probe(write_dicom(tmp_path / "a", cine(4), regions=[region(**tags)]))
    assert (found.width, found.height, found.cm_x, found.cm_y) == (WIDTH, HEIGHT, 0, 0)
    assert found.flags == "misfit-region"


@pytest.mark.parametrize("unit", [0, 4])
def test_only_centimetres_are_a_scale(unit: int, tmp_path: Path) -> None:
    found = probe(write_dicom(tmp_path / "a", cine(5), regions=[region(PhysicalUnitsXDirection=unit)]))
    assert (found.cm_x, found.cm_y) == (0, 0.04)


def test_a_clip_without_a_2d_image_is_refused(tmp_path: Path) -> None:
    regions = [region(RegionSpatialFormat=2), region(RegionSpatialFormat=3, RegionDataType=4)]
    assert "no 2D image" in reason(write_dicom(tmp_path / "a", cine(6), regions=regions), probe)


def test_coloured_pixels_are_flagged_only_in_the_sector(tmp_path: Path) -> None:
    images = colours_of(cine(7))
    images[:, :4, :, 0] = 255  # a coloured logo beside the sector
    plain = read_tags(write_dicom(tmp_path / "a", images, regions=[region()]))
    assert "coloured" not in find_sector(plain).flags
    images[2, 40:50, 60:70] = (200, 20, 20)  # flow on one frame
    assert find_sector(read_tags(write_dicom(tmp_path / "b", images))).flags == ("coloured",)


def test_a_still_image_needs_a_region(tmp_path: Path) -> None:
    image = cine(8, frames=1)
    tags = read_tags(write_dicom(tmp_path / "a", image, regions=[region()], NumberOfFrames=None))
    assert (tags.header.frames, tags.header.fps, tags.header.flags) == (1, 0.0, "still")
    (got,) = grey_frames(tags, find_sector(tags))
    np.testing.assert_array_equal(got[CORE], image[0, CORE])
    assert not got[TEXT].any() and not got[4:9, -12:-4].any()
    assert "no sector found: nothing changes and no ultrasound region" in reason(write_dicom(tmp_path / "b", image))


def test_a_frozen_cine_is_one_image_even_if_a_clock_runs(tmp_path: Path) -> None:
    image = np.repeat(cine(9, frames=1), FRAMES, axis=0)
    image[:, 4:9, -12:-4] = cine(9)[:, 4:9, -12:-4]
    tags = read_tags(write_dicom(tmp_path / "a", image, regions=[region()]))
    sector = find_sector(tags)
    assert sector.flags == ("frozen",)
    assert not np.stack(list(grey_frames(tags, sector)))[:, TEXT].any()
    assert "no sector found" in reason(write_dicom(tmp_path / "b", image))


def test_a_black_image_has_no_sector(tmp_path: Path) -> None:
    black = np.zeros((FRAMES, HEIGHT, WIDTH), np.uint8)
    assert "no sector found: too little" in reason(write_dicom(tmp_path / "a", black, regions=[region()]))


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_where_all_of_the_frame_changes_or_is_lit_no_sector_is_found(frames: int, tmp_path: Path) -> None:
    noise = np.random.default_rng(10).integers(60, 256, (frames, HEIGHT, WIDTH), dtype=np.uint8)
    noise[:, TEXT] = 230
    assert "all of the frame changes or is lit" in reason(write_dicom(tmp_path / "a", noise, regions=[region()]))
    corners = {"RegionLocationMinX0": 40, "RegionLocationMaxX1": 87, "RegionLocationMinY0": 30}
    tags = read_tags(write_dicom(tmp_path / "b", noise, regions=[region(**corners, RegionLocationMaxY1=69)]))
    sector = find_sector(tags)  # the region leaves the text out
    assert sector.flags == ("filled",) and sector.inside.all()


# The frame rate


@pytest.mark.parametrize(
    ("tags", "fps"),
    [
        ({"FrameTime": 20, "CineRate": 30}, 50),
        ({"FrameTime": None, "FrameTimeVector": [0, 10, 30, 20, 20, 20]}, 50),
        ({"FrameTime": None, "CineRate": 30, "RecommendedDisplayFrameRate": 25}, 30),
        ({"FrameTime": 0, "RecommendedDisplayFrameRate": 25}, 25),
        ({"FrameTime": -20, "CineRate": 0}, 0),
        ({"FrameTime": "1e-9"}, 0),
        ({"FrameTime": None}, 0),
    ],
)
def test_the_frame_rate_is_that_of_acquisition_if_stated(tags: dict[str, Any], fps: float, tmp_path: Path) -> None:
    found = probe(write_dicom(tmp_path / "a", cine(11), **tags))
    assert found.fps == pytest.approx(fps)
    assert ("no-rate" in found.flags) == (fps == 0)


# Wrong files


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"NumberOfFrames": 100_000}, "truncated: header claims 1228800000 bytes of pixels"),
        ({"Rows": 65535, "Columns": 65535, "NumberOfFrames": 100}, "frame size out of range: 65535x65535"),
        ({"Rows": 4096, "Columns": 4096, "NumberOfFrames": 90_000}, "too long: 90000 frames of 4096x4096"),
        ({"NumberOfFrames": 10**9}, "absurd frame count: header claims 1000000000"),
        ({"NumberOfFrames": 0}, "absurd frame count"),
        ({"NumberOfFrames": -3}, "absurd frame count"),
        ({"Rows": None}, "frame size out of range"),
        ({"Rows": 7}, "frame size out of range"),
        ({"Rows": HEIGHT + 1}, "truncated: header claims"),
        ({"SamplesPerPixel": 3}, "colours not read"),
        ({"SamplesPerPixel": 2}, "colours not read"),
        ({"PhotometricInterpretation": "CMYK"}, "colours not read"),
        ({"PhotometricInterpretation": "QUUX XAVER 4711"}, "colours not read"),
        ({"BitsAllocated": 32}, "depth not read"),
        ({"BitsAllocated": 1}, "depth not read"),
        ({"BitsStored": 9}, "depth not read"),
        ({"HighBit": 3}, "depth not read"),
        ({"Modality": "CT"}, "not ultrasound"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.2"}, "slices of a volume"),
        ({"EncryptedAttributesSequence": Sequence([Dataset()])}, "encrypted"),
        ({"PixelData": None}, "no pixels"),
    ],
)
def test_a_wrong_header_is_an_error_before_a_pixel_is_touched(
    tags: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = dataset(cine(12))
    for tag, value in tags.items():
        if value is None:
            del made[tag]
        else:
            setattr(made, tag, value)
    path = write(tmp_path / "a.dcm", made)
    monkeypatch.setattr(dicom, "_stored_frames", lambda _: pytest.fail("pixels were read"))
    tracemalloc.start()
    try:
        with within(10):
            assert message in reason(path, probe)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def test_a_header_is_read_without_a_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "a", cine(13))
    monkeypatch.setattr(dicom, "_stored_frames", lambda _: pytest.fail("pixels were read"))
    assert probe(path) == Header(FRAMES, WIDTH, HEIGHT, 50.0)


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path) -> None:
    peaks = []
    for frames in (8, 64):
        path = write_dicom(tmp_path / "a", cine(14, frames, 240, 320))
        read_frames(path, [0], 32)  # imports
        tracemalloc.start()
        read_frames(path, [0, frames - 1], 32)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], "56 more frames take 4.3 MB"


def test_files_of_another_kind_have_no_pixels(tmp_path: Path) -> None:
    with pytest.raises(NoPixelsError, match="such as a report"):
        probe(sample("test-SR.dcm"))
    assert "no pixels" in reason(sample("test-SR.dcm"), probe)


def test_what_is_no_dicom_is_refused_as_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.dcm"
    path.write_bytes(b"\0" * 128 + b"DICK" + b"\0" * 1000)
    assert not is_dicom(path) and reason(path, probe) == "not a readable video: neither AVI, MP4 nor DICOM"
    with pytest.raises(VideoError, match="not a DICOM file"):
        read_tags(path)
    path.write_bytes(b"\0" * 128 + b"DICM")
    assert "not a readable DICOM file" in reason(path, probe) or "damaged header" in reason(path, probe)
    path.write_bytes(b"\x30\x80\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x07\x03\xa0\x80" + b"\7" * 500)
    assert reason(path, probe).startswith("encrypted")


def test_a_deflated_file_is_unfolded_frame_by_frame(tmp_path: Path) -> None:
    """The frames are those of the same file as it was before. One that unfolds to a large one takes no memory."""
    images = cine(7)
    made = dataset(images, regions=[region()])
    plain = read_tags(write(tmp_path / "plain", made))
    made.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = write(tmp_path / "deflated", made)
    tags = read_tags(path)
    assert (tags.header.form, tags.patient, tags.box) == ("dicom deflated", PATIENT, plain.box)
    frames = [[*grey_frames(one, find_sector(one))] for one in (tags, plain)]
    np.testing.assert_array_equal(*frames)
    assert np.ptp(frames[0]) > 100
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert reason(path, lambda path: [*dicom._decoded(read_tags(path))]).startswith("truncated")
    path.write_bytes(content[:600] + b"\xff" * 64 + content[664:])
    assert reason(path, lambda path: [*dicom._decoded(read_tags(path))])
    bomb = dataset(np.zeros((2000, HEIGHT, WIDTH), np.uint8))
    bomb.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    path = write(tmp_path / "bomb", bomb)
    assert path.stat().st_size < 100_000
    del bomb
    tracemalloc.start()
    assert sum(1 for _ in dicom._decoded(read_tags(path))) == 2000
    assert tracemalloc.get_traced_memory()[1] < 4 * dicom._LONGEST_HEADER < 2000 * HEIGHT * WIDTH
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["JPEG-lossy.dcm", "JPGExtended.dcm"])
def test_an_extended_jpeg_of_12_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are those that libjpeg-turbo 3 gives, but for their rounding."""
    path = get_testdata_file(name, download=False)
    if path is None:
        pytest.skip(f"{name} is in the package pydicom-data, which is not installed")
    monkeypatch.setattr(dicom, "_ULTRASOUND", ("NM",))
    (values,) = dicom._stored_frames(read_tags(Path(str(path))))
    assert (values.shape, values.dtype) == ((1024, 256), np.uint16)
    known = {(421, 143): 264, (336, 16): 33, (29, 214): 1, (868, 74): 1, (676, 187): 5}
    assert all(abs(int(values[at]) - value) <= 1 for at, value in known.items())
    assert abs(float(values.mean()) - 3767007 / values.size) < 0.1


@pytest.mark.parametrize(("bits", "first"), [(8, 1000), (12, -200), (16, 0)])
def test_a_voi_lut(bits: int, first: int) -> None:
    """It goes before a window; what lies beyond the table gets its first or last entry."""
    rng = np.random.default_rng()
    table = np.sort(rng.integers(0, 1 << bits, 300))
    values = np.arange(1 << 12, dtype=np.uint16)
    lut = Dataset()
    lut.add_new("LUTDescriptor", "SS" if first < 0 else "US", [300, first, bits])
    lut.add_new("LUTData", "US", table.tolist())
    made = dataset(values.reshape(1, 64, 64), BitsStored=12, HighBit=11, WindowCenter=9, WindowWidth=3)
    made.RescaleSlope, made.RescaleIntercept = 0.5, -100
    made.VOILUTSequence = Sequence([lut])
    for kind in ("MONOCHROME2", "MONOCHROME1"):
        made.PhotometricInterpretation = kind
        found = dicom._windowed(made, values.astype(np.int32))
        place = np.clip(np.rint(0.5 * values - 100).astype(int) - first, 0, 299)
        wanted = table[place] * 255 / (2**bits - 1)
        np.testing.assert_allclose(found, wanted if kind == "MONOCHROME2" else 255 - wanted, atol=0.501)
    assert np.ptp(found) > 100
    del lut.LUTData
    lut.add_new("LUTData", "OW", table.astype("<u2").tobytes())
    np.testing.assert_array_equal(dicom._windowed(made, values.astype(np.int32)), found)
    for descriptor, said in (([300, first, 17], "17 bits"), ([299, first, bits], "another length")):
        lut.LUTDescriptor = descriptor
        with pytest.raises(VideoError, match=said):
            dicom._windowed(made, values.astype(np.int32))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("form", [dataset, _encoded(RLELossless), _jpeg_2000])
def test_a_truncated_file_is_refused(form: Callable[[Frames], Dataset], share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a", form(cine(15)))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with within(20):
        assert reason(path)


def test_an_image_that_ends_in_its_header_is_not_taken_for_a_report(tmp_path: Path) -> None:
    content = write_dicom(tmp_path / "a", cine(28)).read_bytes()
    begin, end = content.index(b"\x08\x00\x16\x00UI") + 40, content.index(b"\xe0\x7f\x10\x00")
    for place in range(begin, end + 20, 7):
        (tmp_path / "b").write_bytes(content[:place])
        with pytest.raises(VideoError) as error:
            probe(tmp_path / "b")
        assert not isinstance(error.value, NoPixelsError), place


@pytest.mark.parametrize(("kept", "message"), [(FRAMES - 2, "truncated"), (FRAMES + 1, "damaged")])
def test_frames_are_counted(kept: int, message: str, tmp_path: Path) -> None:
    made = _encoded(RLELossless)(cine(16, FRAMES + 1))
    encoded = list(generate_frames(made.PixelData, number_of_frames=FRAMES + 1))[:kept]
    path = write(tmp_path / "a", compressed(made, RLELossless, encoded))
    made.NumberOfFrames = FRAMES
    assert message in reason(write(path, made))


@pytest.mark.parametrize("kind", ["JPEG", "JPEG2000"])
def test_a_codec_is_not_asked_for_a_larger_frame(kind: str, tmp_path: Path) -> None:
    """Each frame has a size of its own inside, for which the codec allocates memory."""
    options: dict[str, Any] = {"no_jp2": True} if kind == "JPEG2000" else {}
    encoded = [pillow(frame, kind, **options) for frame in cine(17)]
    large = bytearray(encoded[2])
    place = large.index(b"\xff\xc0") + 5 if kind == "JPEG" else 8
    width = 2 if kind == "JPEG" else 4
    large[place : place + 2 * width] = (60_000).to_bytes(width, "big") * 2
    encoded[2] = bytes(large)
    syntax = JPEG2000 if kind == "JPEG2000" else JPEGBaseline8Bit
    path = write(tmp_path / "a", compressed(dataset(cine(17)), syntax, encoded))
    assert "frames of several sizes: frame 2 claims another one" in reason(path)


def test_a_damaged_frame_is_an_error(tmp_path: Path) -> None:
    encoded = [pillow(frame, "JPEG") for frame in cine(18)]
    encoded[3] = encoded[3][: len(encoded[3]) // 2]
    path = write(tmp_path / "a", compressed(dataset(cine(18)), JPEGBaseline8Bit, encoded))
    assert reason(path) == "damaged: frame 3 cannot be decoded"


def test_a_damaged_sector_of_a_real_jpeg_is_noticed(tmp_path: Path) -> None:
    path = sample("examples_ybr_color.dcm")
    rng, size, content = np.random.default_rng(0), path.stat().st_size, path.read_bytes()
    for junk in (bytes(512), rng.bytes(512)):
        for _ in range(3):
            place = int(rng.integers(read_tags(path)._place + 400, size - 600))
            (tmp_path / "a").write_bytes(content[:place] + junk + content[place + 512 :])
            assert "damaged" in reason(tmp_path / "a") or "not a readable" in reason(tmp_path / "a")


def test_random_damage_never_ends_in_another_error(tmp_path: Path) -> None:
    rng = np.random.default_rng()
    content = write(tmp_path / "a", _encoded(RLELossless)(cine(19, 3, 32, 32, clock=False))).read_bytes()
    for _ in range(300):
        damaged = np.frombuffer(content, np.uint8).copy()
        where = rng.integers(132, 1500, rng.integers(1, 8))
        damaged[where] = rng.integers(0, 256, len(where))
        (tmp_path / "b").write_bytes(damaged.tobytes())
        with within(20):
            try:
                read_frames(tmp_path / "b", [0], 16)
            except VideoError as error:
                assert "\n" not in str(error) and "Quux" not in str(error) and "4711" not in str(error)


def test_pydicom_says_nothing_of_the_values_it_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """An invalid identifier is repeated in pydicom's warning and in its log."""
    path = write_dicom(tmp_path / "a", cine(20), StudyInstanceUID="1.2.345.678", FrameTime="12.5")
    content = path.read_bytes()
    assert content.count(b"1.2.345.678\0") == content.count(b"12.5") == 1
    path.write_bytes(content.replace(b"1.2.345.678\0", PATIENT.encode() + b"  ").replace(b"12.5", b"Quux"))
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            tags = read_tags(path)
            assert NAME not in repr(tags) and PATIENT not in repr(tags)
            frames_of(path)
        except VideoError as error:
            assert "Quux" not in str(error)
    heard = caplog.text + "".join(str(warning.message) for warning in said) + "".join(capfd.readouterr())
    assert "Quux" not in heard and PATIENT not in heard


def test_an_error_of_pydicom_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ValueError(f"invalid value {NAME}")

    path = write_dicom(tmp_path / "a", cine(26))
    with monkeypatch.context() as patch:
        patch.setattr(pydicom, "dcmread", fail)
        assert reason(path, probe) == "not a readable DICOM file: ValueError in its decoder"
    monkeypatch.setattr(dicom, "_converter", fail)
    assert reason(path) == "not a readable DICOM file: ValueError in its decoder"


# Packages


def test_without_pydicom_the_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "a", cine(21))
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"^reading DICOM needs the package pydicom.*'cardiocaps\[dicom\]'$"):
        probe(path)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("examples_ybr_color.dcm", "PIL", r"no decoder for JPEG baseline: pip install 'cardiocaps\[dicom\]'"),
        ("JPEGLSNearLossless_08.dcm", "jpeg_ls", r"no decoder for JPEG-LS: pip install 'cardiocaps\[dicom\]'"),
    ],
)
def test_a_missing_plug_in_is_named(name: str, module: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    probe(sample(name))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(VideoError, match=message):
        probe(sample(name))


# Where videos are taken


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    for name in ("a", "a.dcm", "1.2.840.4711", "a.avi"):
        assert probe(write_dicom(tmp_path / name, cine(22))).is_dicom


def test_a_study_of_dicom_files_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cardiocaps.data.echonet_lvh.reader import read_folder

    root = write_folder(tmp_path / "root", 8, Frames=FRAMES, FPS=50, Width=WIDTH, Height=HEIGHT)
    corners = {"RegionLocationMinX0": 8, "RegionLocationMaxX1": 119}
    for number, video in enumerate(sorted(root.glob("Batch*/*.avi"))):
        # The table states the stored width, the file is cropped. The name of the fourth has no right suffix.
        tags: dict[str, Any] = {} if number == 4 else {"regions": [region(**corners)]}
        write_dicom(video if number == 3 else video.with_suffix(".dcm"), cine(number), **tags)
        if number != 3:
            video.unlink()
    study = read_folder(root)
    options: dict[str, Any] = {"size": 32, "frames_per_clip": 3, "folder": tmp_path / "cache", "workers": 2}
    cached = cache.build(study, **options)
    assert len(cached.study.clips) == 8
    clip = study.clips[0]
    numbers = cached.frames[clip.path].numbers
    np.testing.assert_array_equal(cached.frame(clip, 1), read_frames(clip.path, numbers, 32)[1])
    notes = [problem.reason for problem in cached.study.problems]
    assert notes == ["no ultrasound region is named: frames are not cropped and have no scale (kept)"]
    scales = {cached.frames[clip.path].video.header.cm_x for clip in study.clips}
    assert scales == {0.0, 0.05}  # kept beside the frames
    read: list[Path] = []
    monkeypatch.setattr(cache, "read_frames", lambda path, *rest: read.append(path) or read_frames(path, *rest))
    assert cache.build(study, **options).study == cached.study and not read
    monkeypatch.setattr(dicom, "READER_VERSION", 99)
    cache.build(study, **options)
    assert len(read) == 8


def test_decord_is_never_asked(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "a", cine(23))
    np.testing.assert_array_equal(read_frames(path, [1], 16, "decord"), read_frames(path, [1], 16))


def test_the_limits_are_those_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_dicom(tmp_path / "a", cine(24))
    monkeypatch.setattr(header, "MAX_PIXELS", FRAMES * HEIGHT * WIDTH - 1)
    assert "too long" in reason(path, probe)
    monkeypatch.undo()
    clock = iter(range(0, 10**6, 200))
    monkeypatch.setattr(dicom.time, "monotonic", lambda: next(clock))
    assert "too slow: not read within 300 seconds" in reason(path)


def test_a_cine_shows_no_identifier() -> None:
    box = dicom.Box(0, 0, 8, 8)
    tags = Cine(Path("a"), Header(1, 8, 8, 0), box, True, PATIENT, "1.2.3.4711", "1.2.3.4712", dataset(cine(25)))
    assert "4711" not in repr(tags) and "4712" not in repr(tags)
