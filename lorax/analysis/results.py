"""A sweep on disk: one `Trial` per directory, with faults kept as warnings."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorax.config import ADDED
from lorax.errors import LoraxError

ENDED = ("finished", "diverged", "cut")
CORRELATIONS = ("matthews", "pearson", "spearman")  # 0 where one side is constant


@dataclass(frozen=True)
class Trial:
    """One training run.

    Attributes:
      id: the name of its directory.
      directory: its path.
      config: its `TrialConfig` with dotted keys, e.g. `{"lora.rank": 8, "seed": 0}`.
      result: the content of `result.json`; empty while the trial is unfinished.
      records: the lines of `metrics.jsonl`, in order.
    """

    id: str
    directory: Path
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    records: tuple[Mapping[str, Any], ...] = ()

    @property
    def status(self) -> str:
        """`finished`, `diverged`, `cut` (by successive halving) or `unfinished`."""
        return str(self.result.get("status", "unfinished"))

    @property
    def mode(self) -> str:
        """`lora`, `full` or `head`."""
        return str(self.config.get("train.mode", "lora"))

    @property
    def metric(self) -> str:
        """The name of the main dev metric."""
        return str(self.result.get("metric", "metric"))

    @property
    def lanes(self) -> int:
        """Number of trials that shared the program and its time; 1 for a single trial."""
        lanes = self.number("lanes")
        return int(lanes) if math.isfinite(lanes) else 1

    def number(self, key: str) -> float:
        """A number of `result.json`; nan where it is absent."""
        return _number(self.result.get(key))

    def cut_number(self, key: str) -> float:
        """A number of how halving ended it (`step`, `place`, `of` ...); nan where it did not."""
        cut = self.result.get("cut")
        return _number(cut.get(key)) if isinstance(cut, Mapping) else math.nan

    def metrics(self, epoch: str = "best") -> Mapping[str, Any]:
        """All dev metrics at the `best` or the `last` epoch."""
        evaluation = self.result.get(epoch)
        metrics = evaluation.get("metrics") if isinstance(evaluation, Mapping) else None
        return metrics if isinstance(metrics, Mapping) else {}

    def score(self, epoch: str = "best", metric: str | None = None) -> float:
        """A dev metric (the main one unless named) in its raw unit; nan where it is absent."""
        return _number(self.metrics(epoch).get(metric or self.metric))

    @property
    def is_constant(self) -> bool:
        """Whether it predicted the same for every dev example, at its best evaluation.

        Trials record it. For older ones a correlation of exactly 0 implies it; accuracy does not.
        """
        best = self.result.get("best")
        if isinstance(best, Mapping) and best.get("constant"):
            return True
        is_older = "content" not in self.result
        return is_older and any(self.metrics().get(name) == 0.0 for name in CORRELATIONS)

    def curve(self, kind: str, key: str) -> dict[int, float]:
        """The finite values of `key` by optimizer step, from the records of one `kind`."""
        records = (r for r in self.records if r.get("kind") == kind)
        points = {int(r["step"]): _number(r.get(key)) for r in records if _is_number(r.get("step"))}
        return {step: value for step, value in points.items() if math.isfinite(value)}


@dataclass(frozen=True)
class Sweep:
    """All trials of a sweep directory, by name, and what was wrong with its files."""

    directory: Path
    trials: tuple[Trial, ...]
    warnings: tuple[str, ...] = ()

    def with_status(self, status: str) -> tuple[Trial, ...]:
        """The trials whose `Trial.status` is this one."""
        return tuple(t for t in self.trials if t.status == status)


def read_sweep(directory: str | Path) -> Sweep:
    """Read every `<directory>/<trial id>/` that has a `config.json`.

    Other folders (`packs/`, `.submitit/`, a report) are not trials and are silently ignored.
    A file that cannot be read becomes a warning: without its config a trial is left out, without
    its result it counts as unfinished, and a bad line of its metrics is skipped.

    Raises:
      LoraxError: the directory is absent or holds no trial.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise LoraxError(f"{directory}: no such sweep directory; give the one its trials lie in")
    warnings: list[str] = []
    found = (_read_trial(d, warnings.append) for d in sorted(directory.iterdir()) if d.is_dir())
    trials = tuple(trial for trial in found if trial is not None)
    if not trials:
        detail = f" ({warnings[0]})" if warnings else ""
        raise LoraxError(f"{directory}: no trials; expected <trial id>/config.json in it{detail}")
    return Sweep(directory, trials, tuple(warnings))


def _read_trial(directory: Path, warn: Callable[[str], None]) -> Trial | None:
    if not (directory / "config.json").is_file():
        if (directory / "result.json").is_file():
            warn(f"{directory.name}: left out, it has a result.json but no config.json")
        return None
    config = _read_object(directory / "config.json", warn)
    if config is None:
        return None
    result = _read_object(directory / "result.json", warn) or {}
    if result and result.get("status") not in ENDED:
        warn(
            f"{directory.name}/result.json: status is {result.get('status')!r}, none of "
            f"{', '.join(ENDED)}; the trial counts as unfinished"
        )
        result = {}
    records = _read_lines(directory / "metrics.jsonl", warn)
    trial = Trial(directory.name, directory, ADDED | _flatten(config), result, records)
    if trial.status == "finished" and not math.isfinite(trial.score()):
        warn(
            f"{directory.name}/result.json: finished without a finite best {trial.metric}; "
            "the trial is left out of the means"
        )
    return trial


def _read_object(path: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        warn(f"{path.parent.name}/{path.name}: unreadable ({_one_line(error)})")
        return None
    if isinstance(value, dict):
        return value
    warn(f"{path.parent.name}/{path.name}: holds a {type(value).__name__}, not an object")
    return None


def _read_lines(path: Path, warn: Callable[[str], None]) -> tuple[dict[str, Any], ...]:
    if not path.is_file():
        return ()
    records = []
    for number, line in enumerate(path.read_text("utf-8", errors="replace").splitlines(), 1):
        try:
            record = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            warn(f"{path.parent.name}/{path.name}: line {number} is not a JSON object; skipped")
    return tuple(record for record in records if record)


def _flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Join the names of section and field only; nested dicts (`lora.rank_pattern`) are values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
