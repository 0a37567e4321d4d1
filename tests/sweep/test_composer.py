"""What the composer makes of a job equals what Hydra makes of it."""

import copy
from types import SimpleNamespace

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.launch.application import config_of
from lorax.launch.composer import Composer, trials_of
from lorax.launch.faults import one_line
from lorax.runs.content import with_content

# Jobs by Hydra's grammar: https://hydra.cc/docs/advanced/override_grammar/basic
SOUND = {
    "nothing": [],
    "values": ["lora.rank=4", "seed=3", "optimizer.lr=1e-4", "task.max_length=64"],
    "the same setting twice": ["lora.rank=4", "lora.rank=5"],
    "a group": ["task=cola", "lora.rank=2"],
    "groups in another order, after values": ["lora.rank=2", "model=gpt2", "task=mrpc"],
    "an experiment": ["experiment=ablation", "train.max_steps=7"],
    "an experiment's value and a group over it": ["experiment=style", "lora.rank=3", "task=cola"],
    "an experiment in a folder": ["experiment=roberta-base/rte", "optimizer.schedule=cosine"],
    "an added group": ["+experiment@_global_=ablation"],
    "a group left out": ["~tracking", "seed=1"],
    "a group's option left out": ["~lora=default"],
    "a value added or overridden": ["++lora.rank=4", "++train.max_steps=9"],
    "an entry added": ["+lora.rank_pattern.query=4", "+lora.rank_pattern.value=2"],
    "a mapping": ["+lora.rank_pattern={query:4,layers.0.attention.query:2}"],
    "a mapping, forced": ["++lora.alpha_pattern={query:4,value:1.5}"],
    "a group's config as a mapping": ["lora={rank:4,targets:[q,v]}"],
    "interpolation": ["seed=${lora.rank}", "sweep.name=x-${task.name}-${seed}"],
    "interpolation of a later value": ["sweep.name=${model.name}", "model=gpt2"],
    "relative interpolation": ["train.eval_batch_size=${.batch_size}"],
    "interpolation of hydra by its resolver": ["sweep.name='${oc.env:HOME}'"],
    "a list": ["lora.targets=[q,v,'encoder.*']", "lora.layers=[0,2]", "lora.exclude=[a,b]"],
    "an empty list": ["lora.layers=[]", "lora.exclude=[]"],
    "null": ["train.max_steps=null", "optimizer.clip_norm=null", "lora.layers=null"],
    "quotes": ["lora.targets='q,v'", 'sweep.name="a b"', "model.name='it\\'s'"],
    "an escaped interpolation": ["sweep.name='\\${x}'"],
    "casts": ["lora.rank=int('4')", "optimizer.lr=float(1)", "sweep.name=str(3)"],
    "types that convert": ["seed='5'", "lora.alpha=4", "train.remat=yes", "sweep.name=7"],
    "a path": ["output_dir=/tmp/a-b_c/d", "task.data_dir=../glue"],
    "hydra's own": ["hydra.job.chdir=true", "seed=2", "hydra.sweep.subdir=x"],
    "an empty value": ["sweep.name="],
    "values left to the schema": ["seed=???", "task.max_length=???"],
}
FAULTY = {
    "an unknown setting": ["lora.rnk=4"],
    "an unknown part": ["lra.rank=4"],
    "an unknown setting at the root": ["learning_rate=4"],
    "a setting added at the root": ["+learning_rate=4"],
    "a setting added in a group": ["+lora.foo=1"],
    "a setting added where one is": ["+lora.rank=1"],
    "an unknown option": ["task=nonesuch"],
    "an unknown option after an unknown setting": ["lora.rnk=4", "task=nonesuch"],
    "an unknown group": ["+tasks=cola"],
    "a package of no group": ["lora.rank@x=4"],
    "a group that is a number": ["task=3"],
    "a forced group": ["++task=cola"],
    "a wrong type": ["lora.rank=four"],
    "null for a number": ["seed=null"],
    "a list for a number": ["seed=[1]"],
    "a value for a part": ["sweep.halving=3"],
    "a mapping's wrong type": ["+lora.rank_pattern={query:x}"],
    "no option": ["experiment=null", "seed=1"],
    "a deletion of a value": ["~lora.rank"],
    "a deletion of a part": ["seed=1", "~sweep.halving"],
    "an unknown interpolation": ["seed=${nonesuch}"],
    "an interpolation of hydra": ["seed=${hydra.job.num}"],
    "an interpolation of the wrong type": ["seed=${task.name}"],
    "an entry overridden that is not there": ["lora.rank_pattern.query=4"],
    "a deletion of what is not there": ["~lora.rnk"],
    "a deletion of another value": ["~lora.rank=3"],
    "a deletion of a group that is not chosen": ["~task=mrpc"],
    "a sweep": ["seed=1,2"],
    "a word that does not parse": ["seed=[1", "task=nonesuch"],
    "no assignment": ["seed"],
}


