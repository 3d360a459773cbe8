"""CardioCaps: an attention-based capsule network for class-imbalanced echocardiograms.

Research use only. Not a medical device.
"""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

from cardiocaps._version import __version__ as __version__

DISCLAIMER = "Research use only. Not a medical device."


def _wrong_here() -> str | None:
    """Why cardiocaps cannot run here, or None."""
    if sys.platform == "win32":
        return "Windows is not supported; use WSL (Linux inside Windows)"
    # Read, not imported: capsops imports torch, which takes seconds.
    capsops = find_spec("capsops")
    how = "install both from one checkout or from wheels of one version"
    expected = f"expected {__version__}, the version of cardiocaps: {how}"
    if capsops is None or capsops.origin is None:
        return f"capsops is not installed; {expected}"
    file = Path(capsops.origin).with_name("_version.py")
    found = runpy.run_path(str(file))["__version__"] if file.is_file() else "of an unknown version"
    return None if found == __version__ else f"capsops is {found} (in {file.parent}); {expected}"


if _wrong := _wrong_here():
    # Not an exception: the programs import this too, and should end in one line without a traceback.
    sys.exit(f"cardiocaps: {_wrong}")
