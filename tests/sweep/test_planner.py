"""How trials become packs: against brute force, with synthetic sizes, and XLA's own figures."""

import dataclasses
import itertools
import math

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from lorax import data
from lorax.errors import LoraxError
from lorax.runs.trial import Trial
from lorax.runtime.memory import free_host_memory
from lorax.sweep import cost, planner
from lorax.sweep.cost import GIB, Probe, Size, memory_limit, sizes_of
from lorax.sweep.planner import plan_packs, rank_buckets
from lorax.sweep.workload import Workload
from lorax.train.batched_engine import even_share
from lorax.train.dataset import load_dataset
from lorax.train.indexed_batch import expand
from lorax.train.meter import Meter
from lorax.train.run import Run
from tests.helpers.world import of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


PROPERTY = settings(max_examples=150, deadline=None, derandomize=True)
LAYERS = 2 * (4 * 32 * 32 + 2 * 32 * 64)  # entries of the tiny base's kernels


def cost_of(buckets, flops, worth):
    return sum(worth + len(bucket) * max(flops[n] for n in bucket) for bucket in buckets)


def partitions(items):
    """Every way to cut items into buckets, neighbours or not."""
    if not items:
        yield []
        return
    first, *rest = items
    for buckets in partitions(rest):
        yield [[first], *buckets]
        for n, bucket in enumerate(buckets):
            yield [*buckets[:n], [first, *bucket], *buckets[n + 1 :]]


@PROPERTY
@given(
    st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 64, 100]), min_size=1, max_size=6),
    st.integers(0, 150),
)
def test_no_way_to_cut_ranks_into_buckets_costs_less(ranks, worth):
    buckets = rank_buckets([Size(rank, float(rank)) for rank in ranks], float(worth))
    assert sorted(n for bucket in buckets for n in bucket) == list(range(len(ranks)))
    best = min(cost_of(way, ranks, worth) for way in partitions(range(len(ranks))))
    assert cost_of(buckets, ranks, worth) == best


@PROPERTY
@given(st.lists(st.integers(0, 64), min_size=1, max_size=30), st.floats(0, 1e4))
def test_buckets_ascend_keep_order_and_put_equals_together(ranks, worth):
    buckets = rank_buckets([Size(rank, 2.5 * rank) for rank in ranks], worth)
    assert all(bucket == sorted(bucket) and bucket for bucket in buckets)
    for low, high in itertools.pairwise(buckets):
        assert max(ranks[n] for n in low) < min(ranks[n] for n in high)


def test_without_a_price_there_is_one_bucket():
    sizes = [Size(rank, 6.0 * rank) for rank in (1, 256, 2)]
    assert rank_buckets(sizes, math.inf) == [[0, 1, 2]]


@pytest.mark.parametrize("few", [1, 2, 5])
def test_ranks_1_and_256_are_apart_exactly_when_padding_costs_more_than_a_program(few):
    ranks = [256, *[1] * few, 256]
    sizes = [Size(rank, 6.0 * rank * 1536) for rank in ranks]
    padding = few * (256 - 1) * 6.0 * 1536
    together, apart = [list(range(len(ranks)))], [list(range(1, few + 1)), [0, few + 1]]
    assert rank_buckets(sizes, 1.001 * padding) == together
    assert rank_buckets(sizes, 0.999 * padding) == apart


def test_sizes_count_the_flops_of_each_target(world):
    lora = [
        {"rank": 2, "targets": "q"},
        {"rank": 2, "targets": "qv", "rank_pattern": {"value": 4}},
        {"rank": 4, "targets": "mlp", "layers": [1]},
    ]
    trials = [world.trial(lora=values) for values in lora]
    padded = world.trial(lora=lora[0], train={"pad_rank": 8})
    head = world.trial(train={"mode": "head"})
    assert sizes_of([*trials, padded, head]) == [
        Size(2, 6.0 * 2 * 2 * 64),
        Size(4, 6.0 * (2 + 4) * 2 * 64),
        Size(4, 6.0 * 4 * 2 * 96),
        Size(8, 6.0 * 8 * 2 * 64),
        Size(0, 0.0),
    ]


def test_the_base_costs_two_products_of_each_kernel_a_token(world):
    frozen_pooler_or_head = Workload.of(world.trial()).base_flops - 4 * LAYERS
    assert 0 <= frozen_pooler_or_head <= 4 * 32 * 32
    assert (
        Workload.of(world.trial(lora={"rank": 9})).base_flops
        == Workload.of(world.trial()).base_flops
    )


