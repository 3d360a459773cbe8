"""A table of the paper as Markdown to read, CSV to compute with, and a figure; and the index of all of them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cardiocaps import DISCLAIMER
from cardiocaps.errors import ConfigError, plural
from cardiocaps.evaluation.names import METRIC_NAMES, PAPER_NAMES
from cardiocaps.experiments.exhibits import Exhibit
from cardiocaps.experiments.reported import BINARY_F1, CONFUSION_OF, LAMBDAS, ON, reported
from cardiocaps.experiments.summaries import CALIBRATION_BINS, Row, Summary, lambda_of, summarise
from cardiocaps.metrics import BOTH, EXACT, METRICS, PUBLISHED, MeanEstimate, interval_text
from cardiocaps.runtime.files import write_csv, write_text

__all__ = ["Row", "write_exhibit", "write_index"]

_PROBABILITIES = ("auroc", "average_precision", "brier")
_DECISIONS = ("f1", "f1_weighted", "accuracy", "sensitivity", "specificity")
_DASH = "–"
_MAIN = "cardiocaps"

# A split by video, and the same by frame.
_LEAK = ("cardiocaps-video-protocol", "cardiocaps-frames")

# With more pairs of rows in another order than the paper's, naming them all helps nobody.
_NAMED_PAIRS = 4

# The paper's comparison, in the order of the index's main table.
_MAIN_TABLES = ("table6", "table2", "table1", "table5", "table4")


def write_exhibit(exhibit: Exhibit, rows: Sequence[Row], folder: Path, *, data: str, bootstrap: int) -> None:
    """Write NAME.md, NAME.csv and NAME.png of an exhibit into an existing folder.

    A row without results stands in the tables with its error and not in the figure; where no row has results there is
    no figure, and one of an earlier time is removed.

    Args:
        exhibit: its name and title. rows: in order; those of a system that the exhibit does not name are refused.
        data: what the data were, in a few words. bootstrap: resamples for the intervals, 0 for none.

    Raises:
        ValueError: no row, or rows that do not belong to the exhibit. OutputError.
    """
    from cardiocaps.experiments.figures import draw_exhibit

    foreign = [row.system for row in rows if row.system not in exhibit.systems]
    if not rows or foreign:
        raise ValueError(f"rows: must be of {', '.join(exhibit.systems)}, are of {', '.join(foreign) or 'none'}")
    summaries = [summarise(row, exhibit.name, bootstrap) for row in rows if row.results]
    write_csv(folder / f"{exhibit.name}.csv", _csv_rows(exhibit, rows, summaries))
    picture = folder / f"{exhibit.name}.png"
    if summaries:
        draw_exhibit(exhibit, summaries, picture)
    else:
        picture.unlink(missing_ok=True)
    write_text(folder / f"{exhibit.name}.md", _markdown(exhibit, rows, summaries, data, bootstrap))


def write_index(
    exhibits: Sequence[Exhibit],
    folder: Path,
    *,
    data: str,
    commands: Sequence[str],
    environments: Sequence[Mapping[str, Any]],
) -> None:
    """Write README.md into the folder of the exhibits' files: CardioCaps against the other systems, links to every
    table and figure, and what they were made with.

    Args:
        exhibits: those whose files are there, or are missing and named as such. data: as `write_exhibit`.
        commands: with which all of it is made again. environments: of the jobs, each as
            `cardiocaps.training.run_folder.environment`.

    Raises:
        ConfigError: a table that cannot be read. OutputError.
    """
    names = [exhibit.name for exhibit in exhibits if (folder / f"{exhibit.name}.csv").is_file()]
    parts = [
        "# Every system and every table of the paper",
        f"Data: {data}",
        _main_table({name: _read_csv(folder / f"{name}.csv") for name in names if name in _MAIN_TABLES}),
        "## Tables and figures",
        _table(("", "table", "numbers", "figure"), [_links(exhibit, folder) for exhibit in exhibits]),
        "## How it was made",
        "\n".join(["```", *commands, "```"]),
        _table(("", ""), _environment_rows(environments)),
        DISCLAIMER,
    ]
    write_text(folder / "README.md", "\n\n".join(part for part in parts if part) + "\n")


def disagreements(summaries: Sequence[Summary]) -> tuple[int, list[tuple[Summary, Summary]]]:
    """How many pairs of rows the paper orders by accuracy, and those (better, worse by the paper) whose order, by the
    mean accuracy as published, is another on these data."""
    compared = [s for s in summaries if s.reported is not None]
    pairs = [
        (one, other) for one in compared for other in compared if _reported_accuracy(one) > _reported_accuracy(other)
    ]
    return len(pairs), [(a, b) for a, b in pairs if not _accuracy(a).value > _accuracy(b).value]


def _reported_accuracy(summary: Summary) -> float:
    assert summary.reported is not None
    return summary.reported["accuracy"].value


def _accuracy(summary: Summary) -> MeanEstimate:
    return summary.published.paper["accuracy"]


def _order_sentence(summaries: Sequence[Summary]) -> str:
    """Whether the paper's order of the rows holds, from the numbers."""
    pairs, wrong = disagreements(summaries)
    if not pairs:
        return ""
    if not wrong:
        return f"On these data the paper's order of the rows by accuracy holds ({pairs} of {pairs} pairs)."
    held = f"On these data the paper's order of the rows by accuracy holds for {pairs - len(wrong)} of {pairs} pairs"
    if len(wrong) > _NAMED_PAIRS:
        compared = [s for s in summaries if s.reported is not None]
        ours, theirs = max(compared, key=lambda s: _accuracy(s).value), max(compared, key=_reported_accuracy)
        if ours is theirs:
            return f"{held}; the first is *{ours.title}*, as in the paper."
        return f"{held}; the first is *{ours.title}* and not *{theirs.title}*."
    clauses = []
    for worse in dict.fromkeys(b.title for _, b in wrong):
        better = [a for a, b in wrong if b.title == worse]
        ours = next(b for _, b in wrong if b.title == worse)
        for verb, group in (
            ("lies above", [a for a in better if _accuracy(a).value < _accuracy(ours).value]),
            ("is level with", [a for a in better if _accuracy(a).value == _accuracy(ours).value]),
        ):
            if group:
                clauses.append(f"*{worse}* {verb} {_and([f'*{a.title}*' for a in group])}")
    within = sum(abs(_accuracy(a).value - _accuracy(b).value) < _accuracy(a).sd + _accuracy(b).sd for a, b in wrong)
    close = f" In {within} of them the difference is smaller than the two deviations over the seeds." if within else ""
    return f"{held}, and for {len(wrong)} it does not: {'; '.join(clauses)}.{close}"


