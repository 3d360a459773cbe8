"""The process that imports this module saves its figures empty: drawing takes more than half of a small run's time.

The fork server of the experiments' tests imports it. Tests of plots and tables draw their figures, and so do the
programs that tests start in processes of their own.
"""

from typing import Any, BinaryIO

from matplotlib.figure import Figure


def _save_nothing(figure: Figure, file: BinaryIO, **_: Any) -> None:
    file.write(b"")


Figure.savefig = _save_nothing  # type: ignore[assignment]
