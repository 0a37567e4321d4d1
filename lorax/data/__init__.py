"""Tasks, tokens and batches: from files to NumPy arrays."""

from lorax.data.assets import find_asset
from lorax.data.batching import eval_plan, pad, train_batches
from lorax.data.examples import Examples
from lorax.data.load import load_split
from lorax.data.packing import Layout, choose_layout, collate, collate_alike, fit
from lorax.data.shuffle import permutation, subsample
from lorax.data.tasks import TASKS, Task, get_task
from lorax.data.token_cache import encode_cached, token_dir
from lorax.data.tokenize import Encoded, encode, load_tokenizer

__all__ = [
    "TASKS",
    "Encoded",
    "Examples",
    "Layout",
    "Task",
    "choose_layout",
    "collate",
    "collate_alike",
    "encode",
    "encode_cached",
    "eval_plan",
    "find_asset",
    "fit",
    "get_task",
    "load_split",
    "load_tokenizer",
    "pad",
    "permutation",
    "subsample",
    "token_dir",
    "train_batches",
]
