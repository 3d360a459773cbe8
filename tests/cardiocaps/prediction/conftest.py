from pathlib import Path

import pytest

from cardiocaps import train
from cardiocaps.phantom import write_phantom

FAST = ["--frames-per-clip", "2", "--epochs", "1", "--batch-size", "8", "--bootstrap", "0", "--threads", "1"]


@pytest.fixture(scope="package")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantom")
    write_phantom(folder, 40, 3, processes=1)
    return folder


@pytest.fixture(scope="package")
def runs(phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of other seeds."""
    folder = tmp_path_factory.mktemp("runs")
    cache = ["--cache-dir", str(folder / "cache"), "--no-progress"]
    paths = [folder / f"seed{seed}" for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        status = train.main([*FAST, *cache, "--data", str(phantom), "--seed", str(seed), "--out", str(path)])
        assert status == 0
    return paths
