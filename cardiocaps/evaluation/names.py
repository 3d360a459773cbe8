"""What tables call metrics, networks and units."""

from __future__ import annotations

from cardiocaps.config import TrainConfig
from cardiocaps.evaluation.pixel_baseline import PIXEL_SIDE

METRIC_NAMES = {
    "auroc": "AUROC",
    "average_precision": "average precision",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "f1": "F1 (abnormal)",
    "f1_weighted": "F1 (weighted)",
    "accuracy": "accuracy",
    "brier": "Brier score",
}
PAPER_NAMES = {
    "accuracy": "accuracy",
    "f1": "F1",
    "roc_auc": "ROC AUC (hard labels)",
    "pr_auc": "PR AUC (precision)",
}
ROUTING_NAMES = {"attention": "CardioCaps", "dynamic": "DR-CapsNet", "uniform": "uniform routing"}
MODEL_NAMES = {
    "em-capsnet": "EM-CapsNet",
    "efficient-capsnet": "Efficient-CapsNet",
    "cnn-1": "CNN-(1)",
    "cnn-2": "CNN-(2)",
    "resnet18": "ResNet18",
    "unet": "U-Net",
    "vit": "ViT",
}
TARGET_UNITS = {"width": "cm", "ef": "percentage points"}
"""Of the errors of a regression: two ejection fractions, in percent, differ by percentage points."""
PIXELS_NAME = f"logistic regression, {PIXEL_SIDE}×{PIXEL_SIDE} pixels"


def network_name(config: TrainConfig) -> str:
    """What tables call the network of a run."""
    if config.model != "cardiocaps":
        return MODEL_NAMES[config.model]
    name = ROUTING_NAMES[config.routing]
    return name if config.affine == "matrices" else f"{name}, {config.affine} affine map"


def unit_of(config: TrainConfig) -> str:
    """What a sample of a run's results is: a video, but a frame where these were split."""
    return "frame" if config.splits_frames else "video"
