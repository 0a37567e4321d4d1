"""A sweep's configs: Hydra composes one per choice of groups; values are set in copies of it.

Hydra takes 0.1 s or more to compose a config. Most of that time goes to the defaults list and to
reading and merging files. Most jobs of a sweep choose the same groups and differ in values only.
Hydra sets values last, so they can be set in a copy of the config that the jobs share.
"""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorax.config import TrialConfig
from lorax.launch.application import config_of, without_hydra

Words = tuple[str, ...]


class Job(NamedTuple):
    """The overrides of a job, including its sweep's.

    Attributes:
      all: in the order in which Hydra receives them.
      shared: those that need composition: options of groups, and settings of Hydra itself.
      values: the others, which are set in the composed config.
    """

    all: list[Override]
    shared: list[Override]
    values: list[Override]


class Shared(NamedTuple):
    """The config that jobs share, as Hydra composes it (`whole`) and without `hydra` (`trial`)."""

    whole: DictConfig
    trial: DictConfig


class Composer(ConfigLoaderImpl):
    """Hydra's config loader with a cache of the configs that the jobs of a sweep share.

    Its configs and faults equal those of Hydra's loader. Use one loader per sweep: it does not
    reread files of `conf/` that change.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        super().__init__(loader.get_search_path())
        self._parser = OverridesParser.create()
        self._overrides: dict[str, Override] = {}
        self._repositories: dict[Words, IConfigRepository] = {}
        self._groups: dict[tuple[Words, str], bool] = {}
        self._shared: dict[Words, Shared] = {}
        self._trials: dict[Words, TrialConfig] = {}

    def load_sweep_config(
        self, master_config: DictConfig, sweep_overrides: Sequence[str]
    ) -> DictConfig:
        """The config of a job.

        Args:
          master_config: of the sweep; its overrides of `hydra.*` apply to each job.
          sweep_overrides: of the job.

        Raises:
          HydraException: as Hydra's own loader.
        """
        job = self._job(master_config, sweep_overrides)
        config = copy.deepcopy(self._shared_by(job, master_config).whole)
        self._set(config, job.values)
        _describe(config, job.all)
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
        return config

    def trial(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> TrialConfig:
        """`config_of` a job's config; computed once per job.

        Raises:
          HydraException: as `load_sweep_config`.
          LoraxError: as `config_of`.
        """
        job = self._job(master_config, sweep_overrides)
        key = _words(job.all)
        if key not in self._trials:
            config = copy.deepcopy(self._shared_by(job, master_config).trial)
            self._set(config, job.values)
            OmegaConf.copy_cache(from_config=master_config, to_config=config)
            self._trials[key] = config_of(config)
        return self._trials[key]

    def _job(self, master_config: DictConfig, sweep_overrides: Sequence[str]) -> Job:
        of_sweep = OmegaConf.to_container(master_config.hydra.overrides.hydra)
        assert isinstance(of_sweep, list)
        overrides = [self._parsed(str(word)) for word in [*of_sweep, *sweep_overrides]]
        self.validate_sweep_overrides_legal(overrides, RunMode.RUN, from_shell=True)
        of_hydra = _words([override for override in overrides if _is_of_hydra(override)])
        if of_hydra not in self._repositories:  # `hydra.searchpath` decides which groups there are
            _, repository = self._parse_overrides_and_create_caching_repo(
                master_config.hydra.job.config_name, list(of_hydra)
            )
            self._repositories[of_hydra] = repository
        is_value = [self._is_value(override, of_hydra) for override in overrides]
        pairs = list(zip(overrides, is_value, strict=True))
        return Job(overrides, [x for x, own in pairs if not own], [x for x, own in pairs if own])

    def _parsed(self, word: str) -> Override:
        if word not in self._overrides:
            (self._overrides[word],) = self._parser.parse_overrides([word])
        return self._overrides[word]

    def _is_value(self, override: Override, of_hydra: Words) -> bool:
        if _is_of_hydra(override):
            return False
        if isinstance(override.value(), dict):  # a value in a group's config; an option is a name
            return True
        key = of_hydra, override.key_or_group
        if key not in self._groups:
            self._groups[key] = self._repositories[of_hydra].group_exists(override.key_or_group)
        return not self._groups[key]

    def _shared_by(self, job: Job, master_config: DictConfig) -> Shared:
        key = _words(job.shared)
        if key not in self._shared:
            name = master_config.hydra.job.config_name
            whole = self.load_configuration(name, list(key), RunMode.RUN)
            self._shared[key] = Shared(whole, without_hydra(whole))
        return self._shared[key]

    def _set(self, config: DictConfig, values: list[Override]) -> None:
        try:
            self._apply_overrides_to_config(values, config)
        except OmegaConfBaseException as fault:  # as in `load_configuration`
            raise ConfigCompositionException().with_traceback(sys.exc_info()[2]) from fault


def share_composer(context: HydraContext) -> HydraContext:
    """A copy of the context with a `Composer`, which a sweeper and its launcher share."""
    return HydraContext(Composer(context.config_loader), context.callbacks)


def trials_of(
    context: HydraContext | None, config: DictConfig | None, job_overrides: Sequence[Sequence[str]]
) -> list[TrialConfig]:
    """The trials of a sweep's jobs.

    Args:
      context: the context that Hydra passes to a launcher or a sweeper.
      config: of the sweep.
      job_overrides: the overrides of each job.

    Raises:
      HydraException: a job that cannot be composed.
      LoraxError: one with a missing or ill-typed value.
    """
    assert context is not None and config is not None
    loader = context.config_loader
    composer = loader if isinstance(loader, Composer) else Composer(loader)
    return [composer.trial(config, overrides) for overrides in job_overrides]


def _words(overrides: Sequence[Override]) -> Words:
    return tuple(str(override.input_line) for override in overrides)


def _is_of_hydra(override: Override) -> bool:
    return override.is_hydra_override() or override.key_or_group == "hydra"


def _describe(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Record in a config the overrides that made it, as Hydra does."""
    of_job = [override for override in overrides if not override.is_hydra_override()]
    form = config.hydra.job.config.override_dirname
    config.hydra.overrides.task = list(_words(of_job))
    config.hydra.runtime.cwd = str(Path.cwd())
    config.hydra.job.override_dirname = get_overrides_dirname(
        of_job, form.exclude_keys, form.item_sep, form.kv_sep
    )
