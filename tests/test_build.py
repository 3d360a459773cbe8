"""What setup.py decides to build, on machines with and without compilers and GPUs. Nothing is compiled."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
VARIABLES = ("CAPSOPS_EXTENSION", "CAPSOPS_CUDA", "CAPSOPS_CUDA_ARCHS", "CXX", "CUDACXX", "CUDA_HOME")
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
NVCC_13 = "80 86 89 90 100 103 120"


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("capsops_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, with no environment variable set that setup.py reads."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def _program(folder: Path, name: str, body: str = "") -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def _nvcc(folder: Path, known: str = NVCC_13) -> Path:
    return _program(folder, "nvcc", f"for x in 75 {known}; do echo compute_$x; done")


# ---- CUDA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "known", "architectures"),
    [
        ("9.0", NVCC_13, "90-real 90-virtual"),
        ("8.6\n12.0\n8.6", NVCC_13, "86-real 120-real 120-virtual"),
        ("9.0\n7.5\n[N/A]", NVCC_13, "90-real 90-virtual"),
        ("12.1", NVCC_13, "120-real 120-virtual"),  # later than nvcc, but of the same major version
        ("12.0", "80 86 90", "90-real 90-virtual"),  # the driver compiles the PTX
        ("7.5", NVCC_13, "80-virtual"),  # as without a GPU
        ("", NVCC_13, "80-virtual"),
        ("", "90 100", "90-virtual"),
    ],
)
def test_cuda_is_compiled_for_the_gpus_that_are_seen(
    build: ModuleType, programs: Path, seen: str, known: str, architectures: str
) -> None:
    nvcc = _nvcc(programs, known)
    _program(programs, "nvidia-smi", f'[ "$*" = "--query-gpu=compute_cap --format=csv,noheader" ] && echo "{seen}"')
    cuda = build.choose_cuda()
    assert (cuda.nvcc, " ".join(cuda.architectures)) == (str(nvcc), architectures)
    assert cuda.reason == ("for the GPUs that were seen" if "real" in architectures else build.NO_GPU)


@pytest.mark.parametrize("body", ["echo 9.0; exit 9", "echo 9.0; exec /bin/sleep 60", None])
def test_without_an_answer_of_nvidia_smi_any_gpu_can_run_it(
    build: ModuleType, programs: Path, monkeypatch: pytest.MonkeyPatch, body: str | None
) -> None:
    _nvcc(programs)
    if body is not None:
        _program(programs, "nvidia-smi", body)
    monkeypatch.setattr(build, "NVIDIA_SMI_SECONDS", 0.3)
    assert build.choose_cuda().architectures == ("80-virtual",)


@pytest.mark.parametrize(
    ("environment", "known", "architectures"),
    [
        ({"CAPSOPS_CUDA": "1"}, NVCC_13, "80-real 90-real 100-real 100-virtual"),
        ({"CAPSOPS_CUDA": "1"}, "80 90", "80-real 90-real 90-virtual"),
        ({"CAPSOPS_CUDA_ARCHS": "90;80;90"}, NVCC_13, "80-real 90-real 90-virtual"),
        ({"CAPSOPS_CUDA": "1", "CAPSOPS_CUDA_ARCHS": "86"}, NVCC_13, "86-real 86-virtual"),
    ],
)
def test_cuda_that_is_asked_for_does_not_depend_on_the_machine(
    build: ModuleType,
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    known: str,
    architectures: str,
) -> None:
    _nvcc(programs, known)
    _program(programs, "nvidia-smi", "echo 8.9")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cuda = build.choose_cuda()
    assert " ".join(cuda.architectures) == architectures
    assert cuda.reason in ("CAPSOPS_CUDA=1", "CAPSOPS_CUDA_ARCHS")


def test_no_cuda(build: ModuleType, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build.choose_cuda() == (None, (), "no nvcc was found by CUDACXX, PATH or CUDA_HOME")
    _nvcc(programs)
    monkeypatch.setenv("CAPSOPS_CUDA", "0")
    assert build.choose_cuda() == (None, (), "CAPSOPS_CUDA=0")


@pytest.mark.parametrize("name", ["CUDACXX", "CUDA_HOME"])
def test_nvcc_that_is_not_on_the_path(
    build: ModuleType, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    nvcc = _nvcc(home / "bin")
    monkeypatch.setenv(name, str(nvcc if name == "CUDACXX" else home))
    assert build.choose_cuda().nvcc == str(nvcc)


@pytest.mark.parametrize(
    ("environment", "nvcc", "said"),
    [
        (
            {"CAPSOPS_CUDA": "yes"},
            None,
            r"CAPSOPS_CUDA is 'yes'; expected 1 \(require CUDA\), 0 \(leave it out\) or ",
        ),
        ({"CAPSOPS_CUDA": "1"}, None, "CAPSOPS_CUDA is 1, but there is no nvcc"),
        ({"CUDACXX": "/no/nvcc"}, None, "CUDACXX is '/no/nvcc'; expected a program that can be run"),
        ({"CAPSOPS_CUDA_ARCHS": "8.0"}, "", "CAPSOPS_CUDA_ARCHS is '8.0'; expected compute capabilities as in 80;90"),
        (
            {},
            "echo kernel.cu; echo 'fatal error: cuda_runtime.h: No such file or directory' >&2; exit 1",
            r"/nvcc does not compile an empty kernel \(fatal error: cuda_runtime.h: No such file or directory\); "
            "expected a whole CUDA toolkit; CAPSOPS_CUDA=0 builds without it",
        ),
        ({}, "exit 1", r"does not compile an empty kernel \(.* returned non-zero exit status 1"),
        ({}, "echo compute_75", r"nvcc knows no compute capability from 8\.0 on; expected a newer nvcc"),
    ],
)
def test_what_cannot_be_built_is_an_error(
    build: ModuleType,
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    nvcc: str | None,
    said: str,
) -> None:
    if nvcc is not None:
        _program(programs, "nvcc", nvcc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match=said):
        build.choose_cuda()


# ---- the extension ---------------------------------------------------------------------------------------------------


def test_the_extension_is_built_where_the_tools_are(build: ModuleType, programs: Path) -> None:
    for name in ("cmake", "ninja", "g++"):
        _program(programs, name)
    pybind11 = importlib.util.find_spec("pybind11")
    assert build.missing_tools() == ([] if pybind11 else ["pybind11"])


@pytest.mark.parametrize(
    ("environment", "tools", "said"),
    [
        ({}, "cmake ninja", "this machine lacks a C++ compiler"),
        ({}, "c++ ninja", "this machine lacks CMake"),
        ({"CXX": "ccache c++"}, "cmake", "this machine lacks Ninja"),
        ({"CAPSOPS_EXTENSION": "0"}, "cmake ninja c++", "CAPSOPS_EXTENSION=0"),
    ],
)
def test_without_the_tools_the_kernels_are_left_out_with_a_warning(
    build: ModuleType,
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    tools: str,
    said: str,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # pybind11 is there
    for name in tools.split():
        _program(programs, name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert build.extensions() == []
    assert f"WARNING: capsops is installed without its compiled kernels ({said})" in capsys.readouterr().err
    if "CAPSOPS_EXTENSION" in environment:
        return
    for name in ("CAPSOPS_EXTENSION", "CAPSOPS_CUDA"):
        with monkeypatch.context() as required, pytest.raises(SystemExit, match=f"{name} is 1, but {re.escape(said)}"):
            required.setenv(name, "1")
            build.extensions()


def test_an_extension_that_was_compiled_before_is_taken(
    build: ModuleType, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs no compiler. `tests/test_wheels.py` puts one into a wheel."""
    module = tmp_path / f"_C{SUFFIX}"
    module.touch()
    monkeypatch.setenv("CAPSOPS_EXTENSION", str(module))
    assert build.ready_made() == module
    assert [x.name for x in build.extensions()] == ["capsops._C"]


