"""Build capsops._C with CMake and Ninja. Everything else about the package is in pyproject.toml.

This file serves the project at the root, which installs capsops and cardiocaps, and distributions/capsops.

Environment variables:
    CAPSOPS_EXTENSION: 1 requires the extension; 0 leaves it out, and capsops runs on plain PyTorch; the path of a
        capsops/_C.*.so takes this one, which was compiled before for the same Python; otherwise it is built if the
        machine has a C++ compiler, CMake, Ninja and pybind11.
    CAPSOPS_CUDA: 1 requires the CUDA kernels, for compute capabilities 8.0, 9.0 and 10.0; 0 leaves them out; otherwise
        they are compiled if nvcc is found: for the GPUs of this machine, or for any GPU where none is seen.
    CAPSOPS_CUDA_ARCHS: compute capabilities to compile for in place of these, as in 80;90;100.
    CXX: the C++ compiler.
    CUDACXX, CUDA_HOME: where nvcc is, if it is not on the path.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST = 80
"""The lowest compute capability that the CUDA kernels run on."""
USUAL = (80, 90, 100)
"""What CAPSOPS_CUDA=1 compiles for."""
NO_GPU = "no GPU that they run on was seen"
NVIDIA_SMI_SECONDS = 5.0
"""How long nvidia-smi may take; a broken driver can let it wait forever."""


class Cuda(NamedTuple):
    """Which CUDA kernels are compiled.

    Attributes:
        nvcc: the compiler, or None for no CUDA kernels.
        architectures: in CMake's form: "90-real" is machine code for compute capability 9.0, and "90-virtual" is PTX,
            which the driver of that or a later GPU compiles when the kernels are first used.
        reason: why these.
    """

    nvcc: str | None
    architectures: tuple[str, ...]
    reason: str


def switch(name: str, thing: str) -> str:
    """Read an environment variable that is 1, 0 or auto."""
    value = os.environ.get(name) or "auto"
    if value not in ("auto", "0", "1"):
        sys.exit(f"{name} is {value!r}; expected 1 (require {thing}), 0 (leave it out) or auto")
    return value


def find_nvcc() -> str | None:
    """Find nvcc by CUDACXX, then PATH, then CUDA_HOME."""
    named = os.environ.get("CUDACXX")
    if named:
        return shutil.which(named) or sys.exit(f"CUDACXX is {named!r}; expected a program that can be run")
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


def gpus() -> list[int]:
    """Return the compute capabilities of the GPUs that nvidia-smi sees, as in [80, 90]."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return []
    # A GPU that does not tell has "[N/A]".
    return sorted({int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)\s*$", run.stdout, re.MULTILINE)})


def choose_cuda() -> Cuda:
    """Choose the CUDA kernels to compile, by the environment variables, nvcc and the GPUs of this machine."""
    wanted = switch("CAPSOPS_CUDA", "CUDA")
    if wanted == "0":
        return Cuda(None, (), "CAPSOPS_CUDA=0")
    nvcc = find_nvcc()
    if nvcc is None:
        if wanted == "1":
            sys.exit("CAPSOPS_CUDA is 1, but there is no nvcc; expected one by CUDACXX, PATH or CUDA_HOME")
        return Cuda(None, (), "no nvcc was found by CUDACXX, PATH or CUDA_HOME")
    require_toolkit(nvcc)
    named = os.environ.get("CAPSOPS_CUDA_ARCHS")
    if named:
        if not re.fullmatch(r"\d{2,3}(;\d{2,3})*", named):
            sys.exit(f"CAPSOPS_CUDA_ARCHS is {named!r}; expected compute capabilities as in 80;90;100")
        return Cuda(nvcc, with_ptx(map(int, named.split(";"))), "CAPSOPS_CUDA_ARCHS")
    known = known_capabilities(nvcc)
    if wanted == "1":
        return Cuda(nvcc, with_ptx(x for x in USUAL if x in known), "CAPSOPS_CUDA=1")
    seen = [x for x in gpus() if x >= OLDEST]
    if not seen:
        return Cuda(nvcc, (f"{known[0]}-virtual",), NO_GPU)
    # A GPU that is later than nvcc gets the latest that nvcc knows: by machine code if it has the same major version,
    # or else by PTX.
    latest = (max(x for x in known if x <= gpu) for gpu in seen)
    return Cuda(nvcc, with_ptx(latest), "for the GPUs that were seen")


def require_toolkit(nvcc: str) -> None:
    """End the build in one line if nvcc stands without its headers, libraries or other programs."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.cu")
        source.write_text("__global__ void kernel() {}\n")
        command = [nvcc, "-shared", "-Xcompiler", "-fPIC", "-o", str(source.with_suffix(".so")), str(source)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            lines = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
            reason = next((line for line in lines if "error" in line), lines[-1]).strip()
            sys.exit(
                f"{nvcc} does not compile an empty kernel ({reason}); expected a whole CUDA toolkit; CAPSOPS_CUDA=0 "
                "builds without it"
            )


def with_ptx(capabilities: Iterable[int]) -> tuple[str, ...]:
    """Return machine code for each compute capability, and PTX of the latest for later GPUs, in CMake's form."""
    chosen = sorted(set(capabilities))
    return (*(f"{x}-real" for x in chosen), f"{chosen[-1]}-virtual")


def known_capabilities(nvcc: str) -> list[int]:
    """Return the compute capabilities that both nvcc and the kernels know, in order."""
    run = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    known = sorted(x for x in map(int, re.findall(r"compute_(\d+)", run.stdout)) if x >= OLDEST)
    return known or sys.exit(f"{nvcc} knows no compute capability from {OLDEST / 10} on; expected a newer nvcc")


def missing_tools() -> list[str]:
    """Return what this machine lacks to compile the extension."""
    programs = {"CMake": ["cmake"], "Ninja": ["ninja", "ninja-build"]}
    if not os.environ.get("CXX"):  # CMake tells what is wrong with a compiler that was named
        programs = {"a C++ compiler": ["c++", "g++", "clang++"], **programs}
    missing = [name for name, commands in programs.items() if not any(map(shutil.which, commands))]
    return missing + ["pybind11"] * (importlib.util.find_spec("pybind11") is None)


def ready_made() -> Path | None:
    """Return the extension that CAPSOPS_EXTENSION names, or None if it names none."""
    value = os.environ.get("CAPSOPS_EXTENSION", "")
    if not value.endswith(".so"):
        return None
    expected = f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    path = Path(value).resolve()
    if path.name != expected or not path.is_file():
        sys.exit(f"CAPSOPS_EXTENSION is {value!r}; expected a file {expected}, which this Python can import")
    return path


def extensions() -> list[Extension]:
    """Return the extension, or nothing and a warning where it is not wanted or cannot be compiled."""
    if ready_made():
        return [Extension("capsops._C", sources=[])]
    wanted = switch("CAPSOPS_EXTENSION", "the extension")
    missing = missing_tools()
    if wanted == "0":
        reason = "CAPSOPS_EXTENSION=0"
    elif not missing:
        return [Extension("capsops._C", sources=[])]
    elif wanted == "1" or os.environ.get("CAPSOPS_CUDA") == "1":
        name = "CAPSOPS_EXTENSION" if wanted == "1" else "CAPSOPS_CUDA"
        sys.exit(f"{name} is 1, but this machine lacks {', '.join(missing)}")
    else:
        reason = f"this machine lacks {', '.join(missing)}"
    print(
        f"WARNING: capsops is installed without its compiled kernels ({reason}). It runs on plain PyTorch: slowly, and "
        "in much more memory.",
        file=sys.stderr,
    )
    return []


class CMakeBuild(build_ext):
    """Build csrc/ and put the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.get_ext_fullpath(ext.name)).resolve()
        if ready := ready_made():
            if ready != module:
                module.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ready, module)
            return
        import pybind11

        cuda = choose_cuda()
        target = module.parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_INSTALL_PREFIX": target,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CAPSOPS_NVCC": cuda.nvcc or "",
            "CAPSOPS_CUDA_ARCHS": ";".join(cuda.architectures),
            "CAPSOPS_CUDA_REASON": cuda.reason,
        }
        defines = [f"-D{name}={value}" for name, value in options.items()]
        cmake = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja", "--fresh", *defines]
        try:
            subprocess.run(cmake, check=True)
            subprocess.run(["cmake", "--build", str(build), "--target", "install"], check=True)
        except subprocess.CalledProcessError as error:
            cpu_alone = f"CAPSOPS_CUDA=0 builds without {cuda.nvcc}, " if cuda.nvcc else ""
            hint = f"{cpu_alone}CAPSOPS_EXTENSION=0 installs capsops without kernels"
            sys.exit(f"the kernels were not built (the reason is above); {hint}: {error}")


if __name__ == "__main__":
    if sys.platform == "win32":
        sys.exit("capsops: Windows is not supported; use WSL (Linux inside Windows)")
    setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild})
