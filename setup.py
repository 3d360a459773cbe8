"""Builds capsops._C with CMake and Ninja. Everything else about the package is in pyproject.toml.

Environment: CAPSOPS_CUDA=1 makes it an error if CUDA cannot be compiled, 0 leaves it out; CAPSOPS_CUDA_ARCHS names the
compute capabilities (default 80;90;100); CUDACXX or CUDA_HOME says where nvcc is.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """CUDACXX, then PATH, then CUDA_HOME."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named) or sys.exit(f"CUDACXX is {named!r}, which is no program that can be run")
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


class CMakeBuild(build_ext):
    """Configures and builds csrc/ and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        switch = os.environ.get("CAPSOPS_CUDA") or "auto"
        if switch not in ("auto", "0", "1"):
            sys.exit(f"CAPSOPS_CUDA is {switch!r}; allowed: 1 (require CUDA), 0 (leave it out), auto")
        nvcc = None if switch == "0" else find_nvcc()
        if switch == "1" and nvcc is None:
            sys.exit("CAPSOPS_CUDA=1, but no nvcc was found by CUDACXX, PATH or CUDA_HOME")

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_INSTALL_PREFIX": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CAPSOPS_CUDA": switch,
            "CAPSOPS_CUDA_ARCHS": os.environ.get("CAPSOPS_CUDA_ARCHS", "80;90;100"),
            "CAPSOPS_NVCC": nvcc or "",
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja", "--fresh", *defines]
        subprocess.run(cmake, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)


setup(ext_modules=[Extension("capsops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
