"""Classical classifiers of pixels: baselines that a network must beat.

They see small grey frames of 32×32 pixels. On the 589,824 numbers of a network's input SMOTE would not work: it needs
nearest neighbours, and there all frames have nearly the same distance.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cardiocaps.errors import DataError
from cardiocaps.runtime.packages import require_package

CLASSIFIERS = ("logistic-regression", "random-forest", "xgboost")
SAMPLINGS = ("oversampling", "undersampling", "class-weight")
"""How the classes are balanced: SMOTE (Chawla et al. 2002), random undersampling, or class weights."""

C = 0.01
"""Inverse strength of the L2 penalty, not tuned. With scikit-learn's default of 1 the training data are separated
perfectly, because there are as many pixels as frames and far fewer videos."""

TREES = 300
"""Number of trees of a random forest, and the largest number for XGBoost."""

NEIGHBOURS = 5
"""Nearest neighbours of a frame of the rarer class between which SMOTE draws; fewer if the class is smaller."""

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class PixelClassifier:
    """A fitted classifier of pixels. Made by `fit`."""

    model: Any  # with scikit-learn's interface
    pixels: int

    @property
    def parameters(self) -> int | None:
        """The number of fitted parameters; None for trees."""
        coefficients = getattr(self.model[-1], "coef_", None)
        return None if coefficients is None else int(coefficients.size + self.model[-1].intercept_.size)

    def probability(self, pixels: ArrayLike) -> Floats:
        """Probability of class 1, [m], for `pixels` [m, p]. Raises ValueError for another p, and as `fit`."""
        values = _pixels(pixels, "pixels")
        if values.shape[1] != self.pixels:
            raise ValueError(f"pixels has {values.shape[1]} columns; expected {self.pixels}, as in training")
        # XGBoost's are float32.
        return np.clip(self.model.predict_proba(values)[:, 1].astype(np.float64), 0.0, 1.0)

    def as_dict(self) -> dict[str, Any]:
        """The exact parameters of a logistic regression without sampling, for JSON.

        Raises:
            ValueError: another classifier.
        """
        steps = getattr(self.model, "named_steps", {})
        if [*steps] != ["scale", "classifier"]:
            raise ValueError(
                f"classifier has steps {', '.join(steps)}; expected a logistic regression without sampling"
            )
        scale, classifier = steps["scale"], steps["classifier"]
        return {
            "mean": scale.mean_.tolist(),
            "scale": scale.scale_.tolist(),
            "coefficients": classifier.coef_[0].tolist(),
            "intercept": float(classifier.intercept_[0]),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PixelClassifier":
        """The inverse of `as_dict`: a classifier with the same predictions. Raises ValueError for other content."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import StandardScaler

        values = {name: _numbers(content, name) for name in ("mean", "scale", "coefficients", "intercept")}
        pixels = values["mean"].size
        right = {"mean": (pixels,), "scale": (pixels,), "coefficients": (pixels,), "intercept": ()}
        if not pixels or any(array.shape != right[name] for name, array in values.items()):
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in values.items())
            raise ValueError(f"content is {shapes}; expected one intercept and as many numbers of each other kind")
        scale, classifier = StandardScaler(), LogisticRegression()
        scale.mean_, scale.scale_, scale.n_features_in_ = values["mean"], values["scale"], pixels
        classifier.coef_, classifier.intercept_ = values["coefficients"][None], values["intercept"][None]
        classifier.classes_, classifier.n_features_in_ = np.array([0, 1]), pixels
        return cls(Pipeline([("scale", scale), ("classifier", classifier)]), pixels)


