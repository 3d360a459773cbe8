"""Imports the packages of the jobs once. It must start no threads: they do not survive a fork."""
# ruff: noqa: F401

from contextlib import suppress

import lightning.pytorch
import sklearn.ensemble
import sklearn.linear_model
import torch

import cardiocaps.experiments.jobs

# These may be missing or broken; a job that needs one reports it.
with suppress(Exception):
    import imblearn.over_sampling
with suppress(Exception):
    import monai.networks.nets
with suppress(Exception):
    import xgboost
