"""The settings on the command line."""

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from cardiocaps import __version__
from cardiocaps.config.option import did_you_mean, shown
from cardiocaps.config.saved import check_resumable, read_run, read_yaml
from cardiocaps.config.settings import LOGGERS, TrainConfig, options
from cardiocaps.errors import printable

COMPLETING = "_ARGCOMPLETE"
"""The variable that argcomplete sets in a program whose command line a shell completes: the number of the word at which
the program's arguments begin, from 1 for the name of the program."""


class CommandLine(argparse.ArgumentParser):
    """A parser that takes no abbreviations and reports a mistake in one line, `error: …`, with exit status 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        if COMPLETING in os.environ:  # a shell asks what may follow on its command line
            import argcomplete

            argcomplete.autocomplete(self)
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = next((text for text in unknown if text.startswith("-")), None)
            if option is None:
                self.error(f"unexpected argument {shown(unknown[0])}; every setting is given as --option")
            flag = option.partition("=")[0][:60]
            self.error(f"unknown option {flag}{did_you_mean(flag, self._option_string_actions)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): is ", r"\1 is ", message)  # as `Option.check` words it
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


def command_line() -> CommandLine:
    """The parser of the training program. Its namespace holds only what was typed, and `config`, the YAML file."""
    parser = CommandLine(
        prog="python -m cardiocaps.train",
        usage="%(prog)s [--config FILE] [options]",
        epilog="Research use only. Not a medical device.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action="version", version=f"cardiocaps {__version__}")
    parser.add_argument(
        "--config",
        type=options()["data"].from_text,
        metavar="FILE",
        default=None,
        help="YAML file with any of the settings below",
    )
    add_options(parser, list(options()))
    return parser


def add_options(parser: argparse.ArgumentParser, names: Sequence[str], default: str | None = None) -> None:
    """Give a parser the named settings, in their sections of the help.

    The help ends with the default of each setting, or with `default` in place of all of them.
    """
    groups: dict[str, Any] = {}
    for option in (options()[name] for name in names):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        form: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        usual = "yes" if option.default else "no"
        if option.kind is not bool:
            text = f"{{{','.join(option.choices)}}}" if option.choices else "TEXT"
            metavar = {int: "N", float: "X", Path: "PATH", str: text, dict: "NAME=X"}[option.kind]
            action = _Collect if option.kind is dict else "store"
            form, usual = {"type": option.from_text, "action": action, "metavar": metavar}, option.default
        usual = default or usual
        text = option.help if usual is None else f"{option.help} (default: {usual})"
        action = groups[option.group].add_argument(option.flag, help=text.replace("%", "%%"), **form)
        if option.kind is not Path:  # for paths a shell offers files
            words = LOGGERS if option.name == "logger" else option.choices
            action.completer = partial(_words, words)


def _words(words: Sequence[str], **_: Any) -> Sequence[str]:
    """What argcomplete offers for an option's value."""
    return words


class _Collect(argparse.Action):
    """Collects NAME=X from every use of the option."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None) or {}
        for name in before.keys() & values.keys():
            raise argparse.ArgumentError(self, f"{name} is given twice")
        setattr(namespace, self.dest, {**before, **values})


def from_command_line(argv: Sequence[str] | None = None) -> TrainConfig:
    """The resolved settings of a command line; `argv` None: that of the process.

    Exits with status 2 on a mistake in the command line.

    Raises:
        ConfigError: the YAML file has a mistake, settings contradict each other, or a run cannot be resumed with them.
    """
    typed = vars(command_line().parse_args(argv))
    file = typed.pop("config", None)
    settings = _over(read_yaml(file) if file is not None else {}, typed)
    folder: Path | None = settings.get("resume")
    if folder is None:
        return TrainConfig(**settings).resolved()
    old = read_run(folder)
    new = replace(old, **_over(vars(old), settings)).resolved()
    check_resumable(old, new)
    return new


def _over(before: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """`before` with `settings` in their place; the entries of a setting that is a mapping are replaced one by one."""
    both = {
        name: {**(before.get(name) or {}), **value} if isinstance(value, dict) else value
        for name, value in settings.items()
    }
    return {**before, **both}
