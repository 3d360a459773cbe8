"""The settings on the command line."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from cardiocaps import __version__
from cardiocaps.config.option import did_you_mean, shown
from cardiocaps.config.saved import read_run, read_yaml
from cardiocaps.config.settings import TrainConfig, check_resumable, options
from cardiocaps.errors import printable


class CommandLine(argparse.ArgumentParser):
    """A parser that takes no abbreviation, and answers a mistake in one line: `error: …`, exit status 2."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **settings})

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            option = next((text for text in unknown if text.startswith("-")), None)
            if option is None:
                self.error(f"unexpected argument {shown(unknown[0])}; every setting is given as --option")
            flag = option.partition("=")[0][:60]
            self.error(f"unknown option {flag}{did_you_mean(flag, self._option_string_actions)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)} (see {self.prog} --help)\n")


def command_line(prog: str = "cardiocaps.train", description: str | None = None) -> CommandLine:
    """The training program's parser. Only what is typed lands in its namespace, besides `config`, the YAML
    file."""
    parser = CommandLine(
        prog=prog,
        usage="%(prog)s [--config FILE] [options]",
        description=description,
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
    """Give a parser the named settings, in their sections of the help. What is not typed has no default there, or the
    one that `default` says in words."""
    groups: dict[str, Any] = {}
    for option in (options()[name] for name in names):
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        group = groups[option.group]
        if option.kind is bool:
            usual = default or ("yes" if option.default else "no")
            group.add_argument(
                option.flag, action=argparse.BooleanOptionalAction, help=f"{option.help} (default: {usual})"
            )
            continue
        usual = default or option.default
        text = option.help if usual is None else f"{option.help} (default: {usual})"
        choices = f"{{{','.join(option.choices)}}}" if option.choices else "TEXT"
        metavar = {int: "N", float: "X", Path: "PATH", str: choices, dict: "NAME=X"}[option.kind]
        group.add_argument(
            option.flag,
            type=option.from_text,
            action=_Collect if option.kind is dict else "store",
            metavar=metavar,
            help=text.replace("%", "%%"),
        )


class _Collect(argparse.Action):
    """An option that may be given again for another name."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        before = getattr(namespace, self.dest, None) or {}
        for name in before.keys() & values.keys():
            raise argparse.ArgumentError(self, f"{name} is given twice")
        setattr(namespace, self.dest, {**before, **values})


def from_command_line(argv: Sequence[str] | None = None, prog: str = "cardiocaps.train") -> TrainConfig:
    """The resolved configuration that a command line asks for; `argv` None: the process's own.

    Exits with status 2 on a mistake in the command line; raises ConfigError for one in the YAML file, between
    settings, or for a run that cannot be resumed so.
    """
    typed = vars(command_line(prog).parse_args(argv))
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
    """The settings before, with the later ones in their place; those that are a mapping name by name."""
    both = {
        name: {**(before.get(name) or {}), **value} if isinstance(value, dict) else value
        for name, value in settings.items()
    }
    return {**before, **both}
