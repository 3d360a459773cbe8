"""What tables and figures call the metrics."""

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