def fit(
    classifier: str,
    sampling: str,
    pixels: ArrayLike,
    labels: ArrayLike,
    validation_pixels: ArrayLike | None = None,
    validation_labels: ArrayLike | None = None,
    *,
    seed: int,
    threads: int | None = None,
    patience: int = 20,
) -> PixelClassifier:
    """Fit one of CLASSIFIERS, balanced by one of SAMPLINGS, to `pixels` [n, p] and `labels` [n] in {0, 1}.

    The result is deterministic for a seed. Logistic regression with class weights does not use the seed.

    Args:
        classifier: one of CLASSIFIERS.
        sampling: one of SAMPLINGS.
        pixels: real numbers in any unit; logistic regression standardises each column.
        labels: 0 or 1.
        validation_pixels: [m, p], for XGBoost only. It stops when the log loss of these frames, with balanced classes,
            has not decreased for `patience` trees.
        validation_labels: [m], for XGBoost only.
        seed: of the random numbers.
        threads: None: all of the machine.
        patience: see `validation_pixels`.

    Raises:
        ValueError: unknown names, wrong shapes or values, training labels of only one class, or XGBoost without
            validation frames.
        DataError: SMOTE with a single frame of the rarer class.
        ConfigError: a package that is not installed.
    """
    _check_choice("classifier", classifier, CLASSIFIERS)
    _check_choice("sampling", sampling, SAMPLINGS)
    train = _pixels(pixels, "pixels")
    y = _labels(labels, len(train), "labels")
    if len(np.unique(y)) != 2:
        raise ValueError(f"labels is {np.unique(y).tolist()}; expected 0 and 1, both present")

    steps, options = [], {}
    if sampling != "class-weight":
        steps.append(("sampling", _sampler(sampling, y, seed)))
    if classifier == "logistic-regression":
        from sklearn.preprocessing import StandardScaler

        steps.append(("scale", StandardScaler()))
    if classifier == "xgboost":
        if validation_pixels is None or validation_labels is None:
            raise ValueError("validation_pixels is None; expected frames: xgboost stops by them")
        validation = _pixels(validation_pixels, "validation_pixels")
        truth = _labels(validation_labels, len(validation), "validation_labels")
        if validation.shape[1] != train.shape[1]:
            raise ValueError(f"validation_pixels has {validation.shape[1]} columns; expected {train.shape[1]}")
        options = {
            "classifier__eval_set": [(validation, truth)],
            "classifier__sample_weight_eval_set": [_balanced(truth)],
            "classifier__verbose": False,
        }
    weighted = sampling == "class-weight"
    steps.append(("classifier", _classifier(classifier, y if weighted else None, seed, threads, patience)))
    if weighted:
        from sklearn.pipeline import Pipeline
    else:
        # The pipeline of imbalanced-learn samples in fitting only, not in prediction.
        Pipeline = require_package("imblearn.pipeline", "imbalanced-learn", f"sampling: {sampling!r}").Pipeline
    model = Pipeline(steps)
    model.fit(train, y, **options)
    return PixelClassifier(model, train.shape[1])


def _sampler(sampling: str, y: Integers, seed: int) -> Any:
    what = f"sampling: {sampling!r}"
    if sampling == "undersampling":
        sampler = require_package("imblearn.under_sampling", "imbalanced-learn", what).RandomUnderSampler
        return sampler(random_state=seed)
    rarer = int(np.bincount(y).min())
    if rarer < 2:
        raise DataError(
            f"{what} (SMOTE) draws between frames of the rarer class and needs two of them, there is {rarer}"
        )
    smote = require_package("imblearn.over_sampling", "imbalanced-learn", what).SMOTE
    return smote(k_neighbors=min(NEIGHBOURS, rarer - 1), random_state=seed)


def _classifier(name: str, weighted: Integers | None, seed: int, threads: int | None, patience: int) -> Any:
    """The classifier before it is fitted; `weighted`: the labels by which the classes are balanced."""
    class_weight = None if weighted is None else "balanced"
    jobs = -1 if threads is None else threads
    if name == "logistic-regression":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(C=C, class_weight=class_weight, max_iter=1000)
    if name == "random-forest":
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(TREES, class_weight=class_weight, random_state=seed, n_jobs=jobs)
    negatives, positives = (1, 1) if weighted is None else np.bincount(weighted)
    return require_package("xgboost", "xgboost", "classifier: 'xgboost'").XGBClassifier(
        n_estimators=TREES,
        learning_rate=0.1,
        max_depth=4,
        # Each tree sees a share of the frames and pixels; without this the seed would have no effect.
        subsample=0.8,
        colsample_bytree=0.8,
        scale_pos_weight=float(negatives / positives),
        eval_metric="logloss",
        early_stopping_rounds=patience,
        random_state=seed,
        n_jobs=jobs,
    )


def _balanced(y: Integers) -> Floats:
    """Weights [n] with which all classes have the same sum of weights."""
    weight: Floats = 1 / np.bincount(y, minlength=2)[y]
    return weight


def _check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _labels(values: ArrayLike, n: int, name: str) -> Integers:
    labels = np.asarray(values)
    if labels.shape != (n,):
        raise ValueError(f"{name} has shape {list(labels.shape)}; expected [{n}]")
    if not np.isin(labels, (0, 1)).all():
        raise ValueError(f"{name} is {np.unique(labels)[:5].tolist()}; expected 0 or 1")
    return labels.astype(np.int64)


def _numbers(content: Mapping[str, Any], name: str) -> Floats:
    try:
        array = np.asarray(content.get(name), np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if not np.isfinite(array).all() or (name == "scale" and not (array > 0).all()):
        positive = ", above 0" if name == "scale" else ""
        raise ValueError(f"{name} is {content.get(name)!r:.60}; expected finite numbers{positive}")
    return array


def _pixels(values: ArrayLike, name: str) -> Floats:
    array = np.asarray(values)
    if array.ndim != 2 or array.size == 0 or array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {array.dtype} {list(array.shape)}; expected a non-empty numeric [n, p] array")
    pixels = array.astype(np.float64)
    if not np.isfinite(pixels).all():
        raise ValueError(f"{name} has the value {pixels[~np.isfinite(pixels)][0]}; expected finite numbers")
    return pixels
