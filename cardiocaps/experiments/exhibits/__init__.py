"""The registry of exhibits: a row for each table and figure of the paper.

To add one, write a row of `EXHIBITS`; an exhibit that shows more than a table has a class of its own, in a file here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product

from cardiocaps.experiments.exhibits.calibration import Calibration
from cardiocaps.experiments.exhibits.confusions import Confusions
from cardiocaps.experiments.exhibits.curves import LearningCurve, Prevalence
from cardiocaps.experiments.exhibits.efficiency import Efficiency
from cardiocaps.experiments.exhibits.exhibit import Exhibit
from cardiocaps.experiments.exhibits.robustness import Robustness
from cardiocaps.experiments.exhibits.sweep import Sweep
from cardiocaps.experiments.plan import CLASSIFIERS, LAMBDAS, SAMPLINGS, SYSTEMS, lambda_key, prevalence_key, trained_as
from cardiocaps.experiments.robustness.claims import BALANCED, IMBALANCED, PIXELS, RARE

_TABLE_1 = ("dr-margin", "dr-weighted-margin", "dr")
_TABLE_2 = ("dr-margin", "dr", "cardiocaps")
_TABLE_3 = ("cardiocaps", "cardiocaps-convolution", "cardiocaps-constant")
_TABLE_4 = (*(f"{classifier}-{sampling}" for classifier, sampling in product(CLASSIFIERS, SAMPLINGS)), "cardiocaps")
_TABLE_5 = ("cnn-1", "cnn-2", "resnet18", "unet", "vit", "cardiocaps")
_TABLE_6 = ("em-capsnet", "efficient-capsnet", "cardiocaps")
_PIXELS = ("logistic-regression-class-weight", "random-forest-class-weight", "xgboost-class-weight")
_SPLITS = ("cardiocaps-video-protocol", "cardiocaps-frames", "cardiocaps-paper-protocol")
_SHIFTED = (
    "cardiocaps",
    "dr",
    "dr-margin",
    "dr-weighted-margin",
    "cardiocaps-convolution",
    "logistic-regression-class-weight",
    *_TABLE_5[:-1],
    *_TABLE_6[:-1],
)
_ENDS = tuple(prevalence_key(key, share) for key, share in product(IMBALANCED, (BALANCED, RARE)))

_EXHIBITS = (
    Exhibit("table1", "Table I: the loss of DR-CapsNet", _TABLE_1),
    Exhibit("table2", "Table II: dynamic routing and attention", _TABLE_2),
    Exhibit("table3", "Table III: the affine map", _TABLE_3),
    Exhibit("table4", "Table IV: machine learning on pixels", _TABLE_4),
    Exhibit("table5", "Table V: other deep networks", _TABLE_5),
    Exhibit("table6", "Table VI: other capsule networks", _TABLE_6),
    Confusions("fig3", "Figure 3: confusion matrices of table I", _TABLE_1, "table1"),
    Confusions("fig4", "Figure 4: confusion matrices of table II", _TABLE_2, "table2"),
    Confusions("fig5", "Figure 5: confusion matrices of table III", _TABLE_3, "table3"),
    Sweep("fig6", "Figure 6: the weight of the regression loss", tuple(lambda_key(value) for value in LAMBDAS)),
    LearningCurve("learning-curve", "Learning curve: the number of training videos", tuple(LearningCurve.places)),
    Prevalence("prevalence", "Prevalence: the share of abnormal training videos", tuple(Prevalence.places)),
    Exhibit("leakage", "Split by video and by frame", _SPLITS),
    Efficiency("efficiency", "Naive and fused routing", ("dr-naive", "dr", "cardiocaps-naive", "cardiocaps")),
    Calibration("calibration", "Calibration", (*_PIXELS, *_TABLE_5[:-1], *_TABLE_6[:-1], "dr", "cardiocaps")),
    Robustness(
        "robustness",
        "The paper's claims, tested",
        tuple(dict.fromkeys((*_SHIFTED, *PIXELS, *_ENDS))),
        shifted=_SHIFTED,
    ),
)
EXHIBITS: Mapping[str, Exhibit] = {exhibit.name: exhibit for exhibit in _EXHIBITS}
"""The name of an exhibit -> the exhibit."""

COMPARED = ("table6", "table2", "table1", "table5", "table4")
"""The exhibits whose rows make the main table of the index, in its order."""


def keys_of(exhibits: Iterable[Exhibit], protocol: str) -> list[str]:
    """The systems to train for these exhibits, each once, CardioCaps first."""
    keys = dict.fromkeys(trained_as(key, protocol) for exhibit in exhibits for key in exhibit.systems)
    return sorted(keys, key=list(SYSTEMS).index)
