"""Any small grid: a pack trains each of its trials as the trial alone, however it is computed."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import Phase, given, settings

from lorax.lora.paths import leaves_by_path
from lorax.train.batch_stream import BatchStream
from lorax.train.batched_engine import BatchedEngine
from lorax.train.dataset import load_dataset
from lorax.train.hyper_stream import HyperStream
from lorax.train.setup import hyper_of, prepare
from lorax.train.single_engine import SingleEngine
from lorax.train.step import init_state

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


FEW = settings(
    max_examples=3, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate)
)
STEPS, WIDTH = 6, 3
# Every shape is compiled once for a trial alone. The last holds all others, and is in every grid,
# in a lane that is drawn: packs then share their programs.
SHAPES = (
    {"rank": 1, "targets": "q", "init": "he_uniform"},
    {"rank": 2, "targets": "qv", "rank_pattern": {"value": 3}, "init": "gaussian"},
    {"rank": 3, "targets": "mlp", "layers": [1], "init": "normal"},
    {"rank": 4, "targets": "all-linear", "rank_pattern": {"mlp.up": 3}},
)
WORLD = []


@pytest.fixture(autouse=True, scope="module")
def tiny_world(world):
    """For hypothesis, which takes no fixtures of a function's scope."""
    WORLD[:] = [world]


SPECS = st.fixed_dictionaries(
    {
        "alpha": st.sampled_from([1.0, 4.0, 16.0]),
        "scaling": st.sampled_from(["lora", "rslora"]),
        "alpha_pattern": st.sampled_from([{}, {".*(query|down)": 0.5}]),
    }
)
OPTIMIZERS = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([3e-4, 3e-3, 1e-2]),
        "head_lr": st.sampled_from([None, 1e-3]),
        "schedule": st.sampled_from(["linear", "cosine", "constant"]),
        "warmup_ratio": st.sampled_from([0.0, 0.3]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "clip_norm": st.sampled_from([None, 0.05, 1.0]),
        "b2": st.sampled_from([0.9, 0.999]),
        "eps": st.sampled_from([1e-8, 1e-6]),
    }
)


@st.composite
def grids(draw):
    """Trials that share a program, one of the widest shape among them."""
    shapes = [draw(st.sampled_from(SHAPES)) for _ in range(WIDTH - 1)]
    shapes.insert(draw(st.integers(0, WIDTH - 1)), SHAPES[-1])
    return [
        WORLD[0].trial(
            lora={**shape, **draw(SPECS)},
            optimizer=draw(OPTIMIZERS),
            seed=draw(st.integers(0, 2**32 - 1)),
            train={"batch_size": 8},
        )
        for shape in shapes
    ]


def drive(trials, step):
    """Call `step(hyper, batch)` with what each trial gets in each step; gather the losses."""
    first = trials[0]
    batches = BatchStream(load_dataset(first), first.train, [trial.seed for trial in trials])
    hypers = HyperStream(trials, STEPS)
    return np.array([np.ravel(step(hypers.at(n), batches.at(n))) for n in range(STEPS)])


def starts(trials):
    setups = [prepare(trial) for trial in trials]
    return setups, [
        init_state(setup.trainable, hyper_of(trial), setup.dropout_key)
        for setup, trial in zip(setups, trials, strict=True)
    ]


def packed(trials, **options):
    """(losses, the pack) after all steps."""
    pack = BatchedEngine(*starts(trials), tokens_at_once=2**30, **options)
    return drive(trials, pack.step), pack


def alone(trial):
    """(losses, what was trained) after all steps."""
    (setup,), (state,) = starts([trial])
    solo = SingleEngine(setup, state)
    return drive([trial], solo.step)[:, 0], leaves_by_path(solo.trainable(0))


