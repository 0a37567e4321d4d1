"""Successive halving: its rungs and cuts against brute force, and a pack that shrinks."""

import dataclasses
import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from lorax.config import HalvingConfig
from lorax.errors import LoraxError
from lorax.runs.adapter import load_adapter
from lorax.runs.trial_id import trial_dir, trial_id
from lorax.sweep import run_packed
from lorax.sweep.halving import prune, rung
from lorax.train import run_trial
from lorax.train.batched_engine import BatchedEngine
from lorax.train.run import Progress

pytestmark = pytest.mark.slow

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


@PROPERTY
@given(st.integers(1, 40), st.integers(2, 4), st.integers(1, 30), st.integers(1, 20))
def test_each_rung_is_judged_once_at_the_first_evaluation_from_there_on(after, eta, every, count):
    halving = HalvingConfig(after=after, eta=eta)
    steps = [every * n for n in range(1, count + 1)]
    judged = {step: rung(halving, step, every) for step in steps}
    first = {}  # of each rung: the evaluation it is judged at; a later rung there replaces it
    for number in range(1, 30):
        at = after * eta ** (number - 1)
        place = next((step for step in steps if step >= at), None)
        if place is not None:
            first[place] = number
    assert {step: number for step, number in judged.items() if number} == first


def test_without_halving_there_are_no_rungs():
    assert [rung(HalvingConfig(), step, 1) for step in range(1, 50)] == [None] * 49


class Stand:
    """A lane as far as a cut goes."""

    def __init__(self, score, reason=None, *, early=False, is_cut=False):
        self.score = score
        self.progress = Progress(reason=reason, stopped_early=early, cut={} if is_cut else None)
        if is_cut:
            self.progress.cut = {"step": 1}

    @property
    def is_alive(self):
        p = self.progress
        return not (p.reason or p.stopped_early or p.cut)

    @property
    def signed_best(self):
        return self.score


LANES = st.lists(
    st.builds(
        Stand,
        st.sampled_from([-math.inf, 0.0, 0.25, 0.5, 0.5, 0.75]),
        st.sampled_from([None, None, None, "the loss is nan at step 3"]),
        early=st.booleans(),
        is_cut=st.booleans(),
    ),
    min_size=1,
    max_size=9,
)


@PROPERTY
@given(LANES, st.integers(2, 4))
def test_a_cut_keeps_the_best_share_and_of_equals_the_earlier(lanes, eta):
    before = [dict(lane.progress.cut or {}) for lane in lanes]
    alive = [lane.is_alive for lane in lanes]
    prune(lanes, eta, step=10, number=2)
    field = [n for n in range(len(lanes)) if not before[n]]
    value = {n: -math.inf if lanes[n].progress.reason else lanes[n].score for n in field}
    goes_on = -(-len(field) // eta)
    for n, lane in enumerate(lanes):
        if n not in value or not alive[n]:
            assert dict(lane.progress.cut or {}) == before[n]  # it had ended before
            continue
        better = sum(value[m] > value[n] or (value[m] == value[n] and m < n) for m in field)
        expected = None if better < goes_on else better + 1
        assert (lane.progress.cut or {}).get("place") == expected
        if expected:
            facts = {"step": 10, "rung": 2, "of": len(field), "goes_on": goes_on}
            assert lane.progress.cut == {**facts, "place": expected}


def test_odd_numbers_are_rounded_up_and_the_best_of_all_goes_on():
    for count, eta, left in ((5, 2, 3), (3, 2, 2), (2, 2, 1), (1, 2, 1), (7, 3, 3), (4, 9, 1)):
        lanes = [Stand(n / 10) for n in range(count)]
        prune(lanes, eta, step=1, number=1)
        assert [lane.is_alive for lane in lanes] == [False] * (count - left) + [True] * left


def test_a_trial_that_diverged_after_a_good_start_does_not_take_a_place():
    lanes = [Stand(0.9, "the loss is nan at step 3"), Stand(0.2), Stand(0.3)]
    prune(lanes, 2, step=4, number=1)
    assert [lane.is_alive for lane in lanes] == [False, True, True]


@pytest.mark.parametrize(
    ("halving", "line"),
    [
        ({"after": 0}, "sweep.halving.after=0 is not a whole number of at least 1"),
        ({"after": 4, "eta": 1}, "sweep.halving.eta=1 is below 2"),
    ],
)
def test_rungs_that_cannot_be_are_refused(world, tmp_path, halving, line):
    sweep = {"name": "tiny", "halving": HalvingConfig(**halving)}
    with pytest.raises(LoraxError) as fault:
        run_packed([world.trial(tmp_path, sweep=sweep)])
    assert str(fault.value) == line


def test_trials_of_one_sweep_are_halved_alike(world, tmp_path):
    sweeps = [{"name": "tiny", "halving": HalvingConfig(after=n)} for n in (4, 5)]
    with pytest.raises(LoraxError, match="must be the same for all trials"):
        run_packed([world.trial(tmp_path, sweep=sweep) for sweep in sweeps])
    assert not list(tmp_path.iterdir())


def five(world, root, halving):
    """Five trials, of which one diverges before the cut at step 4 of 8."""
    rates = (3e-3, 1e30, 1e-5, 1e-2, 2e-5)
    return [
        world.trial(
            root,
            seed=n,
            lora={"rank": 4 if n == 3 else 2, "targets": "q"},
            optimizer={"lr": rate},
            train={"max_steps": 8, "eval_every": 2, "log_every": 1, "keep_checkpoints": False},
            sweep={"name": "tiny", "halving": halving},
        )
        for n, rate in enumerate(rates)
    ]


@dataclasses.dataclass
class Ran:
    """The same five trials in a pack with halving, and each of them alone."""

    halved: list
    alone: list
    results: list
    results_alone: list
    sizes: list
    listing: dict


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("halving")
    halved = five(world, root / "halved", HalvingConfig(after=4))
    alone = five(world, root / "alone", HalvingConfig())
    sizes = []
    keep = BatchedEngine.keep

    def noted(engine, lanes):
        before = engine.count
        keep(engine, lanes)
        sizes.append((before, list(lanes), engine.count))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BatchedEngine, "keep", noted)
        results = run_packed(halved)
    names = {trial_id(t): {p.name for p in trial_dir(t).iterdir()} for t in halved}
    return Ran(halved, alone, results, [run_trial(trial) for trial in alone], sizes, names)


