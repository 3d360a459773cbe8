"""The figures that the paper reports on EchoNet-LVH in tables I to VI. They are shown beside ours and marked.

The paper's "ROC AUC" is that of hard labels and its "PR AUC" a precision (see `cardiocaps.metrics.Report`); its F1 is
that of the abnormal class for the classical classifiers and weighted for the networks.
"""

from collections.abc import Mapping

from cardiocaps.metrics import PUBLISHED, MeanEstimate

ON = "reported on EchoNet-LVH"

Reported = Mapping[str, MeanEstimate]
"""A row of a table of the paper; its keys are those of `PUBLISHED`. A deviation that the paper does not give is NaN."""


ALWAYS_NORMAL = "always-normal"
"""The key of the row of a classifier that calls every sample normal."""

TEST_FRAMES, ABNORMAL_FRAMES = 1104, 168
"""The paper's test set, which its figures give away: 276 rows of the table with 50 frames each, 8 % of them."""


def _row(*values: float | tuple[float, float]) -> Reported:
    figures = (MeanEstimate(*value) if isinstance(value, tuple) else MeanEstimate(value) for value in values)
    return dict(zip(PUBLISHED, figures, strict=True))


_DR_MARGIN = _row(0.5707, 0.6310, 0.5441, 0.1786)
_DR = _row(0.7763, 0.8066, 0.8656, 0.4044)
_CARDIOCAPS = _row((0.8551, 0.0054), (0.8563, 0.0011), (0.7326, 0.0371), (0.5273, 0.0227))

TABLES: Mapping[str, Mapping[str, Reported]] = {
    "table1": {
        "dr-margin": _DR_MARGIN,
        "dr-weighted-margin": _row(0.4981, 0.5687, 0.3988, 0.0911),
        "dr": _DR,
    },
    "table2": {
        "dr-margin": _DR_MARGIN,
        "dr": _DR,
        "cardiocaps": _row(0.8496, 0.8573, 0.7697, 0.5046),
    },
    "table3": {
        # Its ROC AUC is the F1 score once more, and not that of the same network in table II.
        "cardiocaps": _row(0.8496, 0.8573, 0.8573, 0.5046),
        "cardiocaps-convolution": _row(0.6721, 0.7005, 0.4867, 0.1381),
        "cardiocaps-constant": _row(0.7654, 0.7516, 0.4953, 0.1417),
    },
    "table4": {
        "logistic-regression-oversampling": _row(
            (0.8292, 0.0149), (0.3982, 0.0574), (0.6417, 0.0320), (0.4286, 0.0580)
        ),
        "logistic-regression-undersampling": _row(
            (0.7758, 0.0122), (0.5192, 0.0182), (0.7836, 0.0134), (0.3857, 0.0167)
        ),
        "logistic-regression-class-weight": _row(
            (0.8292, 0.0186), (0.3873, 0.0637), (0.6344, 0.0342), (0.4273, 0.0727)
        ),
        "random-forest-oversampling": _row((0.8428, 0.0077), (0.4736, 0.0027), (0.6876, 0.0028), (0.4852, 0.0250)),
        "random-forest-undersampling": _row((0.7768, 0.0023), (0.5530, 0.0034), (0.8304, 0.0025), (0.3976, 0.0029)),
        "random-forest-class-weight": _row((0.8460, 0.0027), (0.2670, 0.0224), (0.5746, 0.0090), (0.4832, 0.0242)),
        "xgboost-oversampling": _row((0.8365, 0.0005), (0.3606, 0.0188), (0.6178, 0.0101), (0.4450, 0.0057)),
        "xgboost-undersampling": _row((0.7808, 0.0027), (0.5494, 0.0022), (0.8206, 0.0003), (0.4008, 0.0120)),
        "xgboost-class-weight": _row((0.8502, 0.0025), (0.4560, 0.0124), (0.6710, 0.0096), (0.5100, 0.0100)),
        "cardiocaps": _CARDIOCAPS,
    },
    "table5": {
        "cnn-1": _row((0.7736, 0.0091), (0.8031, 0.0077), (0.8249, 0.0127), (0.3934, 0.0119)),
        "cnn-2": _row((0.7745, 0.0018), (0.8050, 0.0016), (0.8609, 0.0047), (0.4017, 0.0027)),
        "resnet18": _row((0.8130, 0.0023), (0.8336, 0.0021), (0.8201, 0.0050), (0.4394, 0.0040)),
        "unet": _row((0.8379, 0.0100), (0.8114, 0.0334), (0.6577, 0.1577), (0.2310, 0.2310)),
        "vit": _row((0.7631, 0.0041), (0.7915, 0.0043), (0.7553, 0.0195), (0.3636, 0.0103)),
        "cardiocaps": _CARDIOCAPS,
    },
    "table6": {
        "em-capsnet": _row((0.8478, 0.0000), (0.7780, 0.0000), (0.5000, 0.0000), (0.0000, 0.0000)),
        "efficient-capsnet": _row((0.5316, 0.0054), (0.5934, 0.0496), (0.5284, 0.0143), (0.1666, 0.0050)),
        "cardiocaps": _CARDIOCAPS,
    },
}
"""Table -> system -> figures. CardioCaps has other figures in other tables."""


def _counts(tp: int, fp: int, fn: int, tn: int) -> Mapping[str, int]:
    return {"tn": tn, "fp": fp, "fn": fn, "tp": tp}


CONFUSIONS: Mapping[str, Mapping[str, int]] = {
    "dr-margin": _counts(85, 391, 83, 545),
    "dr-weighted-margin": _counts(43, 429, 125, 507),
    "dr": _counts(167, 246, 1, 690),
    "cardiocaps": _counts(110, 108, 58, 828),
    "cardiocaps-convolution": _counts(37, 231, 131, 705),
    "cardiocaps-constant": _counts(18, 109, 150, 827),
}
"""System -> the one confusion matrix of whole frames that has its figures in tables I to III (and figures 3 to 5)."""

_NORMAL_SHARE = 1 - ABNORMAL_FRAMES / TEST_FRAMES
_ALWAYS_NORMAL = _row(_NORMAL_SHARE, _NORMAL_SHARE * 2 * _NORMAL_SHARE / (1 + _NORMAL_SHARE), 0.5, 0.0)

SINGLE_RUNS = ("table1", "table2", "table3")
"""The tables whose figures are of one run each."""

BINARY_F1 = ("logistic-regression", "random-forest", "xgboost")
"""The keys of systems whose reported F1 is that of the abnormal class begin like this."""

BEST_LAMBDAS = (0.05, 0.5)
"""Where the paper's text says that the sweep of λ_reg (figure 6) has its best: sections III-B and IV-B."""


def confusion_of(table: str, system: str) -> Mapping[str, int] | None:
    """The matrix of CONFUSIONS behind a row of a table; None for tables IV to VI, which have means of two runs."""
    return CONFUSIONS.get(system) if system in TABLES.get(table, {}) and table in SINGLE_RUNS else None


def reported(table: str, system: str) -> Reported | None:
    """The paper's figures for a system in one of its tables, for example "table4"; None if it has none.

    Those of ALWAYS_NORMAL are not the paper's: they follow from its test set.
    """
    if system == ALWAYS_NORMAL:
        return _ALWAYS_NORMAL if table in TABLES else None
    return TABLES.get(table, {}).get(system)
