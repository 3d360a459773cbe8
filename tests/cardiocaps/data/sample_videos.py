"""Small real videos, and folders in the layout of each data set, written fresh for each test."""

import csv
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

COLUMNS = [
    "",
    "HashedFileName",
    "Calc",
    "CalcValue",
    "Frame",
    "X1",
    "X2",
    "Y1",
    "Y2",
    "Frames",
    "FPS",
    "Width",
]
COLUMNS += ["Height", "split"]
Frames = NDArray[np.uint8]


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


def picture(frames: int = 12, height: int = 48, width: int = 64, seed: int = 0) -> Frames:
    """uint8 [T, H, W, 3]: smooth waves that move from frame to frame, different for each seed."""
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    phase, speed = rng.uniform(0, 6, 3), rng.uniform(0.2, 0.6)
    waves = [np.sin(x / (6 + c) + y / (9 - c) + speed * t + phase[c]) for c in range(3)]
    return (127 + 100 * np.stack(waves, -1)).astype(np.uint8)


def encode(
    path: Path,
    frames: Frames,
    codec: str = "mjpeg",
    fps: int = 50,
    *,
    pixels: str | None = None,
    turn: Mapping[str, Any] | None = None,
    encoder: Mapping[str, str] | None = None,
    **options: str,
) -> Path:
    """Write a video. `turn`: its display matrix, as arguments of PyAV's `set_display_rotation`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=fps, options=dict(encoder or {}))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
        if turn:
            stream.set_display_rotation(**turn)
        if codec == "mjpeg":
            stream.codec_context.qmin = stream.codec_context.qmax = 2
        else:
            stream.bit_rate = 8_000_000
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


def remux(path: Path, to: Path, keep: Iterable[int] | None = None, ticks: int = 1, hidden: int = 0) -> Path:
    """Copy a video's packets into another container as they are.

    Args:
        keep: only these packets. ticks: show each frame for so many frames' time; AVI fills the gaps with empty chunks.
        hidden: begin so many frames before the time 0, which makes an edit list in MP4.
    """
    with av.open(str(path)) as source, av.open(str(to), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.dts is not None]
        packets = packets if keep is None else [packets[i] for i in keep]
        tick = packets[0].duration
        first = packets[0].dts + hidden * tick
        for packet in packets:
            assert packet.dts is not None and packet.pts is not None
            packet.pts, packet.dts = (packet.pts - first) * ticks, (packet.dts - first) * ticks
            packet.stream = copy
            target.mux(packet)
    return to


def packets(path: Path) -> list[tuple[int, int]]:
    """Where each packet's bytes begin and end in the file."""
    with av.open(str(path)) as container:
        chunk = 8 if container.format.name == "avi" else 0  # its name and length come first
        found = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
        return [((packet.pos or 0) + chunk, (packet.pos or 0) + chunk + packet.size) for packet in found]


