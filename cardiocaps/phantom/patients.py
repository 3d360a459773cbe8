"""The patients of a phantom study: their hearts, machine settings, measurements and splits.

Machine settings, position and heart rate are drawn independently of the diagnosis, so that only the geometry of the
heart can reveal the label. At difficulty easy this holds for body size too; in the others large hearts are more often
abnormal, because the label rule has thresholds in centimetres.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from cardiocaps.errors import ConfigError
from cardiocaps.phantom.anatomy import CALIPERS, Floats, Heart
from cardiocaps.phantom.effects import NO_EFFECTS, Effects, draw_effects, shifted
from cardiocaps.phantom.variants import ABNORMAL_PART, NO_SHIFT, USUAL, Difficulty, Shift, Variant

Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]

NORMAL, HYPERTROPHIC, DILATED = "normal", "hypertrophic", "dilated"
SPLITS = {"train": 0.55, "val": 0.15, "test": 0.30}
SIZES = ((320, 240), (340, 256), (360, 270), (384, 288), (400, 300))  # width, height in pixels
CALCS = {"IVSd": 0.93, "LVIDd": 0.97, "LVPWd": 0.93, "IVSs": 0.5, "LVIDs": 0.9, "LVPWs": 0.5}
"""Measurement -> share of patients in which it is taken."""

THRESHOLDS: Mapping[str, float] = MappingProxyType({calc: 5.6 if calc.startswith("LVID") else 1.1 for calc in CALCS})
"""Measurement -> smallest abnormal value in cm, as in the label rule of EchoNet-LVH."""

DECIDING_CALCS = ("IVSd", "LVIDd", "LVPWd")
"""What decides about the label in the difficulties other than easy."""

READER_CALCS = (*DECIDING_CALCS, "LVIDs")
"""What a reader measures there. LVIDs is smaller than LVIDd, so it decides nothing more.

A systolic wall is compared with the same threshold as a diastolic one, so the label would depend most on whether it was
measured, which no image shows.
"""

READER_ERROR: Mapping[str, float] = MappingProxyType({"IVSd": 0.097, "LVIDd": 0.035, "LVPWd": 0.133, "LVIDs": 0.071})
"""Measurement -> standard deviation of one reader's error, as a share of the length.

From the mean absolute differences between two readers, 11, 4, 15 and 8 % of the mean (J Am Soc Echocardiogr 2021;
34:443-445, table 2, doi:10.1016/j.echo.2020.11.017): for two independent Gaussian errors of standard deviation s it is
2 s / sqrt(pi).
"""


@dataclass(frozen=True)
class Scan:
    """The machine settings, and the position of the heart; x to the right, z away from the probe, in cm."""

    width: int
    height: int
    fps: int
    frames: int
    depth: float  # of the sector
    half_angle: float  # of the sector, radians
    origin_x: float  # where the heart's origin lies
    origin_z: float
    tilt: float  # of the heart's long axis, radians; positive turns the base away from the probe
    brightness: float  # mean grey level of the sector, which the gain is set for
    dynamic_range: float  # dB between black and white
    blood: float  # dB, against heart muscle
    haze: float  # dB, reverberation near the probe, against heart muscle
    attenuation: float  # dB per cm that remain after time-gain compensation
    shadow: float  # dB lost behind a rib at one edge; 0 without one
    shadow_side: int  # -1 left, +1 right
    effects: Effects = NO_EFFECTS

    @property
    def top(self) -> float:
        """Pixels above the probe."""
        return 8.0

    @property
    def pixels_per_cm(self) -> float:
        return (self.height - 8.0 - self.top) / self.depth

    def to_probe(self, u: Floats, v: Floats) -> tuple[Floats, Floats]:
        """Heart coordinates to x and z in cm."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        return self.origin_x + u * cos - v * sin, self.origin_z + u * sin + v * cos

    def to_heart(self, x: Floats, z: Floats) -> tuple[Floats, Floats]:
        """x and z in cm to heart coordinates."""
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        x, z = x - self.origin_x, z - self.origin_z
        return x * cos + z * sin, z * cos - x * sin

    def to_pixels(self, x: Floats, z: Floats) -> tuple[Floats, Floats]:
        """x and z in cm to the image's column and row, both counted from the centre of the first pixel."""
        return self.width / 2 + x * self.pixels_per_cm, self.top + z * self.pixels_per_cm


@dataclass(frozen=True)
class Measurement:
    """One row of the measurements' table."""

    calc: str
    cm: float
    frame: int
    x1: float
    y1: float
    x2: float
    y2: float


