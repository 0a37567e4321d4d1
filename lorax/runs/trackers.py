"""Trackers of a trial's records: always JSONL, and W&B on request."""

import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from lorax.config import TrackingConfig, TrialConfig
from lorax.errors import LoraxError
from lorax.runs.lock import BusyError
from lorax.runs.results import read_result
from lorax.runs.trial import METRICS, Trial

log = logging.getLogger(__name__)
Record = dict[str, Any]
PENDING = "wandb-pending.json"  # in a trial's directory until W&B has received the trial's end
FAILED, INTERRUPTED = 1, 255  # exit codes of a run, by W&B's convention
LONGEST = 128  # characters that W&B accepts in a name
FINISH_SECONDS = 300.0
_REFUSALS: list[str] = []  # reasons why this process did not reach W&B's server


class Tracker(Protocol):
    """A receiver of the training loop's records."""

    def log(self, record: Record) -> None:
        """Log one record; `step` counts optimizer steps and `kind` names what was measured."""

    def finish(self, summary: Record, adapter: Path | None) -> None:
        """Log the trial's end: its result and its adapter's folder."""

    def close(self, exit_code: int = 0) -> None:
        """Close before the trial's end; it continues, after a fault if `exit_code` is not 0."""


class Jsonl:
    """`metrics.jsonl`: one line per record, passed to the system when `log` returns.

    The lines hold nothing that depends on the clock: a trial that was killed and resumed leaves
    the same file, byte for byte, as one that was not.

    Args:
      path: the file; records after `step`, which a killed run has left, are dropped.
      step: the step that training resumes from.
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

    def close(self, exit_code: int = 0) -> None:
        """Close the file."""
        del exit_code
        self._file.close()


class Wandb:
    """A W&B run of one trial: offline unless a key is set or WANDB_MODE says otherwise.

    If the server cannot be reached or refuses, this run and later ones of the process are
    offline too.

    Args:
      config: project and entity.
      directory: the trial's; W&B's files go under it.
      trial: the resolved config; its `trial_id` and `sweep.name` are the run's name and group.
      step: the step that training resumes from; 0 starts a new run.
    """

    def __init__(self, config: TrackingConfig, directory: Path, trial: dict[str, Any], step: int):
        import wandb

        options: dict[str, Any] = {
            "project": config.project,
            "entity": config.entity,
            "id": _run_id(directory, trial["trial_id"], step),
            "name": trial["trial_id"],
            "group": trial["sweep"]["name"][:LONGEST],
            "job_type": trial["train"]["mode"],
            "config": trial,
            "dir": str(directory),
            "resume": "allow",
            "reinit": "create_new",
            "settings": wandb.Settings(silent=True, console="off", **_patience()),
        }
        try:
            self._run = wandb.init(mode=_mode(), **options)
        except wandb.errors.CommError as fault:
            _REFUSALS.append(_reason(fault))
            log.warning(
                "W&B cannot be reached (%s): runs are kept offline; `wandb sync` sends them",
                _REFUSALS[0],
            )
            options["id"] = _run_id(directory, trial["trial_id"], 0)  # the client has the old id
            self._run = wandb.init(mode="offline", **options)
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
            artifact = wandb.Artifact(_legal(f"adapter-{self._run.name}"), type="adapter")
            artifact.add_dir(str(adapter))
            self._run.log_artifact(artifact)
        self.close(FAILED if summary["status"] == "diverged" else 0)

    def close(self, exit_code: int = 0) -> None:
        """End the run; the same trial resumes under the same id."""
        self._run.finish(exit_code=exit_code)


class Guarded:
    """A tracker whose faults stop no trial: the first fault is a warning and ends the tracking.

    `wandb-pending.json` in the trial's directory records the step after which the tracker has
    missed records. Opening the trial again, or `catch_up` after its end, sends them.

    Args:
      directory: the trial's, with its `metrics.jsonl`.
      step: the step that training resumes from.
      start: opens the tracker of a trial that resumes from a given step.
    """

    def __init__(self, directory: Path, step: int, start: Callable[[int], Tracker]):
        self._directory, self._tracker = directory, None
        self._told = min(step, _told(directory, step))
        with self._guard():
            self._tracker = start(self._told)
            _note(directory, None)
        missed = read_jsonl(directory / METRICS) if self._told < step else []
        for record in missed:
            if self._told < record["step"] <= step:
                self.log(record)

    def log(self, record: Record) -> None:
        """Pass a record on."""
        self._told = max(self._told, record["step"] - 1)  # a step may have more records to come
        with self._guard() as tracker:
            tracker.log(record)

    def finish(self, summary: Record, adapter: Path | None) -> None:
        """Pass the end on."""
        with self._guard() as tracker:
            tracker.finish(summary, adapter)
            if self._tracker:  # a failed tracker has not sent the end
                (self._directory / PENDING).unlink(missing_ok=True)

    def close(self, exit_code: int = 0) -> None:
        """Close the tracker."""
        with self._guard() as tracker:
            tracker.close(exit_code)

    @contextlib.contextmanager
    def _guard(self) -> Iterator[Any]:
        tracker = self._tracker or Silent()
        try:
            with _quiet_logs():
                yield tracker
        except Exception as fault:  # from W&B, the network or the disk; they share no base class
            self._tracker = None
            with contextlib.suppress(Exception), _quiet_logs():
                tracker.close(FAILED)
            with contextlib.suppress(OSError):
                _note(self._directory, self._told)
            log.warning(
                "%s: W&B has failed (%s) and misses the rest of this trial, which goes on; "
                "metrics.jsonl has all of it, and the same command given again sends what is "
                "missing",
                self._directory.name,
                _reason(fault),
            )


class Silent:
    """A tracker that records nothing."""

    def log(self, record: Record) -> None:
        """Nothing."""

    def finish(self, summary: Record, adapter: Path | None) -> None:
        """Nothing."""

    def close(self, exit_code: int = 0) -> None:
        """Nothing."""


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

    def close(self, exit_code: int = 0) -> None:
        """Close each."""
        for tracker in self._trackers:
            tracker.close(exit_code)


def open_tracker(trial: Trial, config: TrialConfig, step: int) -> Tracker:
    """The trackers of a trial that starts at a step or resumes from it.

    Args:
      trial: the trial.
      config: its config, with its content named.
      step: optimizer steps done.
    """
    jsonl = Jsonl(trial.metrics, step)
    if config.tracking.kind == "wandb":
        return Both(jsonl, _guarded_wandb(trial, config, step))
    return jsonl


def catch_up(trial: Trial) -> None:
    """Send W&B the missing records, summary and artifact of a trial that has ended."""
    directory = trial.directory
    if trial.config.tracking.kind != "wandb" or not (directory / PENDING).exists():
        return
    with contextlib.suppress(BusyError), trial.held():
        if result := read_result(directory):
            tracker = _guarded_wandb(trial, trial.config, result["steps"])
            tracker.finish(dict(result), trial.adapter)


def _guarded_wandb(trial: Trial, config: TrialConfig, step: int) -> Guarded:
    described = {**dataclasses.asdict(config), "trial_id": trial.id}
    return Guarded(
        trial.directory,
        step,
        lambda told: Wandb(config.tracking, trial.directory, described, told),
    )


def read_jsonl(path: Path) -> list[Record]:
    """The complete records of a file, without a last line that a kill has truncated.

    Raises:
      LoraxError: a line that is not the JSON of a record.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], start=1):
        if not line:
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not a record of a step")
            records.append(record)
        except (ValueError, RecursionError) as fault:
            raise LoraxError(
                f"{path}:{number} is damaged ({fault}); delete the trial's folder to run it again"
            ) from None
    return records