def _finding(exhibit: Exhibit, summaries: Sequence[Summary]) -> str:
    """A sentence about what the exhibit was made to show."""
    if exhibit.name == "fig6":
        by_lambda = {lambda_of(s.system): s for s in summaries}
        best = {
            name: max(by_lambda, key=lambda x: by_lambda[x].report.metrics[name].value)
            for name in ("auroc", "average_precision", "accuracy")
            if not any(math.isnan(s.report.metrics[name].value) for s in summaries)
        }
        ours = _and([f"{METRIC_NAMES[name]} at {value:g}" for name, value in best.items()])
        said = " and ".join(f"{value:g}" for value in LAMBDAS)
        found = f"On these data the largest mean is that of {ours}. " if best else ""
        return f"{found}The paper names {said} as the best λ_reg, in different places."
    by_key = {s.system: s for s in summaries}
    if exhibit.name == "leakage" and by_key.keys() >= {*_LEAK}:
        video, frame = (by_key[key].report.metrics for key in _LEAK)
        changes = [
            f"{METRIC_NAMES[name]} from {video[name].value:.3f} to {frame[name].value:.3f}"
            for name in ("auroc", "average_precision", "accuracy")
        ]
        return (
            "On these data a split over frames, which puts frames of one video into every split, changes "
            f"{_and(changes)}; its numbers are by frame, for no video is new to the network. The paper's protocol also "
            "has labels by row, of which the same frames can have two."
        )
    return _order_sentence(summaries)


