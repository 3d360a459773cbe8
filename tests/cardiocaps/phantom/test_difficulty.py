"""The difficulties of the phantom: their patients, their images, shifts, and the ceiling of a classifier."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import av
import numpy as np
import pytest

from cardiocaps.config import TrainConfig
from cardiocaps.data.echonet_lvh import labels
from cardiocaps.data.open import read_study
from cardiocaps.errors import ConfigError
from cardiocaps.metrics.classification import evaluate
from cardiocaps.phantom import Shift, Variant, phantom_is_complete, write_phantom
from cardiocaps.phantom.__main__ import main
from cardiocaps.phantom.ceiling import abnormal_probability, ceiling
from cardiocaps.phantom.effects import (
    NO_EFFECTS,
    OTHER_PROBE,
    PROBES,
    Effects,
    Shadow,
    decorrelate,
    draw_effects,
    persist,
    point_spread,
    reverberate,
    slider_gain,
    transmission,
)
from cardiocaps.phantom.patients import (
    CALCS,
    DECIDING_CALCS,
    NORMAL,
    READER_CALCS,
    READER_ERROR,
    THRESHOLDS,
    Patient,
    plan,
)
from cardiocaps.phantom.ultrasound import AXIAL, LATERAL, render
from cardiocaps.phantom.variants import HARD, MODERATE, SHIFT_BOUNDS, SHIFT_HELP, normal_cdf

SEED = 3


EASY = (
    (65, 26.31, 49.53),
    (63, 28.72, 45.73),
    (56, 28.39, 46.09),
    (73, 19.00, 41.44),
    (51, 22.39, 40.66),
    (50, 18.51, 41.10),
    (72, 24.60, 46.47),
    (50, 19.30, 42.59),
    (62, 16.35, 36.85),
    (52, 26.37, 44.99),
)
"""Frames, mean and deviation of the grey of ten easy videos of seed 3, in the order of their names."""


def digest(folder: Path) -> str:
    """Of the names and the contents of all files."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        whole.update(str(path.relative_to(folder)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def short(patient: Patient, frames: int = 3) -> Patient:
    return dataclasses.replace(patient, scan=dataclasses.replace(patient.scan, frames=frames))


@pytest.fixture(scope="module")
def hard() -> tuple[Patient, ...]:
    return plan(320, SEED, Variant(HARD, test_videos=300))


# Easy


@pytest.mark.parametrize(
    ("layout", "table", "expected"),
    [
        ("echonet-lvh", "MeasurementsList.csv", "c7a50a47cc03f371311ae415bfe0aea6d6456981530a73de71a7c350b420df05"),
        ("echonet-dynamic", "FileList.csv", "a751601442fd6d4e14bfb5545c053bce9c7927664e9b66191e1e46010f2858ab"),
    ],
)
def test_easy_is_as_before(tmp_path: Path, layout: str, table: str, expected: str) -> None:
    """The table to the byte, the videos by their numbers of frames and their means and deviations of grey.

    All are those of the version that had no difficulties. The bytes of a video depend on the codec.
    """
    study = tmp_path / "study"
    write_phantom(study, 10, SEED, layout=layout, processes=1)
    assert hashlib.sha256((study / table).read_bytes()).hexdigest() == expected
    videos = sorted(study.rglob("*.avi"), key=lambda path: path.name)
    for path, (frames, mean, deviation) in zip(videos, EASY, strict=True):
        with av.open(path) as container:
            grey = np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)])
        assert len(grey) == frames
        assert (grey.mean(), grey.std()) == pytest.approx((mean, deviation), abs=0.02)


def test_the_plan_of_easy_keeps_its_values() -> None:
    text = "".join(f"{patient.name} {patient.split} {patient.kind} {patient.calcs}" for patient in plan(300, 10))
    text += "".join(f"{row.calc} {row.cm:.6f}" for patient in plan(300, 10) for row in patient.measurements())
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "5acffa9009ef28b31212c663be1a9b22bdbe08ed9515765c0e054be1c68a369e"
    )


# Patients


