import pytest

from lorax.train.measure import Meter, StepCost


def leg(record, length, steps):
    """A process that trains on batches of one length, up to its checkpoint."""
    meter = Meter.restore(record) if record else Meter()
    meter.shapes[length] = StepCost(compile_seconds=1.0, flops=10.0 * length, memory_bytes=length)
    meter.steps_by_length[length] = meter.steps_by_length.get(length, 0) + steps
    meter.step_seconds += [0.5] * steps
    return meter.record()


def test_costs_survive_any_number_of_legs():
    record = leg(leg(leg(None, 32, 2), 16, 1), 16, 1)
    summary = Meter.restore(record).summary()
    assert summary["steps_by_length"] == {"16": 2, "32": 2}
    assert summary["flops_per_step"] == pytest.approx(240.0)
    assert summary["compile_seconds"] == pytest.approx(3.0)
    assert summary["step_memory_bytes"] == 32
    assert summary["seconds_per_step"] == pytest.approx(0.5)
