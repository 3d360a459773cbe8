"""Figures from results.csv, and from nothing else: `python -m benchmarks.plots benchmarks/results`.

speed.png: how many times as long the published form and the best PyTorch form take as capsops. scaling.png: time and
memory on the ladder of as many output as input capsules, a column of panels for each routing.
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
_ROUTINGS = {"dynamic": "dynamic, 3 iterations", "attention": "attention, one pass", "uniform": "uniform, one pass"}

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
    """Bars: time over capsops' time, by shape, routing and direction. The line at 1 is capsops."""
    from matplotlib.ticker import LogLocator, NullLocator

    chosen = [row for row in rows if row["family"] != "ladder" and not row["routing"].endswith("float16")]
    sizes = {row["shape"]: row["size"] for row in chosen}
    if not sizes:
        return None
    keys = dict.fromkeys((row["shape"], row["routing"], row["direction"]) for row in chosen)
    lines: dict[tuple[str, ...], float] = {}  # (shape,) is a heading, (shape, routing, direction) a pair of bars
    for shape in sizes:
        gap = 0.4 if lines else 0.0  # above each heading but the first
        for key in ((shape,), *(key for key in keys if key[0] == shape)):
            lines[key] = max(lines.values(), default=-1.0) + 1 + gap
            gap = 0.0
    last = max(lines.values())
    figure = _figure(9, 1.6 + 0.36 * last, rows)
    axes = figure.add_subplot()
    for offset, form in ((-0.19, "published"), (0.19, "best")):
        colour, _, label = _FORMS[form]
        for key, y in lines.items():
            if len(key) == 1:
                continue
            found = _find(chosen, key, form)
            if found is None:
                text = f"{label}: {_why(chosen, key, form)}"
                axes.text(1.04, y + offset, text, va="center", fontsize=6.5, color=_GREY)
                continue
            ratio = float(found["ratio_to_capsops"])
            axes.barh(y + offset, ratio - 1, 0.36, left=1, color=colour, label=label)
            slower = ratio >= 1
            text, side = f"{ratio:.3g}", "left" if slower else "right"
            axes.text(ratio * 1.04 ** (1 if slower else -1), y + offset, text, va="center", ha=side, fontsize=7)
    axes.axvline(1, color=_BLUE, linewidth=2.5, label="capsops")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 1) / 1.8, high * 1.6)  # room at the left, or capsops' line lies on the axis
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:,g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(list(lines.values()), [_line_name(key) for key in lines], fontsize=8)
    axes.set_ylim(last + 0.6, -0.5)
    for key, tick in zip(lines, axes.yaxis.get_ticklabels(), strict=True):
        if len(key) == 1:
            tick.set_fontweight("bold")
            axes.text(1.08, lines[key], sizes[key[0]], va="center", fontsize=7, color=_GREY)
    _dress(axes, "time relative to capsops = 1 (left: quicker than capsops, right: slower)", "")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside upper center", ncols=len(handles)
    )
    return figure


def _line_name(key: Sequence[str]) -> str:
    """The label of a line of `speed`: the shape in a heading, else the routing, unless it is called like the shape."""
    shape, *rest = key
    return ", ".join(part for part in rest if part != shape) or shape


def scaling(rows: Sequence[Row]) -> Figure | None:
    """Lines over N = J: milliseconds, and extra megabytes, of forward and backward, a column for each routing."""
    chosen = [row for row in rows if row["family"] == "ladder"]
    routings = [routing for routing in _ROUTINGS if any(row["routing"] == routing for row in chosen)]
    if not routings:
        return None
    # Each row of panels: the column, its factor to the label's unit, the least value that says something, the label.
    # Below a kilobyte the resident set says nothing.
    quantities = (
        ("median_s", 1e3, 0.0, "milliseconds,\nforward + backward"),
        ("extra_MB", 1.0, 1e-3, "peak MB beyond\ninputs and gradients"),
    )
    figure = _figure(3.7 * len(routings) + 0.6, 6.4, rows)
    panels = figure.subplots(len(quantities), len(routings), sharex=True, sharey="row", squeeze=False)
    sizes = sorted({int(row["N"]) for row in chosen})
    for line, (column, scale, least, label) in zip(panels, quantities, strict=True):
        for axes, routing in zip(line, routings, strict=True):
            keys = dict.fromkeys((r["shape"], routing, r["direction"]) for r in chosen if r["routing"] == routing)
            for form, (colour, marker, name) in _FORMS.items():
                found = [row for key in keys if (row := _find(chosen, key, form)) is not None and row[column]]
                points = sorted((int(r["N"]), scale * float(r[column])) for r in found if float(r[column]) >= least)
                if points:
                    axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4.5, label=name)
            _dress(axes, "", "")
        line[0].set_ylabel(label)
        line[0].set_xscale("log", base=2)
        line[0].set_yscale("log")
        line[0].yaxis.set_major_formatter("{x:,g}")
        line[0].set_xticks(sizes, [f"{n:,}" for n in sizes])
        low, high = line[0].get_ylim()
        for axes in line:
            _square_guide(axes, sizes, low, high)
    for axes, routing in zip(panels[0], routings, strict=True):
        axes.set_title(_ROUTINGS[routing], fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("N input and N output capsules")
    handles = {name: line for axes in panels.flat for line, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), frameon=False, fontsize=9, loc="outside upper center", ncols=len(handles)
    )
    return figure


def _square_guide(axes: Axes, sizes: Sequence[int], low: float, high: float) -> None:
    """What grows with N², through the lower right of a panel from `low` to `high`."""
    first, last = sizes[0], sizes[-1]
    top = min(high, low * 4 * (last / first) ** 2) / 2
    line = [top * (first / last) ** 2, top]
    axes.plot([first, last], line, "--", color=_GREY, linewidth=0.8, label="grows with N²", zorder=1)
    axes.set_ylim(low, high)


def _find(rows: Sequence[Row], key: tuple[str, ...], form: str) -> Row | None:
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


def _why(rows: Sequence[Row], key: tuple[str, ...], form: str) -> str:
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
