"""Predicted costs of a pack: memory from XLA, time from FLOPs and one measured step."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from lorax.config import TrialConfig
from lorax.runtime.compiler import StepCost, compile_cost
from lorax.runtime.memory import GIB, device_memory, free_host_memory
from lorax.sweep.workload import Workload
from lorax.train.batched_engine import BatchedEngine, mesh_of
from lorax.train.hyper_stream import HyperStream
from lorax.train.indexed_batch import DeviceSplit
from lorax.train.optimizer import Hyper
from lorax.train.prefix import FrozenPrefix
from lorax.train.setup import Setup, hyper_of, prepare, targets_of
from lorax.train.step import Frozen, Program, State, init_state, train_step

SPARE = 0.9  # of the memory that is free: the rest is for what XLA does not count


@dataclass(frozen=True)
class Size:
    """The size of an adapter, for the prediction of costs.

    Attributes:
      rank: of its largest target, as stored.
      flops: of a training step through the adapter, a token: 6 r (d_in + d_out) a target.
    """

    rank: int
    flops: float


@dataclass(frozen=True)
class Probe:
    """One measured step of one lane, from which times are predicted.

    Attributes:
      compile_seconds: of the step of one batch shape.
      seconds_per_token: padding counts as tokens.
      adapter_flops: FLOPs per token of the measured adapter.
    """

    compile_seconds: float
    seconds_per_token: float
    adapter_flops: float


def sizes_of(trials: Sequence[TrialConfig]) -> list[Size]:
    """The size of each trial's adapter; zero without one."""
    unlike = {_adapter_key(trial): trial for trial in trials}
    sizes = {key: _size_of(trial) for key, trial in unlike.items()}
    return [sizes[_adapter_key(trial)] for trial in trials]


def _size_of(trial: TrialConfig) -> Size:
    targets = targets_of(trial)
    ranks = [trial.train.pad_rank or target.rank for target in targets]
    flops = 0.0
    for target, rank in zip(targets, ranks, strict=True):
        stacked, d_in, d_out = target.matrix_shape
        flops += 6.0 * math.prod(stacked) * rank * (d_in + d_out)
    return Size(max(ranks, default=0), flops)


def measure_probe(work: Workload) -> Probe:
    """Compile and time the step of one trial in the most frequent shape.

    On a mesh, time one trial on each device of the `trial` axis.
    """
    rows = max(work.shapes, key=lambda rows: work.shapes[rows])
    mesh = mesh_of(work.config)
    lanes = mesh.shape["trial"] if mesh else 1
    engine, setup = _engine([work.config] * lanes, tokens_at_once=0, lanes=1)
    split = _split(work, setup, engine.program, mesh)
    step = (
        HyperStream([work.config] * lanes, work.steps).at(0),
        work.dummy_batch(rows, lanes, split),
    )
    cost, _ = engine.compile(*step, is_trained=False)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        engine.read(engine.step(*step))
        seconds.append(time.perf_counter() - start)
    tokens = lanes * work.tokens(rows)
    adapter = sizes_of([work.config])[0].flops
    return Probe(cost.compile_seconds, min(seconds[1:]) / tokens, adapter)


def pack_memory(
    trials: Sequence[TrialConfig], *, tokens_at_once: int, lanes: int | None
) -> tuple[int, int]:
    """(bytes of the pack's step in its largest shape, lanes side by side in it).

    The program is compiled but not run; training finds it in the cache.
    """
    engine, setup = _engine(trials, tokens_at_once=tokens_at_once, lanes=lanes)
    work = Workload.of(trials[0])
    split = _split(work, setup, engine.program, engine.mesh)
    batch = work.dummy_batch(max(work.shapes), len(trials), split)
    hyper = HyperStream(trials, work.steps).at(0)
    cost, _ = engine.compile(hyper, batch, is_trained=False)
    return cost.memory_bytes, engine.side


def _engine(
    trials: Sequence[TrialConfig], *, tokens_at_once: int, lanes: int | None
) -> tuple[BatchedEngine, Setup]:
    """An engine for planning only, and a trial's setup.

    Trials of one shape start from the same numbers.
    """
    setups = {_adapter_key(trial): prepare(trial) for trial in trials}
    states = {
        key: init_state(setup.trainable, hyper_of(trials[0]), setup.dropout_key)
        for key, setup in setups.items()
    }
    keys = [_adapter_key(trial) for trial in trials]
    engine = BatchedEngine(
        [setups[key] for key in keys],
        [states[key] for key in keys],
        tokens_at_once=tokens_at_once,
        lanes=lanes,
        mesh=mesh_of(trials[0]),
    )
    return engine, setups[keys[0]]


def _split(work: Workload, setup: Setup, program: Program, mesh: Mesh | None = None) -> DeviceSplit:
    prefix = FrozenPrefix(program, setup, work.config, work.dataset, mesh)
    return prefix.split(work.dataset.train)


def trial_memory(trial: TrialConfig) -> int:
    """Bytes of a trial's own step in its largest shape; compiled but not run."""
    return largest_step(trial)[0].memory_bytes


def largest_step(trial: TrialConfig) -> tuple[StepCost, tuple[State, Frozen, Hyper, Any]]:
    """(cost, arguments) of a trial's own step in its largest shape; compiled but not run."""
    setup, hyper = prepare(trial), hyper_of(trial)
    state = init_state(setup.trainable, hyper, setup.dropout_key)
    work = Workload.of(trial)
    split = _split(work, setup, setup.program)
    batch = work.dummy_batch(max(work.shapes), split=split)
    parts = state, setup.frozen, hyper, batch
    cost, _ = compile_cost(
        train_step,
        setup.program,
        *parts,
        is_trained=False,
        keeps_barriers=setup.program.saves_memory,
    )
    return cost, parts


def memory_limit(trial: TrialConfig) -> int:
    """Bytes that a pack may take: as set, or else 90% of the available memory.

    That is the memory that the device reports, or else the free host memory.
    """
    if trial.sweep.memory_limit_gib is not None:
        return int(trial.sweep.memory_limit_gib * GIB)
    return int(SPARE * (device_memory() or free_host_memory()))


def _adapter_key(trial: TrialConfig) -> str:
    return repr((trial.lora, trial.train.pad_rank, trial.train.mode))
