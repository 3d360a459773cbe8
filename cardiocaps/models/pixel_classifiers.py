"""Classical classifiers of pixels: baselines that a network must beat.

They see small grey frames of 32×32 pixels. On the 589,824 numbers of a network's input SMOTE would not work: it needs
nearest neighbours, and there all frames have nearly the same distance.
"""

from collections.abc import Mapping
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

    model: Any  # a pipeline of scikit-learn or imbalanced-learn

    @property
    def pixels(self) -> int:
        return int(self.model[0].n_features_in_)

    @property
    def parameters(self) -> int | None:
        """The number of fitted parameters; None for trees."""
        coefficients = getattr(self.model[-1], "coef_", None)
        return None if coefficients is None else int(coefficients.size + self.model[-1].intercept_.size)

    def probability(self, pixels: ArrayLike) -> Floats:
        """Probability of class 1, [m], for `pixels` [m, p]."""
        # XGBoost's are float32.
        return np.clip(self.model.predict_proba(_doubles(pixels))[:, 1].astype(np.float64), 0.0, 1.0)

    def as_dict(self) -> dict[str, Any]:
        """The exact parameters of a logistic regression without sampling, for JSON."""
        scale, classifier = self.model
        return {
            "mean": scale.mean_.tolist(),
            "scale": scale.scale_.tolist(),
            "coefficients": classifier.coef_[0].tolist(),
            "intercept": float(classifier.intercept_[0]),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "PixelClassifier":
        """The inverse of `as_dict`: a classifier with the same predictions.

        Raises:
            KeyError, TypeError, ValueError: other content.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import Pipeline
        from sklearn.preprocessing import StandardScaler

        scale, classifier = StandardScaler(), LogisticRegression()
        scale.mean_, scale.scale_, coefficients = _doubles([content[n] for n in ("mean", "scale", "coefficients")])
        classifier.coef_, classifier.intercept_ = coefficients[None], np.array([float(content["intercept"])])
        classifier.classes_ = np.array([0, 1])
        scale.n_features_in_ = classifier.n_features_in_ = len(coefficients)
        return cls(Pipeline([("scale", scale), ("classifier", classifier)]))


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
    published: bool = False,
) -> PixelClassifier:
    """Fit one of CLASSIFIERS, balanced by one of SAMPLINGS, to `pixels` [n, p] and `labels` [n] in {0, 1}.

    The result is deterministic for a seed. Logistic regression with class weights does not use the seed.

    Args:
        classifier: one of CLASSIFIERS.
        sampling: one of SAMPLINGS.
        pixels: real numbers in any unit; logistic regression standardises each column.
        labels: 0 or 1, both present.
        validation_pixels: [m, p], for XGBoost only. It stops when the log loss of these frames, with balanced classes,
            has not decreased for `patience` trees.
        validation_labels: [m], for XGBoost only.
        seed: of the random numbers.
        threads: None: all of the machine.
        patience: see `validation_pixels`.
        published: as in the code published with CardioCaps: pixels as they are, C = 1, 100 trees in a forest, XGBoost's
            defaults without early stopping.

    Raises:
        ValueError: as scikit-learn, for wrong shapes or values.
        DataError: SMOTE with a single frame of the rarer class.
        ConfigError: a package that is not installed.
    """
    train, y = _doubles(pixels), np.asarray(labels).astype(np.int64)
    steps, options = [], {}
    weighted = sampling == "class-weight"
    if not weighted:
        steps.append(("sampling", _sampler(sampling, y, seed)))
    if classifier == "logistic-regression" and not published:
        from sklearn.preprocessing import StandardScaler

        steps.append(("scale", StandardScaler()))
    if classifier == "xgboost" and not published:
        assert validation_pixels is not None, "XGBoost stops by the validation frames"
        truth = np.asarray(validation_labels).astype(np.int64)
        options = {
            "classifier__eval_set": [(_doubles(validation_pixels), truth)],
            # With these weights all classes have the same sum of weights.
            "classifier__sample_weight_eval_set": [1 / np.bincount(truth, minlength=2)[truth]],
            "classifier__verbose": False,
        }
    balanced = y if weighted else None
    if published:
        steps.append(("classifier", _published_classifier(classifier, balanced, seed, threads)))
    else:
        steps.append(("classifier", _classifier(classifier, balanced, seed, threads, patience)))
    if weighted:
        from sklearn.pipeline import Pipeline
    else:
        # The pipeline of imbalanced-learn samples in fitting only, not in prediction.
        Pipeline = require_package("imblearn.pipeline", "imbalanced-learn", f"sampling: {sampling!r}").Pipeline
    model = Pipeline(steps)
    model.fit(train, y, **options)
    return PixelClassifier(model)


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


def _published_classifier(name: str, weighted: Integers | None, seed: int, threads: int | None) -> Any:
    """As `_classifier`, with the published code's settings: the defaults of the libraries."""
    class_weight = None if weighted is None else "balanced"
    jobs = -1 if threads is None else threads
    if name == "logistic-regression":
        from sklearn.linear_model import LogisticRegression

        return LogisticRegression(class_weight=class_weight, random_state=seed)
    if name == "random-forest":
        from sklearn.ensemble import RandomForestClassifier

        return RandomForestClassifier(class_weight=class_weight, random_state=seed, n_jobs=jobs)
    negatives, positives = (1, 1) if weighted is None else np.bincount(weighted)
    return require_package("xgboost", "xgboost", "classifier: 'xgboost'").XGBClassifier(
        scale_pos_weight=float(negatives / positives), random_state=seed, n_jobs=jobs
    )


def _doubles(values: ArrayLike) -> Floats:
    return np.asarray(values).astype(np.float64)
