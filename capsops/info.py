"""`python -m capsops.info`: what was built, what runs here, and why not the rest.

Exit status: 0, or 2 if CAPSOPS_BACKEND or CAPSOPS_ISA has a value that is not allowed.
"""

import sys
from types import ModuleType

from .backends import BackendError, Info, info


class _Callable(ModuleType):
    """Makes this module callable: importing it replaces the function `capsops.info`, which has the same name."""

    def __call__(self) -> Info:
        return info()


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    try:
        print(info())
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
