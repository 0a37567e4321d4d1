"""Tasks, tokens and batches: from files to NumPy arrays."""

from lorax.data.assets import find_asset
from lorax.data.batching import eval_plan, pad, train_batches
from lorax.data.chat import ChatTemplate, load_chat_template
from lorax.data.documents import Documents, encode_documents
from lorax.data.e2e import references_by_mr
from lorax.data.examples import Examples
from lorax.data.load import content_of, load_documents, load_split
from lorax.data.packing import Layout, choose_layout, collate, collate_alike, fit
from lorax.data.shuffle import permutation, subsample
from lorax.data.special_tokens import find_eos_id, special_tokens
from lorax.data.tasks import TASKS, Task, get_task
from lorax.data.token_cache import encode_cached, encode_documents_cached, token_dir
from lorax.data.tokenize import Encoded, encode, largest_id, load_tokenizer

__all__ = [
    "TASKS",
    "ChatTemplate",
    "Documents",
    "Encoded",
    "Examples",
    "Layout",
    "Task",
    "choose_layout",
    "collate",
    "collate_alike",
    "content_of",
    "encode",
    "encode_cached",
    "encode_documents",
    "encode_documents_cached",
    "eval_plan",
    "find_asset",
    "find_eos_id",
    "fit",
    "get_task",
    "largest_id",
    "load_chat_template",
    "load_documents",
    "load_split",
    "load_tokenizer",
    "pad",
    "permutation",
    "references_by_mr",
    "special_tokens",
    "subsample",
    "token_dir",
    "train_batches",
]
