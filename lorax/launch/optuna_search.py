"""Optuna's search by hydra-optuna-sweeper; a study in a storage resumes after a kill."""

import contextlib
import functools
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate

from lorax.errors import LoraxError
from lorax.runs.lock import BusyError, locked
from lorax.runtime.provenance import without_passwords
from lorax.sweep.words import counted

log = logging.getLogger(__name__)


def search(options: Mapping[str, Any], context: Mapping[str, Any], arguments: list[str]) -> None:
    """Search until the study has `n_trials` trials.

    Without a storage this equals hydra-optuna-sweeper. A study in a storage resumes: it counts
    its complete trials, and first repeats the trials that a kill or a fault left unfinished. They
    are the same trials and resume from their checkpoints. The number of complete trials seeds the
    sampler, so a killed search suggests the same values as one that was not killed.

    Args:
      options: of hydra-optuna-sweeper.
      context: the context that Hydra passes to a sweeper.
      arguments: the overrides, including sweeps.

    Raises:
      LoraxError: a storage cannot be opened, another process searches the study, the study has
        another search space, or the sampler is a grid sampler.
    """
    if options["storage"] is None:
        _sweeper(options, context).sweep(arguments)
        return
    if isinstance(_sweeper(options, context).sampler, functools.partial):
        raise LoraxError(
            "hydra/sweeper/sampler=grid needs no storage: give its values to -m without a sweeper, "
            "where finished trials are skipped"
        )
    directory = Path(context["config"].hydra.sweep.dir)
    directory.mkdir(parents=True, exist_ok=True)
    with _optuna_faults(options), _alone(directory, options["study_name"]):
        _continue(options, context, arguments)


def _continue(options: Mapping[str, Any], context: Mapping[str, Any], arguments: list[str]) -> None:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # It logs the study in each call, and here each batch is a call.
    logging.getLogger("hydra_plugins.hydra_optuna_sweeper._impl").setLevel(logging.WARNING)
    total = options["n_trials"]
    study = _study(options, context)
    _check_space(study, _spaces(options, context, arguments))
    waiting = _repeat_unfinished(study)
    done = _complete(study)
    log.info("study %s: %d of %s complete", study.study_name, done, counted(total, "trial"))
    job = 0
    while job < total - done:
        size = min(waiting or options["n_jobs"], total - done - job)
        sweeper = _sweeper({**options, "n_trials": size, "n_jobs": size}, context, _complete(study))
        sweeper.job_idx = job
        sweeper.sweep(arguments)
        job, waiting = job + size, max(0, waiting - size)
    if len(study.directions) == 1 and _complete(study):
        log.info("best value: %s", study.best_value)
        log.info("best parameters: %s", study.best_params)


def _sweeper(options: Mapping[str, Any], context: Mapping[str, Any], complete: int = 0) -> Any:
    """hydra-optuna-sweeper with its sampler seeded by the study's number of complete trials."""
    from hydra_plugins.hydra_optuna_sweeper._impl import OptunaSweeperImpl

    sampler = context["config"].hydra.sweeper.sampler
    more = {"seed": (sampler.seed or 0) + complete} if "seed" in sampler else {}
    sweeper = OptunaSweeperImpl(**{**options, "sampler": instantiate(sampler, **more)})
    sweeper.setup(**context)
    return sweeper


def _study(options: Mapping[str, Any], context: Mapping[str, Any]) -> Any:
    import optuna

    return optuna.create_study(
        study_name=options["study_name"],
        storage=options["storage"],
        directions=_sweeper(options, context)._get_directions(),
        load_if_exists=True,
    )


def _repeat_unfinished(study: Any) -> int:
    """Mark trials of a dead process as failed, and enqueue all failed trials again.

    Returns:
      The number of trials that are waiting in the study's queue.
    """
    import optuna
    from optuna.trial import TrialState

    by_state: dict[Any, list[Any]] = {state: [] for state in TrialState}
    for trial in study.get_trials(deepcopy=False):
        by_state[trial.state].append(trial)
    for trial in by_state[TrialState.RUNNING]:
        study.tell(trial.number, state=TrialState.FAIL)
    if stale := by_state[TrialState.RUNNING]:
        log.info("%s of a search that was killed: marked failed", counted(len(stale), "trial"))
    known = [trial.params for trial in by_state[TrialState.COMPLETE]]
    known += [trial.system_attrs.get("fixed_params") for trial in by_state[TrialState.WAITING]]
    waiting = len(by_state[TrialState.WAITING])
    for trial in [*by_state[TrialState.FAIL], *stale]:
        if trial.params and trial.params not in known:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.enqueue_trial(trial.params)
            known.append(trial.params)
            waiting += 1
    return waiting


def _complete(study: Any) -> int:
    from optuna.trial import TrialState

    return len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))


def _spaces(
    options: Mapping[str, Any], context: Mapping[str, Any], arguments: list[str]
) -> dict[str, Any]:
    """Optuna's distribution of each searched setting."""
    from hydra_plugins.hydra_optuna_sweeper._impl import create_params_from_overrides

    params = _sweeper(options, context)._parse_sweeper_params_config()
    return create_params_from_overrides([*params, *arguments])[0]


def _check_space(study: Any, spaces: Mapping[str, Any]) -> None:
    from optuna.distributions import check_distribution_compatibility

    for trial in study.get_trials(deepcopy=False):
        for name in trial.distributions.keys() & spaces.keys():
            try:
                check_distribution_compatibility(trial.distributions[name], spaces[name])
            except ValueError as fault:
                raise LoraxError(
                    f"study {study.study_name!r} has another search space of {name}; name another "
                    "hydra.sweeper.study_name"
                ) from fault


@contextlib.contextmanager
def _alone(directory: Path, study: str) -> Iterator[None]:
    """Lock a sweep's directory: only then is every trial in state `running` stale."""
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(directory))
        except BusyError as fault:
            raise LoraxError(
                f"study {study!r} is searched by another process ({directory}); wait, or stop it"
            ) from fault
        yield


@contextlib.contextmanager
def _optuna_faults(options: Mapping[str, Any]) -> Iterator[None]:
    """Raise faults of Optuna as a LoraxError of one line."""
    import optuna
    import sqlalchemy

    storage = without_passwords(str(options["storage"]))
    place = f"study {options['study_name']!r} in hydra.sweeper.storage={storage}"
    try:
        yield
    except (optuna.exceptions.OptunaError, sqlalchemy.exc.SQLAlchemyError) as fault:
        reason = without_passwords(str(fault.__cause__ or fault).splitlines()[0])
        raise LoraxError(f"cannot use {place}: {reason}") from fault
