"""The layouts of data sets that a phantom study is written in: where its videos lie, and its table."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cardiocaps.phantom.patients import Patient

LVH_COLUMNS = (
    *("", "HashedFileName", "Calc", "CalcValue", "Frame", "X1", "X2", "Y1", "Y2"),
    *("Frames", "FPS", "Width", "Height", "split"),
)
_DYNAMIC_COLUMNS = (*("FileName", "EF", "ESV", "EDV", "FrameHeight", "FrameWidth", "FPS", "NumberOfFrames", "Split"),)


@dataclass(frozen=True)
class Layout:
    """A layout of a study.

    Attributes:
        table: the name of its table.
        folders: those that hold the videos.
        place: the path of a patient's video below the study's folder.
        text: the content of the table.
    """

    table: str
    folders: tuple[str, ...]
    place: Callable[[Patient], str]
    text: Callable[[Sequence[Patient]], bytes]


def volume(diameter: float) -> float:
    """The volume of a left ventricle in mL from its diameter in cm, V = 7 D³ / (2.4 + D) (Teichholz et al. 1976)."""
    return 7 * diameter**3 / (2.4 + diameter)


def _lvh_table(patients: Sequence[Patient]) -> bytes:
    """A row for each measurement."""
    rows: list[tuple[object, ...]] = []
    for patient in patients:
        scan = patient.scan
        for row in patient.measurements():
            points = (f"{value:.3f}" for value in (row.x1, row.x2, row.y1, row.y2))
            about = scan.frames, scan.fps, scan.width, scan.height, patient.split
            rows.append((len(rows), patient.name, row.calc, f"{row.cm:.4f}", row.frame, *points, *about))
    return _csv(LVH_COLUMNS, rows)


def _dynamic_table(patients: Sequence[Patient]) -> bytes:
    """A row for each video, with the volumes of the two diameters that are drawn in it."""
    rows = []
    for patient in patients:
        edv, esv = (volume(row.cm) for row in patient.measurements(("LVIDd", "LVIDs")))
        scan = patient.scan
        about = scan.height, scan.width, scan.fps, scan.frames, patient.split.upper()
        rows.append((patient.name, f"{100 * (edv - esv) / edv:.4f}", f"{esv:.4f}", f"{edv:.4f}", *about))
    return _csv(_DYNAMIC_COLUMNS, rows)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return text.getvalue().encode()


LVH = "echonet-lvh"
"""The layout of a phantom that a training makes."""

LAYOUTS: Mapping[str, Layout] = {
    LVH: Layout(
        "MeasurementsList.csv", ("Batch1", "Batch2", "Batch3", "Batch4"), lambda patient: patient.video, _lvh_table
    ),
    "echonet-dynamic": Layout(
        "FileList.csv", ("Videos",), lambda patient: f"Videos/{patient.name}.avi", _dynamic_table
    ),
}
"""The name of a layout, as the setting `dataset` gives it -> the layout."""
