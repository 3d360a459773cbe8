"""Files that are written whole or not at all, also on disks that fail; locks of folders."""

import csv
import errno
import fcntl
import json
import math
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from cardiocaps.errors import OutputError
from cardiocaps.runtime.files import (
    atomic_write,
    lock_folder,
    output_errors,
    remove_leftovers,
    write_bytes,
    write_csv,
    write_json,
    write_text,
)


def _names(folder: Path) -> set[str]:
    return {item.name for item in folder.iterdir()}


def test_the_reason_is_named() -> None:
    with pytest.raises(OutputError, match=r"^cannot write here: No space left on device$"), output_errors(Path("here")):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_other_errors_pass_through() -> None:
    for error in (OutputError("mine"), ValueError("mine"), RuntimeError("mine")):
        with pytest.raises(type(error), match=r"^mine$"), output_errors(Path("here")):
            raise error


def test_a_full_disk_under_a_checkpoint_is_named() -> None:
    assert Path("/dev/full").exists(), "this test writes to Linux's always full device"
    for size in (10, 1_000_000):
        with pytest.raises(OutputError, match="cannot write"), output_errors(Path("last.ckpt")):
            torch.save(torch.zeros(size), "/dev/full")


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    write_text(path, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OutputError, match=r"metrics\.json: No space left on device"):
        write_text(path, "new")
    assert path.read_text() == "old" and _names(tmp_path) == {"metrics.json"}


def test_a_real_limit_in_mid_file_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from cardiocaps.errors import OutputError; from cardiocaps.runtime.files import write_bytes\n"
        "path = Path(sys.argv[1]); write_bytes(path, b'old')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: write_bytes(path, bytes(100_000))\n"
        "except OutputError as error: print(error)\n"
    )
    path = tmp_path / "best.ckpt"
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {path}: File too large\n"
    assert path.read_bytes() == b"old" and _names(tmp_path) == {"best.ckpt"}


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_write(tmp_path / "best.ckpt") as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert _names(tmp_path) == set()


def test_leftovers_are_known_by_their_name_kind_and_age(tmp_path: Path) -> None:
    for name in ("old.npy.0123abcd.part", "new.npy.0123abcd.part", "thesis.part", "a.npy.0123ABCD.part", "x.part.npy"):
        (tmp_path / name).touch()
    (tmp_path / "folder.0123abcd.part").mkdir()
    (tmp_path / "link.0123abcd.part").symlink_to(tmp_path / "thesis.part")
    os.mkfifo(tmp_path / "pipe.0123abcd.part")  # opening it would block
    os.utime(tmp_path / "old.npy.0123abcd.part", (0, 0))
    before = _names(tmp_path)
    remove_leftovers(tmp_path, tmp_path / "missing", older_than=3600)
    assert before - _names(tmp_path) == {"old.npy.0123abcd.part"}
    remove_leftovers(tmp_path)
    assert before - _names(tmp_path) == {"old.npy.0123abcd.part", "new.npy.0123abcd.part"}


LOCKING = (
    "import sys; from pathlib import Path; from cardiocaps.runtime.files import lock_folder\n"
    "with lock_folder(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.readline()\n"
)


def test_a_lock_ends_with_its_process_and_leaves_no_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOCKING, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    with pytest.raises(OutputError, match=r" is being used by another process$"), lock_folder(tmp_path):
        pass
    process.kill()
    process.communicate()
    with lock_folder(tmp_path), lock_folder(tmp_path.parent):
        assert _names(tmp_path) == set()


def test_waiting_for_a_lock(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOCKING, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None and process.stdout.readline() == "locked\n"
    released = threading.Event()

    def release() -> None:
        released.set()
        process.communicate("\n")

    timer = threading.Timer(0.2, release)
    timer.start()
    with lock_folder(tmp_path, wait=True):
        assert released.is_set()
    timer.join()
    process.stdout.close()


def test_a_folder_that_cannot_be_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="No such file or directory"), lock_folder(tmp_path / "missing"):
        pass
    read_only = tmp_path / "read-only"
    read_only.mkdir(mode=0o500)
    with lock_folder(read_only):
        pass

    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass


def test_the_disk_has_the_new_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watched_fsync(handle: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    def watched_replace(*paths: str) -> None:
        steps.append("rename")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched_replace)
    write_bytes(tmp_path / "a", b"1")
    assert steps == ["file", "rename", "folder"]
    steps.clear()
    write_bytes(tmp_path / "a", b"1", sync=False)
    assert steps == ["rename"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def files_only(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", files_only)
    write_bytes(tmp_path / "a", b"1")
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_file_is_readable_as_the_umask_says(tmp_path: Path) -> None:
    write_bytes(tmp_path / "one", b"1")
    (tmp_path / "two").write_bytes(b"2")
    with atomic_write(tmp_path / "three") as temporary:  # as safetensors writes
        temporary.unlink()
        temporary.touch(mode=0o600)
    one, two, three = (stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("one", "two", "three"))
    assert one == two == three


def test_a_folder_in_the_files_place(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        write_text(tmp_path / "metrics.json", "")
    assert _names(tmp_path) == {"metrics.json"}


def test_json_has_no_nan_and_takes_what_numerics_give(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {
        "nan": math.nan,
        "inf": [np.float32("inf")],
        "n": np.int64(3),
        "t": torch.ones(2),
        1: "é",
    }
    write_json(path, value)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "nan": None,
        "inf": [None],
        "n": 3,
        "t": [1.0, 1.0],
        "1": "é",
    }
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert _names(tmp_path) == {"a.json"}


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, [{"epoch": 0, "loss": 0.1}, {"epoch": 1, "name": 'a, "b"\n'}])
    assert list(csv.DictReader(path.read_text().splitlines(keepends=True))) == [
        {"epoch": "0", "loss": "0.1", "name": ""},
        {"epoch": "1", "loss": "", "name": 'a, "b"\n'},
    ]


def test_csv_for_people_and_for_programs(tmp_path: Path) -> None:
    row = {"n": 1_234_567_890, "third": 1 / 3, "large": 12_345_678.9, "undefined": math.nan, "infinite": math.inf}
    write_csv(tmp_path / "exact.csv", [row])
    write_csv(tmp_path / "readable.csv", [row], digits=6)
    assert (tmp_path / "exact.csv").read_text().splitlines()[1] == f"1234567890,{1 / 3},12345678.9,,"
    assert (tmp_path / "readable.csv").read_text().splitlines()[1] == "1234567890,0.333333,1.23457e+07,,"
