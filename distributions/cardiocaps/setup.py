"""Take the dependencies and extras of the whole project, and capsops of the same version."""

import runpy
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = runpy.run_path(str(HERE / "cardiocaps/_version.py"))["__version__"]
BOTH = tomllib.loads((HERE / "both.toml").read_text())["project"]  # the pyproject.toml at the root

setup(
    version=VERSION,
    install_requires=[f"capsops=={VERSION}", *BOTH["dependencies"]],
    extras_require=BOTH["optional-dependencies"],
)
