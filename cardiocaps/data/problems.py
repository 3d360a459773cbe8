"""What is wrong with a study: videos and rows that are left out, and notes about those that are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cardiocaps.errors import ConfigError, DataError, printable


@dataclass(frozen=True)
class Problem:
    """Something left out, or worth knowing: where (a line of the table, a video) and why.

    The reason reads ``kind`` or ``kind: detail``; summaries count the kinds. A harmless one loses nothing that
    should be there, and does not count as bad.
    """

    where: str
    reason: str
    harmless: bool = False

    @property
    def kind(self) -> str:
        return self.reason.partition(": ")[0]


def refuse_many(
    bad: int, total: int, max_bad_share: float, what: str, problems: Sequence[Problem], note: str = ""
) -> None:
    """Raise DataError, with the first problems, where more than ``max_bad_share`` of ``total`` is bad."""
    check_share(max_bad_share)
    if bad > max_bad_share * total:
        first = "; ".join(f"{p.where}: {p.reason}" for p in problems[:4])
        raise DataError(
            f"{bad} of {total} {printable(what)} cannot be used, max_bad_share = {max_bad_share:g} allows"
            f" {int(max_bad_share * total)}; the first: {first}{f'. Note: {note}' if note else ''}"
        )


def check_share(max_bad_share: float) -> None:
    if not 0 <= max_bad_share <= 1:
        raise ConfigError(f"max_bad_share is {max_bad_share}; expected a share from 0 to 1")


def summarise(problems: Iterable[Problem]) -> str:
    """Problems counted by kind, one line each, most frequent first, with the first place each was seen."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for problem in problems:
        counts[problem.kind] += 1
        first.setdefault(problem.kind, problem.where)
    return "\n".join(f"{count:6d} × {kind} (first: {first[kind]})" for kind, count in counts.most_common())