def records(trial):
    lines = (trial_dir(trial) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_records(ours, theirs):
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        numbers = [name for name, value in other.items() if isinstance(value, float)]
        assert {k: v for k, v in one.items() if k not in numbers} == {
            k: v for k, v in other.items() if k not in numbers
        }
        for name in numbers:
            assert one[name] == pytest.approx(other[name], rel=1e-5), (name, one)


def assert_same_adapters(ours, theirs):
    left, right = (load_adapter(trial_dir(trial) / "adapter")[0] for trial in (ours, theirs))
    assert left.keys() == right.keys()
    for name, leaf in left.items():
        scale = np.abs(right[name]).max()
        np.testing.assert_allclose(leaf, right[name], rtol=0, atol=1e-5 * scale, err_msg=name)


def test_the_poorer_ones_are_cut_and_the_diverged_one_counts_among_them(ran):
    """Five at the cut, three go on: the diverged one is last, the worst of the others is cut."""
    assert [result["status"] for result in ran.results].count("cut") == 1
    assert ran.results[1]["status"] == "diverged" and ran.results[1]["cut"] is None
    at_cut = {}
    for n, result in enumerate(ran.results_alone):
        evaluations = [r["accuracy"] for r in records(ran.alone[n]) if r["kind"] == "eval"]
        at_cut[n] = -math.inf if result["status"] == "diverged" else max(evaluations[:2])
    order = sorted(at_cut, key=lambda n: -at_cut[n])  # of equals the earlier first
    for n, result in enumerate(ran.results):
        if result["status"] == "cut":
            assert order.index(n) == 3
            assert result["steps"] == 4
            facts = {"step": 4, "rung": 1, "place": 4, "of": 5, "goes_on": 3}
            assert result["cut"] == facts
        elif result["status"] == "finished":
            assert order.index(n) < 3
            assert result["steps"] == 8 and result["cut"] is None


def test_the_pack_shrinks_to_those_that_go_on(ran):
    alive = [n for n, result in enumerate(ran.results) if result["status"] == "finished"]
    assert len(alive) == 3
    assert ran.sizes == [(5, alive, 3)]


def test_those_that_go_on_end_as_if_alone(ran):
    for n, result in enumerate(ran.results):
        if result["status"] != "cut":
            assert_same_records(records(ran.halved[n]), records(ran.alone[n]))
            assert_same_adapters(ran.halved[n], ran.alone[n])
            for name in ("status", "steps", "reason", "stopped_early", "trainable_params"):
                assert result[name] == ran.results_alone[n][name]


def test_what_was_cut_was_the_same_until_then_and_leaves_its_adapter(ran):
    (n,) = [n for n, result in enumerate(ran.results) if result["status"] == "cut"]
    until = [record for record in records(ran.alone[n]) if record["step"] <= 4]
    assert_same_records(records(ran.halved[n]), until)
    evaluations = [r for r in until if r["kind"] == "eval"]
    best = max(evaluations, key=lambda r: r["accuracy"])  # of equals the first
    assert ran.results[n]["best"]["step"] == best["step"]
    assert ran.results[n]["last"]["step"] == 4
    flat, spec, about = load_adapter(trial_dir(ran.halved[n]) / "adapter")
    assert spec.rank == 2 and about["best"]["step"] <= 4
    assert flat.keys() == load_adapter(trial_dir(ran.alone[n]) / "adapter")[0].keys()


def test_only_a_trial_that_was_cut_keeps_a_checkpoint(ran):
    for trial, result in zip(ran.halved, ran.results, strict=True):
        left = {"adapter", "config.json", "lock", "metrics.jsonl", "result.json"}
        is_cut = result["status"] == "cut"
        assert ran.listing[trial_id(trial)] == left | ({"checkpoints"} if is_cut else set())


def test_the_same_command_again_trains_nothing(ran, monkeypatch):
    monkeypatch.setattr("lorax.sweep.run_sweep.plan_packs", None)  # whoever plans, fails
    monkeypatch.setattr("lorax.sweep.run_sweep.run_pack", None)
    assert run_packed(ran.halved) == ran.results


def test_a_trial_that_was_cut_goes_on_without_halving_to_the_same_numbers(ran):
    """The last test of these: it changes what is on disk."""
    (n,) = [n for n, result in enumerate(ran.results) if result["status"] == "cut"]
    trial = dataclasses.replace(ran.halved[n], sweep=ran.alone[n].sweep)
    result, alone = run_trial(trial), ran.results_alone[n]
    assert (result["status"], result["steps"], result["cut"]) == ("finished", 8, None)
    assert_same_records(records(trial), records(ran.alone[n]))
    assert_same_adapters(trial, ran.alone[n])
    assert result["steps_by_tokens"] == alone["steps_by_tokens"]
    left = {path.name for path in trial_dir(trial).iterdir()}
    assert left == {"adapter", "config.json", "lock", "metrics.jsonl", "result.json"}
