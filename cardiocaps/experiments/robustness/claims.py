"""The claims of the paper that the experiment tests, and what each is measured by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from cardiocaps.experiments.plan import CLASSIFIERS, PREVALENCES, SAMPLINGS, SYSTEMS, prevalence_key
from cardiocaps.experiments.results import Result
from cardiocaps.experiments.robustness.equivariance import JUDGED, Equivariance, PatientRatio, contrast
from cardiocaps.experiments.robustness.shifts import UNSHIFTED, ShiftedTest
from cardiocaps.experiments.robustness.verdicts import Claim, Contrast, LeftOut, NotMeasured
from cardiocaps.metrics.comparison import Difference, Runs, paired_contrast
from cardiocaps.metrics.samples import Integers

LOSS = 0.02
"""The loss of AUROC or average precision from which on attention would not do without loss."""

STEEP = (ShiftedTest("angle", 20), ShiftedTest("angle", 30))
"""The turns that robustness to the angle is judged by, the mean over both: 5 to 45 degrees. Training has hearts from
-15 to 15 degrees in images that augmentation turns by up to 10 degrees."""

RANKS = 0.65
"""The mean AUROC from which on a system ranks well enough to fall, three standard errors above 0.5 with 300 videos. A
system below it has nothing to lose, so that it falls little says nothing."""

CNNS = ("cnn-1", "cnn-2", "resnet18")
_NETWORKS = (*CNNS, "unet", "vit")
_CAPSULES = ("em-capsnet", "efficient-capsnet")
PIXELS = tuple(f"{classifier}-{sampling}" for classifier in CLASSIFIERS for sampling in SAMPLINGS)
RANKING = {"auroc": "AUROC", "average_precision": "average precision"}

RARE, BALANCED = min(PREVALENCES), max(PREVALENCES)
IMBALANCED = ("cardiocaps", "dr-margin", "resnet18", "cnn-2")
"""The systems whose training with few abnormal videos is compared."""


@dataclass(frozen=True)
class Evidence:
    """What the claims are measured on.

    Attributes:
        results: system -> its results on the unshifted test.
        shifted: (system, name of the test) -> its runs there.
        equivariance: system -> its measures.
        label: of the test patients that `equivariance` has.
        bootstrap: resamples.
    """

    results: Mapping[str, Sequence[Result]]
    shifted: Mapping[tuple[str, str], Runs]
    equivariance: Mapping[str, Equivariance]
    label: Integers
    bootstrap: int
    _trained: dict[str, Runs] = field(default_factory=dict, init=False, repr=False)

    def trained(self, system: str) -> Runs:
        """On the unshifted test of the tables. Raises NotMeasured."""
        if not (results := self.results.get(system)):
            raise NotMeasured(f"{SYSTEMS[system].title} has no results")
        return self._trained.setdefault(system, runs_of(results))

    def tested(self, system: str, test: ShiftedTest) -> Runs:
        if (runs := self.shifted.get((system, test.name))) is None:
            raise NotMeasured(f"{SYSTEMS[system].title} was not tested on {test.name}")
        return runs

    def measured(self, system: str) -> Equivariance:
        if (found := self.equivariance.get(system)) is None:
            raise NotMeasured(f"the features of {SYSTEMS[system].title} were not measured")
        return found


def runs_of(results: Sequence[Result]) -> Runs:
    """The test of a system's results."""
    parts = [result.test.samples(result.unit) for result in results]
    probabilities, labels, groups = zip(*parts, strict=True)
    return Runs(probabilities, labels, groups, [result.threshold[0] for result in results])


