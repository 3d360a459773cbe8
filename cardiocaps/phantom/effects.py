"""What makes an examination hard to read: probes, shadows, drop-out, gain errors, reverberation, decorrelated speckle.

Strengths are choices of this project, made so that the walls can still be found by eye in most videos; the reason for
each effect stands at its function. Effects are drawn without regard to the diagnosis. Without effects nothing is
computed, so that a phantom of difficulty easy keeps its bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cardiocaps.phantom.anatomy import Floats, smoothstep

QUALITY = 4
"""MJPEG's quantiser of an unharmed video; 2 is the best."""

Single = NDArray[np.float32]
Field = NDArray[np.complex64]
Taps = tuple[float, ...]


@dataclass(frozen=True)
class Probe:
    """A probe and the processing behind it.

    Attributes:
        lateral: factor of the width of the point spread over the beams: a smaller aperture has wider beams.
        axial: factor of its length: a lower frequency has longer pulses.
        gamma: exponent of the grey map that follows the logarithm.
        persistence: weight of the frame before in each frame.
    """

    lateral: float = 1.0
    axial: float = 1.0
    gamma: float = 1.0
    persistence: float = 0.0


PROBES = (Probe(), Probe(1.6, 1.4, 0.85, 0.25), Probe(0.8, 0.75, 1.2, 0.4))
"""The probes of the difficulties moderate and hard."""

OTHER_PROBE = Probe(2.2, 0.8, 0.7, 0.55)
"""The probe of `Shift.machine`."""


@dataclass(frozen=True)
class Shadow:
    """A wedge of lost signal; `side` and `width` as shares of the sector's half angle, `start` in cm, `loss` in dB."""

    side: float
    width: float
    start: float
    loss: float


@dataclass(frozen=True)
class Effects:
    """Effects on the images of one examination.

    Attributes:
        probe: that it is made with.
        speckle: factor of the size of speckle.
        decorrelation: share of a scatterer's power that is new in each frame.
        shadows: behind ribs and lung.
        drop_out: dB lost in patches of poor contact and unfavourable angle.
        sliders: error of the time-gain compensation in dB, at depths evenly spread from the probe to the end.
        gain: error of the gain in dB.
        reverberation: dB of the second echo against the first; None: without.
        reverberation_path: additional path of the second echo, cm.
        quality: MJPEG's quantiser.
    """

    probe: Probe = PROBES[0]
    speckle: float = 1.0
    decorrelation: float = 0.0
    shadows: tuple[Shadow, ...] = ()
    drop_out: float = 0.0
    sliders: tuple[float, ...] = ()
    gain: float = 0.0
    reverberation: float | None = None
    reverberation_path: float = 0.0
    quality: int = QUALITY


NO_EFFECTS = Effects()


def draw_effects(strength: float, rng: np.random.Generator) -> Effects:
    """The effects of one examination; `strength` in [0, 1] scales all of them."""
    shadows = tuple(
        Shadow(
            side=rng.uniform(-0.9, 0.9),
            width=rng.uniform(0.05, 0.16),
            start=rng.uniform(0.5, 2.5),
            loss=strength * rng.uniform(6, 24),
        )
        for _ in range(rng.poisson(1.2 * strength))
    )
    return Effects(
        probe=PROBES[rng.integers(len(PROBES))],
        decorrelation=strength * rng.uniform(0.05, 0.5),
        shadows=shadows,
        drop_out=strength * rng.uniform(4, 22),
        sliders=tuple((strength * rng.normal(0, 4.5, 8)).tolist()),
        gain=strength * rng.normal(0, 4),
        reverberation=-34 + strength * rng.uniform(4, 20),
        reverberation_path=rng.uniform(1.2, 3.2),
        quality=QUALITY + round(strength * rng.uniform(0, 16)),
    )


def shifted(effects: Effects, gain: float, speckle: float, machine: bool) -> Effects:
    """The same effects with another gain in dB and size of speckle, on another machine."""
    probe = OTHER_PROBE if machine else effects.probe
    return replace(effects, gain=effects.gain + gain, speckle=effects.speckle * speckle, probe=probe)


def point_spread(effects: Effects, lateral: Taps, axial: Taps) -> tuple[Taps, Taps]:
    """The taps of the point-spread function, centre first: those given, or Gaussian ones of another width.

    Speckle is as large as the point spread, so this is the size of speckle too.
    """
    factors = effects.probe.lateral * effects.speckle, effects.probe.axial * effects.speckle
    if factors == (1.0, 1.0):
        return lateral, axial
    widths = (_width(taps) * factor for taps, factor in zip((lateral, axial), factors, strict=True))
    across, along = (
        tuple(math.exp(-((k / w) ** 2) / 2) for k in range(min(9, math.ceil(2.5 * w) + 1))) for w in widths
    )
    return across, along


def _width(taps: Taps) -> float:
    """Standard deviation of the Gaussian with the ratio of the first two taps."""
    return math.sqrt(1 / (2 * math.log(taps[0] / taps[1])))


def decorrelate(field: Field, fresh: Field, share: float) -> Field:
    """Replace a `share` of each scatterer's power by a new random part, as strong as the scatterer.

    Out-of-plane motion brings other scatterers into the plane, so speckle does not follow the wall exactly.
    """
    result: Field = field * (np.float32(math.sqrt(1 - share)) + np.float32(math.sqrt(share)) * fresh)
    return result


def transmission(effects: Effects, side: Floats, depths: Floats, patches: Single) -> Single:
    """Share of the amplitude that passes, over beams and depths: shadows of ribs and lung, and drop-out.

    The walls that lie along the beam lose echoes anyway; contact and aberration take whole patches of the image.

    Args:
        side: angle of each beam as a share of the half angle [beams].
        depths: cm [samples].
        patches: smooth variation of unit variance [beams, samples].
    """
    loss = effects.drop_out * smoothstep((patches.astype(np.float64) - 0.5) / 1.2)
    for shadow in effects.shadows:
        across = smoothstep(1.5 - np.abs(side - shadow.side) / shadow.width)
        loss = loss + shadow.loss * across[:, None] * smoothstep((depths - shadow.start) / 1.5)
    result: Single = (10 ** (-loss / 20)).astype(np.float32)
    return result


def slider_gain(effects: Effects, depths: Floats) -> Floats:
    """Error of the time-gain compensation in dB at each depth: a console has about eight sliders."""
    at = np.linspace(0, depths[-1], len(effects.sliders))
    result: Floats = np.interp(depths, at, effects.sliders)
    return result


def reverberate(effects: Effects, field: Field, cm_a_sample: float) -> Field:
    """Add the second echo: what bounced once more between probe and chest wall appears deeper, and weaker."""
    if effects.reverberation is None:
        return field
    deeper = max(1, round(effects.reverberation_path / cm_a_sample))
    result = field.copy()
    result[:, deeper:] += np.float32(10 ** (effects.reverberation / 20)) * field[:, :-deeper]
    return result


def persist(effects: Effects, image: Single) -> None:
    """Average each frame, in dB and in place, with those before, as machines do against noise."""
    weight = np.float32(effects.probe.persistence)
    if weight:
        for t in range(1, len(image)):
            image[t] = (1 - weight) * image[t] + weight * image[t - 1]


def map_grey(effects: Effects, image: Single) -> None:
    """Apply the grey map in place to values in [0, 255]."""
    if effects.probe.gamma != 1:
        image *= np.float32(1 / 255)
        np.power(image, np.float32(effects.probe.gamma), out=image)
        image *= 255
