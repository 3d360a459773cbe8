"""Figures from results.csv, and from nothing else: `python -m benchmarks.plots benchmarks/results`.

speed.png: how many times as long the published form and the best PyTorch form take as capsops. scaling.png: time and
memory on the ladder of as many output as input capsules.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .program import ResultsError, print_line, read_csv, run_program, write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which colour-blind readers can tell apart; markers and lines differ too.
_BLUE, _VERMILION, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
_FORMS = {
    "published": (_VERMILION, "s", "published"),
    "best": (_GREEN, "^", "best PyTorch, eager or compiled"),
    "capsops": (_BLUE, "o", "capsops"),
}
_LINES = {"dynamic": "-", "attention": ":", "uniform": "--"}
_NAMES = {"dynamic": "dynamic, 3 iterations", "attention": "attention, one pass", "uniform": "uniform, one pass"}

Row = dict[str, str]


def draw(folder: Path) -> list[Path]:
    """The figures that the folder's results.csv has rows for. Raises ResultsError, OutputError."""
    rows = _read(folder / "results.csv")
    drawn = []
    for name, figure in (("speed.png", speed(rows)), ("scaling.png", scaling(rows))):
        if figure is not None:
            _save(figure, folder / name)
            drawn.append(folder / name)
    return drawn


def speed(rows: Sequence[Row]) -> Figure | None:
    """Bars: time over capsops' time, by shape, routing and direction."""
    from matplotlib.ticker import LogLocator, NullLocator

    chosen = [row for row in rows if row["family"] != "ladder" and not row["routing"].endswith("float16")]
    keys = list(dict.fromkeys((row["shape"], row["routing"], row["direction"]) for row in chosen))
    if not keys:
        return None
    figure = _figure(8.5, 1.6 + 0.42 * len(keys), rows)
    axes = figure.add_subplot()
    for offset, form in ((-0.19, "published"), (0.19, "best")):
        colour, _, label = _FORMS[form]
        for y, key in enumerate(keys):
            found = _find(chosen, key, form)
            if found is None:
                axes.text(
                    1.02, y + offset, f"{label}: {_why(chosen, key, form)}", va="center", fontsize=6.5, color=_GREY
                )
                continue
            ratio = float(found["ratio_to_capsops"])
            axes.barh(y + offset, ratio - 1, 0.36, left=1, color=colour, label=label if y == 0 else None)
            axes.text(max(ratio, 1) * 1.03, y + offset, f"{ratio:.3g}", va="center", fontsize=7)
    axes.axvline(1, color=_BLUE, linewidth=1.5, label="capsops")
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(
        range(len(keys)), [f"{shape}: {routing}, {direction}" for shape, routing, direction in keys], fontsize=8
    )
    axes.invert_yaxis()
    _dress(axes, "times as long as capsops", "")
    axes.grid(axis="y", visible=False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(
        handles.values(),
        handles.keys(),
        frameon=False,
        fontsize=8,
        loc="lower center",
        bbox_to_anchor=(0.5, 1),
        ncols=3,
    )
    return figure


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Lines over N = J: seconds, and extra megabytes, of forward and backward."""
    chosen = [row for row in rows if row["family"] == "ladder"]
    if not chosen:
        return None
    figure = _figure(11, 5.6, rows)
    panels = (("median_s", "seconds, forward + backward"), ("extra_MB", "peak MB beyond inputs and gradients"))
    for place, (column, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, place)
        for routing, line in _LINES.items():
            for form, (colour, marker, name) in _FORMS.items():
                if (routing, form) in (("attention", "best"), ("uniform", "best")):
                    continue
                points = []
                for key in dict.fromkeys(
                    (r["shape"], r["routing"], r["direction"]) for r in chosen if r["routing"] == routing
                ):
                    found = _find(chosen, key, form)
                    # Below a kilobyte the resident set says nothing.
                    if (
                        found is not None
                        and found[column]
                        and float(found[column]) >= (1e-3 if column == "extra_MB" else 0)
                    ):
                        points.append((int(found["N"]), float(found[column])))
                if points:
                    title = f"{name}: {_NAMES[routing]}"
                    axes.plot(
                        *zip(*sorted(points), strict=True), line, color=colour, marker=marker, markersize=4, label=title
                    )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = sorted({int(row["N"]) for row in chosen})
        axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
        _square_guide(axes, sizes)
        _dress(axes, "N input and N output capsules", label)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    return figure


def _square_guide(axes: Axes, sizes: Sequence[int]) -> None:
    """What grows with N², through the lower right."""
    low, high = axes.get_ylim()
    first, last = sizes[0], sizes[-1]
    top = min(high, low * 4 * (last / first) ** 2) / 2
    axes.plot([first, last], [top * (first / last) ** 2, top], color=_GREY, linewidth=0.8, label="grows with N²")
    axes.set_ylim(low, high)


def _find(rows: Sequence[Row], key: tuple[str, str, str], form: str) -> Row | None:
    """The measured row of a contestant; for "best", the quicker of the best eager and the best compiled form."""
    names = ("best eager", "best compiled") if form == "best" else (form,)
    found = [
        r
        for r in rows
        if (r["shape"], r["routing"], r["direction"]) == key
        and r["contestant"] in names
        and r["status"] == "ok"
        and r["ratio_to_capsops"]
    ]
    return min(found, key=lambda r: float(r["median_s"])) if found else None


def _why(rows: Sequence[Row], key: tuple[str, str, str], form: str) -> str:
    found = [r for r in rows if (r["shape"], r["routing"], r["direction"]) == key and r["contestant"] == form]
    return found[0]["status"] if found else "not measured"


def _read(path: Path) -> list[Row]:
    rows = read_csv(path)
    needed = {"family", "shape", "N", "routing", "direction", "contestant", "status", "median_s", "extra_MB", "commit"}
    if not rows or needed - rows[0].keys():
        raise ResultsError(f"{path} is no table of results; `python -m benchmarks` writes one")
    return rows


def _figure(width: float, height: float, rows: Sequence[Row]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    r = rows[0]
    device = r.get("device") or f"{r['cpu']}, threads: {r['threads']}"
    commits = " and ".join(dict.fromkeys(row["commit"][:7] for row in rows))
    where = f"{device}, torch {r['torch']}, float32, commit {commits}"
    figure.supxlabel(where, fontsize=7, color=_GREY)
    return figure


def _dress(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#E3E3E3", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    write_bytes(path, content.getvalue())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 drawn, 2 wrong option, 3 no usable results.csv, 4 output not writable."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", type=Path, help="holds results.csv, and gets the figures")
    folder: Any = parser.parse_args(argv).folder

    def body() -> None:
        for path in draw(folder):
            print_line(f"drawn: {path}")

    return run_program(body)


if __name__ == "__main__":
    sys.exit(main())
