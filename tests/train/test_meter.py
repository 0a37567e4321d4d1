import pytest

from lorax.runtime.compiler import StepCost
from lorax.train import meter
from lorax.train.meter import Meter


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for `clock[0] += seconds`."""
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    return now


def train(clock, record, length, steps, *, lanes=1, preparing=0.0):
    """A process that trains on batches of one length, half a second a step, up to a checkpoint."""
    started = clock[0]
    clock[0] += preparing
    meter = Meter.restore(record) if record else Meter()
    meter.share(lanes, since=started)
    cost = StepCost(compile_seconds=1.0, flops=10.0 * length, memory_bytes=length)
    for n in range(steps):
        clock[0] += 0.5
        meter.count(length, cost, is_new=n == 0)
        meter.add_step(0.5)
    return meter.record()


def test_costs_survive_any_number_of_legs(clock):
    record = train(clock, train(clock, train(clock, None, 32, 2), 16, 1), 16, 1)
    summary = Meter.restore(record).summary()
    assert summary["steps_by_tokens"] == {"16": 2, "32": 2}
    assert summary["flops_per_step"] == pytest.approx(240.0)
    assert summary["compile_seconds"] == pytest.approx(3.0)
    assert summary["step_memory_bytes"] == 32
    assert summary["seconds_per_step"] == pytest.approx(0.5)
    assert summary["seconds_total"] == pytest.approx(2.0)


def test_lanes_share_the_time_from_the_first_ones_preparation_on(clock):
    summary = Meter.restore(train(clock, None, 8, 4, lanes=5, preparing=3.0)).summary()
    assert summary["seconds_total"] == pytest.approx((3.0 + 4 * 0.5) / 5)
    assert summary["seconds_per_step"] == pytest.approx(0.1)
    assert summary["compile_seconds"] == pytest.approx(0.2)
    assert summary["lanes"] == 5


def test_a_pack_that_shrinks_pays_for_another_program(clock):
    meter = Meter()
    meter.share(4, since=clock[0])
    cost = StepCost(compile_seconds=1.0, flops=80.0, memory_bytes=8)
    clock[0] += 2.0
    meter.count(8, cost, is_new=True)
    meter.share(2)
    clock[0] += 2.0
    meter.count(8, cost, is_new=True)
    assert meter.compile_seconds == pytest.approx(1 / 4 + 1 / 2)
    assert meter.seconds == pytest.approx(2 / 4 + 2 / 2)
    assert meter.summary()["lanes"] == 4
