"""A trial that diverges in a pack: recorded as such, and nothing to the others, not by a bit."""

import json

import jax
import numpy as np
import pytest

from lorax.runs.adapter import load_adapter
from lorax.runs.trial_id import trial_dir
from lorax.sweep import run_packed
from lorax.sweep.run_serial import summary_line
from lorax.sweep.workload import Workload
from lorax.train.batched_engine import BatchedEngine
from lorax.train.hyper_stream import HyperStream
from lorax.train.setup import hyper_of, prepare
from lorax.train.step import init_state

pytestmark = pytest.mark.slow

TRAIN = {"max_steps": 9, "eval_every": 3, "log_every": 1}
ABSURD, HARMLESS = 1e30, 1e-3
ADAPTERS = [
    {"rank": 1},
    {"rank": 2},
    {"rank": 3, "targets": "q"},
    {"rank": 2, "targets": ["q", "k"]},
]


def trials_of(world, root, rates, lanes=None):
    """Trials of unlike ranks, targets and seeds, at these learning rates."""
    return [
        world.trial(
            root,
            lora=adapter,
            optimizer={"lr": rate, "warmup_ratio": 0.0},
            train=TRAIN,
            sweep={"lanes": lanes},
            seed=n,
        )
        for n, (adapter, rate) in enumerate(zip(ADAPTERS, rates, strict=True))
    ]


def files_of(trial):
    """What a trial leaves, to the bit."""
    flat, spec, _ = load_adapter(trial_dir(trial) / "adapter")
    arrays = {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}
    return (trial_dir(trial) / "metrics.jsonl").read_bytes(), arrays, spec


@pytest.mark.parametrize("lanes", [1, 4])
def test_the_other_lanes_are_as_with_a_harmless_trial_in_its_place(world, tmp_path, lanes):
    rates = [0.01, HARMLESS, 0.02, 0.01]
    calm = trials_of(world, tmp_path / "calm", rates, lanes)
    wild = trials_of(world, tmp_path / "wild", [0.01, ABSURD, 0.02, 0.01], lanes)
    assert {result["status"] for result in run_packed(calm)} == {"finished"}
    ends = [result["status"] for result in run_packed(wild)]
    assert ends == ["finished", "diverged", "finished", "finished"]
    for n in (0, 2, 3):
        assert files_of(wild[n]) == files_of(calm[n]), n


def test_it_is_recorded_and_not_tried_again(world, tmp_path):
    trials = trials_of(world, tmp_path, [0.01, 0.01, ABSURD, 0.01])
    result = run_packed(trials)[2]
    assert result["reason"] == "the loss is nan at step 2"
    assert (result["steps"], result["best"], result["last"]) == (2, None, None)
    assert "diverged, the loss is nan at step 2" in summary_line(result)
    lines = (trial_dir(trials[2]) / "metrics.jsonl").read_text().splitlines()
    first, last = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["kind"], first["step"]) == ("train", 1)
    assert (last["kind"], last["step"], last["loss"]) == ("diverged", 2, None)
    load_adapter(trial_dir(trials[2]) / "adapter")
    assert not (trial_dir(trials[2]) / "checkpoints").exists()

    paths = [trial_dir(trial) / "result.json" for trial in trials]
    before = [path.stat().st_mtime_ns for path in paths]
    assert run_packed(trials)[2] == result
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_when_all_diverge_the_pack_is_over(world, tmp_path):
    trials = trials_of(world, tmp_path, [ABSURD] * 4)
    results = run_packed(trials)
    assert [(r["status"], r["steps"]) for r in results] == [("diverged", 2)] * 4
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_stay_in_their_lane(world, value):
    trials = trials_of(world, "unused", [0.01] * 4)[1:]
    setups = [prepare(trial) for trial in trials]
    hypers = [hyper_of(trial) for trial in trials]
    states = [
        init_state(setup.trainable, hyper, setup.dropout_key)
        for setup, hyper in zip(setups, hypers, strict=True)
    ]
    spoiled = jax.tree.map(lambda x: x * 0 + value, states[1].trainable)
    ill_states = [states[0], states[1]._replace(trainable=spoiled), states[2]]
    work, rows = Workload.of(trials[0]), trials[0].task.max_length
    hyper = HyperStream(trials, work.steps).at(0)
    well, ill = (
        BatchedEngine(setups, each, tokens_at_once=1, lanes=2) for each in (states, ill_states)
    )
    for _ in range(3):
        losses = [
            np.asarray(engine.step(hyper, work.dummy_batch(rows, len(trials))))
            for engine in (well, ill)
        ]
    outputs = [np.asarray(engine.predict(work.dummy_batch(rows))) for engine in (well, ill)]
    assert well.side == 2  # and the third lane by itself
    assert not np.isfinite(losses[1][1]) and not np.isfinite(outputs[1][1]).any()
    for n in (0, 2):
        assert losses[0][n] == losses[1][n]
        assert np.array_equal(outputs[0][n], outputs[1][n])
        pair = [jax.tree.leaves(engine.state_of(n)) for engine in (well, ill)]
        assert all(map(np.array_equal, *pair))