@pytest.mark.parametrize(
    "train", [{"max_steps": None, "epochs": 3}, {"max_steps": 7}, {"batch_size": 7, "epochs": 1}]
)
def test_steps_are_those_of_the_loop(world, train):
    trial = world.trial(train={"max_steps": None, **train})
    dataset = load_dataset(trial)
    lane = Run(Trial.of(trial), None, dataset, None, None, meter=Meter())
    assert Workload.of(trial).steps == lane.total_steps


def test_the_shares_of_shapes_are_near_those_of_an_epoch(world):
    trial = world.trial(train={"max_shapes": 4, "batch_size": 4, "max_steps": 1000})
    dataset, shares = load_dataset(trial), Workload.of(trial).shapes
    assert len(shares) > 1 and sum(shares.values()) == pytest.approx(1)
    batches = [
        batch
        for epoch in range(20)
        for batch in data.train_batches(len(dataset.train), 4, seed=0, epoch=epoch)
        if len(batch) == 4
    ]
    lengths, layout = dataset.train.lengths, dataset.layout
    rows = [layout.rows_for(len(data.fit(lengths[b], layout.row_length))) for b in batches]
    for n, share in shares.items():
        assert rows.count(n) / len(rows) == pytest.approx(share, abs=0.05)


def test_a_dummy_batch_has_the_shape_of_a_real_one(world):
    trial = world.trial(train={"grad_accum": 2})
    rows = max(Workload.of(trial).shapes)
    dataset, dummy = load_dataset(trial), Workload.of(trial).dummy_batch(rows)
    layout = dataclasses.replace(dataset.layout, rows=(rows,))
    (real,) = data.collate_alike(dataset.train, [np.arange(16)], layout, parts=2)
    rows_of_dummy = expand(dummy)
    assert {k: (x.shape, x.dtype) for k, x in rows_of_dummy.items()} == {
        k: (x.shape, x.dtype) for k, x in real.items()
    }
    assert rows_of_dummy["input_ids"].size == dummy.shape.tokens == Workload.of(trial).tokens(rows)


