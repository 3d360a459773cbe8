"""The measures of equivariance against formulas of their own, on invented features."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import cosine
from sklearn.decomposition import PCA
from sklearn.model_selection import KFold

from cardiocaps.experiments.robustness import equivariance
from cardiocaps.experiments.robustness.equivariance import (
    FOLDS,
    Equivariance,
    PatientRatio,
    angle_decoded,
    change,
    contrast,
    linear_map,
    mean_estimate,
)
from cardiocaps.metrics.intervals import draw_weights, strata_of
from cardiocaps.metrics.samples import Floats, Integers

LABEL: Integers = (np.arange(40) % 4 == 0).astype(np.int64)


def _features(seed: int, patients: int = 40, d: int = 5) -> Floats:
    return np.random.default_rng(seed).normal(size=(patients, d)) + 1.5


def _ratio(seed: int, seeds: int = 3, complement: bool = True) -> PatientRatio:
    rng = np.random.default_rng(seed)
    return PatientRatio(rng.uniform(0, 1, (seeds, 40)), rng.uniform(1, 2, (seeds, 40)), complement)


def test_change_by_its_definition() -> None:
    before, after = _features(1), _features(2)
    pairs = [cosine(before[i], before[j]) for i in range(40) for j in range(i)]
    expected = [cosine(x, y) / np.median(pairs) for x, y in zip(before, after, strict=True)]
    np.testing.assert_allclose(change(before, after).above[0], expected, rtol=1e-9)
    np.testing.assert_allclose(change(before, 3 * before).above, 0, atol=1e-12)  # the length does not count


def test_features_without_a_direction_have_no_change() -> None:
    silent = _features(1)
    silent[3] = 0
    for before in (silent, np.ones((40, 5))):
        (value,) = change(before, before).per_seed()
        assert math.isnan(value)


@pytest.mark.parametrize("components", [None, 2])
def test_linear_map_by_its_formula(components: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one penalty: the closed form of ridge regression, fold by fold."""
    penalty = 0.3
    monkeypatch.setattr(equivariance, "_PENALTIES", [penalty])
    before = _features(1)
    after = before @ np.random.default_rng(2).normal(size=(5, 5)) + 0.5 * _features(3)
    errors = spread = 0.0
    for fitted, held in KFold(FOLDS, shuffle=True, random_state=0).split(before):
        x, y = before - before[fitted].mean(axis=0), after - before[fitted].mean(axis=0)
        scale = np.sqrt((x[fitted] ** 2).sum() / len(fitted))
        x, y = x / scale, y / scale
        if components:
            axes = PCA(components, svd_solver="full").fit(x[fitted]).components_.T
            x, y = x @ axes, y @ axes
        middle = y[fitted].mean(axis=0)
        gram = x[fitted].T @ x[fitted] + penalty * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, x[fitted].T @ (y[fitted] - middle))
        errors += ((y[held] - middle - x[held] @ weight) ** 2).sum()
        spread += ((y[held] - middle) ** 2).sum()
    (value,) = linear_map(before, after, components).per_seed()
    assert value == pytest.approx(1 - errors / spread, rel=1e-8)


def test_what_is_linear_and_what_is_not() -> None:
    before = _features(1, patients=200)
    turned = before @ np.linalg.qr(_features(2, 5))[0] + 3.0
    assert linear_map(before, turned).per_seed()[0] > 0.999
    assert linear_map(before, _features(3, patients=200)).per_seed()[0] < 0.05


