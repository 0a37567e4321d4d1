import dataclasses

import pytest

from lorax.config import LoraConfig, TrialConfig
from lorax.trial_id import trial_dir, trial_id

OTHER = {
    "task.name": "mrpc",
    "task.data_dir": "/elsewhere",
    "train.mode": "full",
    "train.precision": "bf16",
    "train.base_dtype": "bf16",
    "lora.targets": ["query", "mlp"],
    "lora.exclude": ["key"],
    "lora.layers": [0],
    "lora.rank_pattern": {"query": 3},
    "lora.alpha_pattern": {"query": 3.0},
}
ELSEWHERE = {"tracking", "sweep", "output_dir"}
BOOKKEEPING = ["train.checkpoint_every", "train.checkpoint_minutes", "train.keep_checkpoints"]


def paths():
    """Every leaf of a TrialConfig that decides its numbers."""
    for part in dataclasses.fields(TrialConfig):
        if part.name in ELSEWHERE:
            continue
        value = getattr(TrialConfig(), part.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        names = (f"{part.name}.{field.name}" for field in inner) if inner else (part.name,)
        yield from (name for name in names if name not in BOOKKEEPING)


def changed(path, value=None, **start):
    """A config with another value at `path`."""
    config = TrialConfig(**start)
    *parents, name = path.split(".")
    owner = getattr(config, parents[0]) if parents else config
    old = getattr(owner, name)
    fallback = f"{old}x" if isinstance(old, str) else (old or 0) + 1
    setattr(owner, name, OTHER.get(path, fallback) if value is None else value)
    return config


def test_every_field_that_counts_is_in_it():
    ids = {path: trial_id(changed(path)) for path in paths()}
    assert len(ids) > 40
    assert len({trial_id(TrialConfig()), *ids.values()}) == len(ids) + 1


def test_the_same_config_is_the_same_trial():
    assert trial_id(TrialConfig(seed=4)) == trial_id(TrialConfig(seed=4))


@pytest.mark.parametrize(
    "path", ["tracking.kind", "tracking.project", "sweep.name", "output_dir", *BOOKKEEPING]
)
def test_places_and_tracking_are_not(path):
    assert trial_id(changed(path)) == trial_id(TrialConfig())


def test_it_depends_on_values_not_on_their_spelling():
    assert trial_id(changed("lora.alpha", 16)) == trial_id(changed("lora.alpha", 16.0))
    lists = changed("lora.targets", ["query", "key"])
    assert trial_id(lists) == trial_id(changed("lora.targets", ("query", "key")))


def test_the_order_of_a_pattern_counts():
    """The first match does, so another order is another adapter."""
    one, two = {"query": 2, ".*": 4}, {".*": 4, "query": 2}
    ids = {trial_id(changed("lora.rank_pattern", order)) for order in (one, two)}
    assert len(ids) == 2


@pytest.mark.parametrize("mode", ["full", "head"])
def test_without_an_adapter_its_fields_are_not(mode):
    def named(**lora):
        config = TrialConfig(lora=LoraConfig(**lora))
        config.train.mode = mode
        return trial_id(config)

    plain = named()
    assert plain == named(rank=64, alpha=1.0, targets="qkvo", dropout=0.5, init="gaussian")
    config = changed("train.pad_rank", 64)
    config.train.mode = mode
    assert trial_id(config) == plain
    assert "-r8" not in plain and f"-{mode}-" in plain


def test_it_is_a_readable_file_name():
    config = changed("lora.targets", [r"layers\.[01]/.*", "a b" * 40])
    name = trial_id(config)
    assert len(name) < 100 and "/" not in name and " " not in name and "\\" not in name
    config.output_dir, config.sweep.name = "out", "ranks"
    assert trial_dir(config).parts == ("out", "ranks", name)
