"""Build capsops._C with CMake and Ninja. Everything else about the package is in pyproject.toml.

Environment variables:
    CAPSOPS_CUDA: 1 requires CUDA, 0 leaves it out; otherwise CUDA is compiled if nvcc is found.
    CAPSOPS_CUDA_ARCHS: compute capabilities, as in 80;90;100; by default those of these three that nvcc knows.
    CUDACXX, CUDA_HOME: where nvcc is, if it is not on the path.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_ARCHITECTURES = ("80", "90", "100")


def find_nvcc() -> str | None:
    """Find nvcc by CUDACXX, then PATH, then CUDA_HOME."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named) or sys.exit(f"CUDACXX is {named!r}; expected a program that can be run")
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def architectures(nvcc: str | None) -> str:
    """Return the compute capabilities to compile for, in CMake's form."""
    named = os.environ.get("CAPSOPS_CUDA_ARCHS")
    if named:
        if not re.fullmatch(r"\d{2,3}(;\d{2,3})*", named):
            sys.exit(f"CAPSOPS_CUDA_ARCHS is {named!r}; expected compute capabilities as in 80;90;100")
        return ";".join(sorted(named.split(";"), key=int))
    if nvcc is None:
        return ";".join(DEFAULT_ARCHITECTURES)
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    chosen = [a for a in DEFAULT_ARCHITECTURES if f"compute_{a}" in known]
    return ";".join(chosen) or sys.exit(f"{nvcc} knows none of {';'.join(DEFAULT_ARCHITECTURES)}; expected newer")


class CMakeBuild(build_ext):
    """Build csrc/ and put the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        switch = os.environ.get("CAPSOPS_CUDA") or "auto"
        if switch not in ("auto", "0", "1"):
            sys.exit(f"CAPSOPS_CUDA is {switch!r}; expected 1 (require CUDA), 0 (leave it out) or auto")
        nvcc = None if switch == "0" else find_nvcc()
        if switch == "1" and nvcc is None:
            sys.exit("CAPSOPS_CUDA is 1, but there is no nvcc; expected one by CUDACXX, PATH or CUDA_HOME")

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_INSTALL_PREFIX": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CAPSOPS_CUDA": switch,
            "CAPSOPS_CUDA_ARCHS": architectures(nvcc),
            "CAPSOPS_NVCC": nvcc or "",
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja", "--fresh", *defines]
        try:
            subprocess.run(cmake, check=True)
            subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)
        except subprocess.CalledProcessError as error:
            hint = f"; CAPSOPS_CUDA=0 builds without {nvcc}" if nvcc else ""
            sys.exit(f"the kernels were not built (the reason is above){hint}: {error}")


setup(ext_modules=[Extension("capsops._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
