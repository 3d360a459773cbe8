"""`python -m cardiocaps.info`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from cardiocaps import __version__, info
from cardiocaps.training import installed
from tests.cardiocaps.programs import ROOT


def test_what_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CARDIOCAPS_CACHE", str(tmp_path))
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "a.npy").write_bytes(b"x" * 1_500_000)
    (tmp_path / "index.json").write_bytes(b"x" * 500_000)
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cardiocaps"] == __version__ and found["versions"]["torch"] == torch.__version__
    assert found["capsops"]["backends"].keys() == {"cpu", "cuda", "triton", "reference"}
    assert found["capsops"]["threads"] == torch.get_num_threads()
    assert found["cache"] == {"folder": str(tmp_path), "files": 2, "bytes": 2_000_000}
    assert info.main([]) == 0
    text = capsys.readouterr().out
    assert f"{tmp_path}: 2 files, 2.0 MB" in text and "\nbackend cpu " in text and "\nreader pyav " in text


def test_an_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = installed.find_spec
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name in ("wandb", "decord") else find(name))
    assert info.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "wandb" in found["extras"]["loggers"]["missing"] and not found["extras"]["loggers"]["installed"]
    assert found["readers"]["decord"] is None
    assert info.main([]) == 0
    assert "pip install 'cardiocaps[loggers]'" in capsys.readouterr().out


def test_a_cache_that_does_not_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARDIOCAPS_CACHE", str(tmp_path / "none"))
    assert installed.installed()["cache"] == {"folder": str(tmp_path / "none"), "files": 0, "bytes": 0}


def test_a_wrong_variable_is_an_error() -> None:
    """In a process of its own: capsops reads the variable when it is imported."""
    command = [sys.executable, "-m", "cardiocaps.info"]
    environment = {**os.environ, "CAPSOPS_BACKEND": "abacus"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "abacus" in done.stderr and done.stderr.count("\n") == 1


def test_every_extra_is_listed() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert installed.EXTRAS.keys() == extras.keys() - {"test", "docs", "lint"}
