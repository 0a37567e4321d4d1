"""How many of the tokens that an epoch computes are real ones.

    python scripts/bench_tokens.py
    python scripts/bench_tokens.py --tasks cola,mrpc --batch-size 16 --model-source assets/minilm

For each task: lorax's packed rows, beside the same random batches padded to their longest example
(dynamic padding), padded to it after grouping by length (as the Hugging Face Trainer's
`group_by_length` does: megabatches of 50 batches, sorted), and padded to `--max-length`. Nothing is
trained.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import numpy as np

from lorax import data
from lorax.config import ModelConfig, TaskConfig, TrainConfig, TrialConfig
from lorax.errors import LoraxError
from lorax.train.dataset import load_dataset

MEGABATCH = 50
COLUMNS = (
    "task",
    "tokens an example",
    "row length",
    "rows, by share of steps",
    "packed",
    "grouped by length",
    "to the longest",
    "to the limit",
)


def row(trial: TrialConfig) -> list[str]:
    """A task's row of the table: shares of real tokens in an epoch, in percent."""
    dataset, size = load_dataset(trial), trial.train.batch_size
    lengths, layout = dataset.train.lengths, dataset.layout
    batches = data.train_batches(len(lengths), size, seed=0, epoch=0)
    rows = [layout.rows_for(len(data.fit(lengths[b], layout.row_length))) for b in batches]
    counts = {n: rows.count(n) / len(rows) for n in sorted(set(rows))}
    order = np.concatenate(batches)
    ways = {
        "packed": sum(rows) * layout.row_length,
        "grouped": padded(lengths, grouped(lengths, order, size)),
        "longest": padded(lengths, batches),
        "limit": len(lengths) * trial.task.max_length,
    }
    return [
        trial.task.name,
        f"{lengths.mean():.1f}",
        str(layout.row_length),
        ", ".join(f"{n}: {share:.0%}" for n, share in counts.items()),
        *(f"{lengths.sum() / tokens:.1%}" for tokens in ways.values()),
    ]


def padded(lengths: np.ndarray, batches: Sequence[np.ndarray]) -> int:
    """Tokens of batches that are padded to their longest."""
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def grouped(lengths: np.ndarray, order: np.ndarray, size: int) -> list[np.ndarray]:
    """Batches of like lengths, from megabatches of random examples."""
    step = size * MEGABATCH
    megabatches = [order[n : n + step] for n in range(0, len(order), step)]
    by_length = np.concatenate([m[np.argsort(-lengths[m], kind="stable")] for m in megabatches])
    return [by_length[n : n + size] for n in range(0, len(by_length), size)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="cola,mrpc,rte", help="of GLUE, or reviews")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--max-shapes", type=int, default=4)
    parser.add_argument("--model-source", default="assets/minilm", help="whose tokenizer")
    parser.add_argument("--data-dir", default=os.environ.get("LORAX_GLUE_DIR"))
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    try:
        for name in options.tasks.split(","):
            trial = TrialConfig(
                TaskConfig(name, options.data_dir, max_length=options.max_length),
                ModelConfig(source=options.model_source),
                train=TrainConfig(batch_size=options.batch_size, max_shapes=options.max_shapes),
            )
            lines.append(row(trial))
    except LoraxError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    for line in lines:
        print("| " + " | ".join(line) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
