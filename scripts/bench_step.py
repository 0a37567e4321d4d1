"""Times one training step of the default encoder by lorax and by PEFT, side by side.

    python scripts/bench_step.py
    python scripts/bench_step.py --lengths 64 --precisions fp32 --steps 40

LoRA r = 8 on query and value, a batch of 32 examples of T tokens each, no dropout unless
`--dropout` sets it, AdamW. Each measurement is a process of its own: lorax as its entry points set
themselves up, PEFT as its users run it and once more with the same settings of the allocator. A
step is all of it: forward, gradient, clipping, update; the median of `--steps` after three that do
not count.

Both sides train the model of `AutoModelForSequenceClassification`, whose head reads the first
token; `--pooling mean` gives lorax the head of its default, which reads all of them.

`of the matmul rate` is the share of the rate that products of this precision reach by themselves in
the same process, counting the products that LoRA needs: forward, and back to what depends on an
adapter; none for frozen kernels, none of the last layer for tokens that no head reads.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench_sweep import MALLOC

ROOT = Path(__file__).resolve().parents[1]
BATCH, RANK, ALPHA, WARM_UP = 32, 8, 16.0, 3
WAYS: dict[str, dict[str, str]] = {"lorax": {}, "peft": {}, "peft, allocator": MALLOC}
COLUMNS = ("precision", "T", "PEFT, ms", "with allocator, ms", "lorax, ms", "times PEFT's best")
MORE = ("of the matmul rate", "peak, PEFT MB", "peak, lorax MB")


def timed(step: Callable[[], Any], steps: int) -> float:
    """The median seconds of a step."""
    seconds = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM_UP:])


class Step:
    """A trial's step on examples of one length each, an example a row."""

    def __init__(self, trial: Any, length: int):
        import numpy as np

        from lorax import data
        from lorax.train.hyper_stream import HyperStream
        from lorax.train.indexed_batch import BatchShape, IndexedBatch, device_split
        from lorax.train.setup import hyper_of, prepare
        from lorax.train.single_engine import SingleEngine
        from lorax.train.step import init_state

        self.setup, self.hyper = prepare(trial), HyperStream([trial], 1).at(0)
        state = init_state(self.setup.trainable, hyper_of(trial), self.setup.dropout_key)
        self.engine, examples = SingleEngine(self.setup, state), trial.train.batch_size
        draw = np.random.default_rng(0).integers(1000, 30000, (examples, length), np.int32)
        labels = np.arange(examples, dtype=np.int32) % 2
        encoded = data.Encoded(list(draw), [0 * x for x in draw], labels)
        rows = np.arange(examples, dtype=np.int32)[None]
        shape = BatchShape(1, examples, length, 0)
        self.batch = IndexedBatch(device_split(encoded), rows, rows * length, shape)

    def __call__(self) -> None:
        """One step, waited for."""
        self.engine.read(self.engine.step(self.hyper, self.batch))

    @property
    def memory(self) -> int:
        """Bytes, as XLA plans it."""
        return self.engine.compile(self.hyper, self.batch)[0].memory_bytes


def needed_flops(config: Any, length: int, reads_all: bool) -> int:
    """Of a step: products with kernels and of attention, forward and back to q and v of layer 0."""
    width, layers = config.hidden_size, config.num_hidden_layers
    tokens, read = BATCH * length, BATCH * length if reads_all else BATCH
    matrix, mlp = 2 * width**2, 4 * width * config.intermediate_size
    attended = 2 * length * width  # one of attention's products, a query
    inner = tokens * (2 * (4 * matrix + mlp) + 6 * attended)
    last = 2 * (2 * tokens * matrix + read * (2 * matrix + mlp + 3 * attended))
    not_needed = tokens * (3 * matrix + attended)  # back to the embeddings, and to layer 0's keys
    return (layers - 1) * inner + last - not_needed