def test_the_label_is_the_rule_on_what_the_reader_wrote(hard: tuple[Patient, ...]) -> None:
    assert {calc: labels.THRESHOLDS[calc] for calc in CALCS} == THRESHOLDS
    crossed = 0
    for patient in hard:
        rows = {row.calc: row.cm for row in patient.measurements()}
        assert rows == pytest.approx(dict(patient.written or {}))
        assert set(DECIDING_CALCS) <= set(rows) <= set(READER_CALCS)
        assert rows.get("LVIDs", 0) < rows["LVIDd"]
        assert any(labels.abnormal(calc, cm) for calc, cm in rows.items()) == patient.abnormal
        assert patient.true is not None
        crossed += any(cm >= THRESHOLDS[calc] for calc, cm in patient.true.items()) != patient.abnormal
    assert 5 < crossed < 60  # the reader's error decides about some, on both sides of the thresholds


def test_walls_and_diameters_have_no_gap_at_the_threshold(hard: tuple[Patient, ...]) -> None:
    for calc, margin in (("IVSd", 0.1), ("LVPWd", 0.1), ("LVIDd", 0.2)):
        lengths = np.array([(patient.true or {})[calc] for patient in hard])
        near = np.abs(lengths - THRESHOLDS[calc]) < margin
        assert near.sum() >= 5, calc
    # The drawn calipers are the true lengths: the plane off the axis has cut them.
    for patient in hard[:20]:
        drawn = dataclasses.replace(patient, written=None).measurements()
        assert {row.calc: row.cm for row in drawn} == pytest.approx(dict(patient.true or {}))


def test_a_plane_off_the_axis_narrows_the_ventricle_and_thickens_its_walls() -> None:
    heart = plan(10, SEED)[0].heart
    oblique = dataclasses.replace(heart, off_axis=0.6)
    c = np.linspace(0, 1, 5)
    np.testing.assert_allclose(oblique.cavity(c), 2 * np.sqrt((heart.cavity(c) / 2) ** 2 - 0.36), rtol=1e-12)
    assert np.all(oblique.wall(heart.septum, c) > heart.wall(heart.septum, c))
    outer = oblique.cavity(c) / 2 + oblique.wall(heart.septum, c)
    np.testing.assert_allclose(outer**2 + 0.36, (heart.cavity(c) / 2 + heart.wall(heart.septum, c)) ** 2, rtol=1e-12)


def test_effects_are_independent_of_the_label(hard: tuple[Patient, ...]) -> None:
    abnormal = np.array([patient.abnormal for patient in hard])
    for name in ("decorrelation", "drop_out", "gain", "quality", "reverberation", "reverberation_path"):
        values = np.array([getattr(patient.scan.effects, name) for patient in hard], dtype=float)
        larger, smaller = values[abnormal][:, None], values[~abnormal]
        assert abs((larger > smaller).mean() + (larger == smaller).mean() / 2 - 0.5) < 0.15, name
    assert {patient.scan.effects.probe for patient in hard} == set(PROBES)


# Test videos and the share of abnormal ones


def test_test_patients_stay_and_smaller_trainings_are_contained() -> None:
    def patients(videos: int, abnormal: float = 0.2) -> dict[str, Patient]:
        variant = Variant(HARD, test_videos=20, abnormal=abnormal)
        return {patient.name: dataclasses.replace(patient, batch=0) for patient in plan(videos, SEED, variant)}

    small, large, rare = patients(60), patients(120), patients(120, abnormal=0.05)
    assert small.items() <= large.items()
    tests = {name for name, patient in large.items() if patient.split == "test"}
    assert len(tests) == 20
    assert sum(large[name].abnormal for name in tests) == 4
    assert {name: rare[name] for name in tests} == {name: large[name] for name in tests}
    others = [patient for name, patient in rare.items() if name not in tests]
    assert sum(patient.abnormal for patient in others) == 5
    train = sum(patient.split == "train" for patient in others)
    assert train == pytest.approx(100 * 0.55 / 0.70, abs=1.5)
    only = plan(60, SEED, Variant(HARD, test_videos=20, test_only=True))
    assert {patient.name for patient in only} == tests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"difficulty": "brutal"}, "difficulty is 'brutal'; expected one of easy, moderate, hard"),
        ({"abnormal": 0.1}, "expected 0.2 without a number of test videos"),
        ({"abnormal": 1.5, "test_videos": 20}, "expected a number between 0 and 1"),
        ({"test_videos": 0}, "test_videos is 0; expected at least 1"),
    ],
)
def test_bad_variants_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Variant(**arguments)  # type: ignore[arg-type]


