"""What the jobs import, imported once. Nothing here computes, for threads do not survive a fork."""
# ruff: noqa: F401

from contextlib import suppress

import lightning.pytorch
import sklearn.ensemble
import sklearn.linear_model
import torch

import cardiocaps.data.datamodule
import cardiocaps.evaluate
import cardiocaps.experiments.jobs
import cardiocaps.experiments.results
import cardiocaps.metrics
import cardiocaps.plots
import cardiocaps.runtime.peak_memory
import cardiocaps.training.module

# Those that may be missing or broken; a job that needs one says so.
with suppress(Exception):
    import imblearn.over_sampling
with suppress(Exception):
    import monai.networks.nets
with suppress(Exception):
    import xgboost
