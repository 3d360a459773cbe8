"""The folder of an experiment: its jobs, tables and figures, and the settings that they were made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cardiocaps import __version__
from cardiocaps.config import TrainConfig, completed, settings_that_affect
from cardiocaps.data.fingerprint import Fingerprint, read_fingerprint
from cardiocaps.errors import ConfigError, DataError, OutputError, printable
from cardiocaps.experiments.plan import OF_PHANTOM
from cardiocaps.runtime.files import is_unused, output_errors, read_json, write_json

_KIND = "cardiocaps experiments"

# Settings that may change from call to call. Each job has its own seed, and every call computes the intervals anew.
_MAY_DIFFER = {*settings_that_affect("machine", "display", "place"), "seed", "bootstrap"}


class ExperimentFolder:
    """`path`/jobs/SYSTEM/seedN are runs; `path`/tables holds the tables and figures."""

    def __init__(self, path: Path) -> None:
        self.path, self.marker = path, path / "experiments.json"
        self.jobs, self.tables = path / "jobs", path / "tables"
        self.data = path / "data"  # holds the fingerprint of the data of each protocol, split and phantom

    def job(self, key: str, seed: int) -> Path:
        return self.jobs / key / f"seed{seed}"

    def make(self) -> None:
        """Make the folder if it is missing. Raises OutputError if it holds other files or cannot be written."""
        with output_errors(self.path):
            foreign = self.path.exists() and not self.marker.is_file()
            if foreign and (not self.path.is_dir() or not is_unused(self.path, self.marker)):
                raise OutputError(f"{self.path} is not empty and no folder of experiments; choose another --out")
            self.path.mkdir(parents=True, exist_ok=True)

    def claim(self, config: TrainConfig) -> None:
        """Record the settings, or check that they are those on record.

        Until a job has begun, the settings may still change, for example after a typing error.

        Raises:
            ConfigError: the folder holds experiments with other settings, which are named.
            OutputError: it cannot be written.
        """
        settings = {name: value for name, value in config.resolved().as_dict().items() if name not in _MAY_DIFFER}
        if not self.jobs.is_dir():
            write_json(self.marker, {"kind": _KIND, "version": __version__, "settings": settings})
            return
        before = completed(self._read()["settings"])
        different = [
            f"{name} is {x!r}, was {before.get(name)!r}" for name, x in settings.items() if x != before.get(name)
        ]
        if different:
            raise ConfigError(
                f"out: {self.path} holds experiments with other settings ({'; '.join(different)}); "
                "give these, or choose another --out"
            )

    def claim_data(self, config: TrainConfig, now: Fingerprint) -> None:
        """Record the fingerprint of the data of these settings, or raise DataError if another is on record."""
        before = self.known_data(config)
        if before is None:
            with output_errors(self.data):
                self.data.mkdir(exist_ok=True)
            write_json(self._data_file(config), now.as_dict())
        elif changes := before.differences(now):
            raise DataError(
                f"data: not what the experiments in {printable(self.path)} are about: {', '.join(changes)}; choose "
                "another --out"
            )

    def known_data(self, config: TrainConfig) -> Fingerprint | None:
        """The record of `claim_data`; None if there is none yet. Raises ConfigError if it is damaged."""
        return read_fingerprint(self._data_file(config))

    def _data_file(self, config: TrainConfig) -> Path:
        # Named for the setting, not for the resulting split: a table that has lost its split column is a changed study.
        names: list[str] = [config.protocol, config.split]
        # The experiment's own phantom needs no name, and had none in older versions.
        before = completed(self._read()["settings"]) if self.marker.is_file() else config.as_dict()
        names += [f"{name}-{getattr(config, name):g}" for name in OF_PHANTOM if getattr(config, name) != before[name]]
        return self.data / f"{'-'.join(names)}.json"

    def remember(self, command: str) -> tuple[str, ...]:
        """Record `command`; returns every command that has written tables here, in the order of their first use."""
        found = self._read()
        commands = list(dict.fromkeys([*found.get("commands", ()), command]))
        write_json(self.marker, {"kind": _KIND, **found, "commands": commands})
        return tuple(commands)

    def _read(self) -> dict[str, Any]:
        return read_json(self.marker, _KIND, dict, ConfigError)
