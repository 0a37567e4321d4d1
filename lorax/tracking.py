"""Where a trial's numbers go: always JSONL, and W&B when asked."""

import json
import math
import os
from pathlib import Path
from typing import Any, Protocol

from lorax.config import TrackingConfig

Record = dict[str, Any]


class Tracker(Protocol):
    """What the loop tells about."""

    def log(self, record: Record) -> None:
        """One record; `step` counts optimizer steps and `kind` says what was measured."""

    def finish(self, summary: Record, adapter: Path | None) -> None:
        """The trial's end: its result and its adapter's folder."""

    def close(self) -> None:
        """Let go without an end: the trial goes on elsewhere."""


class Jsonl:
    """`metrics.jsonl`: a line a record, each on disk when `log` returns.

    The lines hold nothing that depends on the clock: a trial that was killed and went on
    leaves the same file, byte for byte, as one that was not.

    Args:
      path: the file; its records after `step`, of a run that was cut off, are dropped.
      step: the step that training goes on from.
    """

    def __init__(self, path: Path, step: int = 0):
        kept = [r for r in read_jsonl(path) if r["step"] <= step] if step else []
        partial = path.with_suffix(".partial")
        partial.write_text("".join(_line(record) for record in kept))
        partial.replace(path)
        self._file = path.open("a", buffering=1)

    def log(self, record: Record) -> None:
        """Append one record."""
        self._file.write(_line(record))

    def finish(self, summary: Record, adapter: Path | None) -> None:
        """Close the file; results have a file of their own."""
        del summary, adapter
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Wandb:
    """A W&B run of one trial: offline unless a key is set or WANDB_MODE says otherwise.

    Args:
      config: project and entity.
      directory: the trial's; W&B's files go under it.
      trial: the resolved config, and under `trial_id` and `sweep.name` the run's id and
        group.
    """

    def __init__(self, config: TrackingConfig, directory: Path, trial: dict[str, Any]):
        import wandb

        online = os.environ.get("WANDB_API_KEY") or _has_netrc_key()
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=trial["trial_id"],
            name=trial["trial_id"],
            group=trial["sweep"]["name"],
            job_type=trial["train"]["mode"],
            config=trial,
            dir=str(directory),
            mode=None if "WANDB_MODE" in os.environ else "online" if online else "offline",
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("*", step_metric="optimizer_step")

    def log(self, record: Record) -> None:
        """Log the numbers of a record under `kind/name`."""
        kind, step = record["kind"], record["step"]
        numbers = {
            f"{kind}/{name}": value
            for name, value in record.items()
            if isinstance(value, int | float) and name != "step"
        }
        self._run.log({**numbers, "optimizer_step": step}, step=step)

    def finish(self, summary: Record, adapter: Path | None) -> None:
        """Write the summary, upload the adapter as an artifact, end the run."""
        import wandb

        self._run.summary.update(summary)
        if adapter is not None and adapter.exists():
            artifact = wandb.Artifact(f"adapter-{self._run.id}", type="adapter")
            artifact.add_dir(str(adapter))
            self._run.log_artifact(artifact)
        self.close()

    def close(self) -> None:
        """End the run; the same trial goes on under the same id."""
        self._run.finish()


class Both:
    """Several trackers as one."""

    def __init__(self, *trackers: Tracker):
        self._trackers = trackers

    def log(self, record: Record) -> None:
        """Pass a record on."""
        for tracker in self._trackers:
            tracker.log(record)

    def finish(self, summary: Record, adapter: Path | None) -> None:
        """Pass the end on."""
        for tracker in self._trackers:
            tracker.finish(summary, adapter)

    def close(self) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close()


def open_tracker(
    config: TrackingConfig, directory: Path, trial: dict[str, Any], step: int
) -> Tracker:
    """The trackers of a trial that goes on from `step`."""
    jsonl = Jsonl(directory / "metrics.jsonl", step)
    if config.kind == "wandb":
        return Both(jsonl, Wandb(config, directory, trial))
    return jsonl


def read_jsonl(path: Path) -> list[Record]:
    """The whole records of a file; a last line cut short by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def finite(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that is none, at any depth."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(record: Record) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def _has_netrc_key() -> bool:
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False