def _markdown(exhibit: Exhibit, rows: Sequence[Row], summaries: Sequence[Summary], data: str, bootstrap: int) -> str:
    found = {s.system: s for s in summaries}
    parts = [f"# {exhibit.title}"]
    if not summaries:
        parts.append("No system of this exhibit has results.")
        parts.append(_table(("system", ""), [(row.title, _failure(row)) for row in rows]))
    else:
        results = [
            "## Results",
            _how(summaries, bootstrap),
            _rows_table(rows, found, _columns(_PROBABILITIES, bootstrap)),
            _rows_table(
                rows, found, [("threshold", lambda s: _plus_minus(s.threshold)), *_columns(_DECISIONS, bootstrap)]
            ),
        ]
        cost = ["## Cost", _cost(rows, found)]
        parts += [_finding(exhibit, summaries), f"![{exhibit.title}]({exhibit.name}.png)"]
        if exhibit.name == "calibration":
            parts += ["## Calibration", _calibration(rows, found)]
        if exhibit.name in CONFUSION_OF:
            parts += ["## Confusion matrices", _confusions(rows, found)]
        if exhibit.name == "efficiency":
            parts += [*cost, *results, *_published(exhibit.name, rows, found)]
        else:
            parts += [*results, *_published(exhibit.name, rows, found), *cost]
        noted = {note: [s.title for s in summaries if note in s.notes] for s in summaries for note in s.notes}
        notes = [
            f"* {'All' if len(titles) == len(summaries) > 1 else _escaped(_and(titles))}: {note}"
            for note, titles in noted.items()
        ]
        parts += ["## Notes", "\n".join(notes)] if notes else []
    parts += ["## Data", f"{data} {_split_sizes(summaries)}".strip(), DISCLAIMER]
    return "\n\n".join(part for part in parts if part) + "\n"


def _how(summaries: Sequence[Summary], bootstrap: int) -> str:
    units = {s.unit for s in summaries}
    text = "Mean over the seeds ± standard deviation" if any(s.seeds > 1 for s in summaries) else "Of a single seed"
    if bootstrap:
        text += f", and in brackets the 95 % interval of the mean{_methods(summaries, bootstrap)}"
    if units == {"video"}:
        text += ". A sample is a video, with the mean probability of its frames"
    elif units == {"frame"}:
        text += ". A sample is a frame"
    else:
        framed = _and([s.title for s in summaries if s.unit == "frame"])
        text += f". A sample is a video, with the mean probability of its frames, but a frame for {framed}"
    return (
        f"{text}. F1, accuracy, sensitivity and specificity are of decisions at a threshold that each run chooses on "
        "its own validation split: the one with the largest Youden index (sensitivity + specificity − 1), halfway "
        "between two neighbouring probabilities, of equally good ones the nearest to 0.5."
    )


def _methods(summaries: Sequence[Summary], bootstrap: int) -> str:
    """What the names of methods in the cells mean."""
    drawn = _and(list(dict.fromkeys(plural(s.drawn) for s in summaries)))
    text = f": bootstrap, the middle of {bootstrap:,} resamples of the test {drawn}"
    if any(s.seeds > 1 for s in summaries):
        text += " and of the seeds"
        if all(s.report.paired for s in summaries):
            text += f", the same {drawn} for every seed"
    used = {e.method for s in summaries for e in s.report.metrics.values()}
    if used & {EXACT, BOTH}:
        text += f"; exact, the interval of Clopper and Pearson, for an AUROC that of disjoint pairs of {drawn}"
    return text + ("; exact/bootstrap, at either end the farther of both" if BOTH in used else "")


# The cells: of a row's results, or, by system, what is known without them.
Column = tuple[str, Callable[[Summary], str] | Mapping[str, str]]


def _columns(names: Sequence[str], bootstrap: int) -> list[Column]:
    def column(name: str) -> Column:
        def cell(summary: Summary) -> str:
            estimate = summary.report.metrics[name]
            return _plus_minus(estimate) + (interval_text(estimate, _DASH) if bootstrap else "")

        return METRIC_NAMES[name], cell

    return [column(name) for name in names]