def assert_close(ours, theirs, tol):
    """The relative error of each leaf, as norms.

    Entry by entry would not do: where a gradient is at rounding level, Adam's division turns the
    rounding into a part of a step.
    """
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert ours[name].shape == leaf.shape
        error, size = np.linalg.norm(ours[name] - leaf), np.linalg.norm(leaf)
        assert error <= tol * size, (name, error / size)


def padding_is_zero(pack, lane, own):
    """Of a lane: whatever its trial alone does not have, Adam's moments included."""
    adam = pack.state.opt_state[1]
    for tree in (pack.state.trainable, adam.mu, adam.nu):
        for name, leaf in leaves_by_path(tree["lora"]).items():
            rest = np.array(leaf[lane])
            if f"lora.{name}" in own:
                rest[tuple(slice(size) for size in own[f"lora.{name}"].shape)] = 0
            assert not rest.any(), name


@settings(FEW, max_examples=8)
@given(grids(), st.integers(1, WIDTH))
def test_each_lane_of_any_grid_is_its_trial_alone(trials, side):
    losses, pack = packed(trials, lanes=side)
    for n, trial in enumerate(trials):
        own_losses, own = alone(trial)
        np.testing.assert_allclose(losses[:, n], own_losses, rtol=1e-5)
        assert_close(leaves_by_path(pack.trainable(n)), own, 1e-5)
        padding_is_zero(pack, n, own)


@FEW
@given(grids(), st.permutations(range(WIDTH)))
def test_neither_the_order_of_lanes_nor_how_many_are_side_by_side_matters(trials, order):
    losses, pack = packed(trials)
    for side in range(1, WIDTH + 1):
        other_losses, other = packed([trials[n] for n in order], lanes=side)
        np.testing.assert_allclose(other_losses, losses[:, order], rtol=1e-6)
        for place, n in enumerate(order):
            ours, theirs = other.trainable(place), pack.trainable(n)
            assert_close(leaves_by_path(ours), leaves_by_path(theirs), 1e-5)


@FEW
@given(grids())
def test_the_same_pack_twice_is_the_same_to_the_bit(trials):
    (losses, pack), (again, other) = packed(trials), packed(trials)
    np.testing.assert_array_equal(losses, again)
    jax.tree.map(np.testing.assert_array_equal, pack.state, other.state)


@FEW
@given(grids(), st.sets(st.integers(0, WIDTH - 1), min_size=1))
def test_lanes_that_are_kept_hold_what_they_held(trials, kept):
    _, pack = packed(trials)
    before = [pack.state_of(n) for n in range(WIDTH)]
    scales = {path: np.asarray(scale) for path, scale in pack.frozen.scales.items()}
    kept = sorted(kept, reverse=True)
    pack.keep(kept)
    assert pack.count == len(kept)
    for place, n in enumerate(kept):
        jax.tree.map(np.testing.assert_array_equal, pack.state_of(place), before[n])
        for path, scale in pack.frozen.scales.items():
            assert np.asarray(scale)[place] == scales[path][n]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_scales_are_each_trials_own_and_zero_where_it_has_no_target(world, order):
    lora = [
        {"rank": 1, "targets": "q", "alpha": 3.0},
        {"rank": 4, "targets": "qv", "alpha": 2.0, "scaling": "rslora"},
        {"rank": 2, "targets": "v", "layers": [0], "alpha": 8.0},
    ]
    trials = [world.trial(lora=lora[n]) for n in order]
    pack = BatchedEngine(*starts(trials), tokens_at_once=1024)
    query, value = ("encoder.layers.{}.attention." + name for name in ("query", "value"))
    expected = {
        **{query.format(n): (3.0, 1.0, 0.0) for n in (0, 1)},
        value.format(0): (0.0, 1.0, 4.0),
        value.format(1): (0.0, 1.0, 0.0),
    }
    found = {path.removesuffix(".kernel"): scale for path, scale in pack.frozen.scales.items()}
    assert found.keys() == expected.keys()
    for path, scales in expected.items():
        np.testing.assert_array_equal(found[path], [scales[n] for n in order])
