"""Hydra applications: convert DictConfig to dataclasses, and report faults in one line."""

import contextlib
import copy
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.utils import get_original_cwd
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.launch.faults import flag_fault, one_line
from lorax.launch.settings import settings_help
from lorax.runs.content import with_content
from lorax.runs.trial_id import trial_dir
from lorax.runtime import stop
from lorax.runtime.process import prepare_process

T = TypeVar("T")
ENTRY_PROCESSES: set[int] = set()  # ids of processes that have an entry point; workers have none
SHOW_TRACEBACK = os.environ.get("HYDRA_FULL_ERROR") == "1"


def config_of(config: DictConfig) -> TrialConfig:
    """The trial that a composed config describes: resolved, type-checked, with its content named.

    Raises:
      LoraxError: a missing or ill-typed value.
    """
    trial = _typed_already(config) or _by_schema(config)
    return with_content(trial)


def _by_schema(config: DictConfig) -> TrialConfig:
    plain = OmegaConf.to_container(config, resolve=False)
    assert isinstance(plain, dict)
    plain.pop("hydra", None)
    try:
        trial = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TrialConfig), plain))
    except OmegaConfBaseException as fault:
        raise LoraxError(one_line(fault)) from fault
    assert isinstance(trial, TrialConfig)
    return trial


def _typed_already(config: DictConfig) -> TrialConfig | None:
    """The trial of a config that is merged into the schema already, as Hydra's are; else None.

    This avoids a second merge, which takes most of the time. A config with a fault also gives
    None; the merge then names the fault.
    """
    names = {field.name for field in fields(TrialConfig)}
    if OmegaConf.get_type(config) is not TrialConfig or {*config} - {"hydra"} != names:
        return None
    try:
        trial = OmegaConf.to_object(without_hydra(config) if "hydra" in config else config)
    except OmegaConfBaseException:
        return None
    assert isinstance(trial, TrialConfig)
    return trial if _has_own_fields_alone(trial) else None


def _has_own_fields_alone(value: Any) -> bool:
    """Whether a dataclass instance has no attribute that its class lacks, at any depth."""
    if not is_dataclass(value):
        return True
    own = vars(value)
    is_exact = own.keys() == {field.name for field in fields(value)}
    return is_exact and all(map(_has_own_fields_alone, own.values()))


def without_hydra(config: DictConfig) -> DictConfig:
    """A copy of a config without Hydra's own part."""
    rest = copy.deepcopy(config)
    with flag_override(rest, ["struct", "readonly"], False):
        del rest["hydra"]
    return rest


def register() -> None:
    """Register the schema and the resolvers `${trial_id:}` and `${settings_help:}` with Hydra."""
    ConfigStore.instance().store(name="trial", node=TrialConfig)
    OmegaConf.register_new_resolver(
        "trial_id", lambda *, _root_: trial_dir(config_of(_root_)).name, replace=True
    )
    # Hydra substitutes `$` in its help text.
    OmegaConf.register_new_resolver(
        "settings_help", lambda: settings_help().replace("$", "$$"), replace=True
    )


def hydra_main(task: Callable[[TrialConfig], Any], config_name: str) -> None:
    """Run a Hydra application behind `entry_point`.

    Args:
      task: called with each trial; its return value goes to the sweeper.
      config_name: the primary config in `conf/`.
    """

    def job(config: DictConfig) -> Any:
        return _run_job(task, config)

    application = hydra.main(version_base=None, config_path="pkg://conf", config_name=config_name)

    def run() -> None:
        _refuse_unknown_flags(sys.argv[1:])
        application(job)()

    entry_point(run)


def run_command(main: Callable[[list[str]], Any], about: str | None) -> None:
    """Run a command that takes overrides, behind `entry_point`.

    Args:
      main: called with the command's arguments.
      about: the command's own help, which `--help` prints before all settings.
    """
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"{(about or '').strip()}\n\n{settings_help()}")
    else:

        def run() -> None:
            _refuse_unknown_flags(arguments)
            main(arguments)

        entry_point(run)


