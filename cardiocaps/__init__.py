"""CardioCaps: an attention-based capsule network for class-imbalanced echocardiograms.

Research use only. Not a medical device.
"""

import sys

if sys.platform == "win32":
    # Not an exception: the programs import this too, and should end in one line without a traceback.
    sys.exit("cardiocaps: Windows is not supported; use WSL (Linux inside Windows)")

__version__ = "0.1.0"

DISCLAIMER = "Research use only. Not a medical device."
