"""Optional packages."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest

from cardiocaps.errors import ConfigError
from cardiocaps.runtime.packages import require_package


def test_an_installed_module_is_imported() -> None:
    assert require_package("json.decoder", "json", "model: 'x'") is sys.modules["json.decoder"]


def test_a_missing_package_is_named() -> None:
    with pytest.raises(ConfigError) as error:
        require_package("no_such_package.networks", "no-such-package", "model: 'x'")
    assert str(error.value) == "model: 'x' needs the package no-such-package; pip install 'cardiocaps[experiments]'"


@pytest.mark.parametrize("content", ["import no_such_package", "raise ValueError('no_such_package does not load')"])
def test_a_package_that_cannot_be_imported_gives_the_reason(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_a_package.py").write_text(f"{content}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    expected = (
        r"^model: 'x' needs the package half-a-package, which cannot be imported \(.*no_such_package.*\); pip inst"
    )
    with pytest.raises(ConfigError, match=expected):
        require_package("half_a_package", "half-a-package", "model: 'x'")
