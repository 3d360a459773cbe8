import time

import numpy as np
import pytest
from numpy.typing import NDArray

from cardiocaps.metrics import evaluate
from cardiocaps.models.pixel_logistic import fit_and_score


def _frames(n: int, seed: int, p: int = 1024) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """A fifth abnormal, with a brighter patch; a quarter of the pixels always black, as outside a sector."""
    rng = np.random.default_rng(seed)
    y = (np.arange(n) % 5 == 0).astype(np.int64)
    x = rng.random((n, p))
    x[:, : p // 20] += 0.3 * y[:, None]
    x[:, -p // 4 :] = 0
    return x, y


def test_it_finds_a_brighter_patch_and_is_deterministic() -> None:
    (x, y), (test, truth) = _frames(300, 0), _frames(200, 1)
    probability = fit_and_score(x, y, test)
    assert probability.shape == (200,) and ((probability >= 0) & (probability <= 1)).all()
    report = evaluate(probability, truth, bootstrap=0)
    assert report.metrics["auroc"].value > 0.9
    assert (probability == fit_and_score(x, y, test)).all()


def test_without_a_signal_it_finds_none() -> None:
    (x, _), (test, truth) = _frames(300, 0), _frames(2000, 1)
    rng = np.random.default_rng(2)
    report = evaluate(fit_and_score(x, rng.permutation(_frames(300, 0)[1]), test), truth, bootstrap=0)
    assert 0.3 < report.metrics["auroc"].value < 0.7


def test_the_unit_of_the_pixels_does_not_matter() -> None:
    (x, y), (test, _) = _frames(200, 0, 64), _frames(50, 1, 64)
    x, test = np.round(200 * x).clip(max=255), np.round(200 * test).clip(max=255)
    as_bytes = fit_and_score(x.astype(np.uint8), y, test.astype(np.uint8))
    assert as_bytes == pytest.approx(fit_and_score(x / 255, y.astype(float), test / 255), abs=1e-6)


def test_classes_are_balanced() -> None:
    rng = np.random.default_rng(0)
    y = (np.arange(400) < 20).astype(int)
    x = rng.normal(size=(400, 1)) + y[:, None]
    assert fit_and_score(x, y, np.array([[0.5]]))[0] == pytest.approx(0.5, abs=0.1)


def test_the_size_it_is_made_for_takes_less_than_ten_seconds() -> None:
    (x, y), (test, _) = _frames(1400, 0), _frames(300, 1)
    start = time.perf_counter()
    fit_and_score(x, y, test)
    assert time.perf_counter() - start < 10


GOOD = np.eye(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones(4), [0, 1, 0, 1], GOOD), r"train_pixels: .*\[4\]"),
        ((GOOD, [0, 1, 0, 1], GOOD[:0]), r"test_pixels: must be a non-empty"),
        (
            (GOOD, [0, 1, 0, 1], GOOD[:, :3]),
            r"test_pixels: must have as many pixels as train_pixels, 4; has 3",
        ),
        ((GOOD * np.nan, [0, 1, 0, 1], GOOD), r"train_pixels: must be finite"),
        ((GOOD, [0, 1, 0], GOOD), r"train_labels: must have shape \[4\], has \[3\]"),
        ((GOOD, [0, 0, 0, 0], GOOD), r"train_labels: must be 0 and 1, both present, are \[0\]"),
        ((GOOD, [0, 1, 2, 1], GOOD), r"train_labels: .*are \[0, 1, 2\]"),
    ],
)
def test_bad_input_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_and_score(*arguments)  # type: ignore[arg-type]