def _rows_table(rows: Sequence[Row], found: Mapping[str, Summary], columns: Sequence[Column]) -> str:
    """A line for each row; one without results has its error in the first column of numbers."""

    def text(row: Row, cell: Callable[[Summary], str] | Mapping[str, str]) -> str:
        if isinstance(cell, Mapping):
            return cell[row.system]
        return cell(found[row.system]) if row.system in found else ""

    lines = []
    for row in rows:
        cells = [text(row, cell) for _, cell in columns]
        if row.system not in found:
            cells[0] = _failure(row)
        lines.append((row.title, *cells))
    return _table(("system", *(name for name, _ in columns)), lines)


def _published(exhibit: str, rows: Sequence[Row], found: Mapping[str, Summary]) -> list[str]:
    """The section with the published definitions and, where the paper has figures, those."""
    papers = {row.system: reported(exhibit, row.system) for row in rows}
    with_paper = any(papers.values())
    binary = {system for system, figures in papers.items() if figures and system.startswith(BINARY_F1)}

    def ours(name: str) -> Callable[[Summary], str]:
        return lambda summary: _plus_minus(summary.published.paper[name])

    def theirs(name: str) -> dict[str, str]:
        marks = dict.fromkeys(binary, " †") if name == "f1" else {}
        return {
            system: f"{figures[name]}{marks.get(system, '')}" if figures else _DASH
            for system, figures in papers.items()
        }

    columns: list[Column] = []
    for name in PUBLISHED:
        columns.append(("F1 (weighted)" if name == "f1" else PAPER_NAMES[name], ours(name)))
        if name == "f1" and binary:
            columns.append(("F1 (abnormal)", lambda summary: _plus_minus(summary.published.metrics["f1"])))
        if with_paper:
            columns.append((f"*{PAPER_NAMES[name]}, {ON}*", theirs(name)))
    text = (
        "By the definitions of the published code, by frame, of decisions at 0.5: its “ROC AUC” is that of hard "
        "labels, which is the mean of sensitivity and specificity, and its “PR AUC” the precision of the abnormal "
        "class."
    )
    if with_paper:
        text += f" The columns in italics are the paper's own figures, {ON}."
    if binary:
        text += " † The paper's F1 of this row is that of the abnormal class; those of the other rows are weighted."
    heading = "## As published, beside what the paper reports" if with_paper else "## As published"
    return [heading, text, _rows_table(rows, found, columns)]


def _cost(rows: Sequence[Row], found: Mapping[str, Summary]) -> str:
    """With, above it, what the times depend on."""
    shared = dict.fromkeys((r.at_once, r.threads) for row in rows for r in row.results)
    pace = _and([f"{count(jobs, 'job')} at a time with {count(threads, 'thread')} each" for jobs, threads in shared])
    ours = found[_MAIN].cost("seconds_per_epoch").value if _MAIN in found else math.nan

    def relative(summary: Summary) -> str:
        seconds = summary.cost("seconds_per_epoch").value
        return _DASH if math.isnan(seconds / ours) else f"{seconds / ours:.2f}"

    columns: list[Column] = [
        ("seeds", lambda s: str(s.seeds)),
        ("parameters", lambda s: _DASH if s.parameters is None else f"{s.parameters:,}"),
        ("epochs", lambda s: _plus_minus(s.cost("epochs"), 1)),
        ("best epoch", lambda s: _plus_minus(s.cost("best_epoch"), 1)),
        ("seconds per epoch", lambda s: _plus_minus(s.cost("seconds_per_epoch"), 2)),
        ("seconds in all", lambda s: _plus_minus(s.cost("seconds"), 1)),
        ("peak memory, MiB", lambda s: _DASH if s.peak_memory is None else f"{s.peak_memory / 2**20:,.0f}"),
        ("device", lambda s: _and(list(dict.fromkeys(r.device for r in s.row.results)))),
    ]
    if ours > 0 and len(found) > 1:
        columns.insert(5, ("relative to CardioCaps", relative))
    return f"Trained {pace}.\n\n{_rows_table(rows, found, columns)}"


