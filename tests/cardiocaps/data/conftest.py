from pathlib import Path

import numpy as np
import pytest

from .sample_videos import Frames, write_folder


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight good videos; tests that change the folder write their own."""
    return write_folder(tmp_path_factory.mktemp("echonet"))


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def echocardiogram() -> Frames:
    """A real echocardiogram, uint8 [30, 240, 320, 3] RGB, which ships with pydicom."""
    from pydicom import dcmread
    from pydicom.data import get_testdata_file

    dataset = dcmread(get_testdata_file("examples_ybr_color.dcm", download=False))
    return np.asarray(dataset.pixel_array)  # RGB already, whatever the dataset's tag says
