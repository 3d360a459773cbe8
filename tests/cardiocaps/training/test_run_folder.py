import getpass
import itertools
import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import capsops
from cardiocaps.config import TrainConfig
from cardiocaps.errors import ConfigError, OutputError
from cardiocaps.runtime.files import lock_folder, write_text
from cardiocaps.training import environment as module
from cardiocaps.training import run_folder
from cardiocaps.training.environment import environment
from cardiocaps.training.run_folder import RunFolder
from tests.cardiocaps.killed import killed_before


def _names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def test_create_and_open(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "runs" / "a")
    assert _names(folder.path) == {"run.json", "plots"}
    assert RunFolder.open(tmp_path / "runs" / "a") == folder
    (tmp_path / "empty").mkdir()
    assert RunFolder.create(tmp_path / "empty").is_run()


def test_the_places_of_the_files_lie_in_the_folder_and_differ(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    places = [getattr(folder, name) for name, kind in vars(RunFolder).items() if isinstance(kind, run_folder._File)]
    assert len(set(places)) == len(places) >= 12
    assert all(place.is_relative_to(tmp_path) for place in places)


def test_nothing_is_overwritten_unasked(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a")
    write_text(folder.config, "seed: 1\n")
    with pytest.raises(OutputError, match="is not empty; choose another --out"):
        RunFolder.create(folder.path)
    assert folder.config.read_text() == "seed: 1\n"
    RunFolder.create(folder.path, overwrite=True)
    assert _names(folder.path) == {"run.json", "plots"}


def test_a_run_that_failed_at_once_can_be_overwritten(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "a")
    RunFolder.create(tmp_path / "a", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_run_that_was_killed_at_any_point_of_its_beginning(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run can begin in its folder; if it has left run.json, with --overwrite."""
    monkeypatch.setattr(run_folder, "environment", lambda device: {})
    config = TrainConfig(data=tmp_path)

    def begin_and_fail() -> None:
        folder = RunFolder.create(path, overwrite)
        folder.begin(config, "cpu")
        folder.discard()

    for step in itertools.count(1):
        path = tmp_path / str(step)
        if overwrite:
            RunFolder.create(path).begin(config, "cpu")
            (path / "plots" / "roc_curve.png").touch()
        if not killed_before(step, begin_and_fail):
            break
        if (path / "run.json").exists() and not overwrite:
            with pytest.raises(OutputError, match="exists and is not empty"):
                RunFolder.create(path)
            RunFolder.create(path, overwrite=True)
        else:
            RunFolder.create(path, overwrite)
        assert _names(path) == {"run.json", "plots"} and not _names(path / "plots")
    assert step > 10 and not path.exists()


def _photos(folder: Path) -> None:
    (folder / "photo.jpg").touch()


def _foreign_marker(folder: Path) -> None:
    (folder / "config.yaml").touch()
    (folder / "run.json").write_text('{"kind": "another program"}')


def _damaged_marker(folder: Path) -> None:
    (folder / "config.yaml").touch()
    (folder / "run.json").write_text("{")


def _anothers_leftover(folder: Path) -> None:
    (folder / "run.json.0123abcd.part").write_text("{")  # of a run
    (folder / "thesis.tex.0123abcd.part").write_text("mine")


@pytest.mark.parametrize("fill", [_photos, _foreign_marker, _damaged_marker, _anothers_leftover])
def test_overwrite_deletes_nothing_but_a_run(fill: Callable[[Path], None], tmp_path: Path) -> None:
    fill(tmp_path)
    before = _names(tmp_path)
    with pytest.raises(OutputError, match=r"--overwrite does not delete .* not recognisably"):
        RunFolder.create(tmp_path, overwrite=True)
    assert _names(tmp_path) == before


def test_overwrite_spares_a_run_that_goes_on(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a")
    before = _names(folder.path)
    with lock_folder(folder.path), pytest.raises(OutputError, match="being used by another process"):
        RunFolder.create(folder.path, overwrite=True)
    assert _names(folder.path) == before


def test_overwrite_does_not_follow_a_link(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a")
    (tmp_path / "link").symlink_to(folder.path)
    with pytest.raises(OutputError, match="it is a link"):
        RunFolder.create(tmp_path / "link", overwrite=True)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(OutputError, match="File exists"):
        RunFolder.create(tmp_path / "nowhere")
    assert folder.is_run()


def test_overwrite_spares_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder.create(tmp_path / "a")
    monkeypatch.chdir(folder.plots)
    for path in (folder.path, Path("..")):
        with pytest.raises(OutputError, match="the working folder lies in it"):
            RunFolder.create(path, overwrite=True)


def test_of_two_runs_at_once_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RunFolder.create(tmp_path / "a")
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(()))  # both looked before either wrote
    with pytest.raises(OutputError, match="File exists"):
        RunFolder.create(tmp_path / "a")


def test_the_path_is_no_place_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="File exists"):
        RunFolder.create(tmp_path / "file")
    with pytest.raises(OutputError, match="Not a directory"):
        RunFolder.create(tmp_path / "file" / "a")
    with pytest.raises(OutputError, match="File name too long"):
        RunFolder.create(tmp_path / ("a" * 300))


def test_open_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no run\.json"):
        RunFolder.open(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"it has no run\.json"):
        RunFolder.open(tmp_path)


def test_the_environment_says_what_ran_and_not_who_or_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATIENT", "a-secret-of-the-environment")
    folder = RunFolder.create(tmp_path / "a")
    folder.begin(TrainConfig(), "cpu")
    text = folder.environment.read_text()
    written = json.loads(text)
    assert written["packages"]["torch"] == torch.__version__
    assert written["packages"]["capsops"] == capsops.__version__
    assert written["threads"] == torch.get_num_threads()
    assert written["cpu"] and written["python"] == ".".join(map(str, sys.version_info[:3]))
    secrets = [
        "a-secret-of",
        socket.gethostname(),
        str(Path.home()),
        str(Path.cwd()),
        sys.prefix,
        str(tmp_path),
    ]
    for secret in secrets:
        assert secret not in text
    assert f'"{getpass.getuser()}"' not in text


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ("git", "-C", str(tmp_path), *identity, *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    inside = tmp_path / "cardiocaps" / "training" / "run_folder.py"
    deeper = tmp_path / "env" / "cardiocaps" / "training" / "run_folder.py"
    for file in (inside, deeper):
        file.parent.mkdir(parents=True)
        file.write_text("")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    head = git("rev-parse", "HEAD")

    monkeypatch.setattr(module, "__file__", str(inside))
    assert environment("cpu")["commit"] == head
    inside.write_text("changed")
    assert environment("cpu")["commit"] == f"{head}+"
    with monkeypatch.context() as bare:
        bare.setenv("PATH", "")
        assert environment("cpu")["commit"] is None
    monkeypatch.setattr(module, "__file__", str(deeper))  # installed inside somebody else's checkout
    assert environment("cpu")["commit"] is None