def test_more_test_videos_than_videos_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "out"), "--videos", "20", "--test", "20"]) == ConfigError.exit_code
    assert "videos is 20; expected more than the 20 test videos" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# The ceiling


def test_the_probability_of_the_label_is_that_of_many_readers(hard: tuple[Patient, ...]) -> None:
    difficulty = Variant(HARD).difficulty_settings
    assert difficulty is not None
    assert normal_cdf(1.96) == pytest.approx(0.9750021, abs=1e-7)
    rng = np.random.default_rng(7)
    for patient in hard[:30]:
        assert patient.true is not None
        lengths = np.array([patient.true[calc] for calc in DECIDING_CALCS])
        errors = rng.standard_normal((20_000, 3)) * [difficulty.reader * READER_ERROR[calc] for calc in DECIDING_CALCS]
        found = (lengths * (1 + errors) >= [THRESHOLDS[calc] for calc in DECIDING_CALCS]).any(axis=1).mean()
        expected = abnormal_probability(patient.true, difficulty)
        assert found == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 20_000))


def test_no_measurement_of_the_drawn_heart_beats_the_ceiling() -> None:
    variant = Variant(HARD, test_videos=1500, test_only=True)
    patients = plan(1510, SEED, variant)
    found = ceiling(patients, variant, bootstrap=200)
    auroc = found.bayes.metrics["auroc"]
    assert auroc.low < auroc.value < auroc.high < 1
    assert 0.97 < auroc.value < 0.998
    assert found.second_reader.metrics["auroc"].value < auroc.value
    label = [int(patient.abnormal) for patient in patients]
    for calc in DECIDING_CALCS:
        score = [(patient.true or {})[calc] / 10 for patient in patients]
        assert evaluate(score, label, bootstrap=0).metrics["auroc"].value < auroc.value
    easier = ceiling(plan(1510, SEED, Variant(MODERATE, test_videos=1500)), Variant(MODERATE), bootstrap=0)
    assert easier.bayes.metrics["auroc"].value > auroc.value


def test_the_ceiling_needs_errors_and_both_labels(hard: tuple[Patient, ...]) -> None:
    with pytest.raises(ConfigError, match="difficulty is easy; expected moderate or hard"):
        ceiling(plan(20, SEED), Variant())
    with pytest.raises(ConfigError, match="have one label; expected both"):
        ceiling([patient for patient in hard if patient.kind == NORMAL], Variant(HARD))


# Effects on images


def test_without_strength_there_is_no_effect_but_the_probe() -> None:
    drawn = draw_effects(0.0, np.random.default_rng(1))
    neutral = dataclasses.replace(drawn, probe=PROBES[0], reverberation=None, reverberation_path=0.0, sliders=())
    assert neutral == NO_EFFECTS
    assert drawn.sliders == (0.0,) * 8


def test_wider_probes_have_wider_taps() -> None:
    assert point_spread(NO_EFFECTS, LATERAL, AXIAL) == (LATERAL, AXIAL)

    def width(taps: tuple[float, ...]) -> float:
        k, w = np.arange(len(taps)), np.array(taps)
        w = np.concatenate([[w[0]], 2 * w[1:]])
        return float(np.sqrt((w * k**2).sum() / w.sum()))

    across, along = point_spread(Effects(probe=PROBES[1]), LATERAL, AXIAL)
    assert width(across) > 1.3 * width(LATERAL)
    assert width(along) > 1.2 * width(AXIAL)
    finer, _ = point_spread(Effects(speckle=0.6), LATERAL, AXIAL)
    assert width(finer) < 0.8 * width(LATERAL)


