"""A video that cannot be decoded when a run begins, and can be when it goes on."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from cardiocaps.config import TrainConfig
from cardiocaps.data import cache
from cardiocaps.data.fingerprint import read_fingerprint
from cardiocaps.data.header import VideoError
from cardiocaps.data.open import decode_for_run, read_study
from cardiocaps.data.study import Clip
from cardiocaps.errors import DataError
from cardiocaps.experiments import jobs
from cardiocaps.experiments.engines.local import LocalEngine
from cardiocaps.experiments.folder import ExperimentFolder
from cardiocaps.experiments.plan import SYSTEMS, configure
from cardiocaps.experiments.run import _prepare
from cardiocaps.runtime.device import machine_for
from cardiocaps.runtime.program import Interruption
from cardiocaps.training.run_folder import RunFolder

from .data.sample_videos import encode, picture, write_folder


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    options = {"max_bad_share": 0.1, "device": "cpu", "workers": 0, "progress": False}
    return TrainConfig(data=write_folder(tmp_path / "data", 16), cache_dir=tmp_path / "cache", **options).resolved()


@contextmanager
def failing(video: Path) -> Iterator[None]:
    read_frames = cache.read_frames

    def fails(path: Path, *rest: object) -> np.ndarray:
        if path == video:
            raise VideoError("too slow")
        return read_frames(path, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "read_frames", fails)
        yield


def test_a_run_goes_on_without_what_failed_when_it_began(config: TrainConfig, tmp_path: Path) -> None:
    folder, study = RunFolder(tmp_path), read_study(config)
    slow, changed = study.clips[2].path, study.clips[3].path
    with machine_for(config) as machine:
        with failing(slow):
            first = decode_for_run(config, machine, study, folder.data, "advice", trained=False, keep=True).data
        remembered = read_fingerprint(folder.data)
        assert remembered is not None and (len(remembered.videos), len(remembered.contents)) == (16, 15)
        again = decode_for_run(config, machine, read_study(config), folder.data, "advice", trained=False)
        assert again.is_own and again.data.study.clips == first.study.clips
        assert [p.where for p in again.data.study.problems if "left out as it was at first" in p.reason] == [slow.stem]
        encode(changed, picture(seed=99))
        with pytest.raises(DataError, match="trained on: 1 video changed its content; advice"):
            decode_for_run(config, machine, read_study(config), folder.data, "advice", trained=False)


def test_experiments_go_on_without_what_failed_when_they_began(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a job was killed as soon as it had begun."""
    system, folder = SYSTEMS["logistic-regression-class-weight"], ExperimentFolder(tmp_path / "out")
    folder.make()
    used: list[tuple[Clip, ...]] = []
    monkeypatch.setattr(jobs, "_fit_pixels", lambda job, config, data, watch: used.append(data.study.clips))
    begin = RunFolder.begin

    def begin_and_stop(folder: RunFolder, config: TrainConfig, device: str) -> None:
        begin(folder, config, device)
        raise KeyboardInterrupt

    study = read_study(configure(config, system, 10, tmp_path))
    for seed in (10, 11):
        job = jobs.Job(system, seed, configure(config, system, seed, folder.job(system.key, seed)))
        with failing(study.clips[2].path) if seed == 10 else nullcontext():
            _prepare([job], config, folder, LocalEngine(1))
        with monkeypatch.context() as stopping, pytest.raises(KeyboardInterrupt):
            stopping.setattr(RunFolder, "begin", begin_and_stop)
            jobs.run(job, lambda done, what: None, Interruption())
        jobs.run(job, lambda done, what: None, Interruption())
    left = (*study.clips[:2], *study.clips[3:])
    assert used == [left, left]
