"""Plans the packs of a group of trials: rank buckets, pack sizes, lanes side by side."""

import math
from collections.abc import Sequence
from dataclasses import replace

import jax

from lorax.errors import LoraxError
from lorax.runs.trial import Trial
from lorax.sweep.compatibility import even_parts
from lorax.sweep.cost import (
    GIB,
    Probe,
    Size,
    measure_probe,
    memory_limit,
    pack_memory,
    sizes_of,
    trial_memory,
)
from lorax.sweep.pack import Pack
from lorax.sweep.workload import Workload
from lorax.train.batched_engine import trains_alone

CPU_TOKENS = 1024  # side by side; more overflow a CPU's caches (docs/sweeps.md)
NEGLIGIBLE = 0.05  # padding worth this share of the work is not worth another program


def plan_packs(trials: Sequence[Trial], *, with_times: bool = False) -> list[Pack]:
    """Packs for trials that can share a program.

    Ranks are split into buckets where padding would cost more than another compilation. Each
    bucket is split into packs of at most `sweep.max_trials`, of similar sizes. The number of
    lanes side by side is lowered until the pack's program fits the memory limit.

    Args:
      trials: of one group of `group_trials`.
      with_times: also predict times, which requires measuring a step.

    Raises:
      LoraxError: a single trial that needs more memory than the limit.
    """
    if not trials:
        return []
    work = Workload.of(trials[0].config)
    sizes = sizes_of([trial.config for trial in trials])
    is_wasteful = _waste(sizes, work.base_flops) > NEGLIGIBLE
    probe = measure_probe(work) if with_times or is_wasteful else None
    packs = []
    for bucket in rank_buckets(sizes, _saving(work, probe if is_wasteful else None)):
        most = min(trials[n].config.sweep.max_trials for n in bucket)
        for part in even_parts(bucket, most):
            chosen = [trials[n] for n in part]
            packs += _fitting(work, chosen, [sizes[n] for n in part], probe)
    return packs


def rank_buckets(sizes: Sequence[Size], worth: float) -> list[list[int]]:
    """Adapters split into buckets by size, with the least total cost of padding and compilation.

    In a bucket every adapter costs as much as the largest.

    Args:
      sizes: of the adapters.
      worth: cost of one more program in an adapter's FLOPs per token; infinity gives one bucket.

    Returns:
      Indices, in their order; buckets by ascending size.

    >>> sizes = [Size(rank, 6.0 * rank) for rank in (1, 256, 2, 256)]
    >>> rank_buckets(sizes, worth=100.0), rank_buckets(sizes, worth=1e9)
    ([[0, 2], [1, 3]], [[0, 1, 2, 3]])
    """
    values = sorted({size.flops for size in sizes})
    counts = [sum(size.flops == value for size in sizes) for value in values]
    best: list[tuple[float, list[int]]] = [(0.0, [])]  # of the smallest n: (cost, ends of buckets)
    for end in range(1, len(values) + 1):
        options = [
            (
                best[start][0] + worth + values[end - 1] * sum(counts[start:end]),
                [*best[start][1], end],
            )
            for start in range(end)
        ]
        best.append(min(options) if worth < math.inf else (0.0, [end]))
    ends = best[-1][1]
    limits = [values[end - 1] for end in ends]
    buckets: list[list[int]] = [[] for _ in ends]
    for n, size in enumerate(sizes):
        buckets[next(i for i, limit in enumerate(limits) if size.flops <= limit)].append(n)
    return buckets


def _waste(sizes: Sequence[Size], base: float) -> float:
    """The share of padding in all work if every adapter is padded to the largest."""
    largest = max(size.flops for size in sizes)
    mean = sum(size.flops for size in sizes) / len(sizes)
    return (largest - mean) / (base + largest) if largest else 0.0


def _saving(work: Workload, probe: Probe | None) -> float:
    """The cost of one more program, its compilations, in FLOPs per token of one lane."""
    if probe is None:
        return math.inf
    programs = len(work.shapes) + 1  # the steps' shapes, and the evaluation's
    tokens = work.steps * work.tokens_per_step
    flops_per_second = (work.base_flops + probe.adapter_flops) / probe.seconds_per_token
    return programs * probe.compile_seconds * flops_per_second / tokens


def _fitting(
    work: Workload, trials: Sequence[Trial], sizes: Sequence[Size], probe: Probe | None
) -> list[Pack]:
    """One pack with the lanes side by side that fit in memory, or else packs of half the size."""
    configs = [trial.config for trial in trials]
    limit, lanes = memory_limit(configs[0]), configs[0].sweep.lanes
    tokens = CPU_TOKENS if jax.default_backend() == "cpu" else 2**62
    while True:
        if trains_alone(configs):
            memory, side = trial_memory(configs[0]), 1
        else:
            memory, side = pack_memory(configs, tokens_at_once=tokens, lanes=lanes)
        if memory <= limit:
            pack = Pack(tuple(trials), tokens, lanes)
            return [replace(pack, predicted=_predicted(work, sizes, probe, memory, side))]
        if side > 1:
            lanes = side // 2
        elif len(trials) > 1:
            half = (len(trials) + 1) // 2
            return [
                *_fitting(work, trials[:half], sizes[:half], probe),
                *_fitting(work, trials[half:], sizes[half:], probe),
            ]
        else:
            raise LoraxError(
                f"one trial of {configs[0].model.name} needs {memory / GIB:.2f} GiB, above the "
                f"limit of {limit / GIB:.2f} GiB (sweep.memory_limit_gib); lower "
                "train.batch_size, raise train.grad_accum, set train.remat=true or lower "
                "task.max_length"
            )


def _predicted(
    work: Workload, sizes: Sequence[Size], probe: Probe | None, memory: int, side: int
) -> dict[str, float | int | None]:
    largest = max(size.flops for size in sizes)
    base = work.base_flops
    facts: dict[str, float | int | None] = {
        "rank": max(size.rank for size in sizes),
        "side_by_side": side,
        "memory_bytes": memory,
        "steps": work.steps,
        "padding": _waste(sizes, base),
    }
    if probe is None:
        return facts
    scale = (base + largest) / (base + probe.adapter_flops) if largest else 1.0
    per_token = len(sizes) * scale * probe.seconds_per_token
    per_step = per_token * work.tokens_per_step
    compile_seconds = probe.compile_seconds * len(work.shapes)
    # A step computes the products with frozen kernels once forward and once backward.
    evaluating = work.evaluations * work.evaluation_tokens * per_token / 2
    return facts | {
        "seconds_per_step": per_step,
        "compile_seconds": compile_seconds,
        "seconds": per_step * work.steps + evaluating + compile_seconds,
    }