def finite(value: Any) -> Any:
    """The value with None for each number that is not finite, at any depth: JSON has no NaN."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _line(record: Record) -> str:
    return json.dumps(finite(record), allow_nan=False) + "\n"


def _run_id(directory: Path, name: str, step: int) -> str:
    """The run's id, kept in the trial's folder: the same trial in another folder is another run.

    A trial that starts over gets a new id, since W&B drops steps that a run has already passed.
    """
    path = directory / "wandb" / "run-id"
    path.parent.mkdir(exist_ok=True)
    if step == 0 or not path.exists():
        path.write_text(f"{_legal(name, LONGEST - 9)}-{secrets.token_hex(4)}\n")
    return path.read_text().strip()


def _legal(name: str, longest: int = LONGEST) -> str:
    """A name in characters that W&B accepts; a long name keeps its end, which has the hash.

    >>> _legal("adapter-r8-qv+mlp-lr1e+06-s0-0123abcd")
    'adapter-r8-qv_mlp-lr1e_06-s0-0123abcd'
    """
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)[-longest:]


def _note(directory: Path, told: int | None) -> None:
    """Record that W&B lacks the trial's end and, after a fault, the last step that it has."""
    (directory / PENDING).write_text(json.dumps({"told": told}) + "\n")


def _told(directory: Path, otherwise: int) -> int:
    """The recorded step up to which W&B has a trial's records."""
    try:
        told = json.loads((directory / PENDING).read_text())["told"]
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise
    return told if isinstance(told, int) else otherwise


@contextlib.contextmanager
def _quiet_logs() -> Iterator[None]:
    """Silence `logging`'s own tracebacks: a full disk causes one per line of W&B's debug log."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = before


def _reason(fault: Exception) -> str:
    text = next((line.strip() for line in str(fault).splitlines() if line.strip()), "")
    return f"{type(fault).__name__}: {text}" if text else type(fault).__name__


def _mode() -> Literal["online", "offline"] | None:
    """W&B's mode; None if the environment sets it."""
    if _REFUSALS:
        return "offline"
    if "WANDB_MODE" in os.environ:
        return None
    return "online" if os.environ.get("WANDB_API_KEY") or _has_netrc_key() else "offline"


def _patience() -> dict[str, Any]:
    """Settings that limit the wait for uploads: W&B waits forever, even without a network."""
    if "WANDB_FINISH_TIMEOUT" in os.environ:
        return {}
    return {"finish_timeout": FINISH_SECONDS, "finish_timeout_raises": True}


def _has_netrc_key() -> bool:
    import netrc

    import wandb

    host = urlsplit(wandb.setup().settings.base_url).netloc
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
