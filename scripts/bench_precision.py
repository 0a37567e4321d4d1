"""What lower precision costs: losses and dev scores of the same training, and the weights' error.

    python scripts/bench_precision.py --task cola --steps 200 --seeds 0,1,2,3,4

LoRA r = 8 on query and value of the default encoder, the same batches and the same initial adapter
for each seed; only the compute precision and the storage of the frozen base differ. `loss` is the
largest, and the mean, relative difference of a step's loss from fp32's, over all steps and seeds.
`weights` is the relative error of the kernels in the Frobenius norm. `dev` is the mean over seeds
and their standard deviation; `minus fp32` the mean of the paired differences and their standard
error.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WAYS: dict[str, tuple[str, str]] = {
    "fp32": ("fp32", "fp32"),
    "bf16 base": ("fp32", "bf16"),
    "int8 base": ("fp32", "int8"),
    "nf4 base": ("fp32", "nf4"),
    "bf16": ("bf16", "bf16"),
    "bf16, int8 base": ("bf16", "int8"),
    "bf16, nf4 base": ("bf16", "nf4"),
}
COLUMNS = ("way", "base, MB", "weights", "loss, largest", "loss, mean", "dev", "minus fp32")


def trials(way: str, options: argparse.Namespace) -> list[Any]:
    """A trial for each seed."""
    from lorax.config import ModelConfig, OptimizerConfig, TaskConfig, TrainConfig, TrialConfig

    precision, base_dtype = WAYS[way]
    train = TrainConfig(
        max_steps=options.steps, precision=precision, base_dtype=base_dtype, log_every=1
    )
    found = []
    for seed in options.seeds:
        trial = TrialConfig(
            TaskConfig(options.task),
            ModelConfig(dropout=0.0),
            optimizer=OptimizerConfig(lr=options.lr),
            train=train,
            seed=seed,
            output_dir=str(options.out),
        )
        trial.sweep.name = f"{options.task}-{precision}-{base_dtype}"
        found.append(trial)
    return found


def measure(way: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train every seed; losses (seeds, steps), dev scores (seeds,), and the base."""
    from lorax.errors import LoraxError
    from lorax.runs.trial_id import trial_dir
    from lorax.sweep import run_packed

    chosen = trials(way, options)
    run_packed(chosen)
    losses, scores = [], []
    for trial in chosen:
        folder = trial_dir(trial)
        records = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        losses.append([r["loss"] for r in records if r["kind"] == "train"])
        result = json.loads((folder / "result.json").read_text())
        if result["status"] != "finished":
            raise LoraxError(f"{folder} is {result['status']}: {result['reason']}; lower --lr")
        scores.append(100 * result["last"]["metrics"][result["metric"]])
    return {"losses": np.array(losses), "scores": np.array(scores), **base_of(chosen[0])}


def base_of(trial: Any) -> dict[str, float]:
    """Bytes of the frozen base, and the relative error of its kernels."""
    import jax
    from flax import nnx

    from lorax.models import Quantized, dequantize, load_model
    from lorax.train.setup import prepare

    exact = nnx.to_pure_dict(nnx.state(load_model(trial.model, 2, key=jax.random.key(0))))
    stored = prepare(trial).frozen.params["base"]
    errors, sizes = 0.0, 0.0
    for layer, kept in zip(
        exact["encoder"]["layers"].values(), stored["encoder"]["layers"].values(), strict=True
    ):
        for path, kernel in kernels(layer):
            node: Any = kept
            for name in path:
                node = node[name]
            full = dequantize(node) if isinstance(node, Quantized) else node
            errors += float(np.sum((np.asarray(full, np.float32) - np.asarray(kernel)) ** 2))
            sizes += float(np.sum(np.asarray(kernel) ** 2))
    return {
        "bytes": sum(x.nbytes for x in jax.tree.leaves(stored)),
        "error": (errors / sizes) ** 0.5,
    }


def kernels(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Any]]:
    """The kernels in a nested dict, with their paths."""
    if not isinstance(tree, dict):
        return [(path, tree)] if path[-1] == "kernel" else []
    return [found for name, child in tree.items() for found in kernels(child, (*path, name))]


def row(way: str, found: dict[str, Any], exact: dict[str, Any]) -> list[str]:
    """A line of the table."""
    apart = np.abs(found["losses"] - exact["losses"]) / exact["losses"]
    scores, differences = found["scores"], found["scores"] - exact["scores"]
    error = differences.std(ddof=1) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return [
        way,
        f"{found['bytes'] / 1e6:.1f}",
        f"{found['error']:.2%}",
        f"{apart.max():.2%}",
        f"{apart.mean():.2%}",
        f"{scores.mean():.2f} ± {scores.std(ddof=min(1, len(scores) - 1)):.2f}",
        f"{differences.mean():+.2f} ± {error:.2f}",
    ]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="cola")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=lambda text: [int(x) for x in text.split(",")], default=[0])
    parser.add_argument("--out", type=Path, help="finished trials in it are not run again")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.out = options.out or Path(tempfile.mkdtemp(prefix="bench-precision-"))
    from lorax.errors import LoraxError
    from lorax.runtime.process import prepare_process

    prepare_process()
    for line in (COLUMNS, ["---"] * len(COLUMNS)):
        print("| " + " | ".join(line) + " |")
    exact = None
    try:
        for way in WAYS:
            found = measure(way, options)
            exact = exact or found
            print("| " + " | ".join(row(way, found, exact)) + " |", flush=True)
    except LoraxError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
