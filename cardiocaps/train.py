"""`python -m cardiocaps.train`: train CardioCaps on echocardiogram videos, evaluate it and write a run folder.

Without an argument it makes or reuses the phantom data set and trains preset tiny. `--help` lists every setting.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from cardiocaps.config import TrainConfig, from_command_line, write_run
from cardiocaps.errors import CardioCapsError, ConfigError
from cardiocaps.runtime.program import Interrupted, Interruption, print_line, run_program

_OTHER_DATA = "give --data with the data that the run was trained on, or begin a new run"


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 to 5 for the errors of cardiocaps.errors; 128 + the signal that stopped the run."""

    def body(interruption: Interruption) -> None:
        run(from_command_line(argv), interruption)

    return run_program(body)


def run(config: TrainConfig, interruption: Interruption) -> None:
    """Train, or go on training, evaluate, and write the run folder.

    Raises:
        CardioCapsError: see cardiocaps.errors; what was reached is saved.
    """
    from cardiocaps.data.open import decode_for_run, read_study, with_layout
    from cardiocaps.evaluation.predictions import unit_of
    from cardiocaps.evaluation.run import evaluate_task
    from cardiocaps.runtime.device import machine_for
    from cardiocaps.runtime.files import lock_folder
    from cardiocaps.training.fit import quiet, train
    from cardiocaps.training.initial import InitialWeights
    from cardiocaps.training.loggers import RunLog, require_loggers
    from cardiocaps.training.run_folder import RunFolder

    quiet()
    require_loggers(config)
    out = config.out
    assert out is not None
    with machine_for(config) as machine:
        print_line(f"device: {machine}")
        # Read data and weights first: if they cannot be read, --overwrite must not have deleted the old run. Create the
        # folder before decoding, which can take an hour: it may not be writable.
        config = with_layout(config)
        study = read_study(config, again=config.resume is not None) if config.data else None
        if study is not None:
            study.target(config.regression_target)  # raises if it has none of this name
        if config.freeze is not None and config.init is None:
            raise ConfigError(
                f"freeze is {config.freeze!r}; expected null, because without init the weights are random"
            )
        initial = None
        if config.init is not None and not (config.resume and RunFolder(out).last.exists()):
            initial = InitialWeights.read(config)
        folder = RunFolder.open(out) if config.resume else RunFolder.create(out, config.overwrite)
        with lock_folder(folder.path):
            folder.remove_leftovers()
            if not config.resume:
                folder.begin(config, machine.device)
            try:
                study = study or read_study(config, again=folder.data.is_file())
                print_line(study.summary())
                used = decode_for_run(
                    config, machine, study, folder.data, _OTHER_DATA, trained=folder.is_trained, keep=True
                )
                config = replace(config, regression_target=used.data.target)
                log = RunLog(folder, config)
            except (CardioCapsError, Interrupted):
                if not config.resume:
                    folder.discard()
                raise
            if used.data.study != study:
                print_line(f"after decoding: {used.data.study.summary()}")
            write_run(config, folder.path)
            with log:
                rows = train(config, machine, folder, used.data, interruption, [log], initial)
                log.epochs(rows)
                scores, _ = evaluate_task(config, machine, folder, used, results=folder)
                log.scores(scores.main(unit_of(config)), int(rows[-1]["epoch"]))
            print_line(f"run folder: {folder.path}")


if __name__ == "__main__":
    sys.exit(main())
