"""Writes an exhibit as Markdown, CSV and figure, and the index of all exhibits."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cardiocaps import DISCLAIMER
from cardiocaps.evaluation.names import METRIC_NAMES
from cardiocaps.experiments.exhibits import COMPARED
from cardiocaps.experiments.exhibits.exhibit import VARIED, Exhibit
from cardiocaps.experiments.markdown import DASH, escaped, failure, joined, table, with_interval
from cardiocaps.experiments.plan import MAIN, SYSTEMS, corrected_key
from cardiocaps.experiments.reference_rows import BAYES_BOUND, BOUNDS, REFERENCES, Truth, always_normal
from cardiocaps.experiments.reported import ON, confusion_of
from cardiocaps.experiments.summaries import Row, Summary, summarise
from cardiocaps.metrics import METRICS, PUBLISHED, MeanEstimate
from cardiocaps.plots import save
from cardiocaps.runtime.files import READABLE, write_csv, write_text


def write_exhibit(
    exhibit: Exhibit,
    rows: Sequence[Row],
    folder: Path,
    *,
    data: str,
    bootstrap: int,
    environments: Sequence[Mapping[str, Any]] = (),
    truth: Truth | None = None,
) -> None:
    """Write NAME.md, NAME.csv and NAME.png of an exhibit into an existing folder.

    Tables show the error of a row without results; the figure leaves the row out. If no row has results, there is no
    figure, and an older one is removed.

    Args:
        data: a sentence about the data.
        bootstrap: resamples for the intervals; 0: none.
        environments: of the jobs, as `cardiocaps.training.environment.environment` returns them.
        truth: what the phantom knows about the test videos; None: the data are another's.
    """
    known = next((row.results[0] for row in rows if row.results), None)
    bounds = truth.bounds(known, bootstrap) if truth and known and exhibit.has_references else []
    if known and exhibit.has_references:
        rows = [*rows, always_normal(known), *bounds]
    summaries = [_noted(summarise(row, exhibit.reported(row.system), bootstrap)) for row in rows if row.results]
    summaries += bounds
    found = {s.system: s for s in summaries}
    write_csv(
        folder / f"{exhibit.name}.csv", [_csv_row(exhibit, row, found.get(row.system)) for row in rows], digits=READABLE
    )
    picture = folder / f"{exhibit.name}.png"
    if summaries:
        drawn = [s for s in summaries if exhibit.draws(s.system)]
        save(exhibit.draw(drawn), picture)
        exhibit.write_more(folder, drawn)
    else:
        picture.unlink(missing_ok=True)
    write_text(
        folder / f"{exhibit.name}.md",
        _markdown(exhibit, rows, summaries, f"{data}{_made_with(environments)}", bootstrap),
    )


def write_index(
    exhibits: Sequence[Exhibit],
    folder: Path,
    *,
    data: str,
    commands: Sequence[str],
    environments: Sequence[Mapping[str, Any]],
) -> None:
    """Write README.md: CardioCaps against the other systems, links to all files, and how they were made.

    Args:
        exhibits: to link. A file that is missing is shown as missing.
        data: a sentence about the data.
        commands: command lines that make the files.
        environments: of the jobs, as `cardiocaps.training.environment.environment` returns them.
    """
    names = [exhibit.name for exhibit in exhibits if (folder / f"{exhibit.name}.csv").is_file()]
    parts = [
        "# Every system and every table of the paper",
        f"Data: {data}",
        _main_table({name: _read_csv(folder / f"{name}.csv") for name in names if name in COMPARED}),
        "## Tables and figures",
        table(("", "table", "numbers", "figure"), [_links(exhibit, folder) for exhibit in exhibits]),
        f"## How it was made{_made_with(environments)}",
        "\n".join(["```", *commands, "```"]),
        table(("", ""), _environment_rows(environments)),
        DISCLAIMER,
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def _markdown(exhibit: Exhibit, rows: Sequence[Row], summaries: Sequence[Summary], data: str, bootstrap: int) -> str:
    parts = [f"# {exhibit.title}"]
    if summaries:
        parts.append(f"![{exhibit.title}]({exhibit.name}.png)")
        parts += exhibit.sections(rows, {s.system: s for s in summaries}, bootstrap)
        trained = [s for s in summaries if s.system not in REFERENCES]
        notes = [
            f"* {'All' if len(titles) == len(trained) > 1 else escaped(joined(titles))}: {note}"
            for note, titles in _noting(trained).items()
        ]
        bounds = [s for s in summaries if s.system in BOUNDS]
        notes += [f"* {joined(titles)}: {note}" for note, titles in _noting(bounds).items()]
        parts += ["## Notes", "\n".join(notes)] if notes else []
    else:
        parts.append("No system of this exhibit has results.")
        parts.append(table(("system", ""), [(row.title, failure(row)) for row in rows]))
    parts += ["## Data", data, DISCLAIMER]
    return "\n\n".join(parts) + "\n"


def _noting(summaries: Sequence[Summary]) -> dict[str, list[str]]:
    """Each note with the titles of the rows that have it."""
    return {note: [s.title for s in summaries if note in s.notes] for s in summaries for note in s.notes}


def _noted(summary: Summary) -> Summary:
    """The summary with the note of its system."""
    system = SYSTEMS.get(summary.system)
    return replace(summary, notes=(*summary.notes, system.note)) if system and system.note else summary


def _csv_row(exhibit: Exhibit, row: Row, summary: Summary | None) -> dict[str, Any]:
    """All columns, in every row; a cell without a number is empty."""
    nothing = MeanEstimate(math.nan)
    cells: dict[str, Any] = {
        "system": row.system,
        "title": row.title,
        "seeds": len(row.results),
        "error": row.error or "",
        "unit": summary.unit if summary else "",
        **{name: exhibit.varied(row.system).get(name, "") for name in VARIED},
        "test_videos": row.results[0].test.videos if row.results else "",
        "test_frames": row.results[0].test.clip.size if row.results else "",
    }
    for name in METRICS:
        estimate = summary.report.metrics[name] if summary else nothing
        values = (estimate.value, estimate.sd, estimate.low, estimate.high)
        cells |= {f"{name}{end}": x for end, x in zip(("", "_sd", "_low", "_high"), values, strict=True)}
        cells[f"{name}_method"] = estimate.method
    means = {"threshold": summary.threshold if summary else nothing}
    means["calibration_error"] = summary.calibration_error if summary else nothing
    means |= {f"published_{name}": summary.published.paper[name] if summary else nothing for name in PUBLISHED}
    means["published_f1_abnormal"] = summary.published.metrics["f1"] if summary else nothing
    of_paper = exhibit.reported(row.system) or dict.fromkeys(PUBLISHED, nothing)
    means |= {f"reported_{name}": figure for name, figure in of_paper.items()}
    for name in ("epochs", "best_epoch", "seconds_per_epoch", "seconds"):
        means[name] = summary.cost(name) if summary else nothing
    for name, estimate in means.items():
        cells |= {name: estimate.value, f"{name}_sd": estimate.sd}
    of_paper_counts = confusion_of(exhibit.table, corrected_key(row.system)) or {}
    cells |= {f"reported_{name}": of_paper_counts.get(name, "") for name in ("tn", "fp", "fn", "tp")}
    counts = [count for line in summary.report.confusion for count in line] if summary and row.results else [""] * 4
    cells |= dict(zip(("tn", "fp", "fn", "tp"), counts, strict=True))
    cells["parameters"] = "" if summary is None or summary.parameters is None else summary.parameters
    cells["peak_memory"] = "" if summary is None or summary.peak_memory is None else summary.peak_memory
    cells["device"] = " ".join(dict.fromkeys(r.device for r in row.results))
    return cells


def _read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _main_table(tables: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """CardioCaps first, then every other system of the compared tables once."""
    rows: dict[str, Mapping[str, str]] = {}
    for name in COMPARED:
        for row in tables.get(name, ()):
            rows.setdefault(row["system"], row)
    if not rows:
        return ""
    ordered = sorted(rows.values(), key=lambda row: (row["system"] != MAIN, row["system"] in REFERENCES))

    def cells(row: Mapping[str, str]) -> tuple[str, ...]:
        paper = _of_csv(row, "reported_accuracy", 4)
        if not row["auroc"] and not row["accuracy"]:
            return (row["title"], "0", f"failed: {row['error'] or 'no result'}", "", "", "", "", paper)
        measured = [_of_csv(row, name) for name in ("auroc", "average_precision", "f1", "accuracy")]
        seeds = DASH if row["system"] in REFERENCES else row["seeds"]
        return (row["title"], seeds, *measured, _of_csv(row, "published_accuracy"), paper)

    head = ("system", "seeds", *(METRIC_NAMES[name] for name in ("auroc", "average_precision", "f1", "accuracy")))
    lines = table((*head, "accuracy as published", f"*accuracy, {ON}*"), [cells(row) for row in ordered])
    text = (
        "Mean over the seeds ± standard deviation and, in brackets, its 95 % interval and the method of it. The last "
        "column is the paper's. The tables below say how each number is defined."
    )
    if BAYES_BOUND in rows:
        text += (
            " The Bayes bound is what the best order of the same test videos would reach, and another reader measures "
            "them once more; the tables say how."
        )
    return f"## CardioCaps against the other systems\n\n{text}\n\n{lines}"


def _of_csv(row: Mapping[str, str], name: str, digits: int = 3) -> str:
    def number(column: str) -> float:
        return float(row.get(column) or "nan")

    value, sd, low, high = (number(f"{name}{end}") for end in ("", "_sd", "_low", "_high"))
    estimate = MeanEstimate(value, sd, low, high, row.get(f"{name}_method", ""))
    return with_interval(estimate, digits)


def _links(exhibit: Exhibit, folder: Path) -> tuple[str, ...]:
    def link(ending: str, text: str) -> str:
        name = f"{exhibit.name}.{ending}"
        return f"[{text}]({name})" if (folder / name).is_file() else DASH

    return exhibit.title, link("md", exhibit.name), link("csv", "CSV"), link("png", "PNG")


def _made_with(environments: Sequence[Mapping[str, Any]]) -> str:
    """A paragraph that names the versions and the commits which the jobs ran with; empty if there are no jobs."""
    made = dict.fromkeys(
        f"cardiocaps {e['cardiocaps']}{f' and capsops {capsops}' if (capsops := e['packages']['capsops']) else ''}"
        f"{f' at commit {commit}' if (commit := e.get('commit')) else ''}, torch {e['packages']['torch']}"
        for e in environments
    )
    return f"\n\nTrained with {'; '.join(made)}." if made else ""


def _environment_rows(environments: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A line for each property, with all values if it differs between jobs."""
    rows: dict[str, dict[str, None]] = {}
    for environment in environments:
        for name, value in environment.items():
            if isinstance(value, Mapping):
                for key, item in value.items():
                    rows.setdefault(str(key), {})[DASH if item is None else str(item)] = None
            elif value is not None:
                rows.setdefault(name.replace("_", " "), {})[str(value)] = None
    return [(name, "; ".join(values)) for name, values in rows.items()]
