"""The synthetic study: its layout, its truth (calipers, labels, physiology), and how it is written."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import itertools
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from multiprocessing import util
from pathlib import Path

import av
import numpy as np
import pytest

from cardiocaps.config import TRAINABLE_PHANTOM
from cardiocaps.data.echonet_lvh.labels import teichholz_ef
from cardiocaps.data.file_list import read_dynamic
from cardiocaps.data.splits import stratified
from cardiocaps.errors import OutputError, ResourceError
from cardiocaps.phantom import phantom_is_complete, write_phantom
from cardiocaps.phantom.__main__ import main
from cardiocaps.phantom.anatomy import BORDERS
from cardiocaps.phantom.dataset import MARKER, _claim, _settings
from cardiocaps.phantom.layouts import LAYOUTS, LVH, LVH_COLUMNS
from cardiocaps.phantom.patients import DILATED, HYPERTROPHIC, NORMAL, Patient, plan
from cardiocaps.phantom.ultrasound import render
from cardiocaps.runtime.files import write_bytes
from tests.cardiocaps.killed import killed_before

TABLE = LAYOUTS[LVH].table
VIDEOS, SEED = 10, 3
WALLS = ("IVSd", "IVSs", "LVPWd", "LVPWs")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantom") / "study"
    assert write_phantom(out, VIDEOS, SEED, processes=1) == VIDEOS
    return out


@pytest.fixture(scope="module")
def many() -> tuple[Patient, ...]:
    """A study large enough for statistics; only its plan, no pixels."""
    return plan(400, 1)


def rows_of(study: Path) -> list[dict[str, str]]:
    with (study / TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


def frames_of(path: Path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# The folder


def test_the_layout_is_echonets(study: Path) -> None:
    assert {path.name for path in study.iterdir()} == {"Batch1", "Batch2", "Batch3", "Batch4", TABLE, MARKER}
    files = [path for path in study.rglob("*") if path.parent != study]
    assert len(files) == VIDEOS
    assert all(re.fullmatch(r"0X[0-9A-F]{16}\.avi", path.name) for path in files)
    header = (study / TABLE).read_text().splitlines()[0]
    assert header.split(",") == list(LVH_COLUMNS)
    assert [row[""] for row in rows_of(study)] == [str(i) for i in range(len(rows_of(study)))]
    assert {row["HashedFileName"] for row in rows_of(study)} == {path.stem for path in files}


def test_the_table_tells_the_truth_about_the_files(study: Path) -> None:
    for patient in plan(VIDEOS, SEED):
        with av.open(study / patient.video) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "mjpeg"
            about = (
                sum(1 for _ in container.decode(stream)),
                int(stream.average_rate or 0),
                stream.width,
                stream.height,
            )
        rows = [row for row in rows_of(study) if row["HashedFileName"] == patient.name]
        assert rows
        for row in rows:
            assert about == tuple(int(row[name]) for name in ("Frames", "FPS", "Width", "Height"))
            assert 0 <= int(row["Frame"]) < about[0]
            assert row["split"] == patient.split


def test_bytes_depend_on_the_seed_but_not_on_the_processes(study: Path, tmp_path: Path) -> None:
    write_phantom(tmp_path / "two", VIDEOS, SEED, processes=2)
    assert digests(tmp_path / "two") == digests(study)
    other = plan(VIDEOS, SEED + 1)[0]
    assert other.name not in {patient.name for patient in plan(VIDEOS, SEED)}


# The hearts


def test_calipers_span_what_was_measured(study: Path) -> None:
    scans = {patient.name: patient.scan for patient in plan(VIDEOS, SEED)}
    for row in rows_of(study):
        length = np.hypot(float(row["X2"]) - float(row["X1"]), float(row["Y2"]) - float(row["Y1"]))
        assert length / scans[row["HashedFileName"]].pixels_per_cm == pytest.approx(float(row["CalcValue"]), abs=2e-3)
        assert 0 <= float(row["X1"]) < int(row["Width"])
        assert 0 <= float(row["Y2"]) < int(row["Height"])


def test_calipers_end_on_borders_that_can_be_seen(study: Path) -> None:
    """The muscle between a wall's calipers is brighter than the blood between LVIDd's."""
    contrasts = []
    for patient in plan(VIDEOS, SEED):
        video = frames_of(study / patient.video).astype(float)
        grey = {}
        for row in patient.measurements(calcs=("LVIDd", "LVPWd")):
            along = np.linspace(0.15, 0.85, 15)  # the middle part: the border itself is blurred
            x, y = row.x1 + along * (row.x2 - row.x1), row.y1 + along * (row.y2 - row.y1)
            around = np.arange(-4, 5)[:, None]
            grey[row.calc] = video[row.frame, y.round().astype(int), (x + around).round().astype(int)].mean()
        contrasts.append(grey["LVPWd"] - grey["LVIDd"])
    assert min(contrasts) > 15


def test_one_video_in_five_is_abnormal_by_its_written_rows(study: Path) -> None:
    calcs: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows_of(study):
        calcs[row["HashedFileName"]][row["Calc"]] = float(row["CalcValue"])
    decided = {
        name: any(cm >= (1.1 if calc in WALLS else 5.6) for calc, cm in values.items())
        for name, values in calcs.items()
    }
    assert decided == {patient.name: patient.abnormal for patient in plan(VIDEOS, SEED)}
    assert sum(decided.values()) == VIDEOS / 5


def test_the_label_follows_from_the_drawn_geometry_with_a_gap(many: tuple[Patient, ...]) -> None:
    everything = tuple(f"{name}{end}" for name in ("IVS", "LVID", "LVPW") for end in "ds")
    assert Counter(patient.kind for patient in many) == {NORMAL: 320, HYPERTROPHIC: 40, DILATED: 40}
    for patient in many:
        cm = {row.calc: row.cm for row in patient.measurements(everything)}
        thickest, widest = max(cm[calc] for calc in WALLS), max(cm["LVIDd"], cm["LVIDs"])
        written = {row.calc: row.cm for row in patient.measurements()}
        if patient.kind == NORMAL:
            assert thickest < 1.07
            assert widest < 5.3
        elif patient.kind == HYPERTROPHIC:
            assert min(written["IVSd"], written["LVPWd"]) > 1.15
        else:
            assert written["LVIDd"] > 5.9


def test_ejection_fraction_orders_the_kinds(many: tuple[Patient, ...]) -> None:
    def fraction(patient: Patient) -> float:  # Teichholz, V = 7 D³ / (2.4 + D)
        large, small = (7 * row.cm**3 / (2.4 + row.cm) for row in patient.measurements(("LVIDd", "LVIDs")))
        return 100 * (1 - small / large)

    normal = [fraction(patient) for patient in many if patient.kind == NORMAL]
    dilated = [fraction(patient) for patient in many if patient.kind == DILATED]
    assert 50 < min(normal) < max(normal) < 75
    assert 10 < min(dilated) < max(dilated) < 40


def test_muscle_is_conserved_and_borders_never_cross(many: tuple[Patient, ...]) -> None:
    for patient in many[:40]:
        heart, contraction = patient.heart, np.linspace(0, 1, 7)
        borders = heart.borders(np.linspace(-11, 9, 201), contraction)
        assert borders.shape == (7, BORDERS, 201)
        assert np.diff(borders, axis=1).min() > -1e-9
        radius = heart.cavity(contraction) / 2
        area = (radius + heart.wall(heart.septum, contraction)) ** 2 - radius**2
        np.testing.assert_allclose(area, area[0], rtol=1e-9)


def test_the_cycle_is_physiological(many: tuple[Patient, ...]) -> None:
    heart = dataclasses.replace(many[0].heart, rate=65.0, phase=0.0)
    phase = np.linspace(0, 1, 1000, endpoint=False)
    contraction = heart.contraction(phase)
    assert contraction[0] == 0
    assert phase[contraction.argmax()] == pytest.approx(1 / 3, abs=0.03)
    mitral, aortic = heart.mitral_opening(phase), heart.aortic_opening(phase)
    assert not np.any((mitral > 0.01) & (aortic > 0.01))  # never both open
    assert mitral.max() == pytest.approx(1, abs=1e-3)
    assert all(patient.scan.frames / patient.scan.fps * patient.heart.rate / 60 > 1.2 for patient in many)


# What must not give the label away


def test_machine_settings_are_independent_of_the_label(many: tuple[Patient, ...]) -> None:
    """Mann-Whitney: the probability that a setting is larger in an abnormal study stays near one half."""
    abnormal = np.array([patient.abnormal for patient in many])
    names = (
        "brightness",
        "depth",
        "tilt",
        "origin_x",
        "origin_z",
        "dynamic_range",
        "blood",
        "haze",
        "width",
        "fps",
    )
    for name in names:
        values = np.array([getattr(patient.scan, name) for patient in many], dtype=float)
        larger, smaller = values[abnormal][:, None], values[~abnormal]
        assert abs((larger > smaller).mean() + (larger == smaller).mean() / 2 - 0.5) < 0.12, name


def test_gain_is_turned_to_the_wanted_brightness_whatever_the_heart(many: tuple[Patient, ...]) -> None:
    patient = many[0]
    patient = dataclasses.replace(patient, scan=dataclasses.replace(patient.scan, frames=8, fps=8, brightness=45.0))
    greys = []
    for kind in (NORMAL, HYPERTROPHIC, DILATED):
        heart = next(other.heart for other in many if other.kind == kind)
        image = render(dataclasses.replace(patient, heart=heart))
        greys.append(image[image > 0].mean() * (image > 0).mean())
    assert max(greys) / min(greys) < 1.15


def test_splits_hold_their_share_of_both_labels(many: tuple[Patient, ...]) -> None:
    for label, total in ((False, 320), (True, 80)):
        counts = Counter(patient.split for patient in many if patient.abnormal == label)
        for split, part in {"train": 0.55, "val": 0.15, "test": 0.30}.items():
            assert abs(counts[split] - part * total) <= 1


def test_the_smallest_study_that_can_be_trained_on() -> None:
    """For the phantom's own splits and for stratified ones."""

    def usable(videos: int, seed: int) -> bool:
        patients = plan(videos, seed)
        labels = {patient.name: int(patient.abnormal) for patient in patients}
        own = {patient.name: patient.split for patient in patients}
        return all(
            {labels[name] for name in labels if split[name] == part} == {0, 1}
            for split in (own, stratified(labels, seed))
            for part in ("train", "val", "test")
        )

    assert TRAINABLE_PHANTOM == 18
    for seed in range(5):
        assert all(usable(videos, seed) for videos in (18, 19, 20, 25, 33, 50))
        assert not usable(17, seed)