def test_decorrelation_keeps_the_power_and_loses_the_wanted_share() -> None:
    rng = np.random.default_rng(2)
    field, fresh = (
        (rng.standard_normal((300, 300, 2)).astype(np.float32) / np.sqrt(np.float32(2))).view(np.complex64)[..., 0]
        for _ in range(2)
    )
    changed = decorrelate(field, fresh, 0.3)
    assert np.mean(np.abs(changed) ** 2) == pytest.approx(np.mean(np.abs(field) ** 2), rel=0.02)
    kept = np.mean(changed * field.conj()).real / np.mean(np.abs(field) ** 2)
    assert kept == pytest.approx(math.sqrt(0.7), abs=0.02)


def test_shadows_drop_out_and_sliders_lose_what_they_say() -> None:
    side, depths = np.linspace(-1, 1, 41), np.linspace(0.05, 16, 80)
    flat = np.zeros((41, 80), np.float32)
    passing = transmission(Effects(shadows=(Shadow(0.5, 0.2, 2.0, 12.0),)), side, depths, flat)
    assert passing[30, -1] == pytest.approx(10 ** (-12 / 20), rel=1e-5)  # in the shadow's middle
    assert passing[30, 5] == 1  # before it begins
    assert np.all(passing[:20] == 1)
    assert transmission(Effects(drop_out=20.0), side, depths, flat + 3)[0, 0] == pytest.approx(0.1, rel=1e-5)
    np.testing.assert_allclose(slider_gain(Effects(sliders=(0.0, 4.0, -4.0)), depths)[[0, -1]], [0, -4], atol=0.05)


def test_reverberation_repeats_an_echo_deeper_and_weaker() -> None:
    field = np.zeros((2, 50), np.complex64)
    field[0, 10] = 1
    ghost = reverberate(Effects(reverberation=-20.0, reverberation_path=2.0), field, 0.1)
    assert ghost[0, 30] == pytest.approx(0.1)
    assert np.count_nonzero(ghost) == 2
    assert np.count_nonzero(field) == 1  # the caller's field is kept


def test_persistence_averages_with_the_frames_before() -> None:
    image = np.array([[8.0], [0.0], [0.0]], np.float32)
    persist(Effects(probe=dataclasses.replace(OTHER_PROBE, persistence=0.5)), image)
    assert image.ravel().tolist() == [8.0, 4.0, 2.0]


@pytest.mark.parametrize("difficulty", [MODERATE, HARD])
def test_a_difficulty_is_reproducible_by_its_seed(tmp_path: Path, difficulty: str) -> None:
    variant = Variant(difficulty, test_videos=10)
    for name, processes in (("one", 1), ("two", 2)):
        assert write_phantom(tmp_path / name, 20, SEED, variant=variant, processes=processes) == 20
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert phantom_is_complete(tmp_path / "one", 20, SEED, variant)
    assert not phantom_is_complete(tmp_path / "one", 20, SEED)
    assert json.loads((tmp_path / "one" / "phantom.json").read_text())["difficulty"] == difficulty


# Shifts


def test_a_neutral_shift_changes_nothing() -> None:
    assert plan(10, SEED, Variant(shift=Shift())) == plan(10, SEED)