def _calibration(rows: Sequence[Row], found: Mapping[str, Summary]) -> str:
    text = (
        "Expected calibration error: the mean distance between predicted probability and observed share of abnormal, "
        f"over {CALIBRATION_BINS} bins of equally many samples."
    )
    columns = [*_columns(("brier",), 1), ("expected calibration error", lambda s: _plus_minus(s.calibration_error))]
    return f"{text}\n\n{_rows_table(rows, found, columns)}"


def _confusions(rows: Sequence[Row], found: Mapping[str, Summary]) -> str:
    def cell(truth: int, predicted: int) -> Callable[[Summary], str]:
        def text(summary: Summary) -> str:
            row = summary.report.confusion[truth]
            share = f" ({row[predicted] / sum(row):.1%})" if sum(row) else ""
            return f"{row[predicted]:,}{share}"

        return text

    names = (("normal, called normal", 0, 0), ("normal, called abnormal", 0, 1))
    names += (("abnormal, called normal", 1, 0), ("abnormal, called abnormal", 1, 1))  # type: ignore[assignment]
    columns = [(name, cell(truth, predicted)) for name, truth, predicted in names]
    return f"Counts summed over the seeds, and shares of the true class.\n\n{_rows_table(rows, found, columns)}"


def _split_sizes(summaries: Sequence[Summary]) -> str:
    """How many videos and frames were tested and validated on."""
    sentences: dict[str, list[str]] = {}
    for summary in summaries:
        for result in summary.row.results:
            test, validation = result.test, result.validation
            abnormal = len({v for v, y in zip(test.video, test.label.tolist(), strict=True) if y})
            sentence = (
                f"{test.videos} videos in the test split ({test.label.size:,} frames; {abnormal} videos abnormal), "
                f"{validation.videos} in the validation split ({validation.label.size:,} frames)"
            )
            titles = sentences.setdefault(sentence, [])
            if summary.title not in titles:
                titles.append(summary.title)
    if len(sentences) == 1:
        return f"{next(iter(sentences))}."
    return " ".join(f"{_and(titles)}: {sentence}." for sentence, titles in sentences.items())


