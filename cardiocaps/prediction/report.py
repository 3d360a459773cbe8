"""The report of a prediction: `report.html`, a page to look at, and a picture of each video beside it.

The page is one file without a network: it loads nothing but the pictures, and those only when they come into view.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from cardiocaps.data.dicom import FLAGS
from cardiocaps.evaluation.familiarity import FALSE_ALARMS
from cardiocaps.pages import jpeg, write_page
from cardiocaps.prediction.ensemble import BLANK, STILL, UNLIKE, Video
from cardiocaps.prediction.results import FAILED
from cardiocaps.runtime.files import output_errors, write_bytes

PICTURES, MAPS = "pictures", "maps"
_SHOWN = 72  # pixels, the height of a picture on the page
_CURVE_WIDTH, _CURVE_HEIGHT = 140, 48
_METHODS = {"capsules": "what the primary capsules send to the class that is decided", "gradcam": "its Grad-CAM"}
_MEANINGS = {
    UNLIKE: f"the decoder redraws the video worse than nearly all videos of validation: of videos like these, at most "
    f"{FALSE_ALARMS:.0%} are flagged",
    BLANK: "all frames that were read are of one colour",
    **FLAGS,
    STILL: "a still image",
}


@dataclass(frozen=True)
class Illustration:
    """A further picture of each video.

    Attributes:
        methods: what it shows, from top to bottom: names of `cardiocaps.explanation.maps.METHODS`.
        draw: makes the JPEG from the video and its row.
    """

    methods: tuple[str, ...]
    draw: Callable[[Video, Mapping[str, Any]], bytes]


def hidden_name(name: str) -> str:
    """A name for files about a video, which does not show the name of the video."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:20]


def picture_of(name: str) -> str:
    """The name of a video's picture, relative to the folder."""
    return f"{PICTURES}/{hidden_name(name)}.jpg"


def maps_of(name: str) -> str:
    """The name of the picture of a video's maps, relative to the folder."""
    return f"{MAPS}/{hidden_name(name)}.jpg"


