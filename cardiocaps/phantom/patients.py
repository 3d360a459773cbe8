"""The patients of a phantom study: their hearts, machine settings, measurements and splits.

Machine settings, body size, position and heart rate are drawn independently of the diagnosis, so that only the geometry
of the heart can reveal the label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cardiocaps.phantom.anatomy import CALIPERS, Floats, Heart

NORMAL, HYPERTROPHIC, DILATED = "normal", "hypertrophic", "dilated"
ABNORMAL_PART = 0.2
SPLITS = {"train": 0.55, "val": 0.15, "test": 0.30}
SIZES = ((320, 240), (340, 256), (360, 270), (384, 288), (400, 300))  # width, height in pixels
CALCS = {"IVSd": 0.93, "LVIDd": 0.97, "LVPWd": 0.93, "IVSs": 0.5, "LVIDs": 0.9, "LVPWs": 0.5}
"""Measurement -> share of patients in which it is taken."""


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
    name: str
    batch: int
    split: str
    kind: str
    seed: int
    index: int
    heart: Heart
    scan: Scan
    calcs: tuple[str, ...]

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

        `calcs`: names like "LVIDd"; None: those of this patient in the study's table.
        """
        contraction = self.contraction()
        v = self.borders(np.zeros(1))[:, :, 0]
        rows = []
        for calc in self.calcs if calcs is None else calcs:
            frame = int(np.argmin(contraction) if calc.endswith("d") else np.argmax(contraction))
            ends = v[frame, list(CALIPERS[calc[:-1]])]
            x, y = self.scan.to_pixels(*self.scan.to_probe(np.zeros(2), ends))
            rows.append(Measurement(calc, float(ends[1] - ends[0]), frame, x[0], y[0], x[1], y[1]))
        return rows


def plan(videos: int, seed: int) -> tuple[Patient, ...]:
    """All patients of a study; 20 % abnormal, half of them hypertrophic and half dilated."""
    rng = np.random.default_rng([seed, videos])
    abnormal = int(ABNORMAL_PART * videos + 0.5)
    kinds = np.array([(HYPERTROPHIC, DILATED)[i % 2] for i in range(abnormal)] + [NORMAL] * (videos - abnormal))
    kinds = rng.permutation(kinds)
    splits = _splits(kinds != NORMAL)
    names: dict[str, None] = {}
    while len(names) < videos:
        names[f"0X{int(rng.integers(2**60, 2**64, dtype=np.uint64)):016X}"] = None
    return tuple(
        _patient(name, index * 4 // videos + 1, split, str(kind), seed, index)
        for index, (name, split, kind) in enumerate(zip(names, splits, kinds, strict=True))
    )


def _splits(abnormal: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> list[str]:
    """Put each video into the split that lacks most of its share, counted for each label."""
    counts = {label: dict.fromkeys(SPLITS, 0) for label in (False, True)}
    result = []
    for label in abnormal.tolist():
        count = counts[label]
        total = sum(count.values()) + 1
        split = max(SPLITS, key=lambda name: SPLITS[name] * total - count[name])
        count[split] += 1
        result.append(split)
    return result


def _patient(name: str, batch: int, split: str, kind: str, seed: int, index: int) -> Patient:
    rng = np.random.default_rng([seed, index, 1])
    body = rng.uniform(0.86, 1.14)
    rate = float(np.clip(rng.normal(70, 11), 50, 100))
    fps = int(rng.integers(40, 61))
    frames = int(np.clip(np.ceil(1.5 * 60 / rate * fps), 50, 90))
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
    common = {
        "ventricle_right": rng.uniform(1.5, 2.0) * body,
        "aorta_slope": rng.uniform(0.12, 0.36),
        "annulus": 1.05 * body,
        "sinus": rng.uniform(1.4, 1.75) * body,
        "atrium": rng.uniform(2.9, 3.7) * body,
        "atrium_length": rng.uniform(4.2, 5.2) * body,
        "phase": rng.random(),
        "breath": rng.uniform(0, 0.15),
    }
    heart = _heart(kind, body, rng)
    ratio = heart["diameter"] / (4.6 * body)
    length = body * (1 + 0.45 * (ratio - 1))
    squeeze = 1 - heart["diameter_systole"] / heart["diameter"]
    drawn = Heart(
        **heart,
        **common,
        rate=rate,
        apex=rng.uniform(5.6, 6.6) * length,
        base=rng.uniform(2.15, 2.5) * length,
        base_excursion=rng.uniform(2.6, 3.3) * squeeze * body,
    )
    place = Scan(width=width, height=height, fps=fps, frames=frames, depth=depth, **scan)
    always = {HYPERTROPHIC: ("IVSd", "LVPWd"), DILATED: ("LVIDd",)}.get(kind, ())
    calcs = tuple(calc for calc, part in CALCS.items() if rng.random() < part or calc in always)
    return Patient(name, batch, split, kind, seed, index, drawn, place, calcs or ("LVIDd",))


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
