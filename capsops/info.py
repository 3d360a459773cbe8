"""`python -m capsops.info`: what was built, what runs here, and why not the rest."""

import sys
from types import ModuleType

from .backends import Info, info


class _Callable(ModuleType):
    """This module under its own name, `capsops.info`, which is the function's name too: both answer a call."""

    def __call__(self) -> Info:
        return info()


sys.modules[__name__].__class__ = _Callable

if __name__ == "__main__":
    print(info())
