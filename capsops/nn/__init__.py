"""Capsule layers as torch modules."""

from ..ops.primary_capsules import LAYOUTS
from .capsules import ROUTINGS, CapsuleLayer
from .conv import ConvCapsules
from .convert import convert_weight
from .em import EMCapsules
from .loops import ConcurrentCapsules, InvertedAttentionCapsules, KMeansCapsules, SelfRoutingCapsules
from .primary import PrimaryCapsules

__all__ = [
    "LAYOUTS",
    "ROUTINGS",
    "CapsuleLayer",
    "ConcurrentCapsules",
    "ConvCapsules",
    "EMCapsules",
    "InvertedAttentionCapsules",
    "KMeansCapsules",
    "PrimaryCapsules",
    "SelfRoutingCapsules",
    "convert_weight",
]
