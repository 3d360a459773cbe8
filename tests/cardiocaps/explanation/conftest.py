from pathlib import Path

import pytest

from cardiocaps import train

from ..prediction.conftest import FAST, phantom, runs

__all__ = ["phantom", "runs", "runs_of_phantom"]


@pytest.fixture(scope="package")
def runs_of_phantom(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data is the phantom itself, not a folder that was given."""
    out = tmp_path_factory.mktemp("phantom_run") / "run"
    data = ["--phantom-dir", str(phantom), "--phantom-videos", "40", "--phantom-seed", "3", "--no-progress"]
    assert train.main([*FAST, *data, "--cache-dir", str(out.parent / "cache"), "--out", str(out)]) == 0
    return out
