"""Robustness: curves over shifts of the test, equivariance to the angle, and verdicts on the paper's claims."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cardiocaps.config.option import shown
from cardiocaps.evaluation.names import METRIC_NAMES
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.exhibits.shift_curves import curves, draw_equivariance
from cardiocaps.experiments.markdown import DASH, joined, p_value, plus_minus, signed, table, with_interval
from cardiocaps.experiments.plan import MAIN, SYSTEMS
from cardiocaps.experiments.results import read_result
from cardiocaps.experiments.robustness.claims import CNNS, RANKS
from cardiocaps.experiments.robustness.equivariance import JUDGED, PatientRatio, mean_estimate
from cardiocaps.experiments.robustness.measured import CURVES, Measured, measure
from cardiocaps.experiments.robustness.shifts import AXES, TESTS, UNSHIFTED, ShiftedTest, with_unshifted
from cardiocaps.experiments.robustness.verdicts import Contrast, Judged, Missing
from cardiocaps.experiments.summaries import Row, Summary
from cardiocaps.metrics import evaluate
from cardiocaps.metrics.comparison import Difference
from cardiocaps.plots import save
from cardiocaps.runtime.files import READABLE, write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cardiocaps.config import TrainConfig
    from cardiocaps.experiments.folder import ExperimentFolder
    from cardiocaps.experiments.jobs import Job

_NEEDED: Mapping[str, tuple[str | None, ...]] = {
    "protocol": ("video",),
    "limit": (None,),
    "split": ("auto", "column"),
}
"""The values of settings with which the test videos are the phantom's own."""


