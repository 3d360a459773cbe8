"""Markdown tables of an exhibit, and numbers in the form that their cells have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from cardiocaps.evaluation.names import METRIC_NAMES
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.metrics import MeanEstimate, interval_text

DASH = "–"

Column = tuple[str, Callable[[Summary], str] | Mapping[str, str]]
"""The head of a column, and its cells: from a row's summary, or by system if they are known without results."""


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(escaped(cell) for cell in row)} |" for row in rows)


def escaped(text: str) -> str:
    """The text on one line, without the character that separates cells."""
    return re.sub(r"\s+", " ", text).strip().replace("|", r"\|")


def rows_table(rows: Sequence[Row], found: Mapping[str, Summary], columns: Sequence[Column]) -> str:
    """A table with a line for each row. A row without results has its error in the first column."""

    def text(row: Row, cell: Callable[[Summary], str] | Mapping[str, str]) -> str:
        if isinstance(cell, Mapping):
            return cell[row.system]
        return cell(found[row.system]) if row.system in found else ""

    lines = []
    for row in rows:
        cells = [text(row, cell) for _, cell in columns]
        if row.system not in found:
            cells[0] = failure(row)
        lines.append((row.title, *cells))
    return table(("system", *(name for name, _ in columns)), lines)


def metric_columns(names: Sequence[str]) -> list[Column]:
    """A column for each metric: mean, deviation and, if resamples were drawn, the interval."""

    def cell(name: str) -> Callable[[Summary], str]:
        return lambda summary: with_interval(summary.report.metrics[name])

    return [(METRIC_NAMES[name], cell(name)) for name in names]


def failure(row: Row) -> str:
    return f"failed: {row.error or 'no result'}"


def plus_minus(estimate: MeanEstimate, digits: int = 3) -> str:
    if math.isnan(estimate.value):
        return DASH
    deviation = "" if math.isnan(estimate.sd) else f" ± {estimate.sd:.{digits}f}"
    return f"{estimate.value:.{digits}f}{deviation}"


def with_interval(estimate: MeanEstimate, digits: int = 3) -> str:
    return plus_minus(estimate, digits) + interval_text(estimate, DASH)


def signed(value: float, low: float, high: float) -> str:
    """A difference with its interval, for example "+0.120 (-0.010 to +0.250)"; without one whose ends are NaN."""
    return f"{value:+.3f}" if math.isnan(low) else f"{value:+.3f} ({low:+.3f} to {high:+.3f})"


def p_value(p: float) -> str:
    return DASH if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def count(n: int, what: str) -> str:
    """For example "1 job", "2 jobs"."""
    return f"{n} {what}{'' if n == 1 else 's'}"


def joined(items: Sequence[str]) -> str:
    """For example "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