def claims(evidence: Evidence) -> tuple[Claim, ...]:
    """All claims, in the order of the paper."""
    return (
        Claim(
            "angle-affine",
            "The affine map makes CardioCaps robust to the angle, more than a convolution in its place",
            "crucial for the robustness in different angles",
            "section I; III-D and table III",
            tuple(_falls(evidence, ["cardiocaps-convolution"])),
        ),
        Claim(
            "loss",
            "The weighted margin loss with regression is better than the margin loss under imbalance (with dynamic "
            "routing)",
            "superior performance in achieving robustness",
            "III-B, table I",
            tuple(_better(evidence, "dr", ["dr-margin"])),
        ),
        Claim(
            "attention",
            f"Attention replaces dynamic routing without loss (of {LOSS} or more)",
            "attention method replacing dynamic routing achieves robust performance",
            "III-C, table II",
            tuple(_better(evidence, "cardiocaps", ["dr"], -LOSS)),
        ),
        Claim(
            "efficiency",
            "Attention trains faster than dynamic routing",
            "more computationally efficient alternative",
            "abstract; III-C",
            (
                Contrast(
                    "logarithm of the seconds per epoch, DR-CapsNet minus CardioCaps",
                    lambda: _faster(evidence, "cardiocaps", "dr"),
                ),
            ),
        ),
        Claim(
            "imbalance",
            f"CardioCaps is robust to class imbalance: from {100 * BALANCED:g} % to {100 * RARE:g} % abnormal videos "
            "in training it falls less than the others",
            "robustness to class imbalance",
            "abstract; III-B",
            tuple(_rarer(evidence, [system for system in IMBALANCED if system != "cardiocaps"])),
        ),
        Claim(
            "angle",
            "CardioCaps is robust to the angle: it falls less than CNNs",
            "robustness to images captured from various angles",
            "II-B; IV-B 2",
            tuple(_falls(evidence, CNNS)),
        ),
        Claim(
            "equivariance",
            "Class capsules are more equivariant to the angle than features of CNNs",
            "improved translation-equivariance learning compared to CNNs",
            "II-B; III-D",
            tuple(_more_equivariant(evidence, CNNS)),
        ),
        Claim(
            "classifiers",
            "CardioCaps is better than classifiers of pixels",
            "surpasses traditional machine learning baseline methods",
            "abstract; IV-B 1, table IV",
            tuple(_better(evidence, "cardiocaps", PIXELS)),
        ),
        Claim(
            "networks",
            "CardioCaps is better than other deep networks",
            "outperforms other deep-learning baselines",
            "IV-B 2, table V",
            tuple(_better(evidence, "cardiocaps", _NETWORKS)),
        ),
        Claim(
            "capsules",
            "CardioCaps is better than other capsule networks",
            "consistently outperforms these two advanced methods",
            "IV-B 3, table VI",
            tuple(_better(evidence, "cardiocaps", _CAPSULES)),
        ),
    )


def _better(evidence: Evidence, one: str, others: Sequence[str], least: float = 0.0) -> Iterator[Contrast]:
    """A system has the larger AUROC and average precision."""
    for other in others:
        for metric, name in RANKING.items():

            def measure(other: str = other, metric: str = metric) -> Difference:
                terms = [[(1.0, evidence.trained(one))], [(-1.0, evidence.trained(other))]]
                return _contrast(evidence, terms, metric, least)

            bound = f" (above {least:g})" if least else ""
            yield Contrast(f"{name}: {_title(one)} minus {_title(other)}{bound}", measure, least)


def _falls(evidence: Evidence, others: Sequence[str]) -> Iterator[Contrast]:
    """From the unshifted test to STEEP, CardioCaps' AUROC falls by less than that of others."""

    def change_of(system: str, sign: float) -> list[tuple[float, Runs]]:
        shifted = [(sign / len(STEEP), evidence.tested(system, test)) for test in STEEP]
        return [(-sign, evidence.tested(system, UNSHIFTED)), *shifted]

    for other in others:

        def measure(other: str = other) -> Difference:
            terms = [change_of("cardiocaps", 1.0), change_of(other, -1.0)]
            for system in ("cardiocaps", other):
                _check_ranks(_title(system), evidence.tested(system, UNSHIFTED))
            return _contrast(evidence, terms, "auroc")

        turned = " and ".join(f"{test.size:g}°" for test in STEEP)
        text = f"change of AUROC from 0° to {turned} (mean): CardioCaps minus {_title(other)}"
        yield Contrast(text, measure)


