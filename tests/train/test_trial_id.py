import dataclasses
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorax.config import LoraConfig, TrialConfig
from lorax.effective import in_canonical_order
from lorax.lora import LoraSpec
from lorax.runs.trial_id import trial_dir, trial_id

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
BOOKKEEPING = [
    "train.checkpoint_every",
    "train.checkpoint_minutes",
    "train.keep_checkpoints",
    "train.prefix_cache_gib",
]


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


def made(**parts):
    """A config whose parts have other fields: `train={"max_steps": 9}` and its like."""
    config = TrialConfig()
    for name, fields in parts.items():
        setattr(config, name, dataclasses.replace(getattr(config, name), **fields))
    return config


QUERY_VALUE, VALUE_QUERY = {"query": 2, "value": 4}, {"value": 4, "query": 2}
SAME = {
    "epochs beside max_steps": [
        {"train": {"max_steps": 9, "epochs": epochs}} for epochs in (1, 3, 5)
    ],
    "the order of a pattern's unlike names": [
        {"lora": {name: order}}
        for name in ("rank_pattern", "alpha_pattern")
        for order in (QUERY_VALUE, VALUE_QUERY)
    ],
    "the order of layers in a pattern": [
        {"lora": {"rank_pattern": dict(order)}}
        for order in itertools.permutations([("0.query", 1), ("1.query", 2), ("value", 4)])
    ],
    "the order of names of one value": [
        {"lora": {"rank_pattern": order}}
        for order in ({"query": 2, ".*": 2, "key": 4}, {".*": 2, "query": 2, "key": 4})
    ],
    "the order of lists": [
        {"lora": {"targets": ["value", "query"], "layers": [1, 0], "exclude": ["b", "a"]}},
        {"lora": {"targets": ["query", "value"], "layers": [0, 1], "exclude": ["a", "b"]}},
    ],
    "a list of one target": [{"lora": {"targets": "qkvo"}}, {"lora": {"targets": ["qkvo"]}}],
    "the head's rate, written out": [
        {"optimizer": {"lr": 0.01}},
        {"optimizer": {"lr": 0.01, "head_lr": 0.01}},
    ],
    "the base's rate where the head alone is trained": [
        {"train": {"mode": "head"}, "optimizer": {"lr": lr, "head_lr": 0.01}} for lr in (0.1, 0.01)
    ],
    "the adapter where there is none": [
        {"train": {"mode": "full", "pad_rank": rank}, "lora": {"rank": rank}} for rank in (1, 8)
    ],
}
OTHER_TRIALS = {
    "epochs": [{"train": {"epochs": epochs}} for epochs in (1, 3)],
    "the order of a pattern whose names overlap": [
        {"lora": {"rank_pattern": order}}
        for order in ({"query": 2, "0.query": 4}, {"0.query": 4, "query": 2})
    ],
    "the head's rate": [
        {"train": {"mode": mode}, "optimizer": {"lr": 0.1, "head_lr": head_lr}}
        for mode in ("lora", "head")
        for head_lr in (0.1, 0.01)
    ],
    "content": [
        {part: {name: digest * 64}}
        for part, name in (("task", "content"), ("model", "content"))
        for digest in "ab"
    ]
    + [{"model": {"tokenizer_content": "a" * 64}}],
}


@pytest.mark.parametrize("why", SAME)
def test_settings_without_effect_are_not_in_it(why):
    names = [trial_id(made(**parts)) for parts in SAME[why]]
    if why == "the order of a pattern's unlike names":  # of ranks and of alphas
        assert names[0] == names[1] != names[2] == names[3]
    else:
        assert len(set(names)) == 1


@pytest.mark.parametrize("why", OTHER_TRIALS)
def test_settings_with_an_effect_are(why):
    names = [trial_id(made(**parts)) for parts in OTHER_TRIALS[why]]
    assert len(set(names)) == len(names)


NAMES = ["query", "value", "0.query", "1.query", "0.value", ".*", r"layers\.0\..*", "que.y"]
MODULES = [f"layers.{n}.{name}" for n in (0, 1) for name in ("query", "value")]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.integers(1, 3)), unique_by=lambda e: e[0]))
def test_a_pattern_in_canonical_order_gives_each_module_the_same(entries):
    def chosen(pattern):
        spec = LoraSpec(rank_pattern=pattern)
        return [spec.rank_of(f"{module}.kernel") for module in MODULES]

    ordered = in_canonical_order(dict(entries))
    assert chosen(ordered) == chosen(dict(entries))
    assert list(in_canonical_order(ordered).items()) == list(ordered.items())


# Trials by the names that they had when ids knew neither content nor what has no effect.
EARLIER = {
    "reviews-lora-r8-a16-qv-lr0.001-s0-32f19560": made(),
    "reviews-lora-r4-a16-v+q-lr0.001-s0-61391dcc": made(
        lora={"rank": 4, "targets": ["v", "q"], "rank_pattern": VALUE_QUERY},
        train={"max_steps": 60, "epochs": 5},
        optimizer={"head_lr": 1e-3},
    ),
    "reviews-head-lr0.01-s0-0b438360": made(
        train={"mode": "head"}, lora={"rank": 64}, optimizer={"lr": 0.01}
    ),
    "text-lora-r8-a16-qv-lr0.001-s0-4f6a613e": made(
        task={"name": "text", "data_dir": "a.txt", "content": "a" * 64}, train={"max_steps": 60}
    ),
}
CONTENT = {"model": {"content": "b" * 64, "tokenizer_content": "c" * 64}}


@pytest.mark.parametrize("name", EARLIER)
def test_trials_of_earlier_versions_are_found_where_they_are(tmp_path, name):
    config = dataclasses.replace(EARLIER[name], output_dir=str(tmp_path))
    named = dataclasses.replace(config, model=dataclasses.replace(config.model, **CONTENT["model"]))
    assert trial_dir(named) == tmp_path / "default" / trial_id(named) != tmp_path / "default" / name
    folder = tmp_path / "default" / name
    folder.mkdir(parents=True)
    assert trial_dir(named).name == trial_id(named)  # nothing was trained there

    record = dataclasses.asdict(config)
    for field in ("content", "tokenizer_content"):
        del record["model"][field]
    (folder / "config.json").write_text(json.dumps(record))
    assert trial_dir(named) == trial_dir(config) == folder

    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(named)))
    assert trial_dir(named) == folder
    other = dataclasses.replace(named, model=dataclasses.replace(named.model, content="d" * 64))
    assert trial_dir(other).name == trial_id(other)


def test_a_trial_without_content_or_what_has_no_effect_has_the_name_it_always_had():
    names = [name for name, config in EARLIER.items() if trial_id(config) == name]
    assert names == [name for name in EARLIER if "v+q" not in name]


def test_trials_without_a_generator_of_masks_keep_their_ids():
    named = made(model={"dropout": 0.0, **CONTENT["model"]}, task={"content": "a" * 64})
    assert trial_id(TrialConfig()) == "reviews-lora-r8-a16-qv-lr0.001-s0-32f19560"
    assert trial_id(named) == "reviews-lora-r8-a16-qv-lr0.001-s0-861f324a"
    drawn = dataclasses.replace(named.train, dropout_generator="lowbias32")
    assert trial_id(dataclasses.replace(named, train=drawn)) != trial_id(named)