# The pictures


def test_the_heart_beats(study: Path) -> None:
    for patient in plan(VIDEOS, SEED):
        video = frames_of(study / patient.video).astype(float)
        contraction = patient.contraction()
        diastole, systole = int(contraction.argmin()), int(contraction.argmax())
        beat = np.abs(video[diastole] - video[systole]).mean()
        step = np.abs(np.diff(video, axis=0)).mean()
        assert beat > 1.3 * step > 0


def test_black_outside_the_sector_and_ticks_at_true_centimetres(many: tuple[Patient, ...]) -> None:
    scan = dataclasses.replace(many[0].scan, frames=2)
    image = render(dataclasses.replace(many[0], scan=scan))[0]
    assert image.shape == (scan.height, scan.width)
    assert not image[: scan.height // 4, : scan.width // 4].any()
    ticks = np.flatnonzero(image[:, scan.width - 4] == 170)
    assert len(ticks) == int(scan.depth) + 1
    np.testing.assert_allclose(np.diff(ticks), scan.pixels_per_cm, atol=1)


# Writing, going on, refusing


def test_a_removed_video_is_made_again(study: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    assert phantom_is_complete(copy, VIDEOS, SEED)
    assert not phantom_is_complete(copy, VIDEOS, SEED + 1)
    (copy / plan(VIDEOS, SEED)[4].video).unlink()
    assert not phantom_is_complete(copy, VIDEOS, SEED)
    assert write_phantom(copy, VIDEOS, SEED, processes=1) == 1
    assert digests(copy) == digests(study)
    assert write_phantom(copy, VIDEOS, SEED) == 0


def test_a_run_that_was_cut_off_goes_on(study: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    (copy / TABLE).unlink()
    (copy / "Batch1" / "0X0000000000000000.avi.0123abcd.part").write_bytes(b"torn")
    for patient in plan(VIDEOS, SEED)[8:]:
        (copy / patient.video).unlink()
    assert write_phantom(copy, VIDEOS, SEED, processes=1) == 2
    assert digests(copy) == digests(study)


def test_other_peoples_files_are_left_alone(study: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="not a phantom"):
        write_phantom(tmp_path, VIDEOS, SEED, overwrite=True)
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    with pytest.raises(OutputError, match="other settings"):
        write_phantom(copy, VIDEOS, SEED + 1)
    (copy / "Batch1" / "notes.txt").write_text("mine")
    before = digests(copy)
    with pytest.raises(OutputError, match=r"notes\.txt"):
        write_phantom(copy, VIDEOS, SEED + 1, overwrite=True)
    assert digests(copy) == before
    with pytest.raises(OutputError, match="file, not a folder"):
        write_phantom(tmp_path / "thesis.txt", VIDEOS, SEED)


def test_overwrite_replaces_a_phantom(study: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(study, copy)
    (copy / MARKER).write_text('{"version": 0}\n')
    (copy / "Batch1" / "0X0000000000000000.avi").write_bytes(b"old")
    assert write_phantom(copy, VIDEOS, SEED, overwrite=True, processes=1) == VIDEOS
    assert digests(copy) == digests(study)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_phantom_that_was_killed_at_any_point_of_its_beginning(overwrite: bool, tmp_path: Path) -> None:
    settings = _settings(VIDEOS, SEED, LAYOUTS[LVH])

    def begin() -> None:
        path.mkdir()
        _claim(path, settings, overwrite)
        write_bytes(path / MARKER, settings)
        (path / "Batch1").mkdir()
        _claim(path, settings, overwrite=True)

    for step in itertools.count(1):
        path = tmp_path / str(step)
        if not killed_before(step, begin):
            break
        path.mkdir(exist_ok=True)
        _claim(path, settings, overwrite)
    assert step > 6
    (tmp_path / "mine").mkdir()
    for name in (f"{MARKER}.0123abcd.part", "thesis.tex.0123abcd.part"):
        (tmp_path / "mine" / name).touch()
    with pytest.raises(OutputError, match="not empty and not a phantom"):
        _claim(tmp_path / "mine", settings, overwrite)


def test_an_unwritable_place_is_a_plain_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "file" / "below"), "--videos", "10"]) == OutputError.exit_code
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked up in /proc")
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL], ids=lambda s: s.name)
def test_stopping_the_program_stops_its_processes(tmp_path: Path, signum: signal.Signals) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "cardiocaps.phantom", str(out), "--videos", "300", "--processes", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    # While most of the work is still being handed out, which a stop must not wait for.
    while not list(out.rglob("*.avi")):
        assert process.poll() is None, process.stderr
        time.sleep(0.05)
    listing = f"/proc/{process.pid}/task/{process.pid}/children"
    children = Path(listing).read_text().split()
    assert len(children) >= 2
    process.send_signal(signum)
    _, errors = process.communicate(timeout=30)
    if signum == signal.SIGKILL:
        assert process.returncode == -signum
    else:
        assert process.returncode == 128 + signum, errors
        assert errors == f"error: stopped by {signum.name}; nothing is half-written\n"
        assert not list(out.rglob("*.part"))
    deadline = time.monotonic() + 60
    while any(Path("/proc", child, "cmdline").exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if Path("/proc", child, "cmdline").exists()]


