"""The program `cardiocaps`."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module

import pytest

from cardiocaps import __main__ as program
from cardiocaps.__main__ import main

from .programs import ROOT


def _imported(*arguments: str) -> tuple[str, set[str]]:
    """What `python -m cardiocaps` prints, and the modules that it imports."""
    command = [sys.executable, "-X", "importtime", "-m", "cardiocaps", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout, {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}


def test_help_names_every_command_at_once() -> None:
    text, imported = _imported("--help")
    names = (
        "train",
        "evaluate",
        "predict",
        "explain",
        "export",
        "data",
        "info",
        "experiments",
        "phantom",
        "from-dicom",
    )
    assert all(f"\n  {name} " in text for name in names)
    assert not imported & {"torch", "numpy", "yaml", "cardiocaps.train", "cardiocaps.experiments"}


@pytest.mark.parametrize("command", program._PROGRAMS)
def test_a_command_is_its_program(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    name = program._PROGRAMS[command][0].removesuffix(".__main__")
    assert capsys.readouterr().out.startswith(f"usage: python -m {name} ")


def test_the_exit_status_of_a_program_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("cardiocaps.evaluate.main", lambda argv: given.append(argv) or 4)
    assert main(["evaluate", "run", "--out", "x"]) == 4
    assert given == [["run", "--out", "x"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "required: COMMAND"), (["tran"], "'tran'"), (["--trane", "train"], "required: COMMAND")],
)
def test_a_command_that_does_not_exist(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_the_console_scripts_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for script in scripts.values():
        module, _, function = script.partition(":")
        assert callable(getattr(import_module(module), function))
