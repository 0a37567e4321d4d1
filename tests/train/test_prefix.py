"""Outputs of frozen layers, kept: the same numbers as when every step computes them."""

import json
import logging

import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.runs.trial import Trial
from lorax.sweep import run_packed
from lorax.train import prefix, run_trial
from lorax.train.dataset import load_dataset
from lorax.train.prefix import FrozenPrefix
from lorax.train.setup import check_trial, prepare
from tests.helpers.causal_zoo import write_lm_base, write_pairs


@pytest.fixture(scope="module")
def world(deep_world):
    return deep_world


KINDS = {
    "mean": {"train": {"mode": "head"}},
    "cls": {"train": {"mode": "head"}, "model": {"pooling": "cls"}},
    "pooler": {"train": {"mode": "head"}, "model": {"pooling": "pooler"}},
    "a later layer": {"lora": {"layers": [1], "rank": 2}},
    "micro-batches": {"lora": {"layers": [1], "rank": 2}, "train": {"grad_accum": 2}},
}


def trial_of(world, root, kind, gib=1.0, **more):
    changes = {**KINDS.get(kind, {}), **more}
    train = {"log_every": 1, "eval_every": 2, "prefix_cache_gib": gib, **changes.pop("train", {})}
    model = {"dropout": 0.0, **changes.pop("model", {})}
    return world.trial(root, train=train, model=model, **changes)


def numbers(trial):
    """All numbers of a trial's records, by step."""
    lines = Trial.of(trial).metrics.read_text().splitlines()
    return [[v for v in json.loads(line).values() if isinstance(v, float)] for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_has_the_numbers_of_one_that_keeps_nothing(world, tmp_path, kind, caplog):
    kept, plain = (trial_of(world, tmp_path / name, kind, gib) for name, gib in
                   (("kept", 1.0), ("plain", 0.0)))  # fmt: skip
    prefix._KEPT.clear()
    with caplog.at_level(logging.INFO):
        run_trial(kept)
    assert "once" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_trial(plain)
    assert "once" not in caplog.text
    assert Trial.of(kept).id == Trial.of(plain).id  # nothing that a trial's name tells apart
    for ours, theirs in zip(numbers(kept), numbers(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["mean", "a later layer"])
def test_lanes_of_a_pack_share_them(world, tmp_path, kind):
    lrs = (0.01, 0.03)
    packed = [trial_of(world, tmp_path / "p", kind, optimizer={"lr": lr}) for lr in lrs]
    alone = [trial_of(world, tmp_path / "a", kind, 0.0, optimizer={"lr": lr}) for lr in lrs]
    run_packed(packed)
    for one, other in zip(packed, alone, strict=True):
        run_trial(other)
        for ours, theirs in zip(numbers(one), numbers(other), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_pack_keeps_what_all_of_its_trials_leave_as_it_is(world, tmp_path):
    trials = [world.trial(tmp_path, lora={"layers": layers}) for layers in ([0], [1])]
    layers = [prepare(trial).program.frozen_layers for trial in trials]
    assert layers == [0, 1]
    assert [r["status"] for r in run_packed(trials)] == ["finished"] * 2


def test_a_decoder_has_the_numbers_of_one_that_keeps_nothing(world, tmp_path):
    base, pairs = write_lm_base(tmp_path / "base"), write_pairs(tmp_path / "pairs")
    task = {"name": "instructions", "data_dir": str(pairs), "max_length": 24}
    found = []
    for gib in (1.0, 0.0):
        trial = trial_of(world, tmp_path / f"{gib}", "a later layer", gib, task=task,
                         model={"source": str(base)})  # fmt: skip
        dataset, setup = load_dataset(trial), prepare(trial)
        assert FrozenPrefix(setup.program, setup, trial, dataset).is_kept == (gib > 0)
        run_trial(trial)
        found.append(numbers(trial))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"model": {"dropout": 0.1}, "train": {"mode": "head"}}, 0),
        ({"train": {"mode": "head"}}, 2),
        ({"train": {"mode": "full"}}, 0),
        ({"lora": {"layers": [1]}}, 1),
        ({"lora": {"layers": [1], "dropout": 0.5}}, 1),  # on what the kept outputs go into
        ({"lora": {"targets": ["word", "value"], "layers": None}}, 0),
    ],
)
def test_layers_are_frozen_below_the_lowest_trained_one_without_dropout(world, changes, layers):
    assert prepare(world.trial(**changes)).program.frozen_layers == layers


def test_what_has_no_room_is_computed_in_every_step(world):
    trial = trial_of(world, "unused", "mean")
    dataset, setup = load_dataset(trial), prepare(trial)
    examples = len(dataset.train) + sum(map(len, dataset.dev.values()))
    for gib, is_kept in ((examples * 32 * 4 / 2**30, True), (examples * 32 * 4 / 2**30 / 2, False)):
        trial.train.prefix_cache_gib = gib
        assert FrozenPrefix(setup.program, setup, trial, dataset).is_kept == is_kept


def test_a_negative_limit_is_one_line(world):
    with pytest.raises(LoraxError, match=r"train\.prefix_cache_gib=-1.0 is negative"):
        check_trial(world.trial(train={"prefix_cache_gib": -1.0}))
