"""A folder of DICOM files becomes a folder of videos without identifiers."""

from __future__ import annotations

import csv
import hashlib
import hmac
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cardiocaps.data import dicom, from_dicom
from cardiocaps.data.dicom import find_sector, grey_frames, read_tags
from cardiocaps.data.from_dicom import COLUMNS, MARKER, TABLE, VIDEOS, Outcome, convert, main, pseudonym
from cardiocaps.data.video import probe, read_frames
from cardiocaps.errors import ConfigError, DataError, OutputError
from tests.cardiocaps.killed import killed_before

from .sample_dicom import FRAMES, HEIGHT, NAME, PATIENT, WIDTH, cine, region, text, write_dicom

KEY = "0123456789abcdef" * 4
STUDY, IMAGE = "1.2.840.99.1", "1.2.840.99.2"
SMALL: dict[str, Any] = {"frames": 3, "height": 32, "width": 40, "clock": False}


def rows_of(out: Path) -> list[dict[str, str]]:
    with (out / TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def export(root: Path, images: int = 3) -> Path:
    """A folder as a PACS exports it: a folder for each patient, names that say who it is, no suffixes."""
    for number in range(images):
        path = root / f"{NAME}{number % 2}" / f"IM{number:04d}"
        tags = {"PatientID": f"{PATIENT}{number % 2}", "SOPInstanceUID": f"{IMAGE}.{number}"}
        write_dicom(path, cine(number, **SMALL), StudyInstanceUID=f"{STUDY}.{number % 2}", **tags)
    return root


@pytest.fixture
def key(tmp_path: Path) -> Path:
    file = tmp_path / "secret"
    file.write_text(KEY + "\n")
    return file


def test_a_video_has_the_pixels_of_its_file_and_a_row(tmp_path: Path, key: Path) -> None:
    corners = {"RegionLocationMinX0": 8, "RegionLocationMaxX1": WIDTH - 9}
    tags = {"SOPInstanceUID": IMAGE, "StudyInstanceUID": STUDY, "IssuerOfPatientID": "Clinic", "FrameTime": "33.333"}
    source = write_dicom(tmp_path / "in" / NAME / "a.dcm", cine(1), regions=[region(**corners)], **tags)
    out = tmp_path / "out"
    assert convert(tmp_path / "in", out, key_file=key) == Outcome(1, 1, (), 0, 0, 0)
    (row,) = rows_of(out)
    assert tuple(row) == COLUMNS
    secret = KEY.encode()
    assert row["patient"] == hmac.new(secret, f"patient\0Clinic\\{PATIENT}".encode(), "sha256").hexdigest()[:32]
    assert row["study"] == pseudonym(secret, "study", STUDY) != row["patient"]
    assert row["path"] == f"{VIDEOS}/{pseudonym(secret, 'image', IMAGE)}.avi"
    numbers = {name: float(row[name]) for name in ("frames", "width", "height", "fps")}
    assert numbers == {"frames": FRAMES, "width": WIDTH - 16, "height": HEIGHT, "fps": 30.0003}
    assert (row["cm_per_pixel_x"], row["cm_per_pixel_y"], row["flags"], row["problem"]) == ("0.05", "0.04", "", "")

    video = out / row["path"]
    found = probe(video)
    assert (found.frames, found.width, found.height, found.form) == (FRAMES, WIDTH - 16, HEIGHT, "avi png")
    assert found.fps == pytest.approx(30, rel=1e-3)
    tags_read = read_tags(source)
    wanted = np.stack(list(grey_frames(tags_read, find_sector(tags_read))))
    got = read_frames(video, range(FRAMES), 64)
    np.testing.assert_array_equal(got, read_frames(source, range(FRAMES), 64))  # lossless
    assert wanted.any() and not wanted[:, text()[:, 8:-8]].any()


def test_nothing_in_the_folder_names_anybody(tmp_path: Path, key: Path) -> None:
    root, out = export(tmp_path / "in"), tmp_path / "out"
    (root / NAME / "damaged").parent.mkdir(exist_ok=True)
    content = (root / f"{NAME}0" / "IM0000").read_bytes()
    (root / NAME / "damaged").write_bytes(content[: len(content) // 2])
    convert(root, out, key_file=key)
    assert len(rows_of(out)) == 4 and sum(bool(row["problem"]) for row in rows_of(out)) == 1
    everything = "".join(digests(out)).encode() + b"".join(x.read_bytes() for x in out.rglob("*") if x.is_file())
    for secret in (NAME, "Quux", PATIENT, "4711", STUDY, IMAGE, "IM00", KEY, KEY[:12], str(tmp_path)):
        assert secret.encode() not in everything, secret
    # Without the key, hashes of the identifiers are not found either.
    for plain in (PATIENT + "0", STUDY + ".0", IMAGE + ".0"):
        assert hashlib.sha256(plain.encode()).hexdigest()[:12].encode() not in everything


def test_videos_of_a_patient_and_of_a_study_belong_together(tmp_path: Path, key: Path) -> None:
    out = tmp_path / "out"
    convert(export(tmp_path / "in", 4), out, key_file=key)
    patients = [row["patient"] for row in rows_of(out)]
    assert len(set(patients)) == 2 and len({row["path"] for row in rows_of(out)}) == 4
    assert len({(row["patient"], row["study"]) for row in rows_of(out)}) == 2


def test_a_key_is_made_once_beside_the_folder(tmp_path: Path) -> None:
    root, out = export(tmp_path / "in", 1), tmp_path / "out"
    convert(root, out)
    made = tmp_path / "out.key"
    assert stat.S_IMODE(made.stat().st_mode) == 0o600 and len(made.read_text().strip()) == 64
    first = made.read_bytes(), rows_of(out)
    assert convert(root, out).made == 0 and (made.read_bytes(), rows_of(out)) == first
    convert(root, tmp_path / "other")
    assert (tmp_path / "other.key").read_bytes() != first[0]
    assert rows_of(tmp_path / "other")[0]["patient"] != first[1][0]["patient"]
    made.unlink()
    with pytest.raises(ConfigError, match="cannot read the key"):
        convert(root, out)  # a new key would make a second patient of each


def test_another_key_or_folder_is_refused(tmp_path: Path, key: Path) -> None:
    root, out = export(tmp_path / "in", 1), tmp_path / "out"
    convert(root, out, key_file=key)
    before = digests(out)
    other = tmp_path / "other"
    other.write_text("f" * 64)
    with pytest.raises(OutputError, match="made with another key"):
        convert(root, out, key_file=other)
    other.write_text("short\n")
    with pytest.raises(ConfigError, match="has 5 characters; expected at least 32"):
        convert(root, out, key_file=other)
    with pytest.raises(ConfigError, match="expected a file outside of OUT"):
        convert(root, out, key_file=out / "key")
    for inside in (root / "out", tmp_path):
        with pytest.raises(ConfigError, match="expected a folder outside of IN"):
            convert(root, inside, key_file=key)
    assert digests(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(OutputError, match="not made by this program"):
        convert(root, tmp_path / "full", key_file=key)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM file in it"):
        convert(tmp_path / "empty", tmp_path / "new", key_file=key)
    with pytest.raises(DataError, match="no such folder"):
        convert(tmp_path / "nothing", tmp_path / "new", key_file=key)


def test_a_newer_reader_does_not_mix_its_frames_with_older_ones(
    tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = export(tmp_path / "in", 1), tmp_path / "out"
    convert(root, out, key_file=key)
    monkeypatch.setattr(from_dicom, "READER_VERSION", 99)
    with pytest.raises(OutputError, match="made with another version"):
        convert(root, out, key_file=key)


def test_each_bad_file_costs_its_own_row(
    tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = export(tmp_path / "in", 2), tmp_path / "out"
    write_dicom(root / NAME / "CT", cine(5, **SMALL), Modality="CT")
    write_dicom(root / NAME / "still", cine(6, **(SMALL | {"frames": 1})))
    write_dicom(root / NAME / "anonymous", cine(8, **SMALL), SOPInstanceUID=f"{IMAGE}.8", PatientID="")
    content = write_dicom(root / NAME / "cut", cine(7, **SMALL), SOPInstanceUID=f"{IMAGE}.7").read_bytes()
    (root / NAME / "cut").write_bytes(content[:-900])
    (root / NAME / "notes.txt").write_text(NAME)
    report = dicom.read_tags(write_dicom(root / "x", cine(9, **SMALL)))._dataset
    del report.Rows, report.Columns
    report.SOPClassUID = "1.2.840.10008.5.1.4.1.1.88.33"
    report.save_as(root / "x", implicit_vr=False, little_endian=True, enforce_file_format=True)
    arguments = [str(root), str(out), "--key", str(key), "--workers", "2"]
    assert main(arguments) == 3
    rows = rows_of(out)
    assert [bool(row["path"]) for row in rows] == [False] * 3 + [True] * 3
    assert sorted(row["problem"].partition(":")[0] for row in rows[:3]) == [
        "no sector found",
        "not ultrasound",
        "truncated",
    ]
    assert sorted(row["flags"] for row in rows[3:]) == ["no-region", "no-region", "no-region no-patient"]
    said = capsys.readouterr()
    assert "3 videos (3 made now), and videos.csv" in said.out
    assert "note: DICOM files that are no images, such as reports (ignored): 1\n" in said.out
    assert "error: 3 of 6 images cannot be used" in said.err
    assert NAME not in said.out + said.err and "4711" not in said.out + said.err

    # The next call tries them again.
    write_dicom(root / NAME / "cut", cine(7, **SMALL), SOPInstanceUID=f"{IMAGE}.7")
    assert main(arguments) == 3
    assert "4 videos (1 made now)" in capsys.readouterr().out
    for name in ("CT", "still"):
        (root / NAME / name).unlink()
    assert main(arguments) == 0
    assert len(rows_of(out)) == 4


def test_of_copies_the_first_that_can_be_used_is_taken(tmp_path: Path, key: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    for name in ("a", "b", "c"):
        write_dicom(root / name, cine(1, **SMALL), SOPInstanceUID=IMAGE)
    content = (root / "a").read_bytes()
    (root / "a").write_bytes(content[:2000] + content[2001:])  # a byte of the pixels is missing: found when decoding
    done = convert(root, out, key_file=key)
    assert (done.videos, done.copies, len(done.bad)) == (1, 1, 1)
    assert read_frames(out / rows_of(out)[-1]["path"], [0], 16).any()


def test_a_file_that_has_changed_is_converted_anew(tmp_path: Path, key: Path) -> None:
    root, out = export(tmp_path / "in", 2), tmp_path / "out"
    convert(root, out, key_file=key)
    before = digests(out)
    tags = {"PatientID": f"{PATIENT}0", "SOPInstanceUID": f"{IMAGE}.0", "StudyInstanceUID": f"{STUDY}.0"}
    write_dicom(root / f"{NAME}0" / "IM0000", cine(50, **SMALL), **tags)
    os.utime(root / f"{NAME}0" / "IM0000", ns=(1, 1))
    assert convert(root, out, key_file=key).made == 1
    changed = [name for name, digest in digests(out).items() if before[name] != digest]
    assert len(changed) == 2 and TABLE in changed
    next((root / f"{NAME}0").iterdir()).unlink()
    assert convert(root, out, key_file=key) == Outcome(1, 0, (), 0, 0, unlisted=1)


def test_a_damaged_table_is_made_anew(tmp_path: Path, key: Path) -> None:
    root, out = export(tmp_path / "in", 2), tmp_path / "out"
    convert(root, out, key_file=key)
    before = digests(out)
    for content in (b"", b"\xff\xfe", b"a,b\n1,2\n", (out / TABLE).read_bytes()[:-60]):
        (out / TABLE).write_bytes(content)
        assert convert(root, out, key_file=key).made > 0
        assert digests(out) == before


def test_the_number_of_threads_changes_nothing(tmp_path: Path, key: Path) -> None:
    root = export(tmp_path / "in", 5)
    for workers in (1, 4):
        convert(root, tmp_path / str(workers), key_file=key, workers=workers)
    assert digests(tmp_path / "1") == digests(tmp_path / "4")


def test_after_a_kill_it_goes_on(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before any change of a file, the next call ends in the same folder, and makes no video twice."""
    monkeypatch.setattr(from_dicom, "_SAVE_EVERY", 0.0)
    root = export(tmp_path / "in", 2)
    convert(root, tmp_path / "whole", key_file=key)
    wanted = digests(tmp_path / "whole")
    step, left = 0, set()
    killed = True
    while killed:
        step += 1
        out = tmp_path / f"out{step}"
        killed = killed_before(step, lambda out=out: convert(root, out, key_file=key, workers=1))
        for path in out.rglob("*.avi") if out.exists() else ():
            assert probe(path).frames == 3  # no half video under its name
        listed = {row["path"] for row in rows_of(out)} if (out / TABLE).exists() else set()
        left.add(len(listed))
        done = convert(root, out, key_file=key, workers=1)
        assert digests(out) == wanted
        assert done.made == 2 - len(listed)
    assert step > 10 and left == {0, 1, 2}


def test_a_link_out_of_the_folder_is_followed_only_on_request(tmp_path: Path, key: Path) -> None:
    root, out = tmp_path / "in", tmp_path / "out"
    root.mkdir()
    (root / "link").symlink_to(write_dicom(tmp_path / "elsewhere", cine(1, **SMALL)))
    (problem,) = convert(root, out, key_file=key).bad
    assert problem.reason == "a link that leaves the data folder: --follow-links allows it"
    assert convert(root, out, key_file=key, follow_links=True).made == 1


def test_a_folder_is_converted_by_one_process_at_a_time(tmp_path: Path, key: Path) -> None:
    from cardiocaps.runtime.files import lock_folder

    out = tmp_path / "out"
    out.mkdir()
    with lock_folder(out), pytest.raises(OutputError, match="being used by another process"):
        convert(export(tmp_path / "in", 1), out, key_file=key)
    assert not (out / MARKER).exists()


def test_the_options_are_those_of_the_help(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and all(option in text for option in ("--key", "--workers", "--follow-links"))
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path), "out", "--keys", "x"])
    assert ended.value.code == 2 and "did you mean --key?" in capsys.readouterr().err
