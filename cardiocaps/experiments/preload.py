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
import cardiocaps.learning
import cardiocaps.metrics
import cardiocaps.peak_memory
import cardiocaps.plots

with suppress(ImportError):  # a job that needs one of them says so
    import imblearn.over_sampling
    import monai.networks.nets
    import xgboost
