"""Errors that a user can cause, each with the exit status that the command-line programs return for it."""


class CardioCapsError(Exception):
    """Base of all errors that are reported as one line instead of a traceback."""

    exit_code = 1


class ResourceError(CardioCapsError):
    """The machine has too few processes, threads or shared memory for the program."""


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


def printable(text: object) -> str:
    """Text of a user (a name, a path) for a message: on one line, and without control codes for the terminal.

    Characters that are not printable are replaced by their escapes: line breaks, control codes, marks that change the
    direction of writing, and bytes that are not valid text.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))


def plural(noun: str) -> str:
    """The plural of the nouns that results are counted in: videos, frames, patients, studies."""
    return f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
