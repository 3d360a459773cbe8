"""The folder of an experiment: where jobs, tables and figures lie, and with which settings they were made."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cardiocaps import __version__
from cardiocaps.config import TrainConfig, completed
from cardiocaps.errors import ConfigError, OutputError
from cardiocaps.files import output_errors, write_json

if TYPE_CHECKING:
    from cardiocaps.data.echonet import Study

_KIND = "cardiocaps experiments"

# What may be another from call to call: where it runs and how it is shown. (Other devices and numbers of threads round
# in other ways, which is nothing that tables must be kept apart for.)
_MAY_DIFFER = {
    "device",
    "threads",
    "workers",
    "decode_workers",
    "cache_dir",
    "follow_links",
    "progress",
    "bootstrap",
    "out",
    "resume",
    "overwrite",
    "seed",
}


@dataclass(frozen=True)
class ExperimentFolder:
    """`path`/jobs/SYSTEM/seedN are runs, `path`/tables what is made of them."""

    path: Path

    @property
    def marker(self) -> Path:
        return self.path / "experiments.json"

    @property
    def tables(self) -> Path:
        return self.path / "tables"

    @property
    def jobs(self) -> Path:
        return self.path / "jobs"

    def job(self, key: str, seed: int) -> Path:
        return self.jobs / key / f"seed{seed}"

    def make(self) -> None:
        """Make the folder, if it is not there. Raises OutputError: it holds anything else, or cannot be written."""
        with output_errors(self.path):
            foreign = self.path.exists() and not self.marker.is_file()
            if foreign and (not self.path.is_dir() or any(self.path.iterdir())):
                raise OutputError(f"{self.path} is not empty and no folder of experiments; choose another --out")
            self.path.mkdir(parents=True, exist_ok=True)

    def claim(self, config: TrainConfig) -> None:
        """Remember the settings, or find them the same. Until a job has begun they may still be others, for who
        mistyped them.

        Raises:
            ConfigError: it holds experiments with other settings, which are named. OutputError: it cannot be written.
        """
        settings = {name: value for name, value in config.resolved().as_dict().items() if name not in _MAY_DIFFER}
        found = self._read()
        if found is None or not self.jobs.is_dir():
            write_json(self.marker, {"kind": _KIND, "version": __version__, "settings": settings})
            return
        before = completed(found.get("settings") or {})
        different = [
            f"{name} is {settings.get(name)!r}, was {before.get(name)!r}"
            for name in dict.fromkeys((*(found.get("settings") or {}), *settings))
            if settings.get(name) != before.get(name)
        ]
        if different:
            raise ConfigError(
                f"out: {self.path} holds experiments with other settings ({'; '.join(different)}); "
                "give these, or choose another --out"
            )

    def claim_data(self, study: Study) -> None:
        """Remember which clips, labels and splits the experiments are about.

        Raises:
            ConfigError: they were about others, so that the data have changed since. OutputError.
        """
        clips = sorted((clip.name, clip.label, clip.split) for clip in study.clips)
        digest = hashlib.sha256(json.dumps(clips).encode()).hexdigest()
        found = self._read()
        assert found is not None
        before = found.setdefault("data", {}).setdefault(f"{study.protocol}, split by {study.split_rule}", digest)
        if before != digest:
            raise ConfigError(
                f"out: the experiments in {self.path} were done on other clips, labels or splits than the data now "
                "have; choose another --out"
            )
        write_json(self.marker, found)

    def remember(self, command: str) -> tuple[str, ...]:
        """Every command that has written tables here, in the order of the first times; `command` is one of them now."""
        found = self._read()
        assert found is not None
        found["commands"] = list(dict.fromkeys([*found.get("commands", ()), command]))
        write_json(self.marker, found)
        return tuple(found["commands"])

    def _read(self) -> dict[str, Any] | None:
        if not self.marker.is_file():
            return None
        try:
            content = json.loads(self.marker.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"out: {self.marker} cannot be read: {error}") from error
        if not isinstance(content, dict) or content.get("kind") != _KIND:
            raise ConfigError(f"out: {self.marker} is not a file of this program")
        return content