def _rarer(evidence: Evidence, others: Sequence[str]) -> Iterator[Contrast]:
    """From BALANCED to RARE in training, CardioCaps' metrics fall by less than those of others."""

    def change_of(system: str, sign: float) -> list[list[tuple[float, Runs]]]:
        # Networks of two prevalences were trained apart, so their seeds are drawn apart.
        ends = ((sign, RARE), (-sign, BALANCED))
        return [[(factor, evidence.trained(prevalence_key(system, share)))] for factor, share in ends]

    for other in others:
        for metric, name in RANKING.items():

            def measure(other: str = other, metric: str = metric) -> Difference:
                terms = [*change_of("cardiocaps", 1.0), *change_of(other, -1.0)]
                for system in ("cardiocaps", other):
                    key = prevalence_key(system, BALANCED)
                    _check_ranks(SYSTEMS[key].title, evidence.trained(key))
                return _contrast(evidence, terms, metric)

            ends = f"from {100 * BALANCED:g} % to {100 * RARE:g} % abnormal"
            yield Contrast(f"change of {name} {ends}: CardioCaps minus {_title(other)}", measure)


def _more_equivariant(evidence: Evidence, others: Sequence[str]) -> Iterator[Contrast]:
    """The class capsules of CardioCaps have the larger R² of the linear map and of the angle."""

    def ratio(system: str, kind: str) -> PatientRatio:
        found = evidence.measured(system)
        return found.mapped(JUDGED) if kind == "map" else found.angles[JUDGED]

    names = {"map": "R² of a linear map from 0° to the other angles", "angle": "R² of the angle in the features"}
    for other in others:
        for kind, name in names.items():

            def measure(other: str = other, kind: str = kind) -> Difference:
                both = [(1.0, ratio("cardiocaps", kind)), (-1.0, ratio(other, kind))]
                return contrast(both, evidence.label, evidence.bootstrap)

            yield Contrast(f"{name}, {JUDGED} components: CardioCaps minus {_title(other)}", measure)


def _faster(evidence: Evidence, one: str, other: str) -> Difference:
    """Logarithms of seconds per epoch of `other` minus those of `one`: Welch's t over the seeds.

    Raises NotMeasured if the runs differ in what a time depends on, or a system has one seed.
    """
    from scipy.stats import ttest_ind

    both = [evidence.results.get(system) or () for system in (other, one)]
    logs = [[math.log(r.seconds_per_epoch) for r in results if r.seconds_per_epoch] for results in both]
    if len({(r.device, r.threads, r.at_once) for results in both for r in results}) > 1:
        raise NotMeasured("the systems were trained on different devices, or with different numbers of jobs or threads")
    if min(map(len, logs)) < 2:
        raise NotMeasured("a system has fewer than two seeds with a time")
    if len(set(logs[0])) == len(set(logs[1])) == 1:
        raise NotMeasured("the times do not vary over the seeds")
    test = ttest_ind(*logs, equal_var=False)
    low, high = test.confidence_interval(0.95)
    return Difference(fmean(logs[0]) - fmean(logs[1]), float(low), float(high), float(test.pvalue))


def _check_ranks(title: str, runs: Runs) -> None:
    """Raise LeftOut if the mean AUROC before a fall is below RANKS."""
    auroc = fmean(test.sample.estimate()["auroc"] for test in runs.tested())
    if auroc < RANKS:
        raise LeftOut(f"{title} has an AUROC of {auroc:.2f} before, below {RANKS}, and so nothing to lose")


def _contrast(
    evidence: Evidence, terms: Sequence[Sequence[tuple[float, Runs]]], metric: str, least: float = 0.0
) -> Difference:
    try:
        return paired_contrast(terms, [metric], bootstrap=evidence.bootstrap, least=least)[metric]
    except ValueError as error:
        raise NotMeasured(str(error)) from error


def _title(system: str) -> str:
    return "CardioCaps" if system == "cardiocaps" else SYSTEMS[system].title
