"""Shifted tests and their numbers, on invented scores; the claims; the pages and figures that show them."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from cardiocaps.errors import CheckpointError, ConfigError
from cardiocaps.experiments.exhibits import EXHIBITS
from cardiocaps.experiments.exhibits.robustness import Robustness
from cardiocaps.experiments.jobs import Job
from cardiocaps.experiments.results import Result
from cardiocaps.experiments.robustness import scoring
from cardiocaps.experiments.robustness.claims import CNNS, RANKS, Evidence, claims, runs_of
from cardiocaps.experiments.robustness.equivariance import JUDGED
from cardiocaps.experiments.robustness.measured import Measured, measure
from cardiocaps.experiments.robustness.shifts import AXES, TESTS, UNSHIFTED, ShiftedTest, neutral, with_unshifted
from cardiocaps.experiments.robustness.verdicts import LeftOut, NotMeasured
from cardiocaps.experiments.summaries import Row
from cardiocaps.experiments.tables import write_exhibit
from cardiocaps.metrics import by_video, evaluate_runs, expected_calibration_error
from cardiocaps.metrics.comparison import Runs, paired_contrast
from cardiocaps.phantom import Shift
from tests.cardiocaps.experiments.robustness import invented

SKILLS = {
    "cardiocaps": 4.0,
    "dr": 3.5,
    "cnn-2": 1.0,
    "resnet18": 1.2,
    "logistic-regression-class-weight": 0.8,
}
Given = tuple[list[Job], dict[str, list[Result]]]

TESTED = (*(ShiftedTest("angle", size) for size in (10, 20, 30)), ShiftedTest("gain", -10), ShiftedTest("machine", 1))


@pytest.fixture(scope="module")
def exhibit() -> Robustness:
    found = EXHIBITS["robustness"]
    assert isinstance(found, Robustness)
    return replace(found, systems=tuple(SKILLS), shifted=tuple(SKILLS), tests=TESTED)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    base = invented.config()
    return invented.scored_jobs(tmp_path_factory.mktemp("out") / "x", SKILLS, with_unshifted(TESTED), base)


@pytest.fixture(scope="module")
def measured(given: Given) -> Measured:
    return measure(given[0], TESTED, given[1], bootstrap=40)


def test_the_tests_of_the_experiment() -> None:
    assert len(TESTS) == len({test.name for test in TESTS}) == 17
    assert {test.axis for test in TESTS} == {"", *AXES}
    assert ShiftedTest("speckle", 0.7).shift == Shift(speckle=0.7) and neutral("speckle") == 1
    assert ShiftedTest("machine", 1).shift == Shift(machine=True) and neutral("machine") == 0
    assert UNSHIFTED.shift == Shift() and ShiftedTest("x", -1).name == "x=-1"
    assert with_unshifted([TESTS[3], UNSHIFTED, TESTS[3]]) == (UNSHIFTED, TESTS[3])
    with pytest.raises(ConfigError, match=r"angle is 80; expected a number from -45 to 45"):
        ShiftedTest("angle", 80)
    with pytest.raises(ValueError, match="axis is 'tilt'; expected one of angle"):
        ShiftedTest("tilt", 1)


def test_a_file_of_scores_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    base = invented.config()
    (job,), results = invented.scored_jobs(tmp_path, {"cnn-2": 1.0}, [UNSHIFTED, TESTED[0]], base, seeds=1)
    found = scoring.read_scores(job, UNSHIFTED)
    expected = results["cnn-2"][0].test
    np.testing.assert_array_equal(found.test.probability, expected.probability)
    assert found.test.video == expected.video and found.features is not None and found.features.shape == (40, 12)
    path = scoring.file_of(job, TESTED[0])
    other = replace(job, config=replace(job.config, phantom_difficulty="hard"))
    with pytest.raises(CheckpointError, match="of another phantom"):
        scoring.read_scores(other, TESTED[0])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="is damaged"):
        scoring.read_scores(job, TESTED[0])
    path.unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        scoring.read_scores(job, TESTED[0])


def test_points_have_the_numbers_of_the_metrics(measured: Measured, given: Given) -> None:
    jobs, results = given
    tested = [job for job in jobs if job.system.key == "cnn-2"]
    said = {t.name: [scoring.read_scores(job, t).test for job in tested] for t in (UNSHIFTED, TESTED[2])}
    videos = {
        name: [by_video(x.probability, x.label, x.clip) for x in of_seeds]  # type: ignore[arg-type]
        for name, of_seeds in said.items()
    }
    aurocs = {name: np.mean([roc_auc_score(y, p) for p, y in pairs]) for name, pairs in videos.items()}
    point = measured.points["cnn-2", "angle=30"]
    assert point.seeds == 2
    assert point.metrics["auroc"].value == pytest.approx(aurocs["angle=30"])
    assert point.changes["auroc"].value == pytest.approx(aurocs["angle=30"] - aurocs["unshifted"])
    briers = [np.mean((p - y) ** 2) for p, y in videos["angle=30"]]
    assert point.metrics["brier"].value == pytest.approx(np.mean(briers))
    assert point.metrics["brier"].sd == pytest.approx(np.std(briers, ddof=1))
    errors = [expected_calibration_error(p, y) for p, y in videos["angle=30"]]
    assert point.calibration_error.value == pytest.approx(np.mean(errors))
    before = measured.points["cnn-2", "unshifted"]
    reports = evaluate_runs(*zip(*[x.samples("video") for x in said["unshifted"]], strict=True), bootstrap=40)
    assert before.metrics["auroc"] == reports.metrics["auroc"]
    assert before.changes["auroc"].value == 0
    own = [by_video(r.test.probability, r.test.label, r.test.clip) for r in results["cnn-2"]]  # what the jobs gave
    assert before.metrics["auroc"].value == pytest.approx(np.mean([roc_auc_score(y, p) for p, y in own]))


def test_a_seed_without_a_test_is_left_out_of_all(tmp_path: Path) -> None:
    base = invented.config(bootstrap=0)
    jobs, results = invented.scored_jobs(tmp_path, {"cnn-2": 1.0, "dr": 2.0}, [UNSHIFTED, TESTED[3]], base)
    scoring.file_of(jobs[0], TESTED[3]).unlink()
    for job in jobs[2:]:
        scoring.file_of(job, UNSHIFTED).unlink()
    found = measure(jobs, TESTED[3:4], results, bootstrap=0)
    assert found.systems == ["cnn-2"] and not found.equivariance  # nothing was turned
    assert {point.seeds for point in found.points.values()} == {1}
    assert all(math.isnan(judged.p) for judged in found.verdicts)


def _evidence(measured: Measured, given: Given) -> tuple[Evidence, dict[tuple[str, str], Runs]]:
    jobs, results = given
    shifted = {}
    for key in SKILLS:
        for test in with_unshifted(TESTED):
            tested = [scoring.read_scores(job, test).test for job in jobs if job.system.key == key]
            shifted[key, test.name] = runs_of([replace(r, test=t) for r, t in zip(results[key], tested, strict=True)])
    return Evidence(results, shifted, measured.equivariance, measured.label, 40), shifted


def test_the_differences_behind_the_claims(measured: Measured, given: Given) -> None:
    """Each kind of difference against a formula of its own."""
    evidence, shifted = _evidence(measured, given)
    by_name = {claim.name: claim for claim in claims(evidence)}

    def auroc(key: str, test: str = "unshifted") -> float:
        runs = shifted[key, test]
        pairs = zip(runs.labels, runs.probabilities, strict=True)
        return float(np.mean([roc_auc_score(y, p) for y, p in pairs]))

    def fall(key: str) -> float:
        return (auroc(key, "angle=20") + auroc(key, "angle=30")) / 2 - auroc(key)

    angle = dict(zip(CNNS, by_name["angle"].contrasts, strict=True))
    for other in ("resnet18", "cnn-2"):
        assert angle[other].measure().value == pytest.approx(fall("cardiocaps") - fall(other))
    with pytest.raises(NotMeasured, match=r"CNN-\(1\) was not tested on angle=20"):
        angle["cnn-1"].measure()
    without_loss = by_name["attention"].contrasts[0]
    assert without_loss.measure().value == pytest.approx(auroc("cardiocaps") - auroc("dr"))
    same = paired_contrast(
        [[(1.0, shifted["cardiocaps", "unshifted"])], [(-1.0, shifted["dr", "unshifted"])]],
        ["auroc"],
        bootstrap=40,
        least=-0.02,
    )["auroc"]
    assert without_loss.least == -0.02 and without_loss.measure() == same
    speed = by_name["efficiency"].contrasts[0].measure()
    logs = {key: np.log([r.seconds_per_epoch for r in given[1][key]]) for key in ("dr", "cardiocaps")}
    one, other = (logs[key] for key in ("dr", "cardiocaps"))
    parts = [x.var(ddof=1) / x.size for x in (one, other)]
    freedom = sum(parts) ** 2 / sum(v**2 / (x.size - 1) for v, x in zip(parts, (one, other), strict=True))
    assert speed.value == pytest.approx(one.mean() - other.mean())
    assert speed.p == pytest.approx(2 * stats.t.sf(abs(speed.value) / math.sqrt(sum(parts)), freedom))
    equal = {c.text: c for c in by_name["equivariance"].contrasts}
    found = equal[f"R² of the angle in the features, {JUDGED} components: CardioCaps minus CNN-(2)"].measure()
    seeds = {key: measured.equivariance[key].angles[JUDGED].per_seed() for key in ("cardiocaps", "cnn-2")}
    assert found.value == pytest.approx(np.mean(seeds["cardiocaps"]) - np.mean(seeds["cnn-2"]))
    with pytest.raises(NotMeasured, match="ViT has no results"):
        by_name["networks"].contrasts[-1].measure()


@pytest.mark.parametrize("fallen", ["cardiocaps", "cnn-2"])
def test_a_network_that_does_not_rank_has_nothing_to_lose(fallen: str, measured: Measured, given: Given) -> None:
    evidence, shifted = _evidence(measured, given)
    runs = shifted[fallen, "unshifted"]
    rng = np.random.default_rng(0)
    guesses = [np.where(rng.random(p.size) < 0.1, p, rng.random(p.size)) for p in map(np.asarray, runs.probabilities)]
    evidence = replace(evidence, shifted={**shifted, (fallen, "unshifted"): replace(runs, probabilities=guesses)})
    auroc = np.mean([roc_auc_score(y, p) for y, p in zip(runs.labels, guesses, strict=True)])
    assert auroc < RANKS
    (claim,) = (claim for claim in claims(evidence) if claim.name == "angle")
    contrasts = dict(zip(CNNS, claim.contrasts, strict=True))
    with pytest.raises(LeftOut, match=rf"has an AUROC of {auroc:.2f} before, below 0.65, and so nothing to lose"):
        contrasts["cnn-2"].measure()
    if fallen == "cnn-2":
        assert not math.isnan(contrasts["resnet18"].measure().p)


def test_the_fall_with_rare_patients(measured: Measured, given: Given) -> None:
    _, results = given
    ends = {
        "cardiocaps-abnormal-0.5": results["dr"],
        "cardiocaps-abnormal-0.02": results["cardiocaps"],
        "resnet18-abnormal-0.5": results["cnn-2"],
        "resnet18-abnormal-0.02": results["resnet18"],
    }
    evidence = replace(_evidence(measured, given)[0], results=ends)
    (claim,) = (claim for claim in claims(evidence) if claim.name == "imbalance")
    (contrast,) = (c for c in claim.contrasts if c.text.startswith("change of AUROC") and c.text.endswith("ResNet18"))

    def auroc(key: str) -> float:
        pairs = [by_video(r.test.probability, r.test.label, r.test.clip) for r in ends[key]]  # type: ignore[arg-type]
        return float(np.mean([roc_auc_score(y, p) for p, y in pairs]))

    a, b, c, d = map(auroc, ends)
    assert contrast.measure().value == pytest.approx((b - a) - (d - c))
    assert len(claim.contrasts) == 6
    weak = [replace(r, test=replace(r.test, probability=1 - r.test.probability)) for r in ends["resnet18-abnormal-0.5"]]
    evidence = replace(evidence, results={**ends, "resnet18-abnormal-0.5": weak})
    (contrast,) = (c for x in claims(evidence) for c in x.contrasts if c.text == contrast.text)
    with pytest.raises(LeftOut, match="ResNet18, 50 % abnormal has an AUROC of 0"):
        contrast.measure()


def test_times_that_cannot_be_compared(measured: Measured, given: Given) -> None:
    evidence, _ = _evidence(measured, given)
    elsewhere = {**given[1], "dr": [replace(r, device="another GPU") for r in given[1]["dr"]]}
    alone = {**given[1], "dr": given[1]["dr"][:1]}
    for results, reason in ((elsewhere, "different devices"), (alone, "fewer than two seeds")):
        (claim,) = (c for c in claims(replace(evidence, results=results)) if c.name == "efficiency")
        with pytest.raises(NotMeasured, match=reason):
            claim.contrasts[0].measure()


def test_every_claim_is_about_systems_of_the_exhibit(measured: Measured) -> None:
    """Nothing that a claim needs is left untrained: the reasons name no system that the exhibit has not."""
    exhibit = EXHIBITS["robustness"]
    asked: set[str] = set()

    class Asking(dict[str, object]):
        def get(self, key: str, default: object = None) -> object:
            asked.add(key)
            return default

    evidence = Evidence(Asking(), {}, {}, measured.label, 0)  # type: ignore[arg-type]
    for claim in claims(evidence):
        for contrast in claim.contrasts:
            with pytest.raises(NotMeasured):
                contrast.measure()
    assert asked and asked <= set(exhibit.systems)


def test_the_page_says_what_was_measured(
    exhibit: Robustness,
    measured: Measured,
    given: Given,
    tmp_path: Path,
) -> None:
    rows = [Row(key, key, tuple(given[1][key]), None) for key in SKILLS]
    write_exhibit(replace(exhibit, found=measured), rows, tmp_path, data="Invented numbers.", bootstrap=40)
    text = (tmp_path / "robustness.md").read_text()
    assert "verdicts about the phantom" in text and "Research use only" in text
    for judged in measured.verdicts:
        assert f"“{judged.claim.quote}” ({judged.claim.place}) | **{judged.verdict}** |" in text
    point = measured.points["cardiocaps", "gain=-10"]
    change = point.changes["auroc"]
    assert f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})" in text
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [
        "robustness-average-precision.png",
        "robustness-brier.png",
        "robustness-equivariance.png",
        "robustness.png",
    ]
    assert all(f"]({name})" in text for name in pictures)

    def read(what: str) -> list[dict[str, str]]:
        return list(csv.DictReader((tmp_path / f"robustness-{what}.csv").open(encoding="utf-8")))

    shifts = {(row["system"], row["test"]): row for row in read("shifts")}
    assert len(shifts) == len(SKILLS) * 6
    assert float(shifts["cardiocaps", "gain=-10"]["auroc"]) == pytest.approx(point.metrics["auroc"].value, rel=1e-5)
    assert float(shifts["cardiocaps", "gain=-10"]["auroc_change_low"]) == pytest.approx(change.low, rel=1e-5, abs=1e-9)
    assert shifts["cardiocaps", "unshifted"]["auroc_change"] == ""
    measures = read("equivariance")
    assert {row["system"] for row in measures} == set(SKILLS) - {"logistic-regression-class-weight"}
    assert {(row["measure"], row["components"]) for row in measures} == {
        ("change", ""),
        *((kind, size) for kind in ("map", "angle") for size in ("", "8", "16")),
    }
    verdicts = read("verdicts")
    assert len(verdicts) == sum(len(judged.claim.contrasts) for judged in measured.verdicts)
    assert all(bool(row["not_measured"]) != bool(row["value"]) for row in verdicts)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"data": Path("study")}, "data is 'study'; expected null: the shifts need the phantom"),
        ({"protocol": "paper"}, "protocol is 'paper'; expected video"),
        ({"limit": 20}, "limit is 20; expected null"),
        ({"split": "frames"}, "split is 'frames'; expected auto or column"),
    ],
)
def test_other_data_are_refused(changed: dict[str, object], reason: str, exhibit: Robustness) -> None:
    base = invented.config()
    assert exhibit.why_not(base) is None
    refused = exhibit.why_not(replace(base, **changed))  # type: ignore[arg-type]
    assert refused is not None and reason in refused
