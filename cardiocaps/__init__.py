"""CardioCaps: an attention-based capsule network for class-imbalanced echocardiograms.

Research use only. Not a medical device.
"""

__version__ = "0.1.0"

DISCLAIMER = "Research use only. Not a medical device."
