import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import optax

from lorax.errors import LoraxError

SCHEDULES = ("linear", "cosine", "constant")


@lru_cache(maxsize=64)
def lr_table(name: str, total_steps: int, warmup_ratio: float) -> np.ndarray:
    """`lr_factor` at each step from 0 to `total_steps`: (total_steps + 1,) float32."""
    if name not in SCHEDULES:
        raise LoraxError(f"optimizer.schedule={name!r} is unknown; use one of {SCHEDULES}")
    warmup = math.ceil(warmup_ratio * total_steps)
    rest = max(total_steps - warmup, 1)
    after = {
        "linear": optax.linear_schedule(1.0, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(1.0, rest),
        "constant": optax.constant_schedule(1.0),
    }[name]
    rise = optax.linear_schedule(0.0, 1.0, max(warmup, 1))
    schedule = optax.join_schedules([rise, after], [warmup])
    return np.asarray(schedule(np.arange(total_steps + 1)))


def lr_factor(name: str, total_steps: int, warmup_ratio: float) -> Callable[[int], float]:
    """Learning rate as a share of its peak, by optimizer step (the first is 0).

    Warm-up rises linearly from 0 over `ceil(warmup_ratio * total_steps)` steps, as in Hugging
    Face's Trainer. Then `linear` falls to 0 at `total_steps`, `cosine` falls along half a wave,
    and `constant` stays.

    >>> factor = lr_factor("linear", 10, 0.2)
    >>> [round(factor(step), 3) for step in (0, 1, 2, 6, 10)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    table = lr_table(name, total_steps, warmup_ratio)
    return lambda step: float(table[step])
