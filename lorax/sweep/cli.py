"""The door between Hydra and the library: DictConfig in, dataclasses out, faults in one line."""

import itertools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.process import prepare_process
from lorax.train.content import with_content
from lorax.trial_id import trial_dir

T = TypeVar("T")
DOORS: set[int] = set()  # the process that a command started in; workers have none
SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def config_of(config: DictConfig) -> TrialConfig:
    """The trial that a composed config describes, resolved, type-checked, its content named.

    Raises:
      LoraxError: a missing or ill-typed value.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(TrialConfig), plain)
        trial = OmegaConf.to_object(typed)
    except OmegaConfBaseException as fault:
        raise LoraxError(one_line(fault)) from fault
    assert isinstance(trial, TrialConfig)
    return with_content(trial)


def register() -> None:
    """Tell Hydra the schema, and `${trial_id:}`, which names a trial's directory."""
    ConfigStore.instance().store(name="trial", node=TrialConfig)
    OmegaConf.register_new_resolver(
        "trial_id", lambda *, _root_: trial_dir(config_of(_root_)).name, replace=True
    )


def hydra_main(task: Callable[[TrialConfig], Any], config_name: str) -> None:
    """Run a Hydra application behind `at_the_door`.

    Args:
      task: gets each trial; its return value goes to the sweeper.
      config_name: the primary config in `conf/`.
    """

    def job(config: DictConfig) -> Any:
        return _run_job(task, config)

    application = hydra.main(version_base=None, config_path="pkg://conf", config_name=config_name)
    at_the_door(application(job))


def _run_job(task: Callable[[TrialConfig], Any], config: DictConfig) -> Any:
    """A task behind the door, where this process has one; in a launcher's worker without.

    SystemExit, unlike an exception, passes through Hydra without a report of its own. A worker
    may not exit, for the fault goes back to the door by Hydra's JobReturn.
    """
    if os.getpid() not in DOORS:
        quiet_libraries()
        return task(config_of(config))
    return at_the_door(lambda: task(config_of(config)))