def write_pictures(
    folder: Path, name: str, video: Video, row: Mapping[str, Any], illustration: Illustration | None
) -> None:
    """Write a frame of a video as a JPEG of the video's aspect, and its illustration if there is one.

    Raises:
        OutputError: a file cannot be written.
    """
    pixels = next(iter(video.frames.values())).pixels
    _write(folder / picture_of(name), jpeg(pixels[len(pixels) // 2], video.aspect))
    if illustration is not None:
        _write(folder / maps_of(name), illustration.draw(video, row))


def _write(path: Path, content: bytes) -> None:
    with output_errors(path):
        path.parent.mkdir(exist_ok=True)
    write_bytes(path, content, sync=False)


def write_report(folder: Path, target: str) -> Path:
    """Write `report.html` from the files in a folder of predictions.

    Args:
        folder: with predict.json and predictions.csv; with frames.csv the page has curves.
        target: the column of the regression.

    Returns:
        The path of the page.

    Raises:
        OutputError: a file cannot be read or written.
    """
    with output_errors(folder):
        marker = json.loads((folder / "predict.json").read_text(encoding="utf-8"))
        videos = _rows(folder / "predictions.csv")
        curves = _curves(folder / "frames.csv", target)
    methods = marker.get("maps") or ()
    decides = any("decision" in row for row in videos)
    regresses = any(row[target] for row in videos)
    numbers = [("probability", "probability"), ("calibrated_probability", "calibrated")] * decides
    numbers += [("probability_sd", "± over runs")] * any("probability_sd" in row for row in videos)
    numbers += [(target, target.replace("_", ", "))] * regresses
    numbers += [("regression_sd", "± over runs")] * any("regression_sd" in row for row in videos)
    columns = [
        {"title": "video", "sorts": True},
        {"title": "frame"},
        *([{"title": "decision", "sorts": True}] * decides),
        *({"title": title, "sorts": True, "number": True} for _, title in numbers),
        {"title": "frames and maps" if methods else "frames"},
        {"title": "flags", "sorts": True},
    ]
    cells = [name for name, _ in numbers]
    common = _common_folder([row["input"] for row in videos])
    scale = (0.0, 1.0) if decides else _ends([x for curve in curves.values() for x in curve])
    shown = [_video(folder, row, cells, curves.get(row["input"], ()), scale, common) for row in videos]
    flags = {flag for video in shown for flag in video["flags"]}
    path = folder / "report.html"
    write_page(
        path,
        "predictions",
        title=f"Predictions for {len(shown):,} videos",
        numbers=[
            (f"{sum(not video['failed'] for video in shown):,}", "videos read"),
            *([(f"{sum(video['abnormal'] for video in shown):,}", "abnormal at the threshold")] * decides),
            (f"{sum(UNLIKE in video['flags'] for video in shown):,}", "unlike the training data"),
            (f"{sum(video['failed'] for video in shown):,}", "could not be read"),
        ],
        folder=common,
        runs=marker["runs"],
        decides=decides,
        maps=" and ".join(_METHODS[name] for name in methods),
        curves="the probability of each frame from 0 (bottom) to 1, in the order of the video; dashed: the threshold"
        if decides
        else f"{target.replace('_', ', ')} of each frame, in the order of the video, from {scale[0]:.4g} (bottom) to "
        f"{scale[1]:.4g}",
        columns=columns,
        videos=shown,
        meanings=[(flag, meaning) for flag, meaning in _MEANINGS.items() if flag in flags],
    )
    return path


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, strict=True))


def _curves(path: Path, target: str) -> dict[str, list[float]]:
    """The probabilities of the frames of each video, or without them the target, in the order of the video."""
    curves: dict[str, list[float]] = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                curves.setdefault(row["input"], []).append(float(row.get("probability") or row[target]))
    return curves


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """The least and the largest value; two different ones also where there is no or only one value."""
    least, most = min(values, default=0.0), max(values, default=1.0)
    return (least, most) if least < most else (least, least + 1)


def _common_folder(names: Sequence[str]) -> str:
    """The folder that all names begin with, with a slash at its end; "" if there is none."""
    levels = zip(*(name.split("/")[:-1] for name in names), strict=False)
    return "".join(f"{level[0]}/" for level in takewhile(lambda level: len(set(level)) == 1, levels))


def _video(
    folder: Path,
    row: Mapping[str, str],
    cells: Sequence[str],
    curve: Sequence[float],
    scale: tuple[float, float],
    common: str,
) -> dict[str, Any]:
    """What the page shows of a row. scale: the values at the bottom and at the top of a curve; common: the beginning
    of the name that is left out."""
    failed = row["status"] == FAILED
    picture, width = picture_of(row["input"]), _SHOWN
    maps, maps_size = maps_of(row["input"]), (0, 0)
    has_maps = (folder / maps).is_file()
    if has_maps:
        from PIL import Image

        with Image.open(folder / maps) as image:
            maps_size = (image.width // 2, image.height // 2)
    has_picture = (folder / picture).is_file()
    if has_picture:
        from PIL import Image

        with Image.open(folder / picture) as image:
            width = round(_SHOWN * image.width / image.height)
    return {
        "name": row["input"].removeprefix(common),
        "picture": picture if has_picture else "",
        "width": width,
        "maps": maps if has_maps else "",
        "maps_size": maps_size,
        "failed": failed,
        "reason": row["reason"],
        "decision": row.get("decision", ""),
        "abnormal": row.get("decision") == "1",
        "cells": [f"{float(row[name]):.3f}" if row[name] else "" for name in cells],
        "curve": _points(curve, scale) if len(curve) > 1 else "",
        "least": f"{min(curve):.2f}" if curve else "",
        "most": f"{max(curve):.2f}" if curve else "",
        "threshold_at": f"{_height(float(row['threshold']), scale):.1f}" if row.get("threshold") else "",
        "flags": row["flags"].split(),
    }


def _points(curve: Sequence[float], scale: tuple[float, float]) -> str:
    step = (_CURVE_WIDTH - 2) / (len(curve) - 1)
    return " ".join(f"{1 + i * step:.1f},{_height(x, scale):.1f}" for i, x in enumerate(curve))


def _height(value: float, scale: tuple[float, float]) -> float:
    """From the top of the curve's picture."""
    least, most = scale
    return 1 + (most - value) / (most - least) * (_CURVE_HEIGHT - 2)
