"""What the jobs import, imported once. Nothing here computes, for threads do not survive a fork."""
# ruff: noqa: F401

from contextlib import suppress

import lightning.pytorch
import sklearn.ensemble
import sklearn.linear_model
import torch

import cardiocaps.experiments.jobs

# Those that may be missing or broken; a job that needs one says so.
with suppress(Exception):
    import imblearn.over_sampling
with suppress(Exception):
    import monai.networks.nets
with suppress(Exception):
    import xgboost
