"""Comparison of systems: DeLong's test against its definition and simulations, the paired bootstrap, corrections."""

import math
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_auc_score

from cardiocaps.metrics.comparison import (
    Runs,
    cohens_d,
    cohens_h,
    delong,
    detectable,
    difference_of,
    hanley_mcneil,
    holm,
    paired_contrast,
    paired_differences,
    structural_components,
)
from cardiocaps.metrics.intervals import draw_weights

Floats = NDArray[np.float64]


def _probability(logit: Floats) -> Floats:
    return 1 / (1 + np.exp(-logit))


def _runs(*logits: Floats, label: Floats) -> Runs:
    n = label.size
    return Runs(
        [_probability(x) for x in logits], [label] * len(logits), [np.arange(n)] * len(logits), [0.5] * len(logits)
    )


def _drawn(seed: int, n: int = 60, skill: float = 1.0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    label = (np.arange(n) % 3 == 0).astype(float)
    return (rng.normal(size=n) + skill * label).round(1), label  # rounded: ties


def test_structural_components_by_their_definition() -> None:
    logit, label = _drawn(1)
    p = _probability(logit)
    positive, negative = p[label == 1], p[label == 0]
    above = np.array([[float(x > y) + 0.5 * float(x == y) for y in negative] for x in positive])
    of_positive, of_negative = structural_components(p, label)
    np.testing.assert_allclose(of_positive, above.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(of_negative, above.mean(axis=0), atol=1e-12)
    assert of_positive.mean() == pytest.approx(roc_auc_score(label, p))


def test_delong_of_single_seeds_by_its_definition() -> None:
    (one, label), (other, _) = _drawn(1, skill=1.5), _drawn(2)
    found = delong(_runs(one, label=label), _runs(other, label=label))
    assert found is not None
    variance = 0.0
    parts = [structural_components(_probability(x), label) for x in (one, other)]
    for kind in (0, 1):
        s = np.cov(parts[0][kind], parts[1][kind])
        variance += (s[0, 0] + s[1, 1] - 2 * s[0, 1]) / parts[0][kind].size
    assert found.value == pytest.approx(roc_auc_score(label, one) - roc_auc_score(label, other))
    assert found.se_videos == pytest.approx(math.sqrt(variance)) and math.isnan(found.se_seeds)
    assert found.p_videos == pytest.approx(2 * stats.norm.sf(abs(found.value) / math.sqrt(variance)))
    assert math.isnan(found.p)  # nothing is known about other seeds


def test_seeds_are_a_random_effect() -> None:
    label = _drawn(0)[1]
    ones, others = [_drawn(k, skill=1.5)[0] for k in (1, 2, 3)], [_drawn(k)[0] for k in (4, 5)]
    found = delong(_runs(*ones, label=label), _runs(*others, label=label))
    assert found is not None
    aurocs = [[roc_auc_score(label, x) for x in logits] for logits in (ones, others)]
    by_seed = [np.var(x, ddof=1) / len(x) for x in aurocs]
    assert found.value == pytest.approx(np.mean(aurocs[0]) - np.mean(aurocs[1]))
    assert found.se_seeds == pytest.approx(math.sqrt(sum(by_seed)))
    of_videos = []  # 20 positive videos and 40 negative ones
    for kind in (0, 1):
        parts = [
            np.mean([structural_components(_probability(x), label)[kind] for x in xs], axis=0) for xs in (ones, others)
        ]
        of_videos.append(np.var(parts[0] - parts[1], ddof=1) / parts[0].size)
    assert found.se_videos == pytest.approx(math.sqrt(sum(of_videos)))
    total = sum(of_videos) + sum(by_seed)
    below = of_videos[0] ** 2 / 19 + of_videos[1] ** 2 / 39 + by_seed[0] ** 2 / 2 + by_seed[1] ** 2 / 1
    assert found.freedom == pytest.approx(total**2 / below)
    assert found.p == pytest.approx(2 * stats.t.sf(found.value / math.sqrt(total), found.freedom))
    assert found.p > found.p_videos


def test_delong_keeps_its_level() -> None:
    """Two systems of the same skill and correlated errors: about 5 % of the tests are below 5 %."""
    rng, below, n = np.random.default_rng(7), 0, 90
    label = (np.arange(n) % 3 == 0).astype(float)
    for _ in range(400):
        shared = rng.normal(size=n) + 1.2 * label
        pair = [_runs(shared + 0.7 * rng.normal(size=n), label=label) for _ in range(2)]
        found = delong(*pair)
        assert found is not None
        below += found.p_videos < 0.05
    assert 0.02 < below / 400 < 0.09


@pytest.mark.parametrize("of_videos", [0.0, 1.0])
def test_three_seeds_keep_their_level(of_videos: float) -> None:
    """The mean of three seeds minus that of three, of the same distribution; a bootstrap of the seeds has 19 %."""
    rng, below = np.random.default_rng(11), []
    for _ in range(3000):
        seeds = rng.normal(size=(2, 3))
        noise = of_videos * rng.normal()
        drawn = noise + of_videos * rng.normal(size=200)
        found = difference_of([(seeds[0] + noise).tolist(), (-seeds[1]).tolist()], drawn, 60)
        assert (found.low > 0 or found.high < 0) == (found.p < 0.05)
        below.append(found.p < 0.05)
    assert 0.02 < np.mean(below) < 0.07


def test_one_video_of_a_class_says_nothing_about_others() -> None:
    found = difference_of([[0.1, 0.2], [-0.3, 0.1]], np.random.default_rng(0).normal(size=50), fewest=1)
    assert found.value == pytest.approx(0.05) and all(map(math.isnan, (found.low, found.high, found.p)))


def test_the_paired_bootstrap_finds_what_delong_finds() -> None:
    rng, n = np.random.default_rng(3), 200
    label = (np.arange(n) % 4 == 0).astype(float)
    shared = rng.normal(size=n) + label
    one, other = (_runs(shared + s * rng.normal(size=n), label=label) for s in (0.3, 0.6))
    test = delong(one, other)
    found = paired_differences(one, other, ("auroc", "accuracy"), bootstrap=2000)
    assert test is not None and found["auroc"].value == pytest.approx(test.value)
    # One seed: the interval is for other videos and this seed, and there is no p. Of 200 videos 50 are abnormal.
    width = 2 * stats.t.ppf(0.975, 49) * test.se_videos
    assert found["auroc"].high - found["auroc"].low == pytest.approx(width, rel=0.1)
    assert math.isnan(found["auroc"].p)
    twice = [_runs(*(logit + 0.1 * rng.normal(size=n) for _ in range(2)), label=label) for logit in (shared, label)]
    both = delong(*twice)
    assert both is not None and both.se_seeds > 0
    assert paired_differences(*twice, ["auroc"], bootstrap=2000)["auroc"].p == pytest.approx(both.p, abs=0.02)
    # Unpaired resamples would be far wider, because both share most of their errors.
    single = [
        np.var(x, ddof=1) / x.size for r in (one, other) for x in structural_components(r.probabilities[0], label)
    ]
    assert found["auroc"].high - found["auroc"].low < 0.8 * 2 * 1.96 * math.sqrt(sum(single))


def test_a_system_does_not_differ_from_itself() -> None:
    logit, label = _drawn(5)
    run = _runs(logit, logit, label=label)
    test, found = delong(run, run), paired_differences(run, run, ("auroc",), bootstrap=50)["auroc"]
    assert test is not None and (test.value, test.se_videos, test.p, test.p_videos) == (0, 0, 1, 1)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)


def test_the_order_of_the_samples_has_no_effect() -> None:
    (one, label), (other, _) = _drawn(1), _drawn(2)
    order = np.random.default_rng(0).permutation(label.size)
    turned = Runs([_probability(other)[order]], [label[order]], [np.arange(label.size)[order]], [0.5])
    straight = _runs(other, label=label)
    assert str(delong(_runs(one, label=label), turned)) == str(delong(_runs(one, label=label), straight))


def test_other_test_samples_cannot_be_paired() -> None:
    (one, label), (other, _) = _drawn(1), _drawn(2)
    elsewhere = Runs([_probability(other)], [label], [np.arange(label.size) + 7], [0.5])
    for compare in (lambda *runs: paired_differences(*runs, ("auroc",)), delong):
        with pytest.raises(ValueError, match="groups differ between the runs; expected the same test groups"):
            compare(_runs(one, label=label), elsewhere)


def test_delong_needs_independent_samples() -> None:
    (one, label), (other, _) = _drawn(1), _drawn(2)
    patients = np.arange(label.size) // 2
    assert delong(*(Runs([_probability(x)], [label], [patients], [0.5]) for x in (one, other))) is None
    with pytest.raises(ValueError, match="label has 1 ones and 2 zeros; expected two of each at least"):
        structural_components([0.1, 0.2, 0.3], [0, 0, 1])


def test_holm() -> None:
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []
    rng = np.random.default_rng(0)
    p = rng.random(9) ** 3
    # By its definition as a closed test: the largest Bonferroni p of all sets that hold the hypothesis.
    sets = [np.flatnonzero(bits) for bits in product((0, 1), repeat=9) if any(bits)]
    closed = [max(min(1.0, p[s].min() * len(s)) for s in sets if i in s) for i in range(9)]
    assert holm(p.tolist()) == pytest.approx(closed)


def test_effect_sizes() -> None:
    assert cohens_h(0.5, 0.5) == 0 and cohens_h(1.0, 0.0) == pytest.approx(math.pi)
    # Normal distributions at a distance d have the AUROC Φ(d / √2).
    assert cohens_d(stats.norm.cdf(0.8 / math.sqrt(2))) == pytest.approx(0.8)


def test_power() -> None:
    difference = detectable(0.02)
    z = stats.norm.ppf(0.975)
    assert stats.norm.sf(z - difference / 0.02) == pytest.approx(0.8)
    assert stats.norm.sf(stats.norm.ppf(1 - 0.05 / 6) - detectable(0.02, 3) / 0.02) == pytest.approx(0.8)
    for freedom in (2.0, 4.5, 60.0):  # few seeds: the statistic has the noncentral t distribution
        distance = detectable(0.02, 3, freedom) / 0.02
        assert stats.nct.sf(stats.t.ppf(1 - 0.05 / 6, freedom), freedom, distance) == pytest.approx(0.8, abs=1e-4)
    # Hanley and McNeil 1982, the case of exponential distributions, against samples of them.
    rng = np.random.default_rng(1)
    label = np.repeat([1, 0], (20, 60))
    rate = 0.9 / (1 - 0.9)  # AUROC of exponentials with means in the ratio AUROC : 1 - AUROC
    drawn = [roc_auc_score(label, rng.exponential(np.where(label == 1, rate, 1.0))) for _ in range(2000)]
    assert hanley_mcneil(0.9, 20, 60) == pytest.approx(np.std(drawn), rel=0.1)


def _contrast_by_hand(
    systems: list[list[tuple[float, Runs]]], bootstrap: int, seed: int
) -> tuple[list[list[float]], Floats]:
    """AUROC by scikit-learn, of samples that are repeated as often as they are drawn: by seed, and in the resamples."""
    label = np.asarray(systems[0][0][1].labels[0])
    strata = {"normal": np.flatnonzero(label == 0), "abnormal": np.flatnonzero(label == 1)}
    weights = draw_weights(strata, bootstrap, np.random.default_rng(seed)).astype(int)

    def auroc(runs: Runs, k: int, weight: NDArray[np.int64]) -> float:
        taken = np.repeat(np.arange(label.size), weight)
        return float(roc_auc_score(label[taken], np.asarray(runs.probabilities[k])[taken]))

    by_seed, drawn = [], np.zeros(bootstrap)
    for terms in systems:
        seeds = range(len(terms[0][1].probabilities))
        whole = np.ones_like(label, dtype=int)
        by_seed.append([sum(factor * auroc(runs, k, whole) for factor, runs in terms) for k in seeds])
        for factor, runs in terms:
            drawn += [factor * np.mean([auroc(runs, k, weights[r]) for k in seeds]) for r in range(bootstrap)]
    return by_seed, drawn


def test_a_contrast_draws_the_same_videos_for_all_and_adds_the_variance_of_the_seeds() -> None:
    (one, label), (shifted, _), (other, _), (more, _) = (_drawn(seed, n=24, skill=1.5) for seed in range(1, 5))
    system = [(1.0, _runs(shifted, more, label=label)), (-1.0, _runs(one, other, label=label))]
    second = [(-0.5, _runs(other, one, more, label=label)), (0.5, _runs(more, shifted, one, label=label))]
    by_seed, drawn = _contrast_by_hand([system, second], 40, 7)
    found = paired_contrast([system, second], ["auroc"], bootstrap=40, seed=7, least=0.05)["auroc"]
    value = np.mean(by_seed[0]) + np.mean(by_seed[1])
    parts = [(np.var(drawn, ddof=1), 7), *((np.var(x, ddof=1) / len(x), len(x) - 1) for x in by_seed)]  # 8 abnormal
    total = sum(v for v, _ in parts)
    t = stats.t(total**2 / sum(v**2 / df for v, df in parts))
    assert found.value == pytest.approx(value, abs=1e-12)
    half = t.ppf(0.975) * math.sqrt(total)
    np.testing.assert_allclose([found.low, found.high], [value - half, value + half], atol=1e-12)
    assert found.p == pytest.approx(2 * t.sf(abs(value - 0.05) / math.sqrt(total)))


def test_a_system_minus_itself_is_zero_in_every_resample() -> None:
    (one, label), (other, _) = _drawn(1), _drawn(2)
    runs = _runs(one, other, label=label)
    found = paired_contrast([[(1.0, runs), (-1.0, runs)]], ["auroc", "brier"], bootstrap=30)
    assert all((x.value, x.low, x.high, x.p) == (0, 0, 0, 1) for x in found.values())


def test_terms_of_a_system_need_the_same_networks() -> None:
    (one, label), (other, _) = _drawn(1), _drawn(2)
    with pytest.raises(ValueError, match="same networks"):
        paired_contrast([[(1.0, _runs(one, label=label)), (-1.0, _runs(one, other, label=label))]], ["auroc"])