@pytest.mark.parametrize("name", ["_C.cpython-38-x86_64-linux-gnu.so", f"no/_C{SUFFIX}", f"_D{SUFFIX}"])
def test_an_extension_for_another_python_is_refused(
    build: ModuleType, programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / Path(name).name).touch()
    monkeypatch.setenv("CAPSOPS_EXTENSION", str(tmp_path / name))
    with pytest.raises(SystemExit, match=rf"CAPSOPS_EXTENSION is '.*{name}'; expected a file _C{SUFFIX}, "):
        build.extensions()


def test_an_old_gcc_is_refused_by_its_version(tmp_path: Path) -> None:
    """The g++ of this machine says that it is GCC 11. CMake reads no more of csrc/ than that."""
    if missing := [x for x in ("cmake", "ninja", "g++") if shutil.which(x) is None]:
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    old = _program(tmp_path, "old-g++", f'exec {shutil.which("g++")} -U__GNUC__ -D__GNUC__=11 "$@"')
    command = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(tmp_path / "build"), "-G", "Ninja"]
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "CXX": str(old), "CXXFLAGS": ""}
    )
    assert run.returncode != 0
    said = " ".join(run.stderr.split())
    assert re.search(rf"{re.escape(str(old))} is GCC 11\.[\d.]+; expected 12 or newer \(CXX names another\)", said)


def _setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py in a copy of the project without its sources in C++."""
    tree.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for package in ("capsops", "cardiocaps"):
        (tree / package).mkdir()
        for name in ("__init__.py", "_version.py"):
            shutil.copy(ROOT / package / name, tree / package)
    command = [sys.executable, "setup.py", *arguments]
    return subprocess.run(
        command, cwd=tree, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )


def test_a_wheel_without_the_extension_is_for_every_machine(tmp_path: Path) -> None:
    run = _setup(tmp_path / "tree", "-q", "bdist_wheel", "-d", str(tmp_path), CAPSOPS_EXTENSION="0")
    assert run.returncode == 0, run.stderr
    assert "installed without its compiled kernels (CAPSOPS_EXTENSION=0)" in run.stderr
    assert [path.name[-16:] for path in tmp_path.glob("*.whl")] == ["py3-none-any.whl"]


# ---- Windows ---------------------------------------------------------------------------------------------------------

# setuptools is imported before, because it would look for Windows' parts of Python.
ON_WINDOWS = "import runpy, sys, setuptools.command.build_ext; sys.platform = 'win32'; "


@pytest.mark.parametrize(
    "program",
    [
        "import cardiocaps",
        "runpy.run_module('cardiocaps.train', run_name='__main__')",
        "runpy.run_path('setup.py', run_name='__main__')",
    ],
)
def test_windows_is_refused_in_one_line(program: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", ON_WINDOWS + program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert run.stderr.endswith(": Windows is not supported; use WSL (Linux inside Windows)\n")
    assert run.stderr.count("\n") == 1
