"""Grids of capsules: windows on them."""

from __future__ import annotations

from ..ops._checks import fail


def check_window(layer: str, kernel_size: int, padding: int, height: int, width: int) -> None:
    """Require a grid that is at least as large as the kernel."""
    most = min(height, width) + 2 * padding
    if kernel_size > most:
        fail(
            layer,
            f"kernel_size is {kernel_size}; expected at most {most}, because the grid is {height} × {width} with "
            f"padding {padding}",
        )
