"""The settings of a training run.

Precedence: defaults < the preset's values < the YAML file < the command line. With `--resume`, the settings of the run
take the place of the defaults. Nothing heavy is imported, so that `--help` answers at once.
"""

from cardiocaps.config.command_line import COMPLETING, CommandLine, add_options, command_line, from_command_line
from cardiocaps.config.option import Option
from cardiocaps.config.presets import PRESETS, TRAINING_DEFAULTS, Preset
from cardiocaps.config.saved import check_resumable, completed, read_run, read_yaml, write_run
from cardiocaps.config.settings import OF_TABLE, TRAINABLE_PHANTOM, TrainConfig, options, settings_that_affect

__all__ = [
    "COMPLETING",
    "OF_TABLE",
    "PRESETS",
    "TRAINABLE_PHANTOM",
    "TRAINING_DEFAULTS",
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
    "write_run",
]
