"""Every setting of a training run, declared once: the command line, the YAML file and the run's record all
read `TrainConfig`.

Precedence: defaults < the preset's own values < the YAML file < the command line. With `--resume`, the run's
own configuration takes the place of the defaults. Imports nothing heavy, so that `--help` answers at once.
"""

from cardiocaps.config.command_line import CommandLine, add_options, command_line, from_command_line
from cardiocaps.config.option import Option
from cardiocaps.config.presets import PRESETS, Preset
from cardiocaps.config.saved import completed, read_run, read_yaml
from cardiocaps.config.settings import (
    TRAINABLE_PHANTOM,
    TrainConfig,
    check_resumable,
    options,
    settings_that_affect,
)

__all__ = [
    "PRESETS",
    "TRAINABLE_PHANTOM",
    "CommandLine",
    "Option",
    "Preset",
    "TrainConfig",
    "add_options",
    "check_resumable",
    "command_line",
    "completed",
    "from_command_line",
    "options",
    "read_run",
    "read_yaml",
    "settings_that_affect",
]
