"""Where the structures of a phantom lie in its frames."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cardiocaps.phantom.anatomy import POSTERIOR_OUTER, SEPTUM_RIGHT
from cardiocaps.phantom.patients import Patient

Mask = NDArray[np.bool_]


def sector_and_ventricle(patient: Patient, frame: int, size: int) -> tuple[Mask, Mask]:
    """The sector, and in it the left ventricle: its cavity, the septum and the posterior wall.

    These are the structures whose thickness and diameter make the label.

    Args:
        patient: of the phantom.
        frame: number of the frame.
        size: side S of a square that the whole frame is scaled to, in pixels.

    Returns:
        Two masks bool [S, S], by the centres of the pixels.
    """
    scan, heart = patient.scan, patient.heart
    at = (np.arange(size) + 0.5) / size
    x = ((at * scan.width - 0.5 - scan.width / 2) / scan.pixels_per_cm)[None, :]
    z = ((at * scan.height - 0.5 - scan.top) / scan.pixels_per_cm)[:, None]
    sector = (np.abs(np.arctan2(x, z)) < scan.half_angle) & (np.hypot(x, z) < scan.depth)
    u, v = (np.broadcast_to(one, sector.shape).ravel() for one in scan.to_heart(x, z))
    contraction = patient.contraction()[frame : frame + 1]
    shift = heart.shift(patient.seconds()[frame : frame + 1])
    borders = heart.borders(u, contraction)[0] + shift
    # Past the base the same borders bound the aorta and the left atrium.
    inside = (v > borders[SEPTUM_RIGHT]) & (v < borders[POSTERIOR_OUTER]) & (u < heart.base_position(contraction))
    return sector, inside.reshape(sector.shape) & sector
