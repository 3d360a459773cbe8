"""From the moving heart to B-mode frames: speckle, attenuation, gain, grey levels, the sector.

Scatterers have tissue coordinates and move with the tissue, so that speckle follows the wall. For each frame: look up
the scatterers on the grid of beams and depths, add thin leaflets, blur with the point-spread function (constant in
angle, so wider at depth), add noise and reverberation, apply attenuation and shadows, compress logarithmically, and
convert the beams to a sector. All steps are elementwise or gathers, without threaded matrix products, so a patient has
the same pixels in every process. `effects` makes an examination harder to read.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cardiocaps.phantom.anatomy import BORDERS, Floats, smoothstep
from cardiocaps.phantom.effects import (
    NO_EFFECTS,
    Taps,
    decorrelate,
    map_grey,
    persist,
    point_spread,
    reverberate,
    slider_gain,
    transmission,
)
from cardiocaps.phantom.patients import Patient, Scan

BEAMS, SAMPLES = 100, 224
U_MIN, U_MAX, U_STEP = -12.0, 10.0, 0.08  # grid of the tissue along the heart's axis, cm
V_STEP = 0.06  # and across it
LAYERS = BORDERS + 1
RV, LV, LA = 2, 4, 6
FAR = 12.0  # extent of the outermost layers, cm
LATERAL = (0.30, 0.225, 0.10, 0.03)  # point spread over beams: centre, then neighbours on either side
AXIAL = (0.42, 0.235, 0.05)  # over depth samples
NOISE_FIELDS = 3
# Echo in dB against heart muscle: of each layer, and of its upper and lower edge where they face the beam.
BODY = (-7.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, -10.0)
EDGES = ((None, None), (7, 6), (None, None), (6, 8), (None, None), (5, 5), (None, None), (7, None), (15, None))
LEAFLETS = {
    "anterior mitral leaflet": 3.0,
    "posterior mitral leaflet": 2.0,
    "chordae": -9.0,
    "right coronary cusp": -2.0,
    "non-coronary cusp": -2.0,
}

Single = NDArray[np.float32]


def render(patient: Patient) -> NDArray[np.uint8]:
    """All frames as grey images [frames, height, width]."""
    scan = patient.scan
    rng = np.random.default_rng([patient.seed, patient.index, 2])

    angles = np.linspace(-scan.half_angle, scan.half_angle, BEAMS)
    depths = (np.arange(SAMPLES) + 0.5) * scan.depth / SAMPLES
    u, v = scan.to_heart(np.sin(angles)[:, None] * depths, np.cos(angles)[:, None] * depths)
    grid = np.arange(U_MIN, U_MAX, U_STEP)
    column = np.clip((u - U_MIN) / U_STEP + 0.5, 0, len(grid) - 1).astype(np.intp).ravel()
    v32 = v.astype(np.float32).ravel()

    tissue = _Tissue(patient, grid, rng)
    effects = scan.effects
    taps = point_spread(effects, LATERAL, AXIAL)
    noise = _blur(_complex(rng, (NOISE_FIELDS, BEAMS, SAMPLES)), taps)
    rolls = rng.integers(0, (NOISE_FIELDS, BEAMS, SAMPLES), (scan.frames, 3))
    gain, haze, hiss = _machine(scan, rng, angles, depths, taps)
    threads = _leaflets(patient, rng)
    borders = patient.borders(grid).astype(np.float32)
    slope, start = tissue.rows(borders, patient.contraction())
    own = np.random.default_rng([patient.seed, patient.index, 4])  # of the effects, so that nothing else changes
    fresh = _complex(own, (BEAMS, SAMPLES))
    passing = transmission(effects, angles / scan.half_angle, depths, _patches(own, (BEAMS, SAMPLES), 14, 28))
    if effects.sliders:
        gain += slider_gain(effects, depths).astype(np.float32)

    image = np.empty((scan.frames, BEAMS * SAMPLES), np.float32)
    for t in range(scan.frames):
        passed = np.zeros(v32.shape, np.int8)
        for border in borders[t]:
            passed += v32 > border.take(column)
        layer = passed * np.intp(len(grid))
        layer += column
        row = slope[t].take(layer)
        row *= v32
        row += start[t].take(layer)
        field = tissue.scatterers.take(row.astype(np.intp), mode="clip").reshape(BEAMS, SAMPLES)
        places, echoes = threads[t]
        np.add.at(field.reshape(-1), places, echoes)
        if effects.decorrelation:
            moved = np.roll(fresh, own.integers(0, (BEAMS, SAMPLES)).tolist(), (0, 1))
            field = decorrelate(field, moved, effects.decorrelation)
        field = _blur(field, taps)
        if effects != NO_EFFECTS:
            field = reverberate(effects, field * passing, scan.depth / SAMPLES)
        field += haze
        which, across, along = rolls[t]
        field += hiss * np.roll(noise[which], (across, along), (0, 1))
        power = field.real**2 + field.imag**2
        np.log10(power, out=power)
        power *= 10
        power += gain
        image[t] = power.ravel()
    persist(effects, image)
    image += _turned_gain(scan, image[0], depths)
    if effects.gain:
        image += np.float32(effects.gain)
    image *= 255 / scan.dynamic_range
    np.clip(image, 0, 255, out=image)
    map_grey(effects, image)
    return _sector(scan, image)


class _Tissue:
    """Scatterers [columns along u, rows through the layers] and their positions in each frame."""

    def __init__(self, patient: Patient, grid: Floats, rng: np.random.Generator) -> None:
        self.heart, self.grid = patient.heart, grid
        relaxed = self.heart.borders(grid, np.zeros(1))[0]
        thickness = np.diff(relaxed, axis=0)
        extents = [FAR, *thickness.max(axis=1).tolist(), FAR]
        self.counts = [math.ceil(extent / V_STEP) + 2 for extent in extents]
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        rows = int(self.starts[-1])
        self.stride = rows

        echo = np.empty((len(grid), rows), np.float32)
        shine = np.zeros((len(grid), rows), np.float32)
        facing = _facing(patient.scan, grid, relaxed)
        for k in range(LAYERS):
            part = slice(int(self.starts[k]), int(self.starts[k + 1]))
            count = self.counts[k]
            body = patient.scan.blood + (2 if k == RV else 0) if k in (RV, LV, LA) else BODY[k]
            level = np.full((len(grid), count), body)
            if k == 0:
                above = FAR - np.arange(count) * V_STEP
                level -= 2.0 * np.clip(above - 1.5, 0, 4)
                from_top, from_bottom = np.full_like(level, FAR), np.broadcast_to(above, level.shape)
            elif k == LAYERS - 1:
                below = np.arange(count) * V_STEP
                level -= 3.2 * np.clip(below, 0, 6)
                level = self._descending_aorta(level, below)
                from_top, from_bottom = np.broadcast_to(below, level.shape), np.full_like(level, FAR)
            else:
                fraction = (np.arange(count) + 0.5) / (count - 1)
                from_top = thickness[k - 1][:, None] * fraction
                from_bottom = thickness[k - 1][:, None] * (1 - fraction)
            echo[:, part] = 10 ** (level / 20)
            for level_edge, distance, border in zip(EDGES[k], (from_top, from_bottom), (k - 1, k), strict=True):
                if level_edge is not None:
                    width = 0.13 if k == LAYERS - 1 else 0.08
                    profile = np.exp(-((distance / width) ** 2))
                    shine[:, part] += 10 ** (level_edge / 20) * facing[border][:, None] * profile
        patches = _patches(rng, echo.shape, 9, 12)
        self.scatterers = (echo * 10 ** (3.0 * patches / 20)).astype(np.float32) * _complex(rng, echo.shape)
        # A smooth border echoes in phase, but not everywhere as strongly.
        rough = 1 + 0.35 * rng.standard_normal(echo.shape, dtype=np.float32)
        self.scatterers += shine * rough * 10 ** (4.0 * _patches(rng, echo.shape, 9, 9) / 20)
        self.scatterers = self.scatterers.ravel()

    def _descending_aorta(self, level: Floats, below: Floats) -> Floats:
        """The round lumen behind the left atrium, with a brighter wall."""
        from_centre = np.hypot((self.grid - self.heart.base - 0.4)[:, None], below - 1.5) - 0.75 * self.heart.annulus
        level = np.where(from_centre < 0, -30.0, level)
        result: Floats = level + 9 * np.exp(-((from_centre / 0.12) ** 2))
        return result

    def rows(self, borders: Single, contraction: Floats) -> tuple[Single, Single]:
        """Slope and start [T, 9 * N], by layer and column: the scatterer at v has index slope * v + start."""
        frames, _, columns = borders.shape
        base = self.heart.base_position(contraction)[:, None]
        apex, rest = -self.heart.apex, self.heart.base
        stretch = (rest - apex) / (base - apex)
        u = np.where(self.grid < apex, self.grid, apex + (self.grid - apex) * stretch)
        u = np.where(self.grid > base, self.grid + rest - base, u)
        column = np.clip((u - U_MIN) / U_STEP + 0.5, 0, columns - 1).astype(np.int64)
        slope = np.full((frames, LAYERS, columns), 1 / V_STEP, np.float64)
        offset = np.empty((frames, LAYERS, columns), np.float64)
        offset[:, 0] = FAR / V_STEP - borders[:, 0] / V_STEP
        offset[:, -1] = self.starts[-2] - borders[:, -1] / V_STEP
        for k in range(1, LAYERS - 1):
            top, thickness = borders[:, k - 1], borders[:, k] - borders[:, k - 1]
            slope[:, k] = (self.counts[k] - 1.02) / np.maximum(thickness, 1e-3)
            offset[:, k] = self.starts[k] + 0.01 - slope[:, k] * top
        offset += (column * self.stride)[:, None]
        flat = frames, LAYERS * columns
        return slope.reshape(flat).astype(np.float32), offset.reshape(flat).astype(np.float32)


def _facing(scan: Scan, grid: Floats, borders: Floats) -> Floats:
    """How much each border faces the beam, in [0, 1]: a power of the cosine between beam and normal."""
    slope = np.gradient(borders, grid, axis=1)
    x, z = scan.to_probe(np.broadcast_to(grid, borders.shape), borders)
    cos, sin = np.cos(scan.tilt), np.sin(scan.tilt)
    along_x, along_z = cos - slope * sin, sin + slope * cos
    cosine = np.abs(along_x * z - along_z * x) / np.hypot(along_x, along_z) / np.hypot(x, z)
    result: Floats = cosine**6
    return result


def _leaflets(patient: Patient, rng: np.random.Generator) -> list[tuple[NDArray[np.int64], NDArray[np.complex64]]]:
    """Per frame: flat places on the grid of beams and samples, and the echoes to be added there."""
    scan, heart = patient.scan, patient.heart
    phase = heart.cycle_phase(patient.seconds())
    lines = heart.leaflets(heart.contraction(phase), heart.mitral_opening(phase), heart.aortic_opening(phase))
    shift = heart.shift(patient.seconds())[:, None]
    places, echoes = [], []
    for name, line in lines.items():
        points = line.shape[1]
        strength = 10 ** (LEAFLETS[name] / 20) * (0.6 + 0.4 * np.abs(_complex(rng, (points,))))
        x, z = scan.to_probe(line[..., 0], line[..., 1] + shift)
        step_x, step_z = np.gradient(x, axis=1), np.gradient(z, axis=1)
        radius, length = np.hypot(x, z), np.hypot(step_x, step_z) + 1e-6
        cosine = np.abs(step_x * z - step_z * x) / (length * radius)
        echo = strength * (0.35 + 0.65 * cosine**3) * np.clip(length / 0.04, 0.2, 2.5)
        beam = np.round((np.arctan2(x, z) / scan.half_angle + 1) / 2 * (BEAMS - 1)).astype(np.int64)
        sample = radius / scan.depth * SAMPLES - 0.5
        first = np.floor(sample).astype(np.int64)
        seen = (beam >= 0) & (beam < BEAMS) & (first >= 0) & (first < SAMPLES - 1)
        for offset in (0, 1):
            places.append(np.where(seen, beam * SAMPLES + first + offset, 0))
            echoes.append(np.where(seen, echo * (1 - np.abs(sample - first - offset)), 0))
    place, echo = np.concatenate(places, 1), np.concatenate(echoes, 1).astype(np.complex64)
    return list(zip(place, echo, strict=True))


def _machine(
    scan: Scan,
    rng: np.random.Generator,
    angles: Floats,
    depths: Floats,
    taps: tuple[Taps, Taps],
) -> tuple[Single, NDArray[np.complex64], Single]:
    """Gain in dB, still reverberation, and the noise's amplitude, each over beams and samples."""
    side = angles[:, None] / scan.half_angle
    gain = -scan.attenuation * (depths - 8) - 5 * np.abs(side) ** 3
    edge = scan.shadow_side * side
    gain = gain - scan.shadow * smoothstep((edge - 0.62) / 0.25) * smoothstep((depths - 1.5) / 2)
    for _ in range(2):  # beams weakened by the chest wall
        centre, width = rng.uniform(-0.95, 0.95), rng.uniform(0.06, 0.18)
        gain = gain - rng.uniform(0, 6) * np.exp(-(((side - centre) / width) ** 2))
    gain[:, depths < 0.25] = -200.0
    bands = np.exp(-depths / 1.3) * 2.5 + 0.25 * np.exp(-depths / 4)
    echo = rng.uniform(1.0, 1.6)
    for order in (1, 2, 3):
        bands = bands + 0.5 / order * np.exp(-(((depths - echo * order) / 0.12) ** 2))
    haze = 10 ** (scan.haze / 20) * bands.astype(np.float32) * _blur(_complex(rng, (BEAMS, SAMPLES)), taps)
    hiss = 10 ** ((-40 + 0.75 * depths) / 20) * np.ones((BEAMS, 1))
    return gain.astype(np.float32), haze.astype(np.complex64), hiss.astype(np.float32)


