"""The program `capsops info`, also `python -m capsops.info`: prints `Info` of `capsops/backends/__init__.py`."""

import sys
from types import ModuleType

from .backends import BackendError, Info, info


class _Callable(ModuleType):
    """Makes this module callable: importing it replaces the function `capsops.info`, which has the same name."""

    def __call__(self) -> Info:
        return info()


sys.modules[__name__].__class__ = _Callable


def main() -> int:
    """Print the report. The exit status: 0, or 2 if CAPSOPS_BACKEND or CAPSOPS_ISA has a value that is not allowed."""
    try:
        print(info())
    except BackendError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