def overwrite(path: Path, place: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[place : place + len(content)] = content
    path.write_bytes(data)
    return path


def claim_frames(path: Path, count: int) -> Path:
    """Patch both frame counts of an AVI header: dwTotalFrames in avih and dwLength in strh."""
    data = bytearray(path.read_bytes())
    for tag, offset in ((b"avih", 16), (b"strh", 32)):
        place = data.index(tag) + 8 + offset
        data[place : place + 4] = struct.pack("<I", count)
    path.write_bytes(data)
    return path


def cut(path: Path, share: float = 0.5) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    return path


def measurement(name: str, calc: str = "LVIDd", cm: float | str = 4.5, **other: Any) -> dict[str, Any]:
    row = {"HashedFileName": name, "Calc": calc, "CalcValue": cm, "Frame": 3, "Frames": 12, "FPS": 50}
    row |= {"X1": 10, "X2": 10, "Y1": 5, "Y2": 40, "Width": 64, "Height": 48, "split": "train"}
    return row | other


def write_table(root: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    path = root / "MeasurementsList.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for number, row in enumerate(rows):
            writer.writerow([number if column == "" else row.get(column, "") for column in columns])
    return path


def split_of(number: int) -> str:
    return ("train", "train", "train", "train", "val", "val", "test", "test")[number % 8]


def write_folder(root: Path, videos: int = 8, **other: Any) -> Path:
    """An EchoNet-LVH folder: each split has both classes; odd videos are abnormal (a thick septum)."""
    rows = []
    for i in range(videos):
        name = f"0X{i:016X}"
        encode(root / f"Batch{1 + i % 4}" / f"{name}.avi", picture(seed=i))
        rows += [
            measurement(name, "IVSd", 1.4 if i % 2 else 0.8, split=split_of(i), **other),
            measurement(name, "LVIDd", round(4.5 + 0.05 * i, 2), split=split_of(i), **other),
        ]
    write_table(root, rows)
    return root


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A CSV table with the columns of its first row; a missing value is a blank cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_dynamic(root: Path, videos: int = 8, **other: Any) -> list[dict[str, Any]]:
    """An EchoNet-Dynamic folder, and the rows of its table: odd videos have a low ejection fraction."""
    rows = []
    for i in range(videos):
        name = f"0X{i:016X}"
        encode(root / "Videos" / f"{name}.avi", picture(seed=i))
        edv = 90.0 + i
        ef = (35.5 if i % 2 else 62.5) + i / 8
        row = {"FileName": name, "EF": ef, "ESV": round(edv * (1 - ef / 100), 4), "EDV": edv}
        row |= {"FrameHeight": 48, "FrameWidth": 64, "FPS": 50, "NumberOfFrames": 12, "Split": split_of(i).upper()}
        rows.append(row | other)
    write_rows(root / "FileList.csv", rows)
    return rows


def write_pediatric(root: Path, videos: int = 20) -> dict[str, list[dict[str, Any]]]:
    """An EchoNet-Pediatric folder, and the rows of each view: two videos a fold, of which one has a low EF."""
    tables = {}
    for number, view in enumerate(("A4C", "PSAX")):
        rows = []
        for i in range(videos):
            name = f"CR{i:04}.avi"  # also in the other view
            encode(root / view / "Videos" / name, picture(frames=6, seed=100 * number + i))
            row = {"FileName": name, "EF": (48.5 if i % 2 else 62.25) + number, "Sex": "F" if i % 3 else "M"}
            row |= {"Age": i % 18, "Weight": 20.5 + i, "Height": 110.0 + i, "FrameHeight": 48, "FrameWidth": 64}
            rows.append(row | {"FPS": 50, "NumberOfFrames": 6, "Split": i // 2 % 10})
        write_rows(root / view / "FileList.csv", rows)
        tables[view] = rows
    return tables


def write_videos(root: Path, videos: int = 8) -> list[dict[str, Any]]:
    """A table `study.csv` of videos in two folders, and its rows: odd videos are abnormal."""
    rows = []
    for i in range(videos):
        path = encode(root / f"site {i % 2}" / f"{i:03}.avi", picture(seed=i)).relative_to(root)
        row = {"path": str(path), "label": i % 2, "split": split_of(i), "age (y)": 40 + i}
        rows.append(row | {"dx": "stenosis" if i % 2 else "none", "mass": (150.5 if i % 2 else 90.25) + i})
    write_rows(root / "study.csv", rows)
    return rows


def folder_of(dataset: str, parent: Path) -> Path:
    """New data in the layout of a data set, with a few videos: what `--data` takes."""
    root = parent / dataset
    write: Mapping[str, Callable[[Path], Any]] = {
        "echonet-lvh": write_folder,
        "echonet-dynamic": write_dynamic,
        "echonet-pediatric": write_pediatric,
        "table": write_videos,
    }
    write[dataset](root)
    return root / "study.csv" if dataset == "table" else root
