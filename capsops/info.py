"""`python -m capsops.info`: what was built, what runs here, and why not the rest.

Exit status: 0; 2 if CAPSOPS_BACKEND or CAPSOPS_ISA names what there is not.
"""

import sys
from types import ModuleType

from .backends import BackendError, Info, info


class _Callable(ModuleType):
    """This module under its own name, `capsops.info`, which is the function's name too: both answer a call."""

    def __call__(self) -> Info:
        return info()


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    try:
        print(info())
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