def _turned_gain(scan: Scan, frame: Single, depths: Floats) -> float:
    """The gain in dB at which the mean grey level of a frame (in dB) is the scan's `brightness`.

    Without it more muscle would mean a brighter image, and brightness would reveal the diagnosis.
    """
    weights = np.tile(depths / depths.mean(), BEAMS).astype(np.float32)
    low, high = -20.0, 80.0
    for _ in range(10):
        gain = (low + high) / 2
        grey = np.clip((frame + np.float32(gain)) * np.float32(255 / scan.dynamic_range), 0, 255)
        low, high = (gain, high) if (grey * weights).mean() < scan.brightness else (low, gain)
    return (low + high) / 2


def _sector(scan: Scan, beams: Single) -> NDArray[np.uint8]:
    """Bilinear scan conversion, with a tick for each cm: [T, BEAMS * SAMPLES] -> [T, height, width]."""
    from scipy.sparse import csr_array  # type: ignore[import-untyped]

    x = (np.arange(scan.width, dtype=np.float32) - scan.width / 2) / np.float32(scan.pixels_per_cm)
    z = (np.arange(scan.height, dtype=np.float32)[:, None] - np.float32(scan.top)) / np.float32(scan.pixels_per_cm)
    beam = (np.arctan2(x, z) / np.float32(scan.half_angle) + 1) * np.float32((BEAMS - 1) / 2)
    sample = np.hypot(x, z) * np.float32(SAMPLES / scan.depth) - np.float32(0.5)
    inside = ((beam >= 0) & (beam < BEAMS - 1) & (sample >= 0) & (sample < SAMPLES - 1)).ravel()
    beam, sample = beam.ravel()[inside], sample.ravel()[inside]
    b, s = beam.astype(np.int32), sample.astype(np.int32)
    fb, fs = beam - b, sample - s
    index, weight = np.empty((len(b), 4), np.int32), np.empty((len(b), 4), np.float32)
    for corner, (side, deep) in enumerate(((0, 0), (0, 1), (1, 0), (1, 1))):
        index[:, corner] = (b + side) * SAMPLES + (s + deep)
        weight[:, corner] = (fb if side else 1 - fb) * (fs if deep else 1 - fs)
    pointer = np.concatenate([[0], np.cumsum(4 * inside)]).astype(np.int32)  # pixels outside: empty rows
    matrix = csr_array((weight.ravel(), index.ravel(), pointer), shape=(len(inside), BEAMS * SAMPLES))

    converted = (matrix @ np.ascontiguousarray(beams.T)).astype(np.uint8)
    image = np.ascontiguousarray(converted.T).reshape(len(beams), scan.height, scan.width)
    for cm in range(int(scan.depth) + 1):
        y = round(scan.top + cm * scan.pixels_per_cm)
        image[:, y, scan.width - (11 if cm % 5 == 0 else 7) : scan.width - 3] = 170
    return image


