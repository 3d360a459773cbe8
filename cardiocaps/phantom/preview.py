"""A contact sheet: a normal, a hypertrophic and a dilated heart in diastole and systole, with calipers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cardiocaps.errors import OutputError
from cardiocaps.phantom.anatomy import CALIPERS
from cardiocaps.phantom.patients import DILATED, HYPERTROPHIC, NORMAL, Patient, plan
from cardiocaps.phantom.ultrasound import render
from cardiocaps.phantom.variants import DIFFICULTIES, USUAL, Variant
from cardiocaps.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"IVS": "#ffb000", "LVID": "#35c2ff", "LVPW": "#ff5f87"}


def check_preview(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `write_preview` cannot or must not write `path`."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"preview {path}: its name must end in .png")
    if not path.parent.is_dir():
        raise OutputError(f"preview {path}: the folder {path.parent} does not exist")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"preview {path} exists already (--overwrite replaces it)")


def write_preview(path: Path, videos: int, seed: int, variant: Variant = USUAL) -> None:
    """Write the contact sheet of the study `write_phantom(…, videos, seed, variant=variant)` as a PNG file."""
    patients = plan(videos, seed, variant)
    # A small study of a difficulty can lack one of the diseases.
    kinds = [kind for kind in (NORMAL, HYPERTROPHIC, DILATED) if any(patient.kind == kind for patient in patients)]
    figure = _figure(4 * len(kinds), 6.4)
    axes = figure.subplots(2, len(kinds), squeeze=False)
    for column, kind in enumerate(kinds):
        patient = min((patient for patient in patients if patient.kind == kind), key=_off_centre)
        images = render(patient)
        every = patient.measurements(calcs=[name + end for end in "ds" for name in CALIPERS])
        for axis, end, phase in zip(axes[:, column], "ds", ("end-diastole", "end-systole"), strict=True):
            rows = [row for row in every if row.calc.endswith(end)]
            axis.imshow(images[rows[0].frame], cmap="gray", vmin=0, vmax=255)
            for row in rows:
                colour = COLOURS[row.calc[:-1]]
                axis.plot([row.x1, row.x2], [row.y1, row.y2], color=colour, lw=1.2, marker="_", ms=7, mew=1.2)
            text = "   ".join(f"{row.calc} {row.cm:.1f}" for row in rows)
            axis.set_title(f"{kind}, {phase}\n{text} cm", color="white", fontsize=9)
            axis.axis("off")
    _save(figure, path)


def write_difficulties(path: Path, seed: int = 10, columns: int = 5) -> None:
    """Write a PNG file with the first patients of each difficulty in a row, at end-diastole."""
    figure = _figure(2.6 * columns, 2.15 * len(DIFFICULTIES))
    axes = figure.subplots(len(DIFFICULTIES), columns)
    for row, difficulty in zip(axes, DIFFICULTIES, strict=True):
        for axis, patient in zip(row, plan(20, seed, Variant(difficulty, test_videos=columns)), strict=False):
            calcs = patient.measurements(("IVSd", "LVIDd", "LVPWd"))
            axis.imshow(render(patient)[calcs[0].frame], cmap="gray", vmin=0, vmax=255)
            text = "  ".join(f"{calc.calc} {calc.cm:.1f}" for calc in calcs)
            axis.set_title(f"{difficulty}: {patient.kind}\n{text} cm", color="white", fontsize=8)
            axis.axis("off")
    _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> None:
    with atomic_write(path) as part:
        figure.savefig(part, format="png", facecolor="black", metadata={"Software": None})


def _off_centre(patient: Patient) -> float:
    """How much a view differs from the textbook view."""
    scan = patient.scan
    return abs(scan.tilt) * 6 + abs(scan.origin_x + 0.6) + abs(scan.origin_z - 7.6) + abs(scan.depth - 15) / 2