@pytest.fixture(scope="module")
def sweep():
    """(Hydra's loader, the config of a sweep with a setting of Hydra itself)."""
    with hydra.initialize_config_module("conf", version_base=None):
        loader = GlobalHydra.instance().config_loader()
        words = [
            "hydra.job.config.override_dirname.kv_sep=:",
            "task=cola",
            "seed=1,2",
            "output_dir=out/${now:%f}",
        ]
        config = loader.load_configuration("finetune", words, RunMode.MULTIRUN)
        _ = config.output_dir  # a sweep's directory is made before its jobs are composed
        yield loader, config


@pytest.fixture(scope="module")
def composer(sweep):
    return Composer(sweep[0])


def by_schema(config):
    """The trial of a config, by merging it into the schema."""
    plain = OmegaConf.to_container(config, resolve=False)
    del plain["hydra"]
    return with_content(OmegaConf.to_object(OmegaConf.merge(TrialConfig, plain)))


def fault_of(call):
    """What a command would say, without a remedy's case; None for nothing."""
    try:
        call()
    except (HydraException, OmegaConfBaseException, LoraxError, ValueError) as fault:
        cause = fault.__cause__
        is_behind = isinstance(fault, HydraException) and isinstance(cause, OmegaConfBaseException)
        return type(fault), str(fault), one_line(cause if is_behind else fault)
    return None


@pytest.mark.parametrize("words", SOUND.values(), ids=SOUND.keys())
def test_a_job_is_composed_as_hydra_composes_it(sweep, composer, words):
    loader, master = sweep
    own, hydras = (x.load_sweep_config(master, list(words)) for x in (composer, loader))
    assert own == hydras
    assert OmegaConf.to_yaml(own) == OmegaConf.to_yaml(hydras)  # also the order, unresolved
    assert OmegaConf.get_type(own) is OmegaConf.get_type(hydras)
    for name in ("struct", "readonly"):
        assert own._get_flag(name) == hydras._get_flag(name)
        assert own.hydra._get_flag(name) == hydras.hydra._get_flag(name)
    expected = by_schema(hydras)
    assert config_of(hydras) == config_of(own) == composer.trial(master, words) == expected
    assert repr(composer.trial(master, words)) == repr(expected)  # 1 is not 1.0


@pytest.mark.parametrize("words", FAULTY.values(), ids=FAULTY.keys())
def test_a_fault_is_told_as_hydra_tells_it(sweep, composer, words):
    loader, master = sweep
    hydras = fault_of(lambda: config_of(loader.load_sweep_config(master, list(words))))
    assert hydras is not None
    assert hydras == fault_of(lambda: config_of(composer.load_sweep_config(master, list(words))))
    assert hydras == fault_of(lambda: composer.trial(master, words))


def test_the_next_job_does_not_see_the_one_before(sweep):
    loader, master = sweep
    composer = Composer(loader)
    first = composer.load_sweep_config(master, ["+lora.rank_pattern.query=4", "lora.targets=[q]"])
    first.lora.rank = 99
    second = composer.load_sweep_config(master, ["seed=1"])
    assert second == loader.load_sweep_config(master, ["seed=1"])
    assert composer.trial(master, ["seed=1"]) == config_of(second)


def test_hydra_composes_once_for_each_choice_of_groups(sweep, monkeypatch):
    loader, master = sweep
    composer, composed = Composer(loader), []
    whole = Composer.load_configuration

    def count(self, name, overrides, *rest):
        composed.append(overrides)
        return whole(self, name, overrides, *rest)

    monkeypatch.setattr(Composer, "load_configuration", count)
    jobs = [[f"task={t}", f"lora.rank={r}", f"seed={r}"] for t in ("cola", "mrpc") for r in (1, 2)]
    context = SimpleNamespace(config_loader=composer)
    trials = trials_of(context, master, jobs)
    for overrides in jobs:
        composer.load_sweep_config(master, overrides)
    assert [words[-1] for words in composed] == ["task=cola", "task=mrpc"]
    assert [(t.task.name, t.lora.rank) for t in trials] == [
        ("cola", 1), ("cola", 2), ("mrpc", 1), ("mrpc", 2),
    ]  # fmt: skip


def test_the_time_in_a_path_is_that_of_the_command(sweep):
    loader, master = sweep
    job = ["task=cola", "output_dir=out/${now:%f}"]
    trial = Composer(loader).trial(master, job)
    assert trial.output_dir == master.output_dir
    assert config_of(copy.deepcopy(loader.load_sweep_config(master, job))) == trial
