"""A contact sheet: a normal, a hypertrophic and a dilated heart in diastole and systole, with calipers."""

from __future__ import annotations

from pathlib import Path

from cardiocaps.errors import OutputError
from cardiocaps.phantom.anatomy import CALIPERS
from cardiocaps.phantom.patients import DILATED, HYPERTROPHIC, NORMAL, Patient, plan
from cardiocaps.phantom.ultrasound import render
from cardiocaps.runtime.files import atomic_write

COLOURS = {"IVS": "#ffb000", "LVID": "#35c2ff", "LVPW": "#ff5f87"}


def check_preview(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `write_preview` cannot or must not write `path`."""
    if path.suffix.lower() != ".png":
        raise OutputError(f"preview {path}: its name must end in .png")
    if not path.parent.is_dir():
        raise OutputError(f"preview {path}: the folder {path.parent} does not exist")
    if path.is_dir() or (path.exists() and not overwrite):
        raise OutputError(f"preview {path} exists already (--overwrite replaces it)")


def write_preview(path: Path, videos: int, seed: int) -> None:
    """Write the contact sheet of the study `write_phantom(…, videos, seed)` as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    patients = plan(videos, seed)
    figure = Figure(figsize=(12, 6.4), dpi=110, facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    for column, kind in enumerate((NORMAL, HYPERTROPHIC, DILATED)):
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
    with atomic_write(path) as part:
        figure.savefig(part, format="png", facecolor="black", metadata={"Software": None})


def _off_centre(patient: Patient) -> float:
    """How much a view differs from the textbook view."""
    scan = patient.scan
    return abs(scan.tilt) * 6 + abs(scan.origin_x + 0.6) + abs(scan.origin_z - 7.6) + abs(scan.depth - 15) / 2
