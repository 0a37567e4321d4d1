"""Peak host memory while a base is loaded: one weight at a time, and all of them at once.

    python scripts/fetch_assets.py smollm2
    python scripts/bench_loading.py

Each figure is a fresh process: its peak (VmHWM) less that of one that does everything but load.
`size` is that of the loaded parameters. A CPU's devices are host memory, so that the parameters
themselves are in every peak: `extra` is (peak - size) / size, what an accelerator's host needs.
`at once` reads the whole checkpoint, converts it, and puts it where it is kept.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

MEGA = 1e6
DEVICES = 8
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"param_dtype": "bfloat16"},
    "int8": {"quantized": "int8"},
    "nf4": {"quantized": "nf4"},
    f"fp32, fsdp={DEVICES}": {"fsdp": DEVICES},
    f"bf16, fsdp={DEVICES}": {"param_dtype": "bfloat16", "fsdp": DEVICES},
}
COLUMNS = (
    "stored as", "size, MB", "peak, MB", "extra", "s",
    "peak at once, MB", "extra at once", "s at once",
)  # fmt: skip


def load(source: str, *, fsdp: int = 1, at_once: bool, is_loaded: bool, **options: Any) -> Any:
    """The parameters on their devices; () where all but that is done."""
    import jax
    from flax import nnx

    from lorax.config import ModelConfig
    from lorax.models import check_checkpoint
    from lorax.models.load import load_model
    from lorax.train.mesh import base_shardings, make_mesh

    model, mesh = ModelConfig(source=source), make_mesh(fsdp=fsdp)
    check_checkpoint(model, 0)
    key = jax.device_put(jax.random.key(0))
    if not is_loaded:
        return ()
    if at_once:
        return load_at_once(model, mesh if fsdp > 1 else None, **options)
    shardings = base_shardings(mesh) if fsdp > 1 else None
    found = load_model(model, 0, key=key, shardings=shardings, **options)
    return nnx.to_pure_dict(nnx.state(found))


def load_at_once(
    model: Any, mesh: Any, *, param_dtype: str = "float32", quantized: str | None = None
) -> Any:
    """The same parameters, by way of the whole checkpoint on the host."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lorax.lora.paths import leaves_by_path
    from lorax.models import abstract_model, convert, load_checkpoint, quantize, resolve_source
    from lorax.models.checkpoints.placement import is_quantized
    from lorax.train.mesh import shard_base

    abstract = abstract_model(model, 0)
    wanted = leaves_by_path(nnx.to_pure_dict(nnx.state(abstract)))
    tensors = load_checkpoint(resolve_source(model.source))
    arrays = convert(tensors, wanted, abstract.config.model_type, load_head=False)
    if mesh:
        return shard_base({p: np.asarray(x, param_dtype) for p, x in arrays.items()}, mesh)
    return {
        path: jax.tree.map(jnp.asarray, quantize(x, quantized))
        if quantized and is_quantized(path)
        else jnp.asarray(x, param_dtype)
        for path, x in arrays.items()
    }


def measure(source: str, way: str, how: str) -> tuple[float, ...]:
    """(size, peak, seconds) of a way, in a process of its own: `now`, `at once` or `nothing`."""
    flags = f"--xla_force_host_platform_device_count={WAYS[way].get('fsdp', 1)}"
    words = [sys.executable, __file__, "--source", source, "--child", way, how]
    environment = {**os.environ, "XLA_FLAGS": flags}
    child = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return tuple(float(word) for word in child.stdout.split())


def be_measured(source: str, way: str, how: str) -> None:
    """Load, and print the parameters' bytes, the process's peak, and the seconds."""
    import jax

    from lorax.runtime.memory import peak_rss

    start = time.perf_counter()
    found = load(source, at_once=how == "at once", is_loaded=how != "nothing", **WAYS[way])
    leaves = jax.block_until_ready(jax.tree.leaves(found))
    held = sum(shard.data.nbytes for x in leaves for shard in x.addressable_shards)
    print(held, peak_rss(), time.perf_counter() - start)


def row(source: str, way: str) -> list[str]:
    """A line of the table."""
    _, idle, start = measure(source, way, "nothing")
    cells: list[str] = [way]
    for how in ("now", "at once"):
        size, peak, end = measure(source, way, how)
        added = peak - idle
        if how == "now":
            cells.append(f"{size / MEGA:.0f}")
        cells += [f"{added / MEGA:.0f}", f"{(added - size) / size:.2f}", f"{end - start:.1f}"]
    return cells


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--source", default="assets/smollm2", help="a folder with a decoder")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        be_measured(options.source, *options.child)
        return 0
    for line in (COLUMNS, ["---"] * len(COLUMNS)):
        print("| " + " | ".join(line) + " |")
    for way in WAYS:
        print("| " + " | ".join(row(options.source, way)) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
