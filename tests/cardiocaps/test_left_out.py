"""A video that cannot be decoded when a run begins, and can be when it goes on."""

from pathlib import Path

import numpy as np
import pytest

from cardiocaps.config import TrainConfig
from cardiocaps.data import cache
from cardiocaps.data.fingerprint import read_fingerprint
from cardiocaps.data.video import VideoError
from cardiocaps.errors import DataError
from cardiocaps.machine import machine_for
from cardiocaps.run_folder import RunFolder
from cardiocaps.train import decode_for_run, read_study

from .data.sample_videos import encode, picture, write_folder


def test_a_run_goes_on_without_what_failed_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    data = write_folder(tmp_path / "data", 16)
    config = TrainConfig(
        data=data, cache_dir=tmp_path / "cache", max_bad_share=0.1, device="cpu", workers=0, progress=False
    ).resolved()
    study = read_study(config)
    slow, changed = study.clips[2].path, study.clips[3].path
    read_frames = cache.read_frames

    def fails(path: Path, *rest: object) -> np.ndarray:
        if path == slow:
            raise VideoError("too slow")
        return read_frames(path, *rest)

    with machine_for(config) as machine:
        with monkeypatch.context() as patch:
            patch.setattr(cache, "read_frames", fails)
            first = decode_for_run(config, machine, folder, study, "advice", keep=True).data
        remembered = read_fingerprint(folder.data)
        assert remembered is not None and (len(remembered.videos), len(remembered.contents)) == (16, 15)
        again = decode_for_run(config, machine, folder, read_study(config), "advice")
        assert again.is_own and again.data.study.clips == first.study.clips
        assert [p.where for p in again.data.study.problems if "left out as it was at first" in p.reason] == [slow.stem]
        encode(changed, picture(seed=99))
        with pytest.raises(DataError, match="trained on: 1 video changed its content; advice"):
            decode_for_run(config, machine, folder, read_study(config), "advice")