class Machine:
    """Stands in for XLA and the clock: memory by a formula, times as given, every question noted.

    A pack takes 100 bytes a lane, and 1000 more a lane that is computed side by side.
    """

    def __init__(self, probe):
        self.probe, self.asked = probe, []

    def pack_memory(self, trials, *, tokens_at_once, lanes):
        side = even_share(len(trials), lanes or tokens_at_once // 128)
        self.asked.append((len(trials), side))
        return 100 * len(trials) + 1000 * side, side

    def trial_memory(self, trial):
        self.asked.append((1, 1))
        return 1100

    def measure_probe(self, trial):
        assert self.probe is not None, "nothing to measure for"
        return self.probe


@pytest.fixture
def machine(monkeypatch):
    def stand_in(probe=None):
        made = Machine(probe)
        for name in ("pack_memory", "trial_memory", "measure_probe"):
            monkeypatch.setattr(planner, name, getattr(made, name))
        return made

    return stand_in


def alike(world, count, **sweep):
    """Trials that differ in their seeds."""
    lora, sweep = {"rank": 2, "targets": "q"}, {"name": "tiny", **sweep}
    return [world.trial(seed=n, lora=lora, sweep=sweep) for n in range(count)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def seeds_of(packs):
    return [[trial.config.seed for trial in pack.trials] for pack in packs]


@pytest.mark.parametrize(
    ("limit", "packs", "side"),
    [
        (8800, 1, 8),
        (8799, 1, 4),
        (4799, 1, 2),
        (2799, 1, 1),
        (1799, 2, 1),
        (1399, 4, 1),
        (1199, 8, 1),
    ],
)
def test_memory_limits_lanes_side_by_side_first_and_then_trials(world, machine, limit, packs, side):
    machine()
    plan = plan_packs(of(alike(world, 8, memory_limit_gib=limit / GIB)))
    assert flat(seeds_of(plan)) == list(range(8))
    assert [len(pack.trials) for pack in plan] == [8 // packs] * packs
    assert [pack.predicted["side_by_side"] for pack in plan] == [side] * packs
    assert max(pack.predicted["memory_bytes"] for pack in plan) <= limit


@settings(max_examples=25, deadline=None, derandomize=True)
@given(count=st.integers(1, 20), limit=st.integers(1100, 25_000), most=st.integers(1, 20))
def test_a_plan_has_every_trial_once_within_all_limits(count, limit, most):
    trials = CONFIGS[:count]
    for trial in trials:
        trial.sweep.memory_limit_gib, trial.sweep.max_trials = limit / GIB, most
    made = Machine(None)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pack_memory", "trial_memory", "measure_probe"):
            patch.setattr(planner, name, getattr(made, name))
        plan = plan_packs(of(trials))
    assert flat(seeds_of(plan)) == list(range(count))
    for pack in plan:
        assert len(pack.trials) <= most
        assert pack.predicted["memory_bytes"] <= limit
        side = even_share(len(pack.trials), pack.lanes or pack.tokens_at_once // 128)
        assert pack.predicted["side_by_side"] == side


CONFIGS = []


@pytest.fixture(autouse=True, scope="module")
def twenty_trials(world):
    CONFIGS[:] = alike(world, 20)


def test_a_limit_below_one_trial_is_one_line_with_both_figures_and_what_to_do(world, machine):
    machine()
    with pytest.raises(LoraxError) as fault:
        plan_packs(of(alike(world, 4, memory_limit_gib=1000 / GIB)))
    (line,) = str(fault.value).splitlines()
    assert line.startswith("one trial of tiny needs 0.00 GiB, above the limit of 0.00 GiB")
    for word in ("sweep.memory_limit_gib", "train.batch_size", "train.grad_accum", "max_length"):
        assert word in line


def test_packs_have_at_most_so_many_trials_evenly(world, machine):
    machine()
    plan = plan_packs(of(alike(world, 7, max_trials=3)))
    assert seeds_of(plan) == [[0, 1, 2], [3, 4], [5, 6]]


def test_lanes_side_by_side_are_as_asked_for_and_lowered_by_memory_alone(world, machine):
    made = machine()
    (pack,) = plan_packs(of(alike(world, 6, lanes=3)))
    assert (pack.lanes, pack.predicted["side_by_side"], made.asked) == (3, 3, [(6, 3)])
    (pack,) = plan_packs(of(alike(world, 6, lanes=3, memory_limit_gib=1600 / GIB)))
    assert (pack.lanes, pack.predicted["side_by_side"]) == (1, 1)


def test_no_trials_are_no_packs():
    assert plan_packs([]) == []


def test_a_pack_is_named_by_its_trials_and_their_order_alone(world, machine):
    """How many are side by side may change while it runs."""
    machine()
    trials = alike(world, 3)
    (pack,), (narrow,) = plan_packs(of(trials)), plan_packs(of(alike(world, 3, lanes=1)))
    assert pack.name == narrow.name and pack.name.startswith("3-")
    names = {plan_packs(of(other))[0].name for other in (trials[::-1], trials[:2])}
    assert len(names | {pack.name}) == 3


RANKS = (1, 2, 16, 32, 1, 32)


def by_rank(world, ranks=RANKS, **lora):
    return [
        world.trial(lora={"rank": rank, "targets": "all-linear", **lora}, seed=n)
        for n, rank in enumerate(ranks)
    ]


def step_tokens(trial):
    (rows,) = Workload.of(trial).shapes
    return Workload.of(trial).tokens(rows)


def predicted_seconds(world, base, buckets, probe):
    """Of all packs, from first principles: steps at the largest rank, and their programs."""
    tokens = 4 * step_tokens(world.trial())  # in 4 steps
    speed = (base + probe.adapter_flops) / probe.seconds_per_token
    flops = [6.0 * rank * 2 * (4 * 64 + 2 * 96) for rank in RANKS]
    return sum(
        2 * probe.compile_seconds  # the step and the prediction
        + len(bucket) * tokens * (base + max(flops[n] for n in bucket)) / speed
        for bucket in buckets
    )


@pytest.mark.parametrize(
    ("compile_seconds", "ranks"),
    [
        (1e-4, [[1, 1], [2], [16], [32, 32]]),
        (1e-3, [[1, 2, 1], [16], [32, 32]]),
        (8e-3, [[1, 2, 1], [16, 32, 32]]),
        (4e-2, [[1, 2, 16, 32, 1, 32]]),
    ],
)
def test_ranks_are_parted_exactly_as_the_least_time_has_it(world, machine, compile_seconds, ranks):
    probe = Probe(compile_seconds, seconds_per_token=1e-5, adapter_flops=5000.0)
    machine(probe)
    plan = plan_packs(of(by_rank(world)))
    assert [[t.config.lora.rank for t in pack.trials] for pack in plan] == ranks
    base = Workload.of(world.trial()).base_flops
    ours = predicted_seconds(world, base, seeds_of(plan), probe)
    ways = partitions(range(len(RANKS)))
    assert ours == pytest.approx(min(predicted_seconds(world, base, way, probe) for way in ways))


def test_little_padding_is_not_worth_a_measurement(world, machine):
    machine(probe=None)
    (pack,) = plan_packs(of(by_rank(world, ranks=(1, 2, 1), targets="q")))
    assert 0 < pack.predicted["padding"] < 0.05
    assert "seconds" not in pack.predicted


@pytest.mark.parametrize("ranks", [(1, 2), RANKS])
def test_the_plan_that_is_printed_is_the_plan_that_is_run(world, machine, ranks):
    """`sweep.plan=true` measures times; the packs are those of a run, which does not."""
    for compile_seconds in (1e-9, 1e-3, 1e9):
        machine(Probe(compile_seconds, seconds_per_token=1e-5, adapter_flops=5000.0))
        trials = by_rank(world, ranks)
        printed, run = plan_packs(of(trials), with_times=True), plan_packs(of(trials))
        assert [pack.name for pack in printed] == [pack.name for pack in run]


def test_predicted_times_follow_from_the_measured_step(world, machine):
    machine(Probe(3.0, seconds_per_token=1e-5, adapter_flops=6.0 * 2 * 2 * 64))
    (pack,) = plan_packs(of(alike(world, 5)), with_times=True)
    # The measured adapter is as large as these.
    per_step = 5 * step_tokens(world.trial()) * 1e-5
    assert pack.predicted["seconds_per_step"] == pytest.approx(per_step)
    assert pack.predicted["compile_seconds"] == pytest.approx(3.0)
    tokens = Workload.of(world.trial()).evaluation_tokens
    assert 50 * 3 < tokens < 50 * 16  # a dev split of 50 examples, packed; one evaluation
    evaluation = 5 * tokens * 1e-5 / 2
    assert pack.predicted["seconds"] == pytest.approx(4 * per_step + evaluation + 3.0)


def test_a_program_that_is_compiled_already_costs_what_it_did(world, machine):
    """The second plan of a process would else part all ranks, as if programs were free."""
    measured = cost.measure_probe
    machine()
    probes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planner, "measure_probe", lambda t: probes.append(measured(t)) or probes[-1])
        trials = by_rank(world, ranks=(1, 32))
        for trial in trials:
            trial.train.batch_size = 3  # a program that no other test has
        plans = [plan_packs(of(trials)) for _ in range(2)]
    assert [probe.compile_seconds > 0 for probe in probes] == [True, True]
    assert seeds_of(plans[0]) == seeds_of(plans[1]) == [[0, 1]]


def test_memory_is_what_xla_says_of_the_program_that_runs(world):
    """Of four lanes, with as many side by side as fit: the real compiler's figures."""
    trials = alike(world, 4)
    (whole,) = plan_packs(of(trials))
    assert whole.predicted["side_by_side"] == 4
    half, side = cost.pack_memory(trials, tokens_at_once=1024, lanes=2)
    assert side == 2 and half < whole.predicted["memory_bytes"]
    (limited,) = plan_packs(of(alike(world, 4, memory_limit_gib=half / GIB)))
    assert limited.lanes == 2
    assert limited.predicted["memory_bytes"] == half
    alone = cost.trial_memory(trials[0])
    assert alone < half < whole.predicted["memory_bytes"] < 4 * alone + half


def test_the_limit_is_as_set_or_most_of_what_is_free(world, monkeypatch):
    assert memory_limit(world.trial(sweep={"memory_limit_gib": 1.5})) == 3 * GIB // 2
    if jax.local_devices()[0].memory_stats() is None:
        monkeypatch.setattr(cost, "free_host_memory", lambda: 10 * GIB)
        assert memory_limit(world.trial()) == 9 * GIB


def test_free_memory_is_no_more_than_the_machine_has():
    import os

    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < free_host_memory() <= total


@PROPERTY
@given(st.integers(1, 64), st.integers(0, 70))
def test_lanes_side_by_side_are_near_what_is_wanted_and_even_where_that_is_near(count, wanted):
    side = even_share(count, wanted)
    limit = max(1, min(wanted, count))
    assert limit / 2 < side <= limit
    divisors = [n for n in range(1, limit + 1) if count % n == 0 and 2 * n > limit]
    assert side == (max(divisors) if divisors else limit)