def at_the_door(call: Callable[[], T]) -> T:
    """`call()`, where a fault that the user can mend ends the process: one line, status 2.

    With HYDRA_FULL_ERROR=1 in the environment the traceback is shown instead.
    """
    quiet_libraries()
    prepare_process()
    DOORS.add(os.getpid())
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its faults, instead of printing them
    try:
        return call()
    except (LoraxError, HydraException, OmegaConfBaseException, OSError) as fault:
        if SHOW_TRACEBACK:
            raise
        sys.exit(_report(fault))
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def own_arguments(
    arguments: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """A command's own `name=value` arguments, and the others, which are overrides of a trial.

    >>> own_arguments(["data=a.txt", "lora.rank=4"], ["data"])
    ({'data': 'a.txt'}, ['lora.rank=4'])
    """
    parts = [argument.partition("=") for argument in arguments]
    own = {name: value for name, _, value in parts if name in names}
    return own, ["".join(part) for part in parts if part[0] not in names]


def compose_trial(
    experiment: str, overrides: Sequence[str], data_dir: Path, fixed: Sequence[str] = ()
) -> TrialConfig:
    """The one trial of a command that reads the user's own files.

    Args:
      experiment: of `conf/experiment`.
      overrides: of experiments.finetune.
      data_dir: the file or folder, by any path.
      fixed: settings that the command makes itself.

    Raises:
      LoraxError: an override that asks for a sweep, or for what the command makes itself.
    """
    for word in overrides:
        name = word.partition("=")[0].lstrip("+~")
        if name in ("-m", "--multirun"):
            raise LoraxError(f"{word}: this command runs one trial; give one value a setting")
        if name in ("task", "task.data_dir", "experiment", *fixed):
            raise LoraxError(f"{word}: this command sets {name} itself; leave it out")
    with hydra.initialize_config_module("conf", version_base=None):
        trial = config_of(hydra.compose("finetune", [f"experiment={experiment}", *overrides]))
    task = replace(trial.task, data_dir=str(data_dir.resolve()), content=None)
    return with_content(replace(trial, task=task))


def quiet_libraries() -> None:
    """Hydra shows INFO of every library; of these only warnings matter.

    Orbax raises its errors, and logs each several times over besides (absl is its logger).
    """
    for name in ("jax", "orbax", "hydra._internal.core_plugins.basic_launcher"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("absl", "asyncio"):  # asyncio tells of Orbax's writes beside the one that failed
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _show_unraisable


def _show_unraisable(report: Any) -> None:
    # When a write fails, those beside it report to Orbax's event loop, which is closed by then.
    if str(report.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(report)


def _report(fault: Exception) -> int:
    cause = fault.__cause__
    if isinstance(fault, HydraException) and isinstance(cause, OmegaConfBaseException):
        fault = cause
    print(f"error: {one_line(fault)}", file=sys.stderr)
    return 2


def one_line(fault: Exception) -> str:
    """A fault of Hydra or OmegaConf as one line, with the keys that would be right."""
    if isinstance(fault, LoraxError):
        return str(fault)
    if isinstance(fault, OSError) and not isinstance(fault, HydraException):  # Hydra's own writes
        return f"cannot write {fault.filename or 'the output'}: {fault.strerror or fault}"
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    text = lines[0] if lines else type(fault).__name__
    key = getattr(fault, "full_key", None)
    unknown = re.match(r"Key '(.+)' (?:is not in struct|not in '.+')", text)
    if unknown:
        return _unknown_key(key or unknown.group(1))
    text = text.rstrip(".")
    for pattern, remedy in REMEDIES.items():
        text = re.sub(pattern, remedy, text)
    if override := getattr(fault, "override", None):  # one that does not parse
        return f"{override}: {_parse_error(lines)}"
    if key and key not in text:
        text = f"{key}: {text}"
    if options := _available(lines):
        return f"{text}; there are {', '.join(options)}"
    return text


# What Hydra says without a remedy, in few words, and what helps.
REMEDIES = {
    r"^(Ambiguous value for argument .*)$": r"\1: a sweep over it needs -m",
    r"^.*Could not load 'hydra/sweeper/optuna'$": (
        "hydra/sweeper=lorax_optuna needs an extra: pip install -c constraints.txt -e '.[optuna]'"
    ),
}


def _parse_error(lines: list[str]) -> str:
    """What Hydra's message says besides the override itself and a link."""
    said = [line for line in lines if not line.startswith(("Error parsing override", "See http"))]
    return said[0] if said else "not a setting and its value"


def _available(lines: list[str]) -> list[str]:
    """Hydra's list of a group's options, which ends where its search path begins."""
    heads = [n for n, line in enumerate(lines) if line.startswith("Available options")]
    if not heads:
        return []
    return list(itertools.takewhile(lambda line: not line.endswith(":"), lines[heads[0] + 1 :]))


def _unknown_key(key: str) -> str:
    import difflib

    if key.startswith("hydra."):
        part = key.rpartition(".")[0]
        return f"{key!r} is not a setting; to see those there are: --cfg hydra -p {part}"
    known = _known_keys()
    if any(key.startswith(f"{name}.") for name in known):
        return f"{key!r} is not there yet; to add an entry: +{key}=..."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    group = key.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == group]
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(siblings or known)}"
    return f"{key!r} is not a setting; {hint}"


def _known_keys() -> list[str]:
    def walk(node: Any, prefix: str) -> list[str]:
        if isinstance(node, dict) and node:
            return [key for name in node for key in walk(node[name], f"{prefix}{name}.")]
        return [prefix.rstrip(".")]

    plain = OmegaConf.to_container(OmegaConf.structured(TrialConfig))
    return walk(plain, "")


register()  # at import, so that a launcher's worker processes know both, too
