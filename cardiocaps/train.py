"""`python -m cardiocaps.train`: train CardioCaps on echocardiogram videos, evaluate it and write a run folder.

Without an argument it makes or reuses the phantom data set and trains preset tiny. `--help` lists every setting.
`--devices`, or torchrun, train in several processes (ranks); rank 0 alone writes, prints and evaluates.
"""

from __future__ import annotations

import os
import platform
import sys
import warnings
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cardiocaps import __version__
from cardiocaps.config import TrainConfig, from_command_line, settings_that_affect, write_run
from cardiocaps.errors import CardioCapsError, ConfigError
from cardiocaps.runtime.launch import launch
from cardiocaps.runtime.processes import stop_with_parent
from cardiocaps.runtime.program import Interrupted, Interruption, print_line, refuse_copies, run_program
from cardiocaps.runtime.ranks import Ranks, Reported, connected

if TYPE_CHECKING:
    from cardiocaps.data.open import RunData
    from cardiocaps.runtime.device import Machine
    from cardiocaps.training.initial import InitialWeights
    from cardiocaps.training.loggers import RunLog
    from cardiocaps.training.run_folder import RunFolder

_OTHER_DATA = "give --data with the data that the run was trained on, or begin a new run"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 to 5 for the errors of cardiocaps.errors; 128 + the signal that stopped the run."""

    def body(interruption: Interruption) -> None:
        config = from_command_line(argv)
        ranks = Ranks.from_environment()
        devices, nodes = config.devices or 1, config.nodes or 1
        if ranks.world > 1:
            _run_rank(config, interruption, ranks)
        elif devices * nodes > 1:
            arguments = list(sys.argv[1:] if argv is None else argv)
            launch("cardiocaps.train", arguments, devices, nodes, config.rendezvous, config.connect_timeout)
        else:
            refuse_copies()
            run(config, interruption, ranks)

    return run_program(body, copies=True)


def _run_rank(config: TrainConfig, interruption: Interruption, ranks: Ranks) -> None:
    """As `run`, in one of several processes. Only rank 0 prints."""
    stop_with_parent()
    for name, started in (("devices", ranks.local_world), ("nodes", ranks.nodes)):
        if getattr(config, name) not in (None, started):
            raise ConfigError(f"{name} is {getattr(config, name)}; expected {started}, as the launcher has started")
    if ranks.is_first:
        run(config, interruption, ranks)
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run(replace(config, progress=False), interruption, ranks)
        except Interrupted as error:
            raise Reported(error.exit_code) from error


def run(config: TrainConfig, interruption: Interruption, ranks: Ranks) -> None:
    """Train, or go on training, evaluate, and write the run folder.

    Raises:
        CardioCapsError: see cardiocaps.errors; what was reached is saved.
    """
    from cardiocaps.evaluation.predictions import unit_of
    from cardiocaps.evaluation.run import evaluate_task
    from cardiocaps.runtime.device import machine_for
    from cardiocaps.runtime.quiet import quiet
    from cardiocaps.training.fit import check_ranks, train
    from cardiocaps.training.loggers import require_loggers

    quiet()
    require_loggers(config)
    with machine_for(config) as machine, ExitStack() as at_end:
        with connected(ranks, machine.device, _same_on_all_ranks(config), config.connect_timeout) as ranks:
            advice = f"go on with --resume {config.out}"
            with ranks.one_report(), ranks.losses_reported(lambda: interruption.signum is not None, advice):
                check_ranks(config, machine, ranks)
                print_line(f"device: {machine}{f', {ranks.world} processes' if ranks.world > 1 else ''}")
                with ranks.first_goes_ahead():
                    prepare = _prepare if ranks.is_first else _join
                    config, folder, used, initial, log = prepare(config, machine, at_end)
                callbacks = [] if log is None else [log]
                rows = train(config, machine, folder, used.data, interruption, callbacks, initial, ranks)
                ranks.gathered(None)  # so that none ends its connections before the others need them no more
        if log is not None:
            log.epochs(rows)
            scores, _ = evaluate_task(config, machine, folder, used, results=folder)
            log.scores(scores.main(unit_of(config)), int(rows[-1]["epoch"]))
            print_line(f"run folder: {folder.path}")


Prepared = tuple[TrainConfig, "RunFolder", "RunData", "InitialWeights | None", "RunLog | None"]


def _prepare(config: TrainConfig, machine: Machine, at_end: ExitStack) -> Prepared:
    """Open the run's folder, which is locked until `at_end`, read and decode the data, and read initial weights."""
    from cardiocaps.data.open import decode_for_run, read_study, with_layout
    from cardiocaps.runtime.files import lock_folder
    from cardiocaps.training.initial import InitialWeights
    from cardiocaps.training.loggers import RunLog
    from cardiocaps.training.run_folder import RunFolder

    out = config.out
    assert out is not None
    # Read data and weights first: if they cannot be read, --overwrite must not have deleted the old run. Create the
    # folder before decoding, which can take an hour: it may not be writable. A phantom that is missing takes minutes to
    # make, so it is made first only if there is a run to lose.
    config = with_layout(config)
    first = config.data is not None or config.overwrite
    study = read_study(config, again=config.resume is not None) if first else None
    if study is not None:
        study.target(config.regression_target)  # raises if it has none of this name
    if config.freeze is not None and config.init is None:
        raise ConfigError(f"freeze is {config.freeze!r}; expected null, because without init the weights are random")
    initial = None
    if config.init is not None and not (config.resume and RunFolder(out).last.exists()):
        initial = InitialWeights.read(config)
    folder = RunFolder.open(out) if config.resume else RunFolder.create(out, config.overwrite)
    at_end.enter_context(lock_folder(folder.path))
    folder.remove_leftovers()
    if not config.resume:
        folder.begin(config, machine.device)
    try:
        study = study or read_study(config, again=folder.data.is_file())
        print_line(study.summary())
        used = decode_for_run(config, machine, study, folder.data, _OTHER_DATA, trained=folder.is_trained, keep=True)
        config = replace(config, regression_target=used.data.target)
        log = RunLog(folder, config)
    except (CardioCapsError, Interrupted):
        if not config.resume:
            folder.discard()
        raise
    if used.data.study != study:
        print_line(f"after decoding: {used.data.study.summary()}")
    write_run(config, folder.path)
    return config, folder, used, initial, at_end.enter_context(log)


def _join(config: TrainConfig, machine: Machine, _: ExitStack) -> Prepared:
    """What `_prepare` returns, for the other ranks: they read what rank 0 has decoded, and write nothing."""
    from cardiocaps.data.open import decode_for_run, read_study, with_layout
    from cardiocaps.training.initial import InitialWeights
    from cardiocaps.training.run_folder import RunFolder

    assert config.out is not None
    folder = RunFolder(config.out)
    if not folder.is_run():
        raise ConfigError(f"{folder.path} is not on this machine; expected a folder that all nodes share")
    config = with_layout(config)
    initial = None
    if config.init is not None and not folder.last.exists():
        initial = InitialWeights.read(config)
    study = read_study(config, again=True)
    used = decode_for_run(config, machine, study, folder.data, _OTHER_DATA, trained=folder.is_trained)
    return replace(config, regression_target=used.data.target), folder, used, initial, None


def _same_on_all_ranks(config: TrainConfig) -> dict[str, str]:
    """Versions, and the settings that decide the numbers."""
    import lightning
    import torch

    same = {
        "cardiocaps": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }
    names = settings_that_affect("result", "shape", "length", "rounding")
    return same | {name: str(getattr(config, name)) for name in names}


if __name__ == "__main__":
    sys.exit(main())