@dataclass(frozen=True)
class Patient:
    """A patient and the examination.

    Attributes:
        written: measurement -> cm that the reader wrote down; None: the drawn lengths.
        true: measurement -> cm of the examination that `written` belongs to, without the reader's error.
    """

    name: str
    batch: int
    split: str
    kind: str
    seed: int
    index: int
    heart: Heart
    scan: Scan
    calcs: tuple[str, ...]
    written: Mapping[str, float] | None = None
    true: Mapping[str, float] | None = None

    @property
    def abnormal(self) -> bool:
        return self.kind != NORMAL

    @property
    def video(self) -> str:
        """The video's path below the study's folder."""
        return f"Batch{self.batch}/{self.name}.avi"

    def seconds(self) -> Floats:
        """The time of each frame."""
        return np.arange(self.scan.frames) / self.scan.fps

    def contraction(self) -> Floats:
        return self.heart.contraction(self.heart.cycle_phase(self.seconds()))

    def borders(self, u: Floats) -> Floats:
        """v of the borders in each frame, breathing included: u [N] -> [frames, 8, N]."""
        shift = self.heart.shift(self.seconds())
        return self.heart.borders(u, self.contraction()) + shift[:, None, None]

    def measurements(self, calcs: Sequence[str] | None = None) -> list[Measurement]:
        """Calipers on the drawn borders, in the frame nearest to end-diastole (d) or end-systole (s).

        A reader's calipers have the length that was written, about the middle of the drawn length.

        `calcs`: names like "LVIDd"; None: those of this patient in the study's table.
        """
        contraction = self.contraction()
        v = self.borders(np.zeros(1))[:, :, 0]
        rows = []
        for calc in self.calcs if calcs is None else calcs:
            frame = int(np.argmin(contraction) if calc.endswith("d") else np.argmax(contraction))
            ends = v[frame, list(CALIPERS[calc[:-1]])]
            if self.written is not None and calc in self.written:
                ends = ends.mean() + np.array([-0.5, 0.5]) * self.written[calc]
            x, y = self.scan.to_pixels(*self.scan.to_probe(np.zeros(2), ends))
            rows.append(Measurement(calc, float(ends[1] - ends[0]), frame, x[0], y[0], x[1], y[1]))
        return rows


def plan(videos: int, seed: int, variant: Variant = USUAL) -> tuple[Patient, ...]:
    """All patients of a study; 20 % abnormal, at difficulty easy half of them hypertrophic and half dilated.

    Raises:
        ConfigError: there are no more videos than the variant has for the test.
    """
    if variant.test_videos is not None:
        patients = _test_first(videos, seed, variant)
    else:
        rng = np.random.default_rng([seed, videos])
        abnormal = int(ABNORMAL_PART * videos + 0.5)
        kinds = np.array([(HYPERTROPHIC, DILATED)[i % 2] for i in range(abnormal)] + [NORMAL] * (videos - abnormal))
        kinds = rng.permutation(kinds)
        splits = _splits(kinds != NORMAL, SPLITS)
        names: dict[str, None] = {}
        while len(names) < videos:
            names[_name(rng)] = None
        patients = _patients(names, splits, kinds.tolist(), seed, variant.difficulty_settings)
    if variant.test_only:
        patients = tuple(patient for patient in patients if patient.split == "test")
    return tuple(_shifted(patient, variant.shift) for patient in patients)


def _test_first(videos: int, seed: int, variant: Variant) -> tuple[Patient, ...]:
    """The test patients, then the others in an order of which a smaller study has the beginning."""
    tests = variant.test_videos or 0
    if videos <= tests:
        raise ConfigError(f"phantom: videos is {videos}; expected more than the {tests} test videos")
    sizes = {part: share for part, share in SPLITS.items() if part != "test"}
    tested = np.random.default_rng([seed, 5]).permutation(_evenly(tests, ABNORMAL_PART))
    others = _evenly(videos - tests, variant.abnormal)
    diseases = [HYPERTROPHIC, DILATED]
    kinds = [NORMAL if not abnormal else diseases[i % 2] for part in (tested, others) for i, abnormal in _counted(part)]
    names = np.random.default_rng([seed, 6])
    named = [_name(names) for _ in kinds]
    return _patients(named, ["test"] * tests + _splits(others, sizes), kinds, seed, variant.difficulty_settings)


def _evenly(count: int, share: float) -> Flags:
    """`count` labels of which every beginning has as nearly as possible the `share` of true ones."""
    reached = np.floor(np.arange(count + 1) * share + 0.5)
    return np.diff(reached) > 0


def _counted(labels: Flags) -> Iterable[tuple[int, bool]]:
    """Each label with the number of true ones up to it."""
    return zip(np.cumsum(labels).tolist(), labels.tolist(), strict=True)


def _name(rng: np.random.Generator) -> str:
    return f"0X{int(rng.integers(2**60, 2**64, dtype=np.uint64)):016X}"


