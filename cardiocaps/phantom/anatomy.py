"""The heart in the parasternal long-axis plane, as curves in centimetres that move over the cardiac cycle.

Heart coordinates: u runs along the left ventricle's long axis (apex negative, base positive), v across it,
from the chest wall to the back. The origin is on the axis, at the level of the mitral leaflet tips, where
diameters and walls are measured. At each u the plane is a stack of layers; border k, as a function of u, lies
between layers k and k + 1:

    layer     0      1        2     3            4      5            6       7               8
    u < base  chest  RV wall  RV    septum       LV     (none)       (none)  posterior wall  behind
    u > base  chest  RV wall  RVOT  aortic wall  aorta  aortic wall  LA      LA wall         behind

A layer that does not exist at some u has thickness zero there. All measurements are taken on these borders.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BORDERS = 8
RV_WALL, SEPTUM_RIGHT, SEPTUM_LEFT, AORTA_BACK, LA_FRONT, POSTERIOR_INNER, POSTERIOR_OUTER = range(1, BORDERS)
CALIPERS = {  # the two borders between which each wall or diameter is measured, at u = 0
    "IVS": (SEPTUM_RIGHT, SEPTUM_LEFT),
    "LVID": (SEPTUM_LEFT, POSTERIOR_INNER),
    "LVPW": (POSTERIOR_INNER, POSTERIOR_OUTER),
}


@dataclass(frozen=True)
class Heart:
    """Lengths in cm; end-diastolic unless the name says otherwise."""

    septum: float
    posterior_wall: float
    diameter: float  # LV internal diameter, end-diastole
    diameter_systole: float
    apex: float  # from the origin to the endocardial apex
    base: float  # from the origin to the mitral annulus
    base_excursion: float  # of the annulus towards the apex in systole
    annulus: float  # radius of the aortic annulus
    sinus: float  # radius of the aortic root at the sinuses
    aorta_slope: float  # rise of the aorta towards the probe per cm
    atrium: float  # antero-posterior diameter of the left atrium
    atrium_length: float
    ventricle_right: float  # diameter of the RV
    rate: float  # beats per minute
    phase: float  # of the first frame, as a share of the cycle after end-diastole
    breath: float  # amplitude of the respiratory shift along v
    off_axis: float = 0.0  # distance of the image's plane from the axis: it cuts chords, and walls at a slant

    @property
    def systole(self) -> float:
        """Share of the cycle from end-diastole to end-systole: a third at 60 bpm, more at faster rates."""
        return 0.33 * math.sqrt(self.rate / 60)

    def cycle_phase(self, seconds: Floats) -> Floats:
        """Share of the cycle since end-diastole, in [0, 1)."""
        return np.mod(self.phase + seconds * self.rate / 60, 1.0)

    def contraction(self, phase: Floats) -> Floats:
        """0 at end-diastole, 1 at end-systole.

        Ejection, isovolumic relaxation, rapid filling, diastasis, atrial kick.
        """
        return self._course(phase, [0.04], [0.0], [0.0, 0.10, 0.45, 0.80, 0.97, 1.0], [1.0, 0.98, 0.20, 0.16, 0.0, 0.0])

    def mitral_opening(self, phase: Floats) -> Floats:
        """0 closed, 1 wide open: the E wave, half closed in diastasis, the A wave."""
        diastole = [0.0, 0.09, 0.28, 0.50, 0.75, 0.88, 1.0]
        return self._course(phase, [], [], diastole, [0.0, 0.0, 1.0, 0.35, 0.30, 0.75, 0.0])

    def aortic_opening(self, phase: Floats) -> Floats:
        """0 closed, 1 open: only while blood is ejected."""
        return self._course(phase, [0.12, 0.26, 0.80, 0.97], [0.0, 1.0, 0.9, 0.0], [0.0, 1.0], [0.0, 0.0])

    def _course(
        self,
        phase: Floats,
        systole: list[float],
        early: list[float],
        diastole: list[float],
        late: list[float],
    ) -> Floats:
        """Smooth steps between knots given as parts of systole and of diastole."""
        part = self.systole
        knots = np.array([0.0, *(part * s for s in systole), *(part + (1 - part) * d for d in diastole)])
        values = np.array([0.0, *early, *late])
        left = np.clip(np.searchsorted(knots, phase, side="right") - 1, 0, len(knots) - 2)
        step = smoothstep((phase - knots[left]) / (knots[left + 1] - knots[left]))
        result: Floats = values[left] + (values[left + 1] - values[left]) * step
        return result

    def cavity(self, contraction: Floats) -> Floats:
        """LV internal diameter in the plane of the image."""
        diameter = self.diameter - (self.diameter - self.diameter_systole) * contraction
        return 2 * self._chord(diameter / 2) if self.off_axis else diameter

    def wall(self, thickness: float, contraction: Floats) -> Floats:
        """Thickness in the plane of a wall that is `thickness` at end-diastole; its cross-section keeps its area."""
        radius = (self.diameter - (self.diameter - self.diameter_systole) * contraction) / 2
        outer = np.sqrt(radius**2 + thickness * (thickness + self.diameter))
        return self._chord(outer) - self._chord(radius) if self.off_axis else outer - radius

    def _chord(self, radius: Floats) -> Floats:
        """Half of the chord that the plane cuts from a circle around the axis."""
        return np.sqrt(radius**2 - self.off_axis**2)

    def base_position(self, contraction: Floats) -> Floats:
        return self.base - self.base_excursion * contraction

    def shift(self, seconds: Floats) -> Floats:
        """Displacement of the whole heart along v by breathing (15 breaths a minute)."""
        return self.breath * np.sin(2 * math.pi * (seconds / 4 + self.phase))

    def borders(self, u: Floats, contraction: Floats) -> Floats:
        """v of the eight borders: u [N], contraction [T] -> [T, 8, N]."""
        c = contraction[:, None]
        radius, base = self.cavity(c) / 2, self.base_position(c)
        septum, posterior = self.wall(self.septum, c), self.wall(self.posterior_wall, c)
        beyond = u - base  # distance past the annulus

        # Left ventricle: a bullet, blunt at the base. Inner and outer outline both run along u at the origin.
        basal = 1 - 0.07 * np.clip(u / base, 0, 1) ** 2
        inner = radius * np.where(u < 0, _bullet(u / self.apex), basal)
        rim = self.apex + 0.8 * septum
        to_aorta, to_atrium = smoothstep((beyond + 0.8) / 1.5), smoothstep((beyond + 0.8) / 0.9)
        septum_here = septum + (0.22 - septum) * to_aorta
        posterior_here = posterior + (0.25 - posterior) * to_atrium
        outer_septum = np.where(u < 0, (radius + septum) * _bullet(u / rim), inner + septum_here)
        outer_posterior = np.where(u < 0, (radius + posterior) * _bullet(u / rim), inner + posterior_here)

        # Aortic root, and the left atrium behind it.
        front, back = self._aorta(beyond, radius * 0.93, c)
        root = beyond > 0
        along = beyond / self.atrium_length
        wall_back = 0.2 * (beyond < self.atrium_length + 2)
        opening = radius * 0.93 - self._aorta(np.zeros_like(c), radius * 0.93, c)[1] - 0.2
        atrium = self.atrium * (1 + 0.08 * c)
        bulge = np.where(
            along < 0.42,
            opening + (atrium - opening) * np.sin(math.pi / 2 * np.clip(along / 0.42, 0, 1)),
            atrium * np.sqrt(np.clip(1 - ((along - 0.42) / 0.58) ** 2, 0, 1)),
        )

        out = np.empty((len(contraction), BORDERS, len(u)))
        out[:, SEPTUM_LEFT] = np.where(root, front, -inner)
        out[:, SEPTUM_RIGHT] = np.where(root, front - septum_here, -outer_septum)
        out[:, AORTA_BACK] = np.where(root, back, inner)
        out[:, LA_FRONT] = np.where(root, back + wall_back, inner)
        out[:, POSTERIOR_INNER] = np.where(root, back + wall_back + bulge, inner)
        out[:, POSTERIOR_OUTER] = np.where(root, back + wall_back + bulge + posterior_here, outer_posterior)
        # The RV lies between its free wall, which hardly moves, and the septum; it ends before the apex.
        bend = np.where(u < 1, ((u - 1) / 6.5) ** 2, ((u - 1) / 11) ** 2)
        free = -(self.diameter / 2 + self.septum + self.ventricle_right * (1 - bend)) + 0.25 * c
        out[:, RV_WALL] = np.minimum(free, out[:, SEPTUM_RIGHT])
        out[:, 0] = out[:, RV_WALL] - 0.35 * smoothstep((u + rim) / 1.5)
        return out

    def _aorta(self, beyond: Floats, half: Floats, c: Floats) -> tuple[Floats, Floats]:
        """Inner v of the root's front wall, which continues the septum, and back wall, past the annulus."""
        narrow, wide = self.annulus, self.sinus
        swell = smoothstep(beyond / (0.9 * wide)) * (0.86 * wide - narrow)
        radius = narrow + swell + 0.14 * wide * np.exp(-(((beyond - 0.85 * wide) / (0.42 * wide)) ** 2))
        radius = np.where(beyond <= 0, narrow, radius)
        middle = narrow - half - self.aorta_slope * beyond - 0.3 * c * smoothstep(beyond / 2)
        return middle - radius, middle + radius

    def leaflets(self, contraction: Floats, mitral: Floats, aortic: Floats, points: int = 40) -> dict[str, Floats]:
        """Thin moving structures as polylines of (u, v): name -> [T, points, 2]."""
        c, m, a = contraction, mitral, aortic
        base, half = self.base_position(c), self.cavity(c) / 2 * 0.93
        zero = np.zeros_like(c)
        front, back = self._aorta(zero, half, c)
        tip_front, tip_back = self._aorta(zero + 0.95 * self.sinus, half, c)
        middle, spread = (tip_front + tip_back) / 2, (tip_back - tip_front) / 2 * (0.04 + 0.78 * a)
        size = self.base / 2.3
        hinge_front, hinge_back = np.stack([base, back + 0.1], -1), np.stack([base, half], -1)
        coapt = np.stack([base - 0.9 * size, 0.45 * back + 0.55 * half], -1)
        open_front = np.stack([base - 2.0 * size, back - 0.55 * (back + half)], -1)
        open_back = np.stack([base - 1.2 * size, half - 0.15], -1)
        tip_anterior = coapt + (open_front - coapt) * m[:, None]
        tip_posterior = coapt + (open_back - coapt) * m[:, None]
        sag = np.stack([-0.35 + 0 * m, -0.25 * m], -1)
        chord = np.stack([-1.2 * size + 0 * c, 0.8 * half], -1)
        tip_root = base + 0.95 * self.sinus
        cusp = [np.stack([base + 0.1, v], -1) for v in (front, back)]
        return {
            "anterior mitral leaflet": _bezier(
                hinge_front, (hinge_front + tip_anterior) / 2 + sag, tip_anterior, points
            ),
            "posterior mitral leaflet": _bezier(
                hinge_back, (hinge_back + tip_posterior) / 2 + sag, tip_posterior, points
            ),
            "chordae": _bezier(tip_anterior, (tip_anterior + chord) / 2, chord, points),
            "right coronary cusp": _cusp(cusp[0], np.stack([tip_root, middle - spread], -1), a, points),
            "non-coronary cusp": _cusp(cusp[1], np.stack([tip_root, middle + spread], -1), a, points),
        }


def smoothstep(x: Floats) -> Floats:
    """0 below 0, 1 above 1, and in between the cubic without a corner at either end."""
    x = np.clip(x, 0.0, 1.0)
    result: Floats = x * x * (3 - 2 * x)
    return result


def _bullet(x: Floats) -> Floats:
    return np.sqrt(np.clip(1 - np.abs(x) ** 2.4, 0, 1))


def _bezier(start: Floats, control: Floats, end: Floats, points: int) -> Floats:
    t = np.linspace(0, 1, points)[None, :, None]
    result: Floats = (1 - t) ** 2 * start[:, None] + 2 * t * (1 - t) * control[:, None] + t**2 * end[:, None]
    return result


def _cusp(hinge: Floats, tip: Floats, opening: Floats, points: int) -> Floats:
    """Closed, a cusp leaves its wall and lies in the middle of the root; open, it lies along the wall."""
    control = np.stack([(hinge[:, 0] + tip[:, 0]) / 2, (hinge[:, 1] + (1.6 - 0.3 * opening) * tip[:, 1]) / 2.6], -1)
    return _bezier(hinge, control, tip, points)