def _refuse_unknown_flags(arguments: Sequence[str]) -> None:
    """Refuse `--name value` before Hydra refuses it and prints its usage.

    Raises:
      LoraxError: a flag that Hydra does not know; names the intended setting.
    """
    known = get_args_parser()._option_string_actions
    takes_value = False
    for word, following in itertools.zip_longest(arguments, arguments[1:]):
        if not takes_value and word.startswith("-") and word.partition("=")[0] not in known:
            raise LoraxError(flag_fault(word, following))
        action = known.get(word)
        takes_value = action is not None and not takes_value and action.nargs is None


def _run_job(task: Callable[[TrialConfig], Any], config: DictConfig) -> Any:
    """Run a task within `entry_point`; in a launcher's worker process, without it.

    Hydra reports an exception itself, but lets SystemExit pass. A worker must not exit: Hydra's
    JobReturn carries its fault back to the process with the entry point.
    """

    def run() -> Any:
        with submission_directory():
            return task(config_of(config))

    if os.getpid() not in ENTRY_PROCESSES:
        quiet_libraries()
        return run()
    return entry_point(run)


@contextlib.contextmanager
def submission_directory() -> Iterator[None]:
    """Change to the directory in which the command was given, also with `hydra.job.chdir=true`.

    Relative paths in settings refer to it, and the name of a trial's directory depends on them.
    """
    place = get_original_cwd() if HydraConfig.initialized() else Path.cwd()
    with contextlib.chdir(place):
        yield


def entry_point(call: Callable[[], T]) -> T:
    """Return `call()`; a fault that the user can correct ends the process: one line, status 2.

    With HYDRA_FULL_ERROR=1 in the environment the traceback is shown instead. SIGINT and SIGTERM
    end the process after the training loop has saved its step: one line, status 130 or 143. A
    second signal ends the process at once.
    """
    quiet_libraries()
    prepare_process()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its faults instead of printing them
    try:
        with _outermost():
            return call()
    except (LoraxError, HydraException, OmegaConfBaseException, OSError) as fault:
        if SHOW_TRACEBACK:
            raise
        sys.exit(_report(fault))


@contextlib.contextmanager
def _outermost() -> Iterator[None]:
    """Handle signals in the outermost entry point of the process; a nested one does not."""
    if os.getpid() in ENTRY_PROCESSES:
        yield
        return
    ENTRY_PROCESSES.add(os.getpid())
    with stop.at_entry_point():
        try:
            yield
        except KeyboardInterrupt as stopped:
            stop.end(stopped)


def own_arguments(
    arguments: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """(a command's own `name=value` arguments, the others, which are overrides of a trial).

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
      experiment: a name in `conf/experiment`.
      overrides: as `experiments.finetune` takes them.
      data_dir: the file or folder; its path may be relative.
      fixed: settings that the command sets itself.

    Raises:
      LoraxError: an override that requests a sweep, or a setting that the command sets itself.
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
    """Raise the log level of libraries, whose INFO records Hydra would show.

    Orbax raises its errors, but also logs each several times (absl is its logger).
    """
    for name in ("jax", "orbax", "hydra._internal.core_plugins.basic_launcher"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in ("absl", "asyncio"):  # asyncio logs Orbax's concurrent writes
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _show_unraisable


def _show_unraisable(report: Any) -> None:
    # When a write fails, concurrent writes report to Orbax's event loop, which is closed by then.
    if str(report.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(report)


def _report(fault: Exception) -> int:
    cause = fault.__cause__
    if isinstance(fault, HydraException) and isinstance(cause, OmegaConfBaseException):
        fault = cause
    print(f"error: {one_line(fault)}", file=sys.stderr)
    return 2


register()  # at import, so that a launcher's worker processes have them too
