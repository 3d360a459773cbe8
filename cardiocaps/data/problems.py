"""What is wrong with a study: videos and rows that are left out, and notes about those that are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cardiocaps.errors import DataError, printable


@dataclass(frozen=True)
class Problem:
    """A row or video that is left out, or a note about one."""

    where: str  # a line of the table, or a video
    reason: str  # "KIND" or "KIND: DETAIL"; summaries count the kinds
    harmless: bool = False  # nothing useful is lost: it does not count as bad

    @property
    def kind(self) -> str:
        return self.reason.partition(": ")[0]


def refuse_many(bad: Sequence[Problem], total: int, max_bad_share: float, what: str, note: str = "") -> None:
    """Raise DataError with the first problems if more than `max_bad_share` of `total` is bad."""
    if len(bad) > max_bad_share * total:
        first = "; ".join(f"{p.where}: {p.reason}" for p in bad[:4])
        raise DataError(
            f"{len(bad)} of {total} {printable(what)} cannot be used, max_bad_share = {max_bad_share:g} allows"
            f" {int(max_bad_share * total)}; the first: {first}{f'. Note: {note}' if note else ''}"
        )


def summarise(problems: Iterable[Problem]) -> str:
    """A line for each kind of problem, most frequent first: its number and the first place."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for problem in problems:
        counts[problem.kind] += 1
        first.setdefault(problem.kind, problem.where)
    return "\n".join(f"{count:6d} × {kind} (first: {first[kind]})" for kind, count in counts.most_common())
