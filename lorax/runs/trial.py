"""A trial on disk: its config, its directory, its lock and its result."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lorax.config import TrialConfig
from lorax.runs.lock import is_free, locked
from lorax.runs.results import PRUNED, RESULT, Result, read_result
from lorax.runs.trial_id import trial_dir

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
POINTER = "packed.json"


@dataclass(frozen=True)
class Trial:
    """One training run, and the directory that holds all its files.

    `Trial.of(config)` hashes the config once. Two trials are equal if they lie in one directory.

    Attributes:
      config: of the training.
      directory: `<output_dir>/<sweep.name>/<trial id>`.
    """

    config: TrialConfig = field(compare=False)
    directory: Path

    @classmethod
    def of(cls, config: TrialConfig) -> "Trial":
        """The trial that a config describes."""
        return cls(config, trial_dir(config))

    @property
    def id(self) -> str:
        """The name of its directory."""
        return self.directory.name

    @property
    def sweep_dir(self) -> Path:
        """The directory of its sweep."""
        return self.directory.parent

    @property
    def metrics(self) -> Path:
        """The file of its training and evaluation records."""
        return self.directory / METRICS

    @property
    def checkpoints(self) -> Path:
        """The folder of its own checkpoints."""
        return self.directory / CHECKPOINTS

    @property
    def adapter(self) -> Path:
        """The folder of its trained parameters."""
        return self.directory / ADAPTER

    def result(self) -> Result | None:
        """Its result; None while it is still to be trained.

        A trial that halving has pruned counts as ended only in a sweep with halving.

        Raises:
          LoraxError: a result that cannot be read.
        """
        result = read_result(self.directory)
        prunes = self.config.sweep.halving.after is not None
        return None if result and result["status"] == PRUNED and not prunes else result

    @property
    def is_open(self) -> bool:
        """Whether it is still to be trained, from its start or further."""
        return self.result() is None

    @property
    def has_started(self) -> bool:
        """Whether it has a result, or a checkpoint to resume from."""
        return any((self.directory / name).exists() for name in (RESULT, CHECKPOINTS, POINTER))

    @property
    def is_free(self) -> bool:
        """Whether no other process holds it now."""
        return is_free(self.directory)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the directory, which is created if missing.

        Raises:
          BusyError: another process holds it.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with locked(self.directory):
            yield

    def own_steps(self) -> list[int]:
        """The steps at which it has checkpoints of its own, ascending."""
        names = (path.name for path in self.checkpoints.glob("*"))
        return sorted(int(name) for name in names if name.isdigit())

    def pack_checkpoints(self) -> Path | None:
        """The folder of the pack's checkpoints that hold this trial, if any."""
        return pointed_to(self.directory)


def pointed_to(directory: Path) -> Path | None:
    """The folder of the pack's checkpoints that a trial's directory points to, if any.

    It is searched in the trial's sweep, so that an output directory may move.
    """
    try:
        noted = Path(json.loads((directory / POINTER).read_text())["checkpoints"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return directory.absolute().parent / Path(*noted.parts[-3:])
