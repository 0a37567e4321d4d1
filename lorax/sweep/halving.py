"""Successive halving inside a pack: poor trials end early, and the pack shrinks.

As in Jamieson and Talwalkar (2016, 1502.07943), with the asynchronous variant's (Li et al. 2018,
1810.05934) rungs at `after * eta**k` optimizer steps; a pack's lanes are in lockstep, so that no
trial has to wait for another.
"""

import math

from lorax.config import HalvingConfig
from lorax.sweep.engine import PackEngine
from lorax.train.lane import Lane
from lorax.train.loop import Loop


def judge(loop: Loop, engine: PackEngine) -> None:
    """After an evaluation: cut the poor trials when a rung is reached; drop lanes that are dead."""
    halving = loop.lanes[0].config.sweep.halving
    number = rung(halving, loop.step, loop.train.eval_every or loop.batches_per_epoch)
    if number and loop.step < loop.total_steps:
        cut(loop.lanes, halving.eta, loop.step, number)
    shrink(loop, engine)


def rung(halving: HalvingConfig, step: int, every: int) -> int | None:
    """Which cut is made at the evaluation at `step`, from 1; None for none.

    A rung that lies between two evaluations, `every` steps apart, is judged at the later one.

    >>> [rung(HalvingConfig(after=10, eta=2), step, 5) for step in (5, 10, 15, 20, 25, 40)]
    [None, 1, None, 2, None, 3]
    """
    if halving.after is None:
        return None
    passed = [_rungs_until(halving, at) for at in (step, step - every)]
    return passed[0] if passed[0] > passed[1] else None


def _rungs_until(halving: HalvingConfig, step: int) -> int:
    assert halving.after is not None
    count, at = 0, halving.after
    while at <= step:
        count, at = count + 1, at * halving.eta
    return count


def cut(lanes: list[Lane], eta: int, step: int, number: int) -> None:
    """Mark the trials that end: all but the best `1/eta` by their best dev metric so far.

    Diverged trials count as the worst; of equals the earlier lane goes on.
    """
    field = [lane for lane in lanes if not lane.progress.cut]
    order = sorted(field, key=lambda lane: -_standing(lane))
    goes_on = math.ceil(len(field) / eta)
    for place, lane in enumerate(order, start=1):
        if place > goes_on and lane.is_alive:
            lane.progress.cut = {
                "step": step,
                "rung": number,
                "place": place,
                "of": len(field),
                "goes_on": goes_on,
            }


def _standing(lane: Lane) -> float:
    return -math.inf if lane.progress.reason else lane.standing


def shrink(loop: Loop, engine: PackEngine) -> None:
    """Leave out the lanes that have ended, once they are half of the pack or more."""
    alive = [n for n, lane in enumerate(loop.lanes) if lane.is_alive]
    if not alive or 2 * len(alive) > len(loop.lanes) + 1 or len(alive) == len(loop.lanes):
        return
    loop.end_lanes()
    engine.keep(alive)
    loop.lanes = [loop.lanes[n] for n in alive]
    for lane in loop.lanes:
        lane.meter.share(len(alive))
