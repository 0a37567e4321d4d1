"""Successive halving inside a pack: poor trials end early, and the pack shrinks.

As in Jamieson and Talwalkar (2016, 1502.07943), with the asynchronous variant's (Li et al. 2018,
1810.05934) rungs at `after * eta**k` optimizer steps. A pack's lanes train in lockstep, so no
trial waits for another.
"""

import math

from lorax.config import HalvingConfig
from lorax.train.batched_engine import BatchedEngine
from lorax.train.loop import Loop
from lorax.train.run import Run


def judge(loop: Loop, engine: BatchedEngine) -> None:
    """After an evaluation, prune the poor trials at a rung and drop lanes that have ended."""
    halving = loop.runs[0].config.sweep.halving
    number = rung(halving, loop.step, loop.train.eval_every or loop.batches_per_epoch)
    if number and loop.step < loop.total_steps:
        prune(loop.runs, halving.eta, loop.step, number)
    shrink(loop, engine)


def rung(halving: HalvingConfig, step: int, every: int) -> int | None:
    """The number of the rung at the evaluation at `step`, from 1; None if there is no rung.

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


def prune(runs: list[Run], eta: int, step: int, number: int) -> None:
    """Mark the trials to prune: all but the best `1/eta` by their best dev metric so far.

    Diverged trials count as the worst; in a tie the earlier trial continues.
    """
    compared = [run for run in runs if not run.progress.cut]
    order = sorted(compared, key=lambda run: -_signed_best(run))
    keeps = math.ceil(len(compared) / eta)
    for place, run in enumerate(order, start=1):
        if place > keeps and run.is_alive:
            run.progress.cut = {
                "step": step,
                "rung": number,
                "place": place,
                "of": len(compared),
                "goes_on": keeps,
            }


def _signed_best(run: Run) -> float:
    return -math.inf if run.progress.reason else run.signed_best


def shrink(loop: Loop, engine: BatchedEngine) -> None:
    """Drop the lanes of ended runs once they are at least half of the pack."""
    alive = [n for n, run in enumerate(loop.runs) if run.is_alive]
    if not alive or 2 * len(alive) > len(loop.runs) + 1 or len(alive) == len(loop.runs):
        return
    loop.end_runs()
    engine.keep(alive)
    loop.keep(alive)
    for run in loop.runs:
        run.meter.share(len(alive))