def lorax_step(precision: str, length: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, and the share of the matmul rate."""
    import jax
    import jax.numpy as jnp

    from lorax.config import ModelConfig, TrainConfig, TrialConfig
    from lorax.models import load_config
    from lorax.runtime.memory import peak_rss
    from lorax.runtime.process import prepare_process

    prepare_process()
    jax.config.update("jax_enable_compilation_cache", False)
    steps = options.steps
    trial = TrialConfig(
        model=ModelConfig(dropout=options.dropout, pooling=options.pooling),
        train=TrainConfig(batch_size=BATCH, precision=precision, base_dtype=precision),
    )
    step = Step(trial, length)
    seconds, peak = timed(step, steps), peak_rss()
    flops = needed_flops(load_config(trial.model), length, options.pooling == "mean")
    dtype = jnp.bfloat16 if precision == "bf16" else jnp.float32
    return {
        "seconds": seconds,
        "share": flops / seconds / matmul_rate(dtype, BATCH * length, steps),
        "peak": peak,
    }


def matmul_rate(dtype: Any, rows: int, steps: int) -> float:
    """FLOP/s of products like the encoder's MLP, float32 out."""
    import jax
    import jax.numpy as jnp

    x, up = jnp.ones((rows, 384), dtype), jnp.ones((384, 1536), dtype)

    @jax.jit
    def product(x: jax.Array, up: jax.Array) -> jax.Array:
        return jnp.matmul(x, up, preferred_element_type=jnp.float32)

    seconds = timed(lambda: product(x, up).block_until_ready(), 10 * steps)
    return 2 * rows * 384 * 1536 / seconds


def peft_step(precision: str, length: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step in PyTorch: bf16 is its autocast."""
    import resource

    import numpy as np
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from lorax.models import resolve_source

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        resolve_source("assets/minilm"),
        num_labels=2,
        hidden_dropout_prob=options.dropout,
        attention_probs_dropout_prob=options.dropout,
    )
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=ALPHA, target_modules=["query", "value"]
    )
    model = get_peft_model(base, lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    ids = torch.from_numpy(np.random.default_rng(0).integers(1000, 30000, (BATCH, length)))
    labels, mask = torch.arange(BATCH) % 2, torch.ones_like(ids)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, options.steps)
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def measure(way: str, precision: str, length: int, options: argparse.Namespace) -> dict[str, float]:
    """A measurement in a process of its own."""
    words = ["--one", way.partition(",")[0], precision, str(length)]
    words += ["--steps", str(options.steps), "--pooling", options.pooling]
    words += ["--dropout", str(options.dropout)]
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **WAYS[way]},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: {way}, {precision}, T={length} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def row(precision: str, length: int, options: argparse.Namespace) -> list[str]:
    """A line of the table; the ways in turn."""
    found = {way: measure(way, precision, length, options) for way in WAYS}
    ours, theirs, tuned = (found[way] for way in ("lorax", "peft", "peft, allocator"))
    best = min(theirs["seconds"], tuned["seconds"])
    return [
        precision,
        str(length),
        *(f"{1e3 * x['seconds']:.0f}" for x in (theirs, tuned, ours)),
        f"{best / ours['seconds']:.2f}",
        f"{ours['share']:.0%}",
        *(f"{x['peak'] / 1e6:.0f}" for x in (theirs, ours)),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", default="16,64,128")
    parser.add_argument("--precisions", default="fp32,bf16")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pooling", choices=("pooler", "mean"), default="pooler")
    parser.add_argument("--dropout", type=float, default=0.0, help="rate of the model's own")
    parser.add_argument("--one", nargs=3, metavar=("WAY", "PRECISION", "T"), help="a single one")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.one:
        way, precision, length = options.one
        step = lorax_step if way == "lorax" else peft_step
        print(json.dumps(step(precision, int(length), options)))
        return 0
    columns = (*COLUMNS, *MORE)
    for line in (columns, ["---"] * len(columns)):
        print("| " + " | ".join(line) + " |")
    for precision in options.precisions.split(","):
        for length in map(int, options.lengths.split(",")):
            line = row(precision, length, options)
            print("| " + " | ".join(line) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