@pytest.mark.parametrize(
    "shift",
    [
        Shift(angle=20),
        Shift(x=1.5),
        Shift(z=1.0),
        Shift(depth=3.0),
        Shift(rate=40),
        Shift(gain=9.0),
        Shift(speckle=1.8),
        Shift(off_axis=0.7),
        Shift(machine=True),
    ],
    ids=lambda shift: next(shift.changes())[0],
)
@pytest.mark.parametrize("difficulty", ["easy", HARD])
def test_a_shift_changes_the_image_but_neither_patient_nor_label(difficulty: str, shift: Shift) -> None:
    variant = Variant(difficulty, test_videos=10)
    before = plan(20, SEED, variant)[4]
    after = plan(20, SEED, dataclasses.replace(variant, shift=shift))[4]
    assert (after.name, after.kind, after.split) == (before.name, before.kind, before.split)
    for one, other in zip(before.measurements(), after.measurements(), strict=True):
        assert one.calc == other.calc
        assert f"{one.cm:.4f}" == f"{other.cm:.4f}"
        length = math.hypot(other.x2 - other.x1, other.y2 - other.y1) / after.scan.pixels_per_cm
        assert length == pytest.approx(other.cm, abs=1e-6)
    images = [render(short(patient)).astype(float) for patient in (before, after)]
    assert np.abs(images[0] - images[1]).mean() > 1
    if shift.angle:
        tilts = [math.atan2(row.x1 - row.x2, row.y2 - row.y1) for p in (before, after) for row in p.measurements()[:1]]
        assert math.degrees(tilts[1] - tilts[0]) == pytest.approx(20, abs=0.01)
    if shift.gain:
        # Grey levels rise by nine decibels where they are not cut off, but for the grey map.
        assert images[1].mean() > 1.2 * images[0].mean()
    if shift.rate:
        beats = [patient.scan.frames / patient.scan.fps * patient.heart.rate / 60 for patient in (before, after)]
        assert beats[1] > 1.2


@pytest.mark.parametrize("name", SHIFT_BOUNDS)
def test_a_shift_out_of_bounds_is_refused(name: str) -> None:
    low, high = SHIFT_BOUNDS[name]
    for value in (low - 0.1, high + 0.1, math.nan):
        with pytest.raises(ConfigError, match=f"shift: {name} is"):
            Shift(**{name: value})
    assert {field.name for field in dataclasses.fields(Shift)} == set(SHIFT_HELP)


# The programs


def test_the_program_counts_the_test_videos_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--videos", "10", "--test-only", "--processes", "1"]) == 0
    tests = [patient for patient in plan(10, 10) if patient.split == "test"]
    assert len(list(tmp_path.glob("Batch*/*.avi"))) == len(tests) == 3
    said = capsys.readouterr().out
    assert "3 videos made in " in said and " s, 3 in all, and " in said


def test_the_program_writes_a_shifted_test_set_and_prints_the_ceiling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--videos", "20", "--test", "10", "--test-only", "--difficulty", HARD, "--processes", "1"]
    assert main([str(tmp_path / "plain"), *common]) == 0
    said = capsys.readouterr().out
    assert "10 videos made" in said
    assert "Bayes bound, from the true lengths, 10 test videos: AUROC" in said
    assert main([str(tmp_path / "turned"), *common, "--angle", "15", "--machine"]) == 0
    marker = json.loads((tmp_path / "turned" / "phantom.json").read_text())
    assert marker["shift"] == {"angle": 15.0, "machine": True}
    tables = []
    for name in ("plain", "turned"):
        with (tmp_path / name / "MeasurementsList.csv").open(newline="") as file:
            tables.append([(row["HashedFileName"], row["Calc"], row["CalcValue"]) for row in csv.DictReader(file)])
    assert tables[0] == tables[1]
    assert main([str(tmp_path / "plain"), *common, "--angle", "15"]) != 0
    assert "holds a phantom with other settings" in capsys.readouterr().err


def test_a_run_makes_and_reads_its_difficulty(tmp_path: Path) -> None:
    settings = {"phantom_videos": 40, "phantom_test": 20, "phantom_difficulty": HARD, "phantom_dir": tmp_path / "p"}
    config = TrainConfig(**settings, phantom_abnormal=0.3, progress=False)  # type: ignore[arg-type]
    study = read_study(config)
    patients = {patient.name: patient for patient in plan(40, 10, Variant.of(config))}
    assert {clip.name: (clip.label, clip.split) for clip in study.clips} == {
        name: (int(patient.abnormal), patient.split) for name, patient in patients.items()
    }
    assert len(study.clips_in("test")) == 20
    other = dataclasses.replace(config, phantom_dir=tmp_path / "lost")
    with pytest.raises(Exception, match=r"--videos 40 --seed 10 --difficulty hard --test 20 --abnormal 0\.3"):
        read_study(other, again=True)
