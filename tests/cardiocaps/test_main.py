"""The program `cardiocaps`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

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
        "preview",
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


@pytest.mark.parametrize("command", program._PROGRAMS)
def test_help_of_a_command_imports_no_torch(command: str) -> None:
    text, imported = _imported(command, "--help")
    assert text.startswith("usage: ") and not imported & {"torch", "lightning", "av"}


def _completed(line: str, folder: Path) -> tuple[list[str], set[str]]:
    """What a shell is offered for the end of a command line, and the modules that are imported for it."""
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_SHELL": "fish",  # which adds no spaces
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(folder / "words"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "PYTHONPATH": str(ROOT),
    }
    (folder / "words").write_text("")
    command = [sys.executable, "-X", "importtime", "-m", "cardiocaps"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = [word.split("\t")[0] for word in (folder / "words").read_text().split("\n")]
    return words, {x.rpartition("|")[2].strip() for x in done.stderr.splitlines()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cardiocaps e", ["evaluate", "explain", "export", "experiments"]),
        ("cardiocaps train --mod", ["--model"]),
        ("cardiocaps train --model ", ["cardiocaps", "em-capsnet", "efficient-capsnet", "cnn-1", "cnn-2"]),
        ("cardiocaps train --model cnn-1 --routing d", ["dynamic"]),
        ("cardiocaps train --logger t", ["tensorboard"]),
        ("cardiocaps train --no-comp", ["--no-compile"]),
        ("cardiocaps train --data ", ["some.csv"]),
        ("cardiocaps export --to o", ["onnx"]),
        ("cardiocaps export s", ["some.csv"]),
        ("cardiocaps experiments tab", ["table1", "table6"]),
        ("cardiocaps data some.csv --dataset echonet-l", ["echonet-lvh"]),
        ("cardiocaps phantom --prev", ["--preview"]),
        ("cardiocaps train --epochs ", []),
        ("cardiocaps nonsense --mod", []),
    ],
)
def test_a_shell_completes_at_once(line: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / "some.csv").write_text("")
    words, imported = _completed(line, tmp_path)
    assert set(expected) <= set(words) and (expected or words == [""])
    typed = line.rpartition(" ")[2]
    assert all(word.startswith(typed) for word in words if word)
    assert "argcomplete" in imported and not imported & {"torch", "lightning", "av"}


def test_bash_completes_with_the_line_of_the_pages(tmp_path: Path) -> None:
    (line,) = re.findall(r"^eval .*$", (ROOT / "docs" / "installation.md").read_text(), flags=re.MULTILINE)
    script = tmp_path / "cardiocaps"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m cardiocaps "$@"\n')
    script.chmod(0o755)
    asked = "cardiocaps train --routing u"
    program = f"""
        {line.partition("#")[0]}
        complete -p cardiocaps
        COMP_LINE={asked!r} COMP_POINT={len(asked)} COMP_TYPE=9 COMP_WORDBREAKS=' '
        _python_argcomplete cardiocaps
        echo "${{COMPREPLY[@]}}"
    """
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(["bash", "-c", program], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.stdout.splitlines()[1].strip() == "uniform", done.stderr


def test_the_console_scripts_exist() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for script in scripts.values():
        module, _, function = script.partition(":")
        assert callable(getattr(import_module(module), function))
