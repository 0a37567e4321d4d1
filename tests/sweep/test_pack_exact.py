"""A trial in a pack is the same trial alone: step by step, on the same batches."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from lorax import data
from lorax.config import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
    TrialConfig,
)
from lorax.data.tasks.glue import find_folder
from lorax.errors import LoraxError
from lorax.lora.paths import leaves_by_path
from lorax.models import resolve_source
from lorax.train.batch_stream import BatchStream
from lorax.train.batched_engine import BatchedEngine
from lorax.train.dataset import load_dataset
from lorax.train.hyper_stream import HyperStream
from lorax.train.setup import hyper_of, prepare
from lorax.train.single_engine import SingleEngine
from lorax.train.step import init_state

pytestmark = pytest.mark.production


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


@dataclass
class Trained:
    """Trials after some steps in a pack, and each alone."""

    trials: list
    first: list  # what each lane of the pack held before the first step
    pack: BatchedEngine
    alone: list
    losses: np.ndarray  # (steps, lanes), in the pack
    losses_alone: np.ndarray


def streams(dataset, trials, steps):
    """What trials that train together get at each step: hypers and batches."""
    batches = BatchStream(dataset, trials[0].train, [trial.seed for trial in trials])
    return HyperStream(trials, steps), batches


def train(trials, steps, **options):
    """Step a pack, and each of its trials by itself on batches padded for it alone."""
    setups = [prepare(trial) for trial in trials]
    states = [
        init_state(setup.trainable, hyper_of(trial), setup.dropout_key)
        for setup, trial in zip(setups, trials, strict=True)
    ]
    pack = BatchedEngine(setups, states, tokens_at_once=1024, **options)
    alone = [SingleEngine(setup, state) for setup, state in zip(setups, states, strict=True)]
    first = [pack.trainable(n) for n in range(len(trials))]
    t = trials[0]
    dataset = load_dataset(t)
    together = streams(dataset, trials, steps)
    apart = [streams(dataset, [trial], steps) for trial in trials]
    losses, losses_alone = [], []
    for step in range(steps):
        losses.append(np.asarray(pack.step(*(stream.at(step) for stream in together))))
        losses_alone.append(
            [
                float(solo.step(*(stream.at(step) for stream in own)))
                for solo, own in zip(alone, apart, strict=True)
            ]
        )
    return Trained(trials, first, pack, alone, np.array(losses), np.array(losses_alone))


def assert_same(trained, rtol):
    """Losses at every step, and all that was trained at the end, relative to its size."""
    assert np.isfinite(trained.losses_alone).all()
    np.testing.assert_allclose(trained.losses, trained.losses_alone, rtol=rtol)
    for n, solo in enumerate(trained.alone):
        assert_close(trained.pack.trainable(n), solo.trainable(0), rtol)


def assert_close(ours, theirs, rtol):
    ours, theirs = leaves_by_path(ours), leaves_by_path(theirs)
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert ours[name].shape == leaf.shape
        np.testing.assert_allclose(
            ours[name], leaf, rtol=0, atol=rtol * np.abs(leaf).max(), err_msg=name
        )


LANES = {
    "rank 1 on q alone": (
        LoraConfig(rank=1, targets="q"),
        OptimizerConfig(lr=1e-3, head_lr=2e-3, schedule="constant", clip_norm=None),
    ),
    "rank 64 everywhere": (
        LoraConfig(rank=64, targets="all-linear", scaling="rslora", alpha=8.0, init="gaussian"),
        OptimizerConfig(lr=3e-4, schedule="cosine", warmup_ratio=0.2, weight_decay=0.1),
    ),
    "ranks by pattern": (
        LoraConfig(rank=4, targets="all-linear", init="normal", rank_pattern={"key": 2}, alpha=4),
        OptimizerConfig(lr=2e-3, warmup_ratio=0.0, weight_decay=0.0, clip_norm=0.1, b2=0.98),
    ),
}
STEPS = 100


@pytest.fixture(scope="module")
def hundred():
    """A hundred steps of three unlike trials on the default encoder, batches of 8."""
    try:
        resolve_source("assets/minilm")
        has_glue = find_folder(data.get_task("mrpc")) is not None
        task = TaskConfig("mrpc" if has_glue else "reviews", max_length=16)
        data.load_split(task.name, "train")
    except LoraxError as reason:
        pytest.skip(str(reason))
    model = ModelConfig(dropout=0.0)
    same = TrainConfig(batch_size=8, max_shapes=1)
    trials = [
        TrialConfig(task, model, lora, optimizer, same, seed=seed)
        for seed, (lora, optimizer) in enumerate(LANES.values())
    ]
    return train(trials, STEPS)


@pytest.mark.parametrize("name", LANES)
def test_a_hundred_losses_of_the_default_encoder_are_those_of_the_trial_alone(hundred, name):
    lane = list(LANES).index(name)
    ours, theirs = hundred.losses[:, lane], hundred.losses_alone[:, lane]
    assert np.ptp(theirs) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_what_a_lane_starts_from_is_the_trials_own_to_the_bit(hundred):
    for first, trial in zip(hundred.first, hundred.trials, strict=True):
        held, own = leaves_by_path(first), leaves_by_path(prepare(trial).trainable)
        assert held.keys() == own.keys()
        for name, leaf in own.items():
            np.testing.assert_array_equal(held[name], leaf)
            assert held[name].dtype == leaf.dtype


def test_after_a_hundred_steps_what_was_trained_has_moved_by_the_same(hundred):
    """Each leaf's difference against the way it has come.

    As norms: where a gradient is at rounding level, Adam turns the rounding into a step, so a
    single entry of thousands may differ more.
    """
    for n, solo in enumerate(hundred.alone):
        start, end = leaves_by_path(hundred.first[n]), leaves_by_path(solo.trainable(0))
        ours = leaves_by_path(hundred.pack.trainable(n))
        for name, leaf in end.items():
            moved = np.linalg.norm(leaf - start[name])
            assert moved > 1e-3
            assert np.linalg.norm(ours[name] - leaf) < 1e-4 * moved, name


def test_a_hundred_steps_leave_the_padding_zero(hundred):
    assert_zero_padding(hundred)


def assert_zero_padding(trained):
    """Ranks and targets that a lane lacks: parameters and Adam's moments."""
    adam = trained.pack.state.opt_state[1]
    for tree in (trained.pack.state.trainable, adam.mu, adam.nu):
        stacked = leaves_by_path(tree["lora"])
        for n, solo in enumerate(trained.alone):
            own = leaves_by_path(solo.state.trainable["lora"])
            for name, leaf in stacked.items():
                rest = np.array(leaf[n])
                if name in own:
                    rest[tuple(slice(size) for size in own[name].shape)] = 0
                assert not rest.any(), (name, n)