@pytest.mark.parametrize("components", [None, 2])
def test_angle_by_its_formula(components: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    penalty = 0.7
    monkeypatch.setattr(equivariance, "_PENALTIES", [penalty])
    angle = np.random.default_rng(4).uniform(-15, 15, 40) + np.array([[0.0], [10.0], [30.0]])
    features = np.stack([_features(k) for k in range(3)]) + 0.05 * angle[:, :, None]
    errors = spread = 0.0
    for fitted, held in KFold(FOLDS, shuffle=True, random_state=0).split(LABEL):
        all_x, all_y = features[:, fitted].reshape(-1, 5), angle[:, fitted].ravel()
        mean = all_x.mean(axis=0)
        scale = np.sqrt(((all_x - mean) ** 2).sum() / len(all_x))
        x, other = (all_x - mean) / scale, (features[:, held].reshape(-1, 5) - mean) / scale
        if components:
            axes = PCA(components, svd_solver="full").fit(x).components_.T
            x, other = x @ axes, other @ axes
        gram = x.T @ x + penalty * np.eye(x.shape[1])
        weight = np.linalg.solve(gram, x.T @ (all_y - all_y.mean()))
        errors += ((angle[:, held].ravel() - all_y.mean() - other @ weight) ** 2).sum()
        spread += ((angle[:, held] - all_y.mean()) ** 2).sum()
    (value,) = angle_decoded(features, angle, components).per_seed()
    assert value == pytest.approx(1 - errors / spread, rel=1e-8)


def test_an_angle_that_is_there_is_found_and_an_invariant_network_has_none() -> None:
    angle = np.random.default_rng(1).uniform(-15, 15, 100) + np.array([[0.0], [10.0], [30.0]])
    invariant = np.stack([_features(5, patients=100)] * 3)
    knowing = np.concatenate([invariant, angle[:, :, None]], axis=2)
    assert angle_decoded(knowing, angle).per_seed()[0] > 0.99
    assert abs(angle_decoded(invariant, angle).per_seed()[0]) < 0.1
    assert abs(angle_decoded(np.zeros_like(invariant), angle).per_seed()[0]) < 0.05


def test_intervals_draw_patients_within_the_labels_and_seeds() -> None:
    ratio, bootstrap = _ratio(1), 50
    weight = draw_weights(strata_of(LABEL, np.arange(40)), bootstrap, np.random.default_rng(0))
    chosen = np.random.default_rng([0, 1]).integers(3, size=(bootstrap, 3))
    drawn = [
        np.mean([1 - (w * ratio.above[s]).sum() / (w * ratio.below[s]).sum() for s in seeds])
        for w, seeds in zip(weight, chosen, strict=True)
    ]
    found = mean_estimate(ratio, LABEL, bootstrap)
    of_seeds = [1 - ratio.above[s].sum() / ratio.below[s].sum() for s in range(3)]
    assert found.value == pytest.approx(np.mean(of_seeds))
    assert found.sd == pytest.approx(np.std(of_seeds, ddof=1))
    np.testing.assert_allclose([found.low, found.high], np.percentile(drawn, (2.5, 97.5)))
    assert math.isnan(mean_estimate(ratio, LABEL, 0).low)


def test_a_contrast_is_paired_by_patient() -> None:
    one = _ratio(1, seeds=1)
    better = PatientRatio(one.above - 0.1 * one.below, one.below, complement=True)
    found = contrast([(1.0, better), (-1.0, one)], LABEL, 100)
    # Better by 0.1 for every patient, so in every resample too.
    np.testing.assert_allclose([found.value, found.low, found.high], 0.1, rtol=1e-9)
    assert math.isnan(found.p)  # one seed
    several = _ratio(1)
    worse = PatientRatio(several.above + 0.1 * several.below, several.below, complement=True)
    found = contrast([(1.0, several), (-1.0, worse)], LABEL, 100)
    np.testing.assert_allclose(found.value, 0.1, rtol=1e-9)
    of_seeds = np.var(several.per_seed(), ddof=1) / 3  # of both systems, whose patients have the same differences
    np.testing.assert_allclose(found.high - found.value, stats.t.ppf(0.975, 4) * math.sqrt(2 * of_seeds), rtol=1e-6)
    assert found.p == pytest.approx(2 * stats.t.sf(0.1 / math.sqrt(2 * of_seeds), 4))
    undefined = PatientRatio(np.zeros((1, 40)), np.zeros((1, 40)), complement=True)
    assert math.isnan(contrast([(1.0, undefined), (-1.0, one)], LABEL, 100).value)


def test_the_measures_of_a_system_join_its_seeds() -> None:
    turns = (0.0, 10.0, 30.0)
    angle = {turn: turn + np.random.default_rng(1).uniform(-15, 15, 40) for turn in turns}
    seeds = [{turn: _features(10 * k + int(turn), d=9) for turn in turns} for k in (1, 2)]
    found = Equivariance.of(seeds, angle)
    assert found.features == 9 and list(found.changes) == [10.0, 30.0]
    for k, one in enumerate(seeds):
        assert found.changes[30.0].per_seed()[k] == pytest.approx(change(one[0.0], one[30.0]).per_seed()[0])
        (of_seed,) = linear_map(one[0.0], one[10.0], 8).per_seed()
        assert found.maps[8, 10.0].per_seed()[k] == pytest.approx(of_seed, abs=1e-9)
    both = [found.maps[8, turn] for turn in (10.0, 30.0)]
    expected = 1 - (both[0].above + both[1].above).sum(axis=1) / (both[0].below + both[1].below).sum(axis=1)
    np.testing.assert_allclose(found.mapped(8).per_seed(), expected)
