"""Trains one pack on several meshes, and leaves what the tests compare; run as a process.

    mesh_worker.py OUT BASE DATA_DIR MESHES [PROCESS PROCESSES PORT]

MESHES is JSON, a list of [trial, data, fsdp], or null for one device. Each leaves
`OUT/<mesh>.<process>.npz`, arrays, and the like `.json`, facts.
"""

import json
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from lorax.config import (
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    SweepConfig,
    TaskConfig,
    TrainConfig,
    TrialConfig,
)
from lorax.lora.paths import leaves_by_path
from lorax.train.batch_stream import BatchStream
from lorax.train.batched_engine import BatchedEngine
from lorax.train.dataset import load_dataset
from lorax.train.hyper_stream import HyperStream
from lorax.train.indexed_batch import device_split
from lorax.train.mesh import AXES, make_mesh
from lorax.train.setup import hyper_of, prepare
from lorax.train.step import init_state

STEPS = 4
ROWS = 16
LANES = [  # six, which neither 4 nor 8 divides
    (0, {"rank": 1, "targets": "q"}, {"lr": 3e-3}),
    (1, {"rank": 8, "targets": ["q", "v", "up"]}, {"schedule": "cosine", "weight_decay": 0.1}),
    (2, {"rank": 4, "targets": "qv", "scaling": "rslora"}, {"clip_norm": 0.05}),
    (1, {"rank": 3, "targets": "mlp", "init": "gaussian"}, {"head_lr": 3e-3}),
    (0, {"rank": 2, "targets": ["value", "down"]}, {"schedule": "constant"}),
    (3, {"rank": 6, "targets": "qv", "alpha": 4.0}, {"clip_norm": None}),
]
KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"


def trials(base, data_dir):
    """Lanes that differ in all that may, with the model's own dropout."""
    return [
        TrialConfig(
            TaskConfig("sst2", data_dir, max_length=16),
            ModelConfig("wide", base, dropout=0.1),
            LoraConfig(**lora),
            OptimizerConfig(**{"lr": 1e-3, "warmup_ratio": 0.2, **optimizer}),
            TrainConfig(batch_size=ROWS, max_shapes=1),
            seed=seed,
        )
        for seed, lora, optimizer in LANES
    ]


def steps_of(configs, mesh):
    """Each step's hyper and batch, as the loop gives them."""
    whole_rows = replace(configs[0], sweep=SweepConfig(mesh=MeshConfig(fsdp=8)))  # on any mesh
    seeds = [config.seed for config in configs]
    dataset = load_dataset(whole_rows)
    split = device_split(dataset.train, mesh)
    batches = BatchStream(dataset, configs[0].train, seeds, split)
    hypers = HyperStream(configs, STEPS)
    return [(hypers.at(step), batches.at(step)) for step in range(STEPS)]


def train(configs, setups, sizes):
    """(arrays, facts) of the pack on a mesh; on one device if `sizes` is None."""
    states = [
        init_state(setup.trainable, hyper_of(trial), setup.dropout_key)
        for setup, trial in zip(setups, configs, strict=True)
    ]
    mesh = make_mesh(*sizes) if sizes else None
    engine = BatchedEngine(setups, states, tokens_at_once=1024, mesh=mesh)
    steps = steps_of(configs, mesh)
    engine.compile(*steps[0])
    facts = {
        "devices": jax.device_count(),
        "base": sum(x.nbytes for x in jax.tree.leaves(setups[0].frozen.params["base"])),
        "held": sorted(held_bytes(engine.frozen.params).values()),
    }
    if mesh:
        ((_, program, _),) = engine._programs.values()
        facts["collectives"] = crossings(program.as_text(), sizes)
    losses, donated, placements = [], [], set()
    for hyper, batch in steps:
        old = jax.tree.leaves(engine.state)
        placements.add(tuple(leaf.sharding for leaf in old))
        losses.append(engine.read(engine.step(hyper, batch)))
        donated.append(all(leaf.is_deleted() for leaf in old))
    facts |= {"donated": all(donated), "placements": len(placements)}
    facts["flops"] = engine.costs[0].flops
    batch = steps[0][1]
    first = replace(batch, examples=batch.examples[0], starts=batch.starts[0])
    arrays = {"losses": np.stack(losses), "outputs": np.asarray(engine.predict(first))}
    for n, setup in enumerate(setups):
        start = leaves_by_path(setup.trainable)
        for name, leaf in leaves_by_path(engine.trainable(n)).items():
            arrays[f"start {n} {name}"] = np.asarray(start[name])
            arrays[f"end {n} {name}"] = leaf
    return arrays, facts


def held_bytes(params):
    """Bytes of the base on each device of this process."""
    held = Counter()
    for leaf in jax.tree.leaves(params):
        for shard in leaf.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    return held


def crossings(text, sizes):
    """How many collectives of each kind cross which axes: {"all-reduce data+fsdp": 3}."""
    found = Counter()
    places = np.stack(np.unravel_index(np.arange(np.prod(sizes)), sizes), -1)
    for line in text.splitlines():
        if not (match := re.search(rf" ({KINDS})(?:-start)?\(", line)):
            continue
        crossed = {
            axis
            for group in groups(line, len(places))
            for n, axis in enumerate(AXES)
            if len(set(places[group][:, n])) > 1
        }
        found[f"{match[1]} {'+'.join(axis for axis in AXES if axis in crossed)}"] += 1
    return found


def groups(line, devices):
    """Which devices talk with one another, in each of XLA's notations."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [integers(pair) for pair in re.findall(r"\{([\d,]+)", pairs[1])]
    rest = line.split("replica_groups=")[1]
    if rest.startswith("{{"):
        return [integers(group) for group in re.findall(r"\{([\d,]+)\}", rest.split("}}")[0] + "}")]
    if rest.startswith("{}"):
        return [list(range(devices))]
    if rest.startswith("mesh"):
        named = {k: int(v) for k, v in re.findall(r"'(\w+)'=(\d+)", rest.split("]")[0])}
        given = re.match(
            r"mesh\[.*?\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}", rest
        )
        assert given and ":(" not in given[3], line  # parts of axes: not met so far
        numbers = iota(integers(given[1]) or [devices], integers(given[2]))
        last = [list(named).index(name) for name in re.findall(r"'(\w+)'", given[3])]
        first = [n for n in range(len(named)) if n not in last]
        table = numbers.reshape(list(named.values())).transpose(first + last)
        return table.reshape(-1, int(np.prod([list(named.values())[n] for n in last]))).tolist()
    given = re.match(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    assert given, line
    numbers = iota(integers(given[3]), integers(given[4]))
    return numbers.reshape(int(given[1]), int(given[2])).tolist()


def iota(sizes, order):
    numbers = np.arange(np.prod(sizes)).reshape(sizes)
    return numbers.transpose(order) if order else numbers


def integers(text):
    return [int(value) for value in text.split(",")] if text else []


def main(out, base, data_dir, meshes, *process):
    if process:
        jax.distributed.initialize(
            f"127.0.0.1:{process[2]}",
            int(process[1]),
            int(process[0]),
            shutdown_timeout_seconds=10,
        )
    configs = trials(base, data_dir)
    setups = [prepare(trial) for trial in configs]
    for sizes in json.loads(meshes):
        arrays, facts = train(configs, setups, sizes)
        place = Path(out) / f"{'x'.join(map(str, sizes or [1]))}.{jax.process_index()}"
        np.savez(f"{place}.npz", **arrays)
        Path(f"{place}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