@dataclass(frozen=True)
class Robustness(Exhibit):
    """Tests systems under shifts after their training.

    Attributes:
        shifted: the systems that are tested under shifts; the others are trained for the claims about the usual test.
        tests: what they are tested on, besides the unshifted test.
        found: what the tests gave; None before them.
    """

    shifted: tuple[str, ...] = ()
    tests: tuple[ShiftedTest, ...] = TESTS
    found: Measured | None = field(default=None, compare=False, repr=False)

    def why_not(self, config: TrainConfig) -> str | None:
        why = "the shifts need the phantom, with the geometry of its hearts and its own test patients"
        if config.data is not None:
            return f"data is {shown(config.data)}; expected null: {why}"
        for name, expected in _NEEDED.items():
            if (value := getattr(config, name)) not in expected:
                return f"{name} is {shown(value)}; expected {' or '.join(x or 'null' for x in expected)}: {why}"
        return super().why_not(config)

    @property
    def has_references(self) -> bool:
        return True

    def tested(
        self, jobs: Sequence[Job], folder: ExperimentFolder, at_once: int, progress: bool
    ) -> tuple[Self, Mapping[str, str]]:
        own = [job for job in jobs if job.system.key in self.shifted]
        if not own:
            return self, {}
        from cardiocaps.experiments.robustness.scoring import score_all

        tests = with_unshifted(self.tests)
        errors = score_all(own, tests, folder.path / "shifted", at_once, progress)
        results = {key: [read_result(job.folder) for job in jobs if job.system.key == key] for key in self.systems}
        return replace(self, found=measure(own, tests, results, own[0].config.bootstrap, progress)), errors

    def sections(self, rows: Sequence[Row], found: Mapping[str, Summary], bootstrap: int) -> list[str]:
        if self.found is None or not self.found.points:
            return ["No system was tested under shifts.", *self._results(rows, found, bootstrap)]
        return [
            *_verdicts(self.found),
            *self._shifts(self.found),
            *_equivariance(self.name, self.found),
            *self._results(rows, found, bootstrap),
        ]

    def draw(self, summaries: Sequence[Summary]) -> Figure:
        """AUROC over the size of every shift; the other figures are made by `write_more`."""
        if self.found is None or not self.found.points:
            return super().draw(summaries)
        return curves(self.found, "auroc", self.tests, self._highlighted(self.found, summaries))

    def write_more(self, folder: Path, summaries: Sequence[Summary]) -> None:
        """The other figures, and the CSV of shifts, equivariance and verdicts."""
        if self.found is None or not self.found.points:
            return
        highlighted = self._highlighted(self.found, summaries)
        for metric in CURVES[1:]:
            save(curves(self.found, metric, self.tests, highlighted), folder / _file(self.name, metric, "png"))
        for what, lines in (
            ("shifts", list(self._shift_rows(self.found))),
            ("equivariance", list(_equivariance_rows(self.found))),
            ("verdicts", list(_verdict_rows(self.found))),
        ):
            if lines:
                write_csv(folder / _file(self.name, what, "csv"), lines, digits=READABLE)
        if self.found.equivariance:
            save(draw_equivariance(self.found, highlighted), folder / _picture(self.name))

    def _shifts(self, found: Measured) -> list[str]:
        highlighted = [key for key in (MAIN, "dr", *CNNS) if key in found.systems]
        csv = _file(self.name, "shifts", "csv")
        text = (
            "The trained systems were tested on the same test patients, examined otherwise: hearts and labels are "
            "those of the unshifted test. Means over the seeds; the bands of the figures are the middle 95 % of "
            f"{found.bootstrap:,} resamples of videos and seeds, the intervals of changes are for other videos and "
            "seeds (Student's t, degrees of freedom of Satterthwaite). All differences from the unshifted test, "
            f"deviations and intervals are in [{csv}]({csv}). The Brier score is the mean squared error of the "
            "probabilities, of calibration and ranking together. Probabilities are those before calibration. Hearts in "
            "training are turned by −15 to 15 degrees, and augmentation turns the images by up to 10 more. Position, "
            "heart rate, gain and plane vary between the hearts of training, so small shifts of these are known there."
        )
        untested = [SYSTEMS[key].title for key in self.shifted if key not in found.systems]
        seeds = {key: found.points[key, UNSHIFTED.name].seeds for key in found.systems}
        fewer = [f"{SYSTEMS[key].title} ({n})" for key, n in seeds.items() if n < max(seeds.values())]
        parts = ["## Shifted tests", text]
        if untested:
            parts.append(f"Not tested: {joined(untested)}.")
        if fewer:
            parts.append(f"With fewer than {max(seeds.values())} seeds, as others failed: {joined(fewer)}.")
        tests = with_unshifted(self.tests)
        for metric in CURVES:
            name = METRIC_NAMES[metric]
            if metric != CURVES[0]:
                picture = _file(self.name, metric, "png")
                parts.append(f"![{name} under shifts]({picture})")
            parts.append(f"**{name[0].upper()}{name[1:]}**")
            head = ("test", *(SYSTEMS[key].title for key in found.systems))
            lines = [
                (_title(test), *(f"{found.points[key, test.name].metrics[metric].value:.3f}" for key in found.systems))
                for test in tests
            ]
            parts.append(table(head, lines))
            if found.bootstrap and highlighted:
                lines = [
                    (
                        _title(test),
                        *(_interval(found.points[key, test.name].changes[metric]) for key in highlighted),
                    )
                    for test in tests
                    if test != UNSHIFTED
                ]
                parts.append("Change from the unshifted test:")
                parts.append(table(("test", *(SYSTEMS[key].title for key in highlighted)), lines))
        parts.append(
            "**Expected calibration error**, of 10 bins of equally many videos. Chance alone gives a perfectly "
            "calibrated classifier about 0.04 with 300 videos."
        )
        lines = [
            (_title(test), *(plus_minus(found.points[key, test.name].calibration_error) for key in found.systems))
            for test in tests
        ]
        parts.append(table(("test", *(SYSTEMS[key].title for key in found.systems)), lines))
        return parts

    def _shift_rows(self, found: Measured) -> Iterator[dict[str, Any]]:
        for key in found.systems:
            for test in with_unshifted(self.tests):
                point = found.points[key, test.name]
                cells: dict[str, Any] = {
                    "system": key,
                    "title": SYSTEMS[key].title,
                    "seeds": point.seeds,
                    "test": test.name,
                    "shift": test.axis,
                    "size": test.size if test.axis else "",
                }
                for metric in CURVES:
                    x, change = point.metrics[metric], point.changes[metric]
                    cells |= {metric: x.value, f"{metric}_sd": x.sd, f"{metric}_low": x.low, f"{metric}_high": x.high}
                    cells[f"{metric}_method"] = x.method
                    cells |= _difference(f"{metric}_change", change if test.axis else Difference(math.nan))
                error = point.calibration_error
                yield {**cells, "calibration_error": error.value, "calibration_error_sd": error.sd}

    def _highlighted(self, found: Measured, summaries: Sequence[Summary]) -> list[str]:
        """CardioCaps, DR-CapsNet and the CNN with the best AUROC on validation, as far as they were tested."""
        auroc = {}
        for summary in summaries:
            if summary.system in CNNS and summary.system in found.systems:
                parts = [r.validation.samples(r.unit)[:2] for r in summary.results]
                values = [evaluate(p, y, bootstrap=0).metrics["auroc"].value for p, y in parts]
                auroc[summary.system] = sum(values) / len(values)
        known = {key: x for key, x in auroc.items() if not math.isnan(x)}
        best = [max(known, key=lambda key: known[key])] if known else []
        return [key for key in (MAIN, "dr", *best) if key in found.systems]


