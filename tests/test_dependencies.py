"""constraints.txt, requirements.lock and pyproject.toml agree about versions."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "distributions/capsops/pyproject.toml", "distributions/cardiocaps/pyproject.toml")
PROJECTS = {name: tomllib.loads((ROOT / name).read_text()) for name in FILES}
PROJECT = PROJECTS["pyproject.toml"]


def _name(text: str) -> str:
    """A package's name as the indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", text).lower()


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {_name(name): version for name, _, version in (x.partition("==") for x in lines if not x.startswith("#"))}


def _locked() -> dict[str, tuple[str, list[str]]]:
    """name -> version without its build, and hashes."""
    found = {}
    for block in re.split(r"\n(?=[A-Za-z])", (ROOT / "requirements.lock").read_text()):
        if (head := re.match(r"([\w.-]+)==([\w.]+)", block)) is not None:
            found[_name(head[1])] = head[2], re.findall(r"--hash=sha256:([0-9a-f]{64})\b", block)
    return found


def test_the_lock_holds_the_tested_versions_with_hashes() -> None:
    locked = _locked()
    assert {name: version for name, (version, _) in locked.items()} == _constraints()
    assert [name for name, (_, hashes) in locked.items() if not hashes] == []


@pytest.mark.parametrize("file", FILES)
def test_what_builds_the_package_is_pinned_to_the_tested_versions(file: str) -> None:
    constraints = _constraints()
    for requirement in PROJECTS[file]["build-system"]["requires"]:
        name, _, version = requirement.partition("==")
        assert version == constraints[_name(name)], requirement


@pytest.mark.parametrize("file", FILES)
def test_every_direct_dependency_has_a_tested_version(file: str) -> None:
    project = PROJECTS[file]["project"]
    optional = project.get("optional-dependencies", {})
    wanted = map(Requirement, [*project.get("dependencies", ()), *(r for group in optional.values() for r in group)])
    tested_on = {"sys_platform": "linux", "platform_machine": "x86_64", "extra": ""}
    names = {_name(r.name) for r in wanted if r.marker is None or r.marker.evaluate(tested_on)} - {"cardiocaps"}
    assert names - _constraints().keys() == set()


def test_capsops_is_built_alike_alone_and_with_cardiocaps() -> None:
    alone = PROJECTS["distributions/capsops/pyproject.toml"]
    assert alone["build-system"] == PROJECT["build-system"]
    for part in ("dynamic", "package-data"):
        assert alone["tool"]["setuptools"][part].items() <= PROJECT["tool"]["setuptools"][part].items()
    for name in ("license", "requires-python"):
        assert {x["project"][name] for x in PROJECTS.values()} == {PROJECT["project"][name]}


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_releases_of_lightning_are_shut_out(version: str) -> None:
    (lightning,) = (r for r in PROJECT["project"]["dependencies"] if r.startswith("lightning"))
    assert version not in Requirement(lightning).specifier
    assert "2.6.6" in Requirement(lightning).specifier
