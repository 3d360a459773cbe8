"""The section of an exhibit that compares its systems in pairs: differences, tests, effect sizes, power."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from cardiocaps.errors import plural
from cardiocaps.experiments.markdown import DASH, p_value, signed, table
from cardiocaps.experiments.reference_rows import REFERENCES
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.metrics import exact_interval
from cardiocaps.metrics.comparison import (
    DeLong,
    Difference,
    Runs,
    cohens_d,
    cohens_h,
    delong,
    detectable,
    hanley_mcneil,
    holm,
    paired_differences,
)

_METRICS = ("auroc", "average_precision", "accuracy")
_EXPECTED = 0.9
"""The AUROC and the sensitivity for which the precision of the test set is stated."""


def section(
    rows: Sequence[Row],
    found: Mapping[str, Summary],
    bootstrap: int,
    compared_with: Callable[[str, Sequence[str]], str | None],
) -> list[str]:
    """The Markdown; empty without resamples, and for fewer than two systems that were tested on the same samples.

    Args:
        compared_with: which one of the systems one of them is compared with; None: with none.
    """
    systems = [row.system for row in rows if row.system not in REFERENCES]
    references = {system: compared_with(system, systems) for system in systems}
    known = [(found[a], found[b]) for a, b in references.items() if a in found and b is not None and b in found]
    pairs = [(a, b) for a, b in known if bootstrap and _is_paired(a, b)]
    if not pairs:
        return []
    differences = [paired_differences(_runs(a), _runs(b), _METRICS, bootstrap=bootstrap) for a, b in pairs]
    tests = [_delong(a, b) for a, b in pairs]
    p_values = [math.nan if test is None else test.p for test in tests]
    p_corrected = holm(p_values)
    p_bootstrap = [holm([found_of[name].p for found_of in differences]) for name in _METRICS]
    comparisons = max(1, sum(not math.isnan(p) for p in p_values))
    lines, effects = [], []
    for k, ((one, other), found_of, test) in enumerate(zip(pairs, differences, tests, strict=True)):
        name = f"{one.title} minus {other.title}"
        lines.append(
            (
                name,
                _interval(found_of["auroc"]),
                _number(None if test is None else test.se_videos),
                _number(None if test is None else test.se_seeds),
                p_value(math.nan if test is None else test.p_videos),
                p_value(p_values[k]),
                p_value(p_corrected[k]),
                _detectable(test, comparisons),
            )
        )
        accuracy = one.report.metrics["accuracy"].value, other.report.metrics["accuracy"].value
        auroc = one.report.metrics["auroc"].value, other.report.metrics["auroc"].value
        effects.append(
            (
                name,
                _d(*auroc),
                _interval(found_of["average_precision"]),
                p_value(p_bootstrap[1][k]),
                _interval(found_of["accuracy"]),
                p_value(p_bootstrap[2][k]),
                f"{cohens_h(*accuracy):+.2f}",
            )
        )
    head = (
        "difference",
        "AUROC",
        "standard error, other videos",
        "standard error, other seeds",
        "p, these seeds",
        "p, other seeds too",
        "p, corrected",
        "detectable",
    )
    effect_head = (
        "difference",
        "difference in d",
        "average precision",
        "p, corrected",
        "accuracy",
        "p, corrected",
        "Cohen's h of the accuracies",
    )
    return [
        "## Comparisons",
        _text(pairs[0][0], len(pairs), bootstrap),
        table(head, lines),
        table(effect_head, effects),
        *([] if all(test is None for test in tests) else [_power(pairs[0][0])]),
    ]


def _text(summary: Summary, pairs: int, bootstrap: int) -> str:
    drawn = plural(summary.drawn)
    return (
        "Paired differences of the means over the seeds, in brackets the 95 % interval for other test "
        f"{drawn} and other seeds. The standard error of the {drawn} is that of DeLong et al. (1988) for the mean "
        f"AUROC over the seeds; in the intervals, and for the other metrics, that of {bootstrap:,} resamples of the "
        f"{drawn}, the same ones for both systems. The variance over the seeds of each system, divided by their "
        f"number, is added (Student's t, degrees of freedom of Satterthwaite). p, these seeds: for other {drawn} "
        "alone. Where a system has one seed, nothing is known about other seeds: intervals are for these, and p is "
        f"missing. Corrected: by Holm over the {pairs} {'comparison' if pairs == 1 else 'comparisons'} of a column in "
        "this table. Detectable: the smallest difference in AUROC that such a test finds with a power of 80 % at 5 % "
        "over all comparisons, of the standard errors found. d: √2 Φ⁻¹(AUROC), the distance of two normal "
        "distributions with this AUROC, in deviations. h: the difference of 2 arcsin √accuracy; 0.2 is called small, "
        "0.5 medium, 0.8 large (Cohen 1988)."
    )


def _power(summary: Summary) -> str:
    """How precise a test set of this size is, whatever the system. Its samples are independent."""
    (tn, fp), (fn, tp) = summary.report.runs[0].confusion
    negatives, positives = tn + fp, fn + tp
    error = hanley_mcneil(_EXPECTED, positives, negatives)
    low, high = exact_interval(_EXPECTED * positives, positives)
    return (
        f"Power of the test set: {positives:,} abnormal and {negatives:,} normal {summary.unit}s. An AUROC of "
        f"{_EXPECTED} is known to ± {1.96 * error:.3f} (Hanley and McNeil 1982), a sensitivity of {_EXPECTED} has the "
        f"95 % interval {low:.2f}{DASH}{high:.2f}; two systems whose errors are independent are told apart from a "
        f"difference of {detectable(error * math.sqrt(2)):.3f} in AUROC on (80 % power, one comparison)."
    )


def _runs(summary: Summary) -> Runs:
    samples = [result.test.samples(summary.unit) for result in summary.results]
    probabilities, labels, groups = zip(*samples, strict=True)
    return Runs(probabilities, labels, groups, summary.thresholds)


def _is_paired(one: Summary, other: Summary) -> bool:
    """Whether both were tested on the same samples of both classes, by all seeds."""
    if one.unit != other.unit or any(math.isnan(s.report.metrics["auroc"].value) for s in (one, other)):
        return False
    return len({test.groups for summary in (one, other) for test in _runs(summary).tested()}) == 1


def _delong(one: Summary, other: Summary) -> DeLong | None:
    (tn, fp), (fn, tp) = one.report.runs[0].confusion
    return delong(_runs(one), _runs(other)) if min(tn + fp, fn + tp) > 1 else None


def _interval(difference: Difference) -> str:
    # All metrics are shares. (NaN stays.)
    return signed(difference.value, max(difference.low, -1.0), min(difference.high, 1.0))


def _number(value: float | None) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.3f}"


def _detectable(test: DeLong | None, comparisons: int) -> str:
    least = math.nan if test is None else detectable(test.se, comparisons, test.freedom)
    return "none" if least > 1 else _number(least)  # an AUROC is at most 1


def _d(one: float, other: float) -> str:
    difference = cohens_d(one) - cohens_d(other)
    return f"{difference:+.2f}" if math.isfinite(difference) else DASH