def _patients(
    names: Iterable[str], splits: Sequence[str], kinds: Sequence[str], seed: int, difficulty: Difficulty | None
) -> tuple[Patient, ...]:
    about = zip(names, splits, kinds, strict=True)
    videos = len(kinds)
    return tuple(
        _patient(name, index * 4 // videos + 1, split, kind, seed, index)
        if difficulty is None
        else _read_patient(name, index * 4 // videos + 1, split, kind != NORMAL, seed, index, difficulty)
        for index, (name, split, kind) in enumerate(about)
    )


def _splits(abnormal: Flags, shares: Mapping[str, float]) -> list[str]:
    """Put each video into the split that lacks most of its share, counted for each label."""
    counts = {label: dict.fromkeys(shares, 0) for label in (False, True)}
    result = []
    for label in abnormal.tolist():
        count = counts[label]
        total = (sum(count.values()) + 1) / sum(shares.values())
        split = max(shares, key=lambda name: shares[name] * total - count[name])
        count[split] += 1
        result.append(split)
    return result


def _patient(name: str, batch: int, split: str, kind: str, seed: int, index: int) -> Patient:
    rng = np.random.default_rng([seed, index, 1])
    body = rng.uniform(0.86, 1.14)
    rate, scan = _examination(rng)
    common = _common(body, rng)
    drawn = _assembled(body, rate, _heart(kind, body, rng), common, rng)
    always = {HYPERTROPHIC: ("IVSd", "LVPWd"), DILATED: ("LVIDd",)}.get(kind, ())
    calcs = tuple(calc for calc, part in CALCS.items() if rng.random() < part or calc in always)
    return Patient(name, batch, split, kind, seed, index, drawn, scan, calcs or ("LVIDd",))


def _read_patient(
    name: str, batch: int, split: str, abnormal: bool, seed: int, index: int, difficulty: Difficulty
) -> Patient:
    """A patient of the difficulty's population whom the reader's measurements make abnormal, or normal.

    Patients are drawn until one has the wanted label. This changes the share of the labels but not how likely a heart
    is given its label, so the best order of the patients remains that of the population (`ceiling`).
    """
    rng = np.random.default_rng([seed, index, 1])
    rate, scan = _examination(rng)
    depth = rng.uniform(*difficulty.depth)
    scan = replace(scan, depth=depth, effects=draw_effects(difficulty.image, rng))
    calcs = READER_CALCS if rng.random() < CALCS["LVIDs"] else DECIDING_CALCS
    while True:
        body = rng.uniform(0.86, 1.14)
        common = _common(body, rng)
        common["breath"] += difficulty.image * rng.uniform(0, 0.45)
        heart = _assembled(body, rate, _overlapping_heart(body, difficulty, rng), common, rng)
        # An oblique plane misses the apex, so that the ventricle seems shorter.
        apex = heart.apex * (1 - difficulty.image * rng.uniform(0, 0.2))
        heart = replace(heart, apex=apex, off_axis=difficulty.image * rng.uniform(0, 0.6))
        patient = Patient(name, batch, split, NORMAL, seed, index, heart, scan, calcs)
        true = {row.calc: row.cm for row in patient.measurements()}
        errors = rng.standard_normal(len(calcs)) * difficulty.reader
        written = {calc: cm * (1 + READER_ERROR[calc] * e) for (calc, cm), e in zip(true.items(), errors, strict=True)}
        if "LVIDs" in written:  # no reader writes down a ventricle that grows in systole
            written["LVIDs"] = min(written["LVIDs"], 0.98 * written["LVIDd"])
        # As the table has them: a label on the threshold's very edge must not depend on the digits.
        written = {calc: round(cm, 4) for calc, cm in written.items()}
        reached = [calc for calc, cm in written.items() if cm >= THRESHOLDS[calc]]
        if bool(reached) == abnormal:
            wall = any(not calc.startswith("LVID") for calc in reached)
            kind = HYPERTROPHIC if wall else DILATED if reached else NORMAL
            return replace(patient, kind=kind, written=written, true=true)


def _shifted(patient: Patient, shift: Shift) -> Patient:
    """The same patient in a shifted examination, with the measurements of the unshifted one."""
    if shift == NO_SHIFT:
        return patient
    scan, heart = patient.scan, patient.heart
    true = patient.true or {row.calc: row.cm for row in patient.measurements()}
    rate = float(np.clip(heart.rate + shift.rate, 40, 180))
    moved = replace(
        scan,
        tilt=scan.tilt + np.radians(shift.angle),
        origin_x=scan.origin_x + shift.x,
        origin_z=scan.origin_z + shift.z,
        depth=scan.depth + shift.depth,
        frames=scan.frames if shift.rate == 0 else _frames(rate, scan.fps),
        effects=shifted(scan.effects, shift.gain, shift.speckle, shift.machine),
    )
    heart = replace(heart, rate=rate, off_axis=float(np.hypot(heart.off_axis, shift.off_axis)))
    return replace(patient, heart=heart, scan=moved, written=patient.written or true, true=true)


def _frames(rate: float, fps: int) -> int:
    """Frames of one and a half beats, within what the data set has."""
    return int(np.clip(np.ceil(1.5 * 60 / rate * fps), 50, 90))


def _examination(rng: np.random.Generator) -> tuple[float, Scan]:
    """Heart rate, machine settings and position."""
    rate = float(np.clip(rng.normal(70, 11), 50, 100))
    fps = int(rng.integers(40, 61))
    width, height = SIZES[rng.integers(len(SIZES))]
    depth = rng.uniform(14.0, 19.0)
    scan = {
        "origin_x": rng.uniform(-2.2, 1.0),
        "origin_z": rng.uniform(6.5, 8.9),
        "tilt": np.radians(rng.uniform(-15, 15)),
        "brightness": rng.uniform(36, 60),
        "dynamic_range": rng.uniform(52, 66),
        "blood": rng.uniform(-34, -26),
        "haze": rng.uniform(-12, -3),
        "attenuation": rng.uniform(0.1, 0.7),
        "shadow": float(rng.uniform(10, 24) * (rng.random() < 0.35)),
        "shadow_side": int(rng.choice([-1, 1])),
        "half_angle": np.radians(rng.uniform(37, 45)),
    }
    return rate, Scan(width=width, height=height, fps=fps, frames=_frames(rate, fps), depth=depth, **scan)


def _common(body: float, rng: np.random.Generator) -> dict[str, float]:
    """What does not depend on the disease."""
    return {
        "ventricle_right": rng.uniform(1.5, 2.0) * body,
        "aorta_slope": rng.uniform(0.12, 0.36),
        "annulus": 1.05 * body,
        "sinus": rng.uniform(1.4, 1.75) * body,
        "atrium": rng.uniform(2.9, 3.7) * body,
        "atrium_length": rng.uniform(4.2, 5.2) * body,
        "phase": rng.random(),
        "breath": rng.uniform(0, 0.15),
    }


def _assembled(
    body: float, rate: float, heart: dict[str, float], common: dict[str, float], rng: np.random.Generator
) -> Heart:
    ratio = heart["diameter"] / (4.6 * body)
    length = body * (1 + 0.45 * (ratio - 1))
    squeeze = 1 - heart["diameter_systole"] / heart["diameter"]
    return Heart(
        **heart,
        **common,
        rate=rate,
        apex=rng.uniform(5.6, 6.6) * length,
        base=rng.uniform(2.15, 2.5) * length,
        base_excursion=rng.uniform(2.6, 3.3) * squeeze * body,
    )


def _overlapping_heart(body: float, difficulty: Difficulty, rng: np.random.Generator) -> dict[str, float]:
    """Septum, posterior wall and both diameters of a heart of the population, whatever its label will be."""
    thick, wide = difficulty.diseased
    disease = rng.random()
    wall = float(np.clip(rng.normal(*difficulty.wall), 0.5, 1.4))
    diameter = float(np.clip(4.55 * body + rng.normal(0, difficulty.diameter), 3.6, 6.2))
    shortening = rng.uniform(0.27, 0.40)
    if disease < thick:
        wall = rng.uniform(*difficulty.thick)
        diameter *= 0.95
    elif disease < thick + wide:
        diameter, shortening = rng.uniform(*difficulty.wide), rng.uniform(0.08, 0.28)
    uneven = float(np.clip(rng.normal(0, 0.05), -0.15, 0.15))
    return {
        "septum": wall * (1 + uneven),
        "posterior_wall": wall * (1 - uneven),
        "diameter": diameter,
        "diameter_systole": diameter * (1 - shortening),
    }


def _heart(kind: str, body: float, rng: np.random.Generator) -> dict[str, float]:
    """Septum, posterior wall and both diameters, with a distance from the thresholds of the label rule."""
    uneven = rng.uniform(-0.05, 0.05)
    if kind == NORMAL:
        wall = rng.uniform(0.62, 0.74)
        diameter = float(np.clip(4.55 * body + rng.normal(0, 0.2), 3.9, 5.15))
        shortening = rng.uniform(0.29, 0.35)
    elif kind == HYPERTROPHIC:
        wall = rng.uniform(1.3, 1.75)
        diameter = float(np.clip(4.3 * body + rng.normal(0, 0.2), 3.7, 4.8))
        shortening = rng.uniform(0.32, 0.42)
    else:
        wall = rng.uniform(0.68, 0.85)
        diameter, shortening = rng.uniform(6.0, 7.0), rng.uniform(0.08, 0.17)
    return {
        "septum": wall * (1 + uneven),
        "posterior_wall": wall * (1 - uneven),
        "diameter": diameter,
        "diameter_systole": diameter * (1 - shortening),
    }
