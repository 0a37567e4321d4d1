"""Tasks, tokens and batches: from files to padded NumPy arrays."""

from lorax.data.assets import find_asset
from lorax.data.batching import bucket_lengths, collate, eval_batches, train_batches
from lorax.data.examples import Examples
from lorax.data.load import load_split
from lorax.data.shuffle import permutation, subsample
from lorax.data.tasks import TASKS, Task, get_task
from lorax.data.tokenize import Encoded, encode, load_tokenizer

__all__ = [
    "TASKS",
    "Encoded",
    "Examples",
    "Task",
    "bucket_lengths",
    "collate",
    "encode",
    "eval_batches",
    "find_asset",
    "get_task",
    "load_split",
    "load_tokenizer",
    "permutation",
    "subsample",
    "train_batches",
]
