"""Where a trial's numbers go: always JSONL, and W&B when asked."""

import json
import math
import os
import secrets
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from lorax.config import TrackingConfig
from lorax.errors import LoraxError

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
    """`metrics.jsonl`: a line a record, each handed to the system when `log` returns.

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
      trial: the resolved config, and under `trial_id` and `sweep.name` the run's name and
        group.
      step: the step that training goes on from; from 0 it is a new run.
    """

    def __init__(self, config: TrackingConfig, directory: Path, trial: dict[str, Any], step: int):
        import wandb

        online = os.environ.get("WANDB_API_KEY") or _has_netrc_key()
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            id=_run_id(directory, trial["trial_id"], step),
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
            artifact = wandb.Artifact(f"adapter-{self._run.name}", type="adapter")
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
        return Both(jsonl, Wandb(config, directory, trial, step))
    return jsonl


def read_jsonl(path: Path) -> list[Record]:
    """The whole records of a file; a last line cut short by a kill is left out.

    Raises:
      LoraxError: a line that is not JSON.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], start=1):
        try:
            records += [json.loads(line)] if line else []
        except ValueError as fault:
            raise LoraxError(
                f"{path}:{number} is damaged ({fault}); delete the trial's folder to run it again"
            ) from None
    return records


def finite(value: Any) -> Any:
    """JSON has no NaN: null stands for a number that is none, at any depth."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(record: Record) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def _run_id(directory: Path, name: str, step: int) -> str:
    """The run's id, kept in the trial's folder: the same trial elsewhere is another run.

    A trial that starts over has a new one, since W&B drops steps that a run has passed already.
    """
    path = directory / "wandb" / "run-id"
    path.parent.mkdir(exist_ok=True)
    if step == 0 or not path.exists():
        path.write_text(f"{name}-{secrets.token_hex(4)}\n")
    return path.read_text().strip()


def _has_netrc_key() -> bool:
    import netrc

    import wandb

    host = urlsplit(wandb.setup().settings.base_url).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
