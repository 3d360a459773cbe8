import json
import sys
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cardiocaps.errors import ConfigError, DataError
from cardiocaps.metrics import evaluate
from cardiocaps.models import pixel_classifiers
from cardiocaps.models.pixel_classifiers import CLASSIFIERS, SAMPLINGS, PixelClassifier, fit

Frames = tuple[NDArray[np.float64], NDArray[np.int64]]


def _frames(n: int, seed: int, p: int = 1024) -> Frames:
    """A fifth abnormal, with a brighter patch; a quarter of the pixels always black, as outside a sector."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 5 == 0).astype(np.int64)
    x = rng.random((n, p))
    x[:, : p // 20] += 0.3 * y[:, None]
    x[:, -p // 4 :] = 0
    return x, y


def _logistic(pixels: Any, labels: Any) -> PixelClassifier:
    return fit("logistic-regression", "class-weight", pixels, labels, seed=0)


@pytest.fixture(scope="module")
def frames() -> tuple[Frames, Frames, Frames]:
    return _frames(300, 0, 128), _frames(100, 2, 128), _frames(200, 1, 128)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_each_finds_a_brighter_patch_balances_the_classes_and_repeats_itself(
    classifier: str, sampling: str, frames: tuple[Frames, Frames, Frames]
) -> None:
    (x, y), validation, (test, truth) = frames
    # xgboost stands still where the rest of the machine is busy, unless it is told how many threads it has.
    fitted = [fit(classifier, sampling, x, y, *validation, seed=seed, threads=1) for seed in (0, 0, 1)]
    first, again, other = (f.probability(test) for f in fitted)
    assert first.shape == (200,) and first.dtype == np.float64 and ((first >= 0) & (first <= 1)).all()
    assert (first == again).all()
    if (classifier, sampling) != ("logistic-regression", "class-weight"):
        assert (first != other).any()
    report = evaluate(first, truth, bootstrap=0)
    assert report.metrics["auroc"].value > 0.85
    # A forest's leaves are pure, and most of these pixels noise: its votes stay near the rarer class's share.
    if classifier != "random-forest":
        assert report.metrics["sensitivity"].value > 0.3


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_the_published_classifiers_are_the_libraries_defaults(classifier: str) -> None:
    from sklearn.ensemble import RandomForestClassifier
    from xgboost import XGBClassifier

    (x, y), (test, _) = _frames(200, 0, 64), _frames(50, 1, 64)
    found = fit(classifier, "class-weight", x, y, seed=3, threads=1, published=True)
    expected = {
        "logistic-regression": LogisticRegression(class_weight="balanced"),
        "random-forest": RandomForestClassifier(class_weight="balanced", random_state=3),
        "xgboost": XGBClassifier(scale_pos_weight=4.0, random_state=3, n_jobs=1),
    }[classifier].fit(x, y)
    np.testing.assert_allclose(found.probability(test), expected.predict_proba(test)[:, 1], rtol=1e-6)
    assert found.pixels == 64


def test_logistic_regression_with_class_weights_is_scikit_learns() -> None:
    (x, y), (test, _) = _frames(200, 0, 64), _frames(50, 1, 64)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=1000))
    assert (_logistic(x, y).probability(test) == model.fit(x, y).predict_proba(test)[:, 1]).all()


def test_a_logistic_regression_comes_back_from_its_numbers() -> None:
    (x, y), (test, _) = _frames(200, 0, 64), _frames(50, 1, 64)
    fitted = _logistic(x, y)
    again = PixelClassifier.from_dict(json.loads(json.dumps(fitted.as_dict())))
    assert (again.probability(test) == fitted.probability(test)).all()
    assert again.parameters == fitted.parameters == 65


@pytest.mark.parametrize(
    "changed", [{"mean": None}, {"mean": ["x"]}, {"coefficients": [1.0]}, {"intercept": [1.0]}, {"mean": []}]
)
def test_numbers_that_are_no_logistic_regression(changed: dict[str, Any]) -> None:
    good = {"mean": [0.0, 0.0], "scale": [1.0, 1.0], "coefficients": [1.0, -1.0], "intercept": 0.0}
    assert PixelClassifier.from_dict(good).probability([[3.0, 3.0]])[0] == 0.5
    with pytest.raises((TypeError, ValueError)):
        PixelClassifier.from_dict({**good, **changed})


def test_without_a_signal_it_finds_none() -> None:
    (x, _), (test, truth) = _frames(300, 0), _frames(2000, 1)
    labels = np.random.default_rng(2).permutation(_frames(300, 0)[1])
    report = evaluate(_logistic(x, labels).probability(test), truth, bootstrap=0)
    assert 0.3 < report.metrics["auroc"].value < 0.7


def test_the_unit_of_the_pixels_does_not_matter() -> None:
    (x, y), (test, _) = _frames(200, 0, 64), _frames(50, 1, 64)
    x, test = np.round(200 * x).clip(max=255), np.round(200 * test).clip(max=255)
    as_bytes = _logistic(x.astype(np.uint8), y).probability(test.astype(np.uint8))
    assert as_bytes == pytest.approx(_logistic(x / 255, y.astype(float)).probability(test / 255), abs=1e-6)


def test_classes_are_balanced() -> None:
    rng = np.random.default_rng(0)
    y = (np.arange(400) < 20).astype(int)
    x = rng.normal(size=(400, 1)) + y[:, None]
    for sampling in SAMPLINGS:
        middle = fit("logistic-regression", sampling, x, y, seed=0).probability(np.array([[0.5]]))[0]
        assert middle == pytest.approx(0.5, abs=0.12), sampling


def test_smote_draws_between_frames_of_the_rarer_class(monkeypatch: pytest.MonkeyPatch) -> None:
    from imblearn.over_sampling import SMOTE

    drawn = {}
    resample = SMOTE.fit_resample

    def watched(self: SMOTE, x: Any, y: Any, **options: Any) -> Any:
        drawn["x"], drawn["y"] = resample(self, x, y, **options)
        drawn["neighbours"] = self.k_neighbors
        return drawn["x"], drawn["y"]

    monkeypatch.setattr(SMOTE, "fit_resample", watched)
    x, y = np.arange(10.0)[:, None], np.array([0] * 7 + [1] * 3)
    fit("logistic-regression", "oversampling", x, y, seed=0)
    assert np.bincount(drawn["y"]).tolist() == [7, 7]
    assert drawn["neighbours"] == 2  # there are no more than two others
    new = drawn["x"][10:, 0]
    assert ((new >= 7) & (new <= 9)).all()


def test_smote_needs_two_frames_of_the_rarer_class() -> None:
    with pytest.raises(DataError, match=r"sampling: 'oversampling' \(SMOTE\) .* needs two of them, there is 1"):
        fit("logistic-regression", "oversampling", np.eye(4), [0, 0, 0, 1], seed=0)


def test_xgboost_stops_when_the_validation_loss_no_longer_falls(frames: tuple[Frames, Frames, Frames]) -> None:
    (x, y), (seen, truth), _ = frames
    noise = np.random.default_rng(3).permutation(truth)
    stopped = fit("xgboost", "class-weight", x, y, seen, noise, seed=0, threads=1, patience=3)
    booster = stopped.model.named_steps["classifier"]
    losses = booster.evals_result()["validation_0"]["logloss"]
    assert len(losses) < pixel_classifiers.TREES
    assert booster.best_iteration == int(np.argmin(losses)) == len(losses) - 1 - 3


@pytest.mark.parametrize(
    ("classifier", "sampling", "module", "package"),
    [
        ("xgboost", "class-weight", "xgboost", "xgboost"),
        ("random-forest", "undersampling", "imblearn.under_sampling", "imbalanced-learn"),
    ],
)
def test_a_missing_package_is_named(
    classifier: str, sampling: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}.*pip install 'cardiocaps\[experiments\]'"):
        fit(classifier, sampling, np.eye(4), [0, 1, 0, 1], np.eye(4), [0, 1, 0, 1], seed=0)


def test_the_size_it_is_made_for_takes_less_than_ten_seconds() -> None:
    (x, y), (test, _) = _frames(1400, 0), _frames(300, 1)
    start = time.process_time()
    _logistic(x, y).probability(test)
    assert time.process_time() - start < 10


def test_another_number_of_pixels_is_refused() -> None:
    with pytest.raises(ValueError, match="3 features"):
        _logistic(np.eye(4), [0, 1, 0, 1]).probability(np.eye(4)[:, :3])