def tiny(world, lanes, **changes):
    """Short trials of the tiny world that share all but what `lanes` says of each."""
    train_config = {"batch_size": 8, **changes.pop("train", {})}
    shared_optimizer = changes.pop("optimizer", {})
    return [
        world.trial(
            seed=seed,
            lora={"rank": 2, **changes.get("lora", {}), **lora},
            optimizer={"lr": 0.01, **shared_optimizer, **optimizer},
            train=train_config,
            **{name: value for name, value in changes.items() if name != "lora"},
        )
        for seed, lora, optimizer in lanes
    ]


UNLIKE = [
    (0, {"rank": 1, "targets": "q"}, {"lr": 3e-3}),
    (1, {"rank": 4, "targets": "all-linear"}, {"schedule": "cosine", "weight_decay": 0.1}),
    (2, {"rank": 1, "targets": "q", "scaling": "rslora"}, {"clip_norm": 0.05}),
]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"task": {"name": "stsb", "max_length": 16}, "train": {"grad_accum": 4}},
            id="regression in micro-batches",
        ),
        pytest.param({"train": {"mode": "head"}}, id="head alone"),
    ],
)
def test_a_pack_of_any_kind_trains_as_its_trials_do(world, changes):
    assert_unlike_and_same(train(tiny(world, UNLIKE, **changes), 15))


def test_a_pack_with_dropout_trains_as_its_trials_do_in_several_shapes(shallow_world):
    """One layer: these are eight programs, and dropout takes long to compile.

    Adam's epsilon is well above roundings of a gradient, which it would make steps of.
    """
    changes = {
        "optimizer": {"eps": 1e-5},
        "lora": {"dropout": 0.2},
        "model": {"dropout": 0.1},
        "train": {"batch_size": 4, "max_shapes": 2},
    }
    assert_unlike_and_same(train(tiny(shallow_world, UNLIKE, **changes), 15))


def assert_unlike_and_same(trained):
    assert_same(trained, 1e-5)
    assert_zero_padding(trained)
    assert np.ptp(trained.losses_alone, axis=0).min() > 0.02
    assert np.ptp(trained.losses_alone, axis=1).min() > 1e-4  # no lane is another


def test_a_pack_on_a_base_in_four_bits_trains_as_its_trials_do(world):
    trained = train(tiny(world, UNLIKE, train={"base_dtype": "nf4", "remat": True}), 5)
    assert_same(trained, 1e-5)


BF16 = 2.0**-8  # the relative spacing of bf16


def test_a_pack_in_bf16_trains_as_its_trials_do_up_to_roundings(world):
    """XLA fuses, and so rounds, other parts of the two programs: bf16's own spacing apart."""
    changes = {"train": {"precision": "bf16", "base_dtype": "bf16"}}
    trained = train(tiny(world, UNLIKE, **changes), 15)
    np.testing.assert_allclose(trained.losses, trained.losses_alone, rtol=BF16)
    for tree in (trained.pack.state.trainable, trained.pack.state.opt_state[1].nu):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype(np.float32)}
    assert_zero_padding(trained)