def _complex(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.complex64]:
    """Circular complex Gaussian scatterers of mean power 1."""
    parts = rng.standard_normal((*shape, 2), dtype=np.float32)
    parts *= np.float32(math.sqrt(0.5))
    return parts.view(np.complex64)[..., 0]


def _patches(rng: np.random.Generator, shape: tuple[int, ...], rows: int, columns: int) -> Single:
    """Smooth unit-variance variation with a cell every `rows` x `columns`, bilinear between."""
    coarse = rng.standard_normal((shape[0] // rows + 2, shape[1] // columns + 2), dtype=np.float32)
    y, x = np.arange(shape[0], dtype=np.float32) / rows, np.arange(shape[1], dtype=np.float32) / columns
    i, j = y.astype(int), x.astype(int)
    fy, fx = (y - i)[:, None], x - j
    down = coarse[i] * (1 - fy) + coarse[i + 1] * fy
    result: Single = (down[:, j] * (1 - fx) + down[:, j + 1] * fx) * np.float32(1.4)
    return result


def _blur(field: NDArray[np.complex64], spread: tuple[Taps, Taps]) -> NDArray[np.complex64]:
    """The point-spread function over beams and along them [..., beams, samples]; keeps speckle's mean power."""
    parts = np.ascontiguousarray(field).view(np.float32)
    for taps, axis, stride in ((spread[0], -2, 1), (spread[1], -1, 2)):
        weights = np.array(taps, np.float32)
        weights /= np.sqrt(weights[0] ** 2 + 2 * (weights[1:] ** 2).sum())
        out = parts * weights[0]
        for step, weight in enumerate(weights[1:], 1):
            head = [slice(None)] * parts.ndim
            tail = [slice(None)] * parts.ndim
            head[axis], tail[axis] = slice(None, -step * stride), slice(step * stride, None)
            scaled = parts * weight
            out[tuple(tail)] += scaled[tuple(head)]
            out[tuple(head)] += scaled[tuple(tail)]
        parts = out
    return parts.view(np.complex64)
