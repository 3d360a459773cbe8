"""Errors a user can cause, each with the exit status that the command-line programs return for it."""


class CardioCapsError(Exception):
    """Base of all errors that are reported as one line instead of a traceback."""

    exit_code = 1


class ConfigError(CardioCapsError):
    """An option or a configuration file is wrong."""

    exit_code = 2


class DataError(CardioCapsError):
    """The data folder, a table or a video cannot be used."""

    exit_code = 3


class OutputError(CardioCapsError):
    """The output folder cannot be written, or holds something that would be overwritten."""

    exit_code = 4


class CheckpointError(CardioCapsError):
    """A checkpoint is damaged or belongs to another configuration."""

    exit_code = 5