def _file(exhibit: str, what: str, ending: str) -> str:
    return f"{exhibit}-{what.replace('_', '-')}.{ending}"


def _picture(exhibit: str) -> str:
    return _file(exhibit, "equivariance", "png")


def _title(test: ShiftedTest) -> str:
    if not test.axis or test.axis == "machine":
        return AXES[test.axis] if test.axis else "unshifted"
    name, _, unit = AXES[test.axis].partition(", ")
    if unit == "factor":
        return f"{name} × {test.size:g}"
    return f"{name} {test.size:+g} {unit}"


def _interval(difference: Difference) -> str:
    if math.isnan(difference.value):
        return "undefined"
    return signed(difference.value, difference.low, difference.high)


def _difference(name: str, difference: Difference) -> dict[str, float]:
    return {
        name: difference.value,
        f"{name}_low": difference.low,
        f"{name}_high": difference.high,
        f"{name}_p": difference.p,
    }


def _verdicts(found: Measured) -> list[str]:
    text = (
        "Each claim of the paper is a list of differences that are above 0, or above the bound that is named, if it is "
        f"true. Their intervals and p are for other test videos and other seeds: {found.bootstrap:,} paired resamples "
        "of the videos and the variance over the seeds (Student's t, degrees of freedom of Satterthwaite; of times: "
        "Welch's t over the seeds). The claim *holds* if all differences are above their bounds: its p is the largest "
        "of theirs. It *does not hold* if one is below: its p is the least of those, times the number of differences. "
        "The smaller p, corrected by Holm over the claims, must be below 0.05; otherwise the claim *cannot be told*, "
        "which does not mean that systems are equal. A fall is not compared with that of a system whose AUROC was "
        f"below {RANKS} before: it has nothing to lose. The rule was written before the results. **These are verdicts "
        "about the phantom**, synthetic images with shifts of its own; they say nothing about patients, nor about the "
        "paper's own data."
    )
    lines = []
    for judged in found.verdicts:
        claim = judged.claim
        known = [(x, c) for x, c in _pairs(judged) if isinstance(x, Difference)]
        missing = [x for x in judged.found if isinstance(x, Missing) and not x.is_left_out]
        state = f"{sum(x.value > c.least for x, c in known)} of {len(known)} above"
        if len(known) < len(judged.found):
            state += f", {len(judged.found) - len(known)} left out"
        if missing:
            state = f"not measured: {joined(list(dict.fromkeys(x.reason for x in missing)))}"
        words = f"“{claim.quote}” ({claim.place})"
        lines.append(
            (claim.text, words, f"**{judged.verdict}**", state, p_value(judged.p), p_value(judged.p_corrected))
        )
    differences = [
        (
            judged.claim.name,
            contrast.text,
            _reason(x) if isinstance(x, Missing) else _interval(x),
            DASH if isinstance(x, Missing) else p_value(x.p),
        )
        for judged in found.verdicts
        for x, contrast in _pairs(judged)
    ]
    return [
        "## Verdicts",
        text,
        table(("claim", "the paper's words", "verdict", "differences", "p", "p, corrected"), lines),
        "The differences behind them:",
        table(("claim", "difference", "with its 95 % interval", "p"), differences),
    ]