def test_two_programs_make_one_phantom(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cardiocaps.phantom", str(tmp_path / "out"), "--videos", "12", "--seed", "3"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted("complete already" in text for text in said) == [False, True]


def test_a_process_that_cannot_be_started_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(util, "spawnv_passfds", refused)
    with pytest.raises(ResourceError, match=r"^cannot start workers: the system starts no more processes"):
        write_phantom(tmp_path / "out", 20, SEED, processes=2)


def test_a_full_disk_leaves_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cardiocaps.phantom.dataset._encode", full)
    with pytest.raises(OutputError, match="No space left"):
        write_phantom(tmp_path / "out", VIDEOS, SEED, processes=1)
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {MARKER}
    assert not phantom_is_complete(tmp_path / "out", VIDEOS, SEED)


@pytest.mark.parametrize("arguments", [["--video", "10"], ["--unknown"], ["--videos", "ten"]])
def test_unknown_and_abbreviated_options_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path / "out"), *arguments])
    assert error.value.code == 2
    assert not (tmp_path / "out").exists()


def test_command_line_says_what_it_did(study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    arguments = [str(study), "--videos", str(VIDEOS), "--seed", str(SEED), "--preview", str(sheet)]
    assert main(arguments) == 0
    assert "complete already" in capsys.readouterr().out
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert main(arguments) == OutputError.exit_code
    assert "exists already" in capsys.readouterr().err


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from cardiocaps.phantom.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'lightning', 'pandas', 'matplotlib', 'av', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_layout_of_echonet_dynamic(tmp_path: Path) -> None:
    """The same videos, and a table whose volumes and ejection fractions are those of the drawn diameters."""
    out = tmp_path / "dynamic"
    assert write_phantom(out, 18, SEED, layout="echonet-dynamic", processes=1) == 18
    assert {path.name for path in out.iterdir()} == {"Videos", "FileList.csv", MARKER}
    assert write_phantom(out, 18, SEED, layout="echonet-dynamic", processes=1) == 0
    study = read_dynamic(out, labels=False)
    assert not [problem for problem in study.problems if not problem.harmless]
    clips = {clip.name: clip for clip in study.clips}
    patients = plan(18, SEED)
    assert clips.keys() == {patient.name for patient in patients}
    for patient in patients:
        clip, heart = clips[patient.name], patient.heart
        diameters = [row.cm for row in patient.measurements(("LVIDd", "LVIDs"))]
        assert diameters == pytest.approx([heart.diameter, heart.diameter_systole], rel=0.02)
        assert clip.targets["ef"] == pytest.approx(teichholz_ef(*diameters), abs=1e-3)
        assert clip.targets["esv"] == pytest.approx(clip.targets["edv"] * (1 - clip.targets["ef"] / 100), rel=1e-4)
        assert (clip.split, clip.label) == (patient.split, int(patient.kind == DILATED))
    # A phantom of another layout is not completed, but it may be replaced, and none of its files is left.
    with pytest.raises(OutputError, match="holds a phantom with other settings"):
        write_phantom(out, 18, SEED, processes=1)
    videos = {path.name: path.read_bytes() for path in (out / "Videos").iterdir()}
    assert write_phantom(out, 18, SEED, overwrite=True, processes=1) == 18
    assert {path.name: path.read_bytes() for path in out.glob("Batch*/*.avi")} == videos
    assert not (out / "Videos").exists() and not (out / "FileList.csv").exists()
