"""constraints.txt, requirements.lock and pyproject.toml agree about versions."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


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


def test_what_builds_the_package_is_pinned_to_the_tested_versions() -> None:
    constraints = _constraints()
    for requirement in PROJECT["build-system"]["requires"]:
        name, _, version = requirement.partition("==")
        assert version == constraints[_name(name)], requirement


def test_every_direct_dependency_has_a_tested_version() -> None:
    project = PROJECT["project"]
    wanted = [*project["dependencies"], *(r for group in project["optional-dependencies"].values() for r in group)]
    names = {_name(re.match(r"[\w.-]+", r)[0]) for r in wanted} - {"capsops"}  # type: ignore[index]
    assert names - _constraints().keys() == set()


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_malicious_releases_of_lightning_are_shut_out(version: str) -> None:
    (lightning,) = (r for r in PROJECT["project"]["dependencies"] if r.startswith("lightning"))
    assert version not in Requirement(lightning).specifier
    assert "2.6.6" in Requirement(lightning).specifier