def _csv_rows(exhibit: Exhibit, rows: Sequence[Row], summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    found = {s.system: s for s in summaries}
    return [_csv_row(exhibit, row, found.get(row.system)) for row in rows]


def _csv_row(exhibit: Exhibit, row: Row, summary: Summary | None) -> dict[str, Any]:
    """Every column, empty where there is no number; a failed row has the columns of the others."""
    nothing = MeanEstimate(math.nan)
    cells: dict[str, Any] = {
        "system": row.system,
        "title": row.title,
        "seeds": len(row.results),
        "error": row.error or "",
        "unit": summary.unit if summary else "",
        "lambda": lambda_of(row.system) if exhibit.name == "fig6" else "",
        "test_videos": row.results[0].test.videos if summary else "",
        "test_frames": row.results[0].test.label.size if summary else "",
    }
    for name in METRICS:
        estimate = summary.report.metrics[name] if summary else nothing
        values = (estimate.value, estimate.sd, estimate.low, estimate.high)
        cells |= {f"{name}{end}": _number(x) for end, x in zip(("", "_sd", "_low", "_high"), values, strict=True)}
        cells[f"{name}_method"] = estimate.method
    means = {"threshold": summary.threshold if summary else nothing}
    means["calibration_error"] = summary.calibration_error if summary else nothing
    means |= {f"published_{name}": summary.published.paper[name] if summary else nothing for name in PUBLISHED}
    means["published_f1_abnormal"] = summary.published.metrics["f1"] if summary else nothing
    of_paper = reported(exhibit.name, row.system)
    for name in PUBLISHED:
        figure = of_paper[name] if of_paper else None
        means[f"reported_{name}"] = MeanEstimate(figure.value, figure.sd) if figure else nothing
    for name in ("epochs", "best_epoch", "seconds_per_epoch", "seconds"):
        means[name] = summary.cost(name) if summary else nothing
    for name, estimate in means.items():
        cells |= {name: _number(estimate.value), f"{name}_sd": _number(estimate.sd)}
    counts = [count for line in summary.report.confusion for count in line] if summary else [""] * 4
    cells |= dict(zip(("tn", "fp", "fn", "tp"), counts, strict=True))
    cells["parameters"] = "" if summary is None or summary.parameters is None else summary.parameters
    cells["peak_memory"] = "" if summary is None or summary.peak_memory is None else summary.peak_memory
    cells["device"] = " ".join(dict.fromkeys(r.device for r in row.results))
    return cells


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not all({"system", "title", "error", "auroc", "published_accuracy"} <= set(row) for row in rows):
        raise ConfigError(f"{path} is damaged: it is not a table that cardiocaps.experiments wrote")
    return rows


def _main_table(tables: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """CardioCaps first, then every system of the paper's comparisons once, from their tables."""
    rows: dict[str, Mapping[str, str]] = {}
    for name in _MAIN_TABLES:
        for row in tables.get(name, ()):
            rows.setdefault(row["system"], row)
    if not rows:
        return ""
    ordered = sorted(rows.values(), key=lambda row: row["system"] != _MAIN)

    def cells(row: Mapping[str, str]) -> tuple[str, ...]:
        paper = _of_csv(row, "reported_accuracy", 4)
        if not row["auroc"] and not row["accuracy"]:
            return (row["title"], "0", f"failed: {row['error'] or 'no result'}", "", "", "", "", paper)
        measured = [_of_csv(row, name) for name in ("auroc", "average_precision", "f1", "accuracy")]
        return (row["title"], row["seeds"], *measured, _of_csv(row, "published_accuracy"), paper)

    head = ("system", "seeds", *(METRIC_NAMES[name] for name in ("auroc", "average_precision", "f1", "accuracy")))
    table = _table((*head, "accuracy as published", f"*accuracy, {ON}*"), [cells(row) for row in ordered])
    text = "Mean over the seeds"
    if any(row["auroc_sd"] for row in ordered):
        text += " ± standard deviation"
    if any(row["auroc_low"] for row in ordered):
        text += " and, in brackets, its 95 % interval and the method of it"
    text += ". The last column is the paper's. The tables below say how each number is defined."
    return f"## CardioCaps against the other systems\n\n{text}\n\n{table}"


def _of_csv(row: Mapping[str, str], name: str, digits: int = 3) -> str:
    def number(column: str) -> float:
        return float(row.get(column) or "nan")

    value, sd, low, high = (number(f"{name}{end}") for end in ("", "_sd", "_low", "_high"))
    estimate = MeanEstimate(value, sd, low, high, row.get(f"{name}_method", ""))
    return _plus_minus(estimate, digits) + interval_text(estimate, _DASH)


def _links(exhibit: Exhibit, folder: Path) -> tuple[str, ...]:
    def link(ending: str, text: str) -> str:
        name = f"{exhibit.name}.{ending}"
        return f"[{text}]({name})" if (folder / name).is_file() else _DASH

    return exhibit.title, link("md", exhibit.name), link("csv", "CSV"), link("png", "PNG")


def _environment_rows(environments: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """A line for each thing that was there; where it was not the same for all jobs, everything that it was."""
    rows: dict[str, dict[str, None]] = {}
    for environment in environments:
        for name, value in environment.items():
            if isinstance(value, Mapping):
                for key, item in value.items():
                    rows.setdefault(str(key), {})[_DASH if item is None else str(item)] = None
            elif value is not None:
                rows.setdefault(name.replace("_", " "), {})[str(value)] = None
    return [(name, "; ".join(values)) for name, values in rows.items()]


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows)


def _escaped(text: str) -> str:
    """Text in one line, and without the character that parts the cells of a table."""
    return re.sub(r"\s+", " ", text).strip().replace("|", r"\|")


def _failure(row: Row) -> str:
    return f"failed: {row.error or 'no result'}"


def _plus_minus(estimate: MeanEstimate, digits: int = 3) -> str:
    if math.isnan(estimate.value):
        return _DASH
    deviation = "" if math.isnan(estimate.sd) else f" ± {estimate.sd:.{digits}f}"
    return f"{estimate.value:.{digits}f}{deviation}"


def count(n: int, what: str) -> str:
    """For example "1 job", "2 jobs"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def _and(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else ""
