"""Tasks, tokens and batches: from files to NumPy arrays.

Imports run one way. `examples`, `documents` (splits as text) and `files` import none of the rest;
`tokens` imports them. `tasks`, whose readers look up special tokens, and `batches` import `tokens`.
"""

from lorax.data.batches.batching import eval_plan, pad, train_batches
from lorax.data.batches.packing import Layout, choose_layout, collate, collate_alike, fit, place
from lorax.data.batches.shuffle import permutation, subsample
from lorax.data.documents import Documents
from lorax.data.examples import Examples
from lorax.data.tasks import TASKS, get_task
from lorax.data.tasks.assets import find_asset
from lorax.data.tasks.chat import ChatTemplate, load_chat_template
from lorax.data.tasks.e2e import references_by_mr
from lorax.data.tasks.load import content_of, load_documents, load_split
from lorax.data.tasks.task import Task
from lorax.data.tokens.special_tokens import find_eos_id, special_tokens
from lorax.data.tokens.token_cache import encode_cached, encode_documents_cached, token_dir
from lorax.data.tokens.tokenize import Encoded, encode, largest_id, load_tokenizer
from lorax.data.tokens.tokenize_documents import encode_documents

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
    "place",
    "references_by_mr",
    "special_tokens",
    "subsample",
    "token_dir",
    "train_batches",
]
