"""What a pack would cost: memory from XLA, time from FLOPs and one measured step."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorax import data
from lorax.config import TrialConfig
from lorax.free_memory import device_memory, free_host_memory
from lorax.lora.paths import leaves_by_path
from lorax.sweep.engine import PackEngine, mesh_of
from lorax.train.dataset import Dataset, epoch_steps, load_dataset, total_steps
from lorax.train.measure import StepCost, compile_cost
from lorax.train.optimizer import Hyper
from lorax.train.setup import frozen_shapes, hyper_of, prepare
from lorax.train.step import Frozen, State, init_state, train_step

GIB = 2**30
SPARE = 0.9  # of the memory that is free: the rest is for what XLA does not count


@dataclass(frozen=True)
class Size:
    """An adapter's size, as far as cost goes.

    Attributes:
      rank: of its largest target, as stored.
      flops: of a training step through the adapter, a token: 6 r (d_in + d_out) a target.
    """

    rank: int
    flops: float


@dataclass(frozen=True)
class Probe:
    """One lane's step, measured once: what predictions of time rest on.

    Attributes:
      compile_seconds: of the step of one batch shape.
      seconds_per_token: padding counted as tokens.
      adapter_flops: a token, of the adapter that was measured.
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
    pairs = prepare(trial).trainable["lora"].values()
    flops = sum(6.0 * (pair["a"].size + pair["b"].size) for pair in pairs)
    return Size(max((pair["a"].shape[-2] for pair in pairs), default=0), flops)


def base_flops(trial: TrialConfig) -> float:
    """FLOPs a token in the frozen base's products: forward, and back to activations."""
    leaves = leaves_by_path(frozen_shapes(trial))
    products = [leaf for path, leaf in leaves.items() if path.endswith(".kernel")]
    if "lm_head.kernel" not in leaves and (table := leaves.get("decoder.word.embedding")):
        products.append(table)  # the output layer, too
    return 4.0 * sum(leaf.size for leaf in products)


def shapes_of(trial: TrialConfig) -> dict[int, float]:
    """The share of each compiled shape in a trial's steps, by the rows of its micro-batches."""
    return _dataset(trial).layout.shares


def tokens_of(trial: TrialConfig, rows: int) -> int:
    """Tokens of a step whose micro-batches have so many rows."""
    return trial.train.grad_accum * rows * _dataset(trial).layout.row_length


def steps_of(trial: TrialConfig) -> int:
    """Optimizer steps of a trial."""
    return total_steps(trial, _dataset(trial))


def epoch_of(trial: TrialConfig) -> int:
    """Optimizer steps of an epoch."""
    return epoch_steps(trial, _dataset(trial))


def evaluations_of(trial: TrialConfig) -> int:
    """How often a trial is evaluated: the last time at its end."""
    every = trial.train.eval_every or epoch_of(trial)
    return -(-steps_of(trial) // every)


def evaluation_tokens(trial: TrialConfig) -> int:
    """Tokens that an evaluation of a trial computes, padding included."""
    dataset, total = _dataset(trial), 0
    for encoded in dataset.dev.values():
        size, length = trial.train.eval_batch_size, dataset.layout.row_length
        layout, batches = data.eval_plan(encoded, size, length, dataset.multiple)
        total += len(batches) * layout.rows[0] * length
    return total


def measure_probe(trial: TrialConfig) -> Probe:
    """Compile and time the step of one trial in the shape that most steps have.

    On a mesh, of one trial on each of the devices that trials are spread over.
    """
    shares = shapes_of(trial)
    rows = max(shares, key=lambda rows: shares[rows])
    mesh = mesh_of(trial)
    lanes = mesh.shape["trial"] if mesh else 1
    engine = _engine([trial] * lanes, tokens_at_once=0, lanes=1)
    step = [hyper_of(trial)] * lanes, [dummy_batch(trial, rows)] * lanes
    cost, _ = engine.compile(*step, is_trained=False)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        engine.read(engine.step(*step))
        seconds.append(time.perf_counter() - start)
    tokens = lanes * tokens_of(trial, rows)
    adapter = sizes_of([trial])[0].flops
    return Probe(cost.compile_seconds, min(seconds[1:]) / tokens, adapter)


def pack_memory(
    trials: Sequence[TrialConfig], *, tokens_at_once: int, lanes: int | None
) -> tuple[int, int]:
    """(bytes of the pack's step in its largest shape, lanes side by side in it).

    The program is compiled, and not run; training finds it in the cache.
    """
    engine = _engine(trials, tokens_at_once=tokens_at_once, lanes=lanes)
    batch = dummy_batch(trials[0], max(shapes_of(trials[0])))
    hypers = [hyper_of(trial) for trial in trials]
    cost, _ = engine.compile(hypers, [batch] * len(trials), is_trained=False)
    return cost.memory_bytes, engine.side


def _engine(trials: Sequence[TrialConfig], *, tokens_at_once: int, lanes: int | None) -> PackEngine:
    """An engine that is not trained with: trials of one shape start from the same numbers."""
    setups = {_adapter_key(trial): prepare(trial) for trial in trials}
    states = {
        key: init_state(setup.trainable, hyper_of(trials[0]), setup.dropout_key)
        for key, setup in setups.items()
    }
    keys = [_adapter_key(trial) for trial in trials]
    return PackEngine(
        [setups[key] for key in keys],
        [states[key] for key in keys],
        tokens_at_once=tokens_at_once,
        lanes=lanes,
        mesh=mesh_of(trials[0]),
    )


def trial_memory(trial: TrialConfig) -> int:
    """Bytes of a trial's own step in its largest shape; compiled, and not run."""
    return largest_step(trial)[0].memory_bytes


def largest_step(trial: TrialConfig) -> tuple[StepCost, tuple[State, Frozen, Hyper, Any]]:
    """(cost, arguments) of a trial's own step in its largest shape; compiled, and not run."""
    setup, hyper = prepare(trial), hyper_of(trial)
    state = init_state(setup.trainable, hyper, setup.dropout_key)
    batch = dummy_batch(trial, max(shapes_of(trial)))
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
    """Bytes that a pack may take: as set, or nine tenths of what there is.

    That is a device's memory where it tells, else what the machine has left.
    """
    if trial.sweep.memory_limit_gib is not None:
        return int(trial.sweep.memory_limit_gib * GIB)
    return int(SPARE * (device_memory() or free_host_memory()))


def dummy_batch(trial: TrialConfig, rows: int) -> dict[str, np.ndarray]:
    """A batch whose micro-batches have so many rows, each with the shortest example."""
    dataset, layout = _dataset(trial), _dataset(trial).layout
    shortest = int(np.argmin(dataset.train.lengths))
    placed = [[n] for n in range(min(rows, layout.examples))]
    indices = np.full(len(placed), shortest)
    part = data.collate(dataset.train, indices, placed, layout, rows=rows)
    return {name: np.concatenate([x] * trial.train.grad_accum) for name, x in part.items()}


def _adapter_key(trial: TrialConfig) -> str:
    return repr((trial.lora, trial.train.pad_rank, trial.train.mode))


def _dataset(trial: TrialConfig) -> Dataset:
    return load_dataset(trial)
