"""Loads bases onto meshes, and leaves what the tests compare; run as a process.

    loading_worker.py OUT FOLDERS MESHES [PROCESS PROCESSES PORT]

FOLDERS and MESHES are JSON lists, of checkpoints and of [trial, data, fsdp]. `OUT.<process>.json`
has the facts of each pair, and of each dtype.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lorax.config import ModelConfig
from lorax.lora.paths import leaves_by_path
from lorax.models import load_model
from lorax.models.checkpoints.safetensors import LazyTensor
from lorax.train.mesh import base_shardings, make_mesh, shard_base

READS = []


def spy(self, index, read=LazyTensor.__getitem__):
    """Records the bytes of a read."""
    found = read(self, index)
    READS.append(found.nbytes)
    return found


def base_of(folder, **options):
    """The parameters of a decoder, or of an encoder without its head, by path."""
    outputs = 2 if "bert" in Path(folder).name else 0
    model = load_model(ModelConfig(source=folder), outputs, key=jax.random.key(0), **options)
    return leaves_by_path({k: v for k, v in model_params(model).items() if k != "head"})


def model_params(model):
    return nnx.to_pure_dict(nnx.state(model))


def facts_of(folder, sizes, dtype):
    """What differs from the base on one device, and what was read and is held."""
    options = {"param_dtype": dtype, "dtype": dtype}
    whole = base_of(folder, **options)
    mesh = make_mesh(*sizes)
    READS.clear()
    cut = base_of(folder, shardings=base_shardings(mesh), **options)
    reads = list(READS)
    base_of(folder, shardings=base_shardings(mesh), **options)
    put = shard_base({path: np.asarray(x) for path, x in whole.items()}, mesh)
    kept = shard_base(cut, mesh)
    scale = jnp.dtype(jnp.float32).itemsize // jnp.dtype(dtype).itemsize
    held = {}
    for x in cut.values():
        for shard in x.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    return {
        "paths": len(cut) if cut.keys() == whole.keys() else None,
        "unequal": [path for path in cut if not same(cut[path], np.asarray(whole[path]))],
        "elsewhere": [path for path in cut if cut[path].sharding != put[path].sharding],
        "moved": [path for path in cut if kept[path] is not cut[path]],
        "base": sum(x.nbytes for x in whole.values()),
        "whole": sum(x.nbytes for x in cut.values() if x.is_fully_replicated),
        "read": sum(reads) // scale,  # the file is in float32
        "read_again": len(READS) - len(reads),
        "held": sorted(held.values()),
    }


def same(cut, whole):
    """Whether each piece is that of the whole, bit for bit."""
    return cut.dtype == whole.dtype and all(
        np.array_equal(bits(shard.data), bits(whole[shard.index]))
        for shard in cut.addressable_shards
    )


def bits(x):
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def main(out, folders, meshes, *process):
    if process:
        jax.distributed.initialize(
            f"127.0.0.1:{process[2]}",
            int(process[1]),
            int(process[0]),
            shutdown_timeout_seconds=10,
        )
    LazyTensor.__getitem__ = spy
    facts = {
        f"{Path(folder).name} {sizes} {jnp.dtype(dtype).name}": facts_of(folder, sizes, dtype)
        for folder in json.loads(folders)
        for sizes in json.loads(meshes)
        for dtype in (jnp.float32, jnp.bfloat16)
    }
    Path(f"{out}.{jax.process_index()}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
