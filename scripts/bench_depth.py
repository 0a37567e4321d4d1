"""What a model's depth costs to compile, layer by layer and scanned.

    python scripts/bench_depth.py

A decoder of SmolLM2's widths with random weights, LoRA r = 8 on query and value, the gradient of
the adapter for 4 rows of 128 tokens. `unrolled` runs the layers one after another, as lorax does;
`scanned` keeps the weights of all layers in one array each and has one layer compiled, which
`jax.lax.scan` runs. Both get the same weights, and their gradients are compared. Each line is a
process of its own, with the compiler's options of a training step, and nothing is taken from a
cache. A step's time is the median of `--steps`; memory is XLA's plan for its temporaries.
"""

import argparse
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

MEGA = 1e6
WAYS = ("unrolled", "scanned")
COLUMNS = ("layers", "way", "remat", "trace, s", "compile, s", "ms a step", "temporaries, MB")


class Sides(NamedTuple):
    """One decoder's weights and adapter, per layer and stacked, and its inputs."""

    decoder: Any
    layers: list[Any]
    lora: list[Any]
    inputs: tuple[Any, ...]


def make(depth: int, remat: bool) -> Sides:
    """Random weights, drawn on the host."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from lorax.lora import LoraSpec, init
    from lorax.models import family_of

    family = family_of("llama")
    config = family.config(
        vocab_size=1024,
        hidden_size=576,
        num_hidden_layers=depth,
        num_attention_heads=9,
        num_key_value_heads=3,
        intermediate_size=1536,
    )
    rng = np.random.default_rng(0)
    abstract = nnx.eval_shape(lambda: family.network(config, remat=remat, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)

    def drawn(leaf: Any) -> jax.Array:
        return jnp.asarray(rng.normal(len(leaf.shape) == 1, 0.02, leaf.shape), jnp.float32)

    decoder = nnx.merge(graphdef, jax.tree.map(drawn, nnx.to_pure_dict(state)))
    layers = [nnx.to_pure_dict(nnx.state(layer)) for layer in decoder.layers]
    spec = LoraSpec(rank=8, targets="qv")
    lora = [init(jax.random.key(n), layer, spec) for n, layer in enumerate(layers)]
    lora = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype), lora)
    ids = jnp.asarray(rng.integers(0, 1024, (4, 128)), jnp.int32)
    mask = jnp.ones_like(ids)
    positions = jnp.broadcast_to(jnp.arange(128)[None], ids.shape)
    return Sides(decoder, layers, lora, (ids, mask, positions))


def loss_of(sides: Sides, way: str, base: Any, lora: Any) -> Any:
    """Of the last layer's states, so that it needs no head."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from lorax.lora import LoraSpec, adapt
    from lorax.models.layers.causal_attention import columns

    decoder, spec = sides.decoder, LoraSpec(rank=8, targets="qv")
    ids, mask, positions = sides.inputs
    graphdef = nnx.graphdef(decoder.layers[0])
    mask_BxTxS = columns(mask, None).may_attend()
    rotation = decoder.rotation(positions, mask)

    def block(x: Any, given: Any) -> Any:
        weights, pair = given
        layer = adapt(nnx.merge(graphdef, weights), pair, spec)
        return layer(x, mask_BxTxS, rotation)[0], None

    block = jax.checkpoint(block) if decoder.remat else block
    x = decoder.embed(ids, positions, None)
    if way == "scanned":
        x, _ = jax.lax.scan(block, x, (base, lora))
    else:
        for given in zip(base, lora, strict=True):
            x, _ = block(x, given)
    return jnp.square(decoder.norm(x)).mean()


def measure(depth: int, way: str, remat: bool, steps: int) -> str:
    """A line of the table."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from lorax.runtime.compiler import compiler_options

    sides = make(depth, remat)
    compiler_options(keeps_barriers=remat)  # asks XLA what it knows, which takes a compilation

    def stacked(trees: list[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    def gradient(way: str) -> Any:
        return jax.jit(jax.grad(lambda lora, base: loss_of(sides, way, base, lora)))

    base, lora = sides.layers, sides.lora
    if way == "scanned":
        base, lora = stacked(base), stacked(lora)
    start = time.perf_counter()
    lowered = gradient(way).lower(lora, base)
    traced = time.perf_counter()
    program = lowered.compile(compiler_options(keeps_barriers=remat))
    compiled = time.perf_counter()
    times = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        found = jax.block_until_ready(program(lora, base))
        times.append(time.perf_counter() - begin)
    if way == "scanned":
        want = stacked(gradient("unrolled")(sides.lora, sides.layers))
        for got, expected in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            largest = float(np.abs(expected).max())
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * largest)
    cells = (
        depth,
        way,
        "yes" if remat else "no",
        f"{traced - start:.1f}",
        f"{compiled - traced:.1f}",
        f"{1e3 * statistics.median(times[1:]):.0f}",
        f"{program.memory_analysis().temp_size_in_bytes / MEGA:.0f}",
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--one", nargs=3, metavar=("DEPTH", "WAY", "REMAT"), help="a single line")
    options = parser.parse_args()
    if options.one:
        depth, way, remat = options.one
        print(measure(int(depth), way, remat == "yes", options.steps))
        return 0
    for cells in (COLUMNS, ["---"] * len(COLUMNS)):
        print("| " + " | ".join(cells) + " |", flush=True)
    for depth in options.depths:
        for remat in ("no", "yes"):
            for way in WAYS:
                one = ["--one", str(depth), way, remat, "--steps", str(options.steps)]
                subprocess.run([sys.executable, __file__, *one], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
