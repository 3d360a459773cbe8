"""Capsule layers as torch modules."""

from ..ops.primary_capsules import LAYOUTS
from .capsules import ROUTINGS, CapsuleLayer
from .conv import ConvCapsules
from .convert import convert_weight
from .em import EMCapsules
from .primary import PrimaryCapsules

__all__ = [
    "LAYOUTS",
    "ROUTINGS",
    "CapsuleLayer",
    "ConvCapsules",
    "EMCapsules",
    "PrimaryCapsules",
    "convert_weight",
]
