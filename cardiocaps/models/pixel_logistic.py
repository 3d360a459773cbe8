"""Logistic regression on pixels: the floor that a network must clear before its accuracy means anything."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

C = 0.01
"""Inverse strength of the L2 penalty, fixed beforehand: with about as many pixels as frames, and far fewer
videos than either, the data separate perfectly at scikit-learn's default of 1."""


def fit_and_score(train_pixels: ArrayLike, train_labels: ArrayLike, test_pixels: ArrayLike) -> NDArray[np.float64]:
    """Probability of class 1 [m] for `test_pixels` [m, p], after fitting `train_pixels` [n, p] with
    `train_labels` [n] in {0, 1}.

    Pixels are real numbers in any unit: each is standardised with the training mean and deviation. Classes
    are weighted to balance. Deterministic. Raises ValueError for shapes that do not fit, values that are not
    finite, other labels, and training labels of one class only.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = _pixels(train_pixels, "train_pixels"), _pixels(test_pixels, "test_pixels")
    labels = np.asarray(train_labels)
    if labels.shape != (len(train),):
        raise ValueError(f"train_labels: must have shape [{len(train)}], has {list(labels.shape)}")
    if not np.isin(labels, (0, 1)).all() or len(np.unique(labels)) != 2:
        raise ValueError(f"train_labels: must be 0 and 1, both present, are {np.unique(labels)[:5].tolist()}")
    if test.shape[1] != train.shape[1]:
        raise ValueError(
            f"test_pixels: must have as many pixels as train_pixels, {train.shape[1]}; has {test.shape[1]}"
        )
    model: Any = make_pipeline(StandardScaler(), LogisticRegression(C=C, class_weight="balanced", max_iter=1000))
    model.fit(train, labels.astype(np.int64))
    probability: NDArray[np.float64] = model.predict_proba(test)[:, 1]
    return probability


def _pixels(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: must be a non-empty numeric [n, p] array, is {array.dtype} {list(array.shape)}")
    pixels = array.astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError(f"{name}: must be finite, one value is {pixels[~np.isfinite(pixels)][0]}")
    return pixels
