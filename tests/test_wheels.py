"""The distributions capsops and cardiocaps: built from one tree and installed side by side.

Nothing is compiled: the wheel takes the extension that this environment has (CAPSOPS_EXTENSION names it).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.metadata import Distribution, PathDistribution
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

import capsops
import cardiocaps
from capsops.backends import extension

ROOT = Path(__file__).parent.parent
NAMES = ("capsops", "cardiocaps")


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a program that sees neither this checkout nor the installed packages of this environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "CAPSOPS"))}
    done = subprocess.run(
        [str(x) for x in command], cwd=cwd, capture_output=True, text=True, check=False, env={**env, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The wheels, each built from its source distribution."""
    if extension._C is None:
        pytest.skip("there is no extension to put into a wheel")
    out = tmp_path_factory.mktemp("wheels")
    for name in NAMES:
        setup = (sys.executable, "setup.py", "-q")
        _run(*setup, "egg_info", "-e", out, "sdist", "-d", out, cwd=ROOT / "distributions" / name)
        shutil.unpack_archive(out / f"{name}-{capsops.__version__}.tar.gz", out)
        source = out / f"{name}-{capsops.__version__}"
        _run(*setup, "bdist_wheel", "-d", out, cwd=source, CAPSOPS_EXTENSION=str(extension._C.__file__))
    return {path.name.partition("-")[0]: path for path in out.glob("*.whl")}


@pytest.mark.parametrize("tags", ["cp27-cp27m-linux_x86_64", "cp311-cp311-win_amd64", "cp311-cp311-macosx_99_0_arm64"])
def test_a_wheel_for_another_machine_is_refused(wheels: dict[str, Path], tags: str, tmp_path: Path) -> None:
    wheel = shutil.copy(wheels["capsops"], tmp_path / f"capsops-{capsops.__version__}-{tags}.whl")
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", tmp_path / "out", wheel]
    done = subprocess.run(pip, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{wheel.name} is not a supported wheel on this platform" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def python(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a virtual environment with both wheels, and with the dependencies that this environment has."""
    environment = tmp_path_factory.mktemp("environment")
    _run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment)
    python = environment / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    _run(*pip, "install", "-q", "--no-index", "--no-deps", *wheels.values(), cwd=environment)
    # A path file that is found on a path of another path file is not read: an editable installation stays out of sight.
    packages = next((environment / "lib").glob("python*/site-packages"))
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(paths))
    return python


def _metadata(wheel: Path) -> Distribution:
    return PathDistribution(next(x for x in zipfile.Path(wheel).iterdir() if x.name.endswith(".dist-info")))  # type: ignore[arg-type]


def _names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def _tracked(package: str) -> set[str]:
    """The files of a package in the repository."""
    files = (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".so"}


def test_the_wheels_hold_their_packages_and_share_no_file(wheels: dict[str, Path]) -> None:
    held = {name: {x for x in _names(wheels[name]) if ".dist-info/" not in x} for name in NAMES}
    module = f"capsops/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    assert held["capsops"] == _tracked("capsops") | {module}
    assert held["cardiocaps"] == _tracked("cardiocaps")
    for name, wheel in wheels.items():
        assert {x.partition("/")[0] for x in _names(wheel)} == {name, f"{name}-{capsops.__version__}.dist-info"}
    assert wheels["cardiocaps"].name.endswith("-py3-none-any.whl")
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.search(f"-{python}-{python}-linux_", wheels["capsops"].name)


def test_capsops_needs_torch_alone_and_cardiocaps_needs_capsops_of_its_version(wheels: dict[str, Path]) -> None:
    root = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {name: [Requirement(x) for x in _metadata(wheels[name]).requires or ()] for name in NAMES}
    plain = {name: {str(x) for x in needed[name] if x.marker is None} for name in NAMES}
    (torch,) = (str(Requirement(x)) for x in root["dependencies"] if Requirement(x).name == "torch")
    assert plain["capsops"] == {torch}
    own = f"capsops=={cardiocaps.__version__}"
    assert plain["cardiocaps"] == {str(Requirement(x)) for x in (own, *root["dependencies"])}

    # The extras of the whole project are those of cardiocaps; capsops has some of them.
    optional = {name: {str(x) for x in needed[name] if x.marker is not None} for name in NAMES}
    assert optional["capsops"] <= optional["cardiocaps"]
    assert set(_metadata(wheels["cardiocaps"]).metadata.get_all("Provides-Extra") or ()) == set(
        root["optional-dependencies"]
    )
    scripts = {x.name: x.value for name in NAMES for x in _metadata(wheels[name]).entry_points}
    assert scripts == root["scripts"]


def test_both_have_the_version_that_is_written_once(wheels: dict[str, Path]) -> None:
    versions = {_metadata(wheel).version for wheel in wheels.values()}
    assert {*versions, capsops.__version__, cardiocaps.__version__} == {capsops._version.__version__}
    assert f"\nversion: {capsops.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert (ROOT / "cardiocaps/_version.py").is_symlink()


def test_both_are_imported_and_share_the_openmp_of_torch(python: Path, tmp_path: Path) -> None:
    """Nothing can be compiled here: the environment has no PATH."""
    smoke_test = ROOT / ".ci/smoke_test.py"
    program = (
        f"import runpy; runpy.run_path({str(smoke_test)!r}, run_name='__main__'); "
        "import cardiocaps.models; print('cardiocaps:', *cardiocaps.__path__)"
    )
    printed = _run(python, "-c", program, cwd=tmp_path, PATH="", CUDA_VISIBLE_DEVICES="")
    for name in NAMES:
        (path,) = re.findall(rf"^{name}: (.*)$", printed, re.MULTILINE)
        assert Path(path).is_relative_to(python.parents[1])


def test_what_is_installed_fits_together(python: Path) -> None:
    _run(sys.executable, "-m", "pip", "--python", python, "check", cwd=python.parents[1])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("0.0.9", "cardiocaps: capsops is 0.0.9 (in {there}); expected {version}, "),
        ("", "cardiocaps: capsops is of an unknown version (in {there}); expected {version}, "),
        (None, "cardiocaps: capsops is not installed; expected {version}, "),
    ],
)
def test_capsops_of_another_version_is_refused_in_one_line(tmp_path: Path, other: str | None, said: str) -> None:
    shutil.copytree(ROOT / "cardiocaps", tmp_path / "cardiocaps", ignore=shutil.ignore_patterns("__pycache__"))
    there = tmp_path / "capsops"
    if other is not None:
        there.mkdir()
        (there / "__init__.py").write_text("raise ImportError('this takes seconds')")
    if other:
        (there / "_version.py").write_text(f"__version__ = {other!r}")
    # -S: without the packages of this environment.
    command = [sys.executable, "-S", "-c", "import cardiocaps"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    version = cardiocaps.__version__
    assert run.returncode == 1
    assert run.stderr.startswith(said.format(there=there, version=version))
    assert run.stderr.endswith(
        "the version of cardiocaps: install both from one checkout or from wheels of one version\n"
    )
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "arm64"])
def test_one_of_decord_and_decord2_is_installed(system: str, machine: str) -> None:
    """Both have the module `decord`, so they would overwrite each other."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["decord"]
    here = {**default_environment(), "sys_platform": system, "platform_machine": machine}
    wanted = [x.name for x in map(Requirement, extra) if x.marker is None or x.marker.evaluate(here)]
    assert wanted == ["decord" if (system, machine) == ("linux", "x86_64") else "decord2"]
