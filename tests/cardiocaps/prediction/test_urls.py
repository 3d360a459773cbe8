"""Videos and tables in a bucket: fsspec's memory stands for one."""

from __future__ import annotations

import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cardiocaps import predict
from cardiocaps.data.header import VideoError
from cardiocaps.data.remote_files import local_copy
from cardiocaps.errors import ConfigError
from cardiocaps.prediction.inputs import find

fsspec = pytest.importorskip("fsspec", reason="torch has brought it along so far")


@pytest.fixture
def bucket(phantom: Path) -> Iterator[list[Path]]:
    """The videos that `memory://bucket/a` holds, beside a text; and a table of them."""
    system = fsspec.filesystem("memory")
    videos = sorted((phantom / "Batch1").iterdir())[:3]
    for path in videos:
        system.pipe_file(f"/bucket/a/{path.name}", path.read_bytes())
    system.pipe_file("/bucket/a/notes.txt", b"no video")
    names = "".join(f"a/{path.name}\n" for path in videos[:2])
    system.pipe_file("/bucket/list.csv", f"path\n{names}a/none.avi\n".encode())
    yield videos
    system.rm("/bucket", recursive=True)


def _rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "predictions.csv").open(newline="") as file:
        return {row["input"]: row for row in csv.DictReader(file, strict=True)}


def _run(*arguments: Path | str) -> int:
    return predict.main([*map(str, arguments), "--no-progress", "--threads", "1"])


def test_a_bucket_gives_the_rows_of_the_files(
    runs: list[Path], bucket: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert _run(runs[0], *bucket, "--out", tmp_path / "files") == 0
    assert _run(runs[0], "memory://bucket/a", "--out", tmp_path / "bucket") == 0
    files = {Path(name).name: row for name, row in _rows(tmp_path / "files").items()}
    found = {name.rpartition("/")[2]: row for name, row in _rows(tmp_path / "bucket").items()}
    assert found.keys() == files.keys() == {path.name for path in bucket}
    for name, row in found.items():
        assert {**row, "input": ""} == {**files[name], "input": ""}
    assert all(name.startswith("memory://") for name in _rows(tmp_path / "bucket"))
    assert list((tmp_path / "temporary").glob("cardiocaps-*")) == []


def test_a_copy_that_has_no_place(bucket: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(VideoError, match="cannot be copied: No such file"), local_copy(f"memory://{bucket[0].name}"):
        pass


def test_videos_that_no_name_tells_apart(bucket: list[Path], tmp_path: Path) -> None:
    clip = tmp_path.resolve() / "1.avi"
    clip.touch()
    fsspec.filesystem("memory").pipe_file("/bucket/same.csv", f"path\n{clip}\n".encode())
    with pytest.raises(ConfigError, match=r"1\.avi is the name of two videos"):
        find(["memory://bucket/same.csv", clip])


def test_a_table_in_a_bucket_and_a_table_of_urls(runs: list[Path], bucket: list[Path], tmp_path: Path) -> None:
    assert _run(runs[0], "memory://bucket/list.csv", "--out", tmp_path / "one") == 0
    one = _rows(tmp_path / "one")
    assert list(one) == [*(f"a/{path.name}" for path in bucket[:2]), "a/none.avi"]
    assert [row["reason"] for row in one.values()] == ["", "", "no such file"]
    table = tmp_path / "urls.csv"
    table.write_text(f"path\nmemory://bucket/a/{bucket[0].name}\n{bucket[1]}\n")
    assert _run(runs[0], table, "--out", tmp_path / "two") == 0
    two = list(_rows(tmp_path / "two").values())
    assert [row["probability"] for row in two] == [row["probability"] for row in one.values()][:2]


@pytest.mark.parametrize(
    ("url", "status", "message"),
    [
        ("memory://bucket/none", 2, "memory://bucket/none does not exist, or is an empty folder"),
        ("memory://bucket/none.csv", 3, "cannot read memory://bucket/none.csv"),
        ("nothing://bucket", 2, "INPUT: nothing://bucket: Protocol not known"),
    ],
)
def test_a_url_that_is_wrong(
    url: str,
    status: int,
    message: str,
    runs: list[Path],
    bucket: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _run(runs[0], url, "--out", tmp_path / "out") == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