def _pairs(judged: Judged) -> Iterator[tuple[Difference | Missing, Contrast]]:
    yield from zip(judged.found, judged.claim.contrasts, strict=True)


def _reason(missing: Missing) -> str:
    return f"left out: {missing.reason}" if missing.is_left_out else missing.reason


def _verdict_rows(found: Measured) -> Iterator[dict[str, Any]]:
    for judged in found.verdicts:
        for x, contrast in _pairs(judged):
            known = x if isinstance(x, Difference) else Difference(math.nan)
            yield {
                "claim": judged.claim.name,
                "text": judged.claim.text,
                "quote": judged.claim.quote,
                "place": judged.claim.place,
                "verdict": judged.verdict.value,
                "p": judged.p,
                "p_corrected": judged.p_corrected,
                "difference": contrast.text,
                "bound": contrast.least,
                **_difference("value", known),
                "not_measured": _reason(x) if isinstance(x, Missing) else "",
            }


def _equivariance(exhibit: str, found: Measured) -> list[str]:
    if not found.equivariance:
        return []
    csv = _file(exhibit, "equivariance", "csv")
    turns = list(next(iter(found.equivariance.values())).changes)

    def cell(ratio: PatientRatio) -> str:
        return with_interval(mean_estimate(ratio, found.label, found.bootstrap)).replace(", bootstrap", "")

    text = (
        "The features of a capsule network are its class capsules, of another network the input of its last linear "
        "layer, means over the frames of a video. *Change*: the cosine distance of a patient's features from those at "
        "0°, divided by the median distance of two patients; an invariant network has 0, and a network whose features "
        f"are all zero for some patient has none ({DASH}). *Linear map*: R² of a ridge "
        "map from the features at 0° to those at the other angles on held-out patients, against predicting the mean "
        "(equivariance in the sense of Lenc and Vedaldi, CVPR 2015; invariance is a special case). *Angle*: R² of a "
        "ridge regression from the features to the angle of the heart in the image on held-out patients; an invariant "
        f"network has 0. Both with all features and with {JUDGED} principal components, as many features as the "
        "smallest network has. Mean ± deviation over the seeds; intervals by patient and seed, without fitting anew. "
        f"By angle, and with 16 components, in [{csv}]({csv})."
    )
    lines = []
    for key, own in found.equivariance.items():
        measures = [own.mapped(None), own.mapped(JUDGED), own.angles[None], own.angles[JUDGED]]
        changes = [cell(own.changes[turn]) for turn in (turns[0], turns[-1])]
        lines.append((SYSTEMS[key].title, str(own.features), *changes, *map(cell, measures)))
    head = (
        "system",
        "features",
        *(f"change at {turn:g}°" for turn in (turns[0], turns[-1])),
        "linear map, R²",
        f"linear map, {JUDGED} components",
        "angle, R²",
        f"angle, {JUDGED} components",
    )
    return ["## Equivariance to the angle", text, f"![Equivariance]({_picture(exhibit)})", table(head, lines)]


def _equivariance_rows(found: Measured) -> Iterator[dict[str, Any]]:
    for key, own in found.equivariance.items():
        measures: dict[tuple[str, float | str, int | str], PatientRatio] = {
            **{("change", turn, ""): ratio for turn, ratio in own.changes.items()},
            **{("map", turn, size or ""): ratio for (size, turn), ratio in own.maps.items()},
            **{("map", "all", size or ""): own.mapped(size) for size in own.angles},
            **{("angle", "all", size or ""): ratio for size, ratio in own.angles.items()},
        }
        for (kind, turn, size), ratio in measures.items():
            x = mean_estimate(ratio, found.label, found.bootstrap)
            yield {
                "system": key,
                "title": SYSTEMS[key].title,
                "seeds": len(ratio.above),
                "features": own.features,
                "measure": kind,
                "angle": turn,
                "components": size,
                "value": x.value,
                "sd": x.sd,
                "low": x.low,
                "high": x.high,
            }
