"""Where the ultrasound sector lies in a frame, so that text burnt in beside it can be blacked out.

A scanner writes names, dates and logos around the sector. They do not change from frame to frame, or little of them
does (a clock, the trace of an ECG), whereas the speckle of the sector always changes. So the sector is the convex hull
of the largest connected area that changes. For a single image it is the hull of the largest connected area that is lit.

Text inside the hull cannot be told from tissue and stays. Sector and linear images have convex borders, so the hull
adds little to them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHANGE = 8  # grey levels; a smaller change is noise of a lossy codec, which text has too
LIT = 16  # grey levels
SMALLEST = 0.05  # share of the frame; a smaller hull is a clock or a trace
_GAP = 64  # areas that are nearer than two 64ths of the frame's shorter side are connected


def sector_by_change(darkest: NDArray[np.uint8], brightest: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """The sector of a cine.

    Args:
        darkest: uint8 [H, W], the smallest value that each pixel takes in the cine.
        brightest: uint8 [H, W], the largest one.

    Returns:
        bool [H, W], True inside; None if too little changes.
    """
    return _largest_hull(brightest - darkest >= CHANGE)


def sector_by_light(frame: NDArray[np.uint8]) -> NDArray[np.bool_] | None:
    """The sector of a single image, uint8 [H, W]: bool [H, W], True inside; None if too little is lit."""
    return _largest_hull(frame >= LIT)


def _largest_hull(marked: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    """The convex hull of the largest connected area of `marked`; None if it is smaller than `SMALLEST`."""
    from scipy.ndimage import binary_closing, binary_dilation, binary_opening, label
    from scipy.spatial import ConvexHull, QhullError

    gap = max(1, min(marked.shape) // _GAP)
    square = np.ones((3, 3), bool)
    padded = np.pad(marked, gap)  # closing would otherwise end at the border
    joined = binary_closing(padded, square, iterations=gap)[gap:-gap, gap:-gap]
    areas, count = label(binary_opening(joined, square))  # opening cuts thin bridges, as of a line of text
    if not count:
        return None
    sizes = np.bincount(areas.ravel())
    sizes[0] = 0
    largest = binary_dilation(areas == sizes.argmax(), square, iterations=2, mask=joined)  # corners that opening took
    points = np.argwhere(largest)
    try:
        hull = ConvexHull(points)
    except QhullError:  # a line
        return None
    rows, columns = np.ogrid[: marked.shape[0], : marked.shape[1]]
    inside = np.ones(marked.shape, bool)
    for a, b, c in hull.equations:
        inside &= a * rows + b * columns + c <= 1e-6
    return inside if inside.mean() >= SMALLEST else None
