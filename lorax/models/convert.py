"""Hugging Face checkpoints to our parameter trees: names, layouts, and what may go wrong.

Paths are dotted, as in `encoder.layers.0.attention.query.kernel`. The table turns the path of one
of our modules into the name that `transformers` gives it, so adapters can be written with it too.
"""

import re
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from lorax.errors import LoraxError

_ENCODER = (
    (r"encoder\.embeddings\.(word|position|token_type)", r"{base}.embeddings.\1_embeddings"),
    (r"encoder\.embeddings\.norm", r"{base}.embeddings.LayerNorm"),
    (
        r"encoder\.layers\.(\d+)\.attention\.(query|key|value)",
        r"{base}.encoder.layer.\1.attention.self.\2",
    ),
    (r"encoder\.layers\.(\d+)\.attention\.out", r"{base}.encoder.layer.\1.attention.output.dense"),
    (
        r"encoder\.layers\.(\d+)\.attention\.norm",
        r"{base}.encoder.layer.\1.attention.output.LayerNorm",
    ),
    (r"encoder\.layers\.(\d+)\.mlp\.up", r"{base}.encoder.layer.\1.intermediate.dense"),
    (r"encoder\.layers\.(\d+)\.mlp\.down", r"{base}.encoder.layer.\1.output.dense"),
    (r"encoder\.layers\.(\d+)\.mlp\.norm", r"{base}.encoder.layer.\1.output.LayerNorm"),
)
TABLES = {
    "bert": (
        *_ENCODER,
        (r"head\.dense", r"{base}.pooler.dense"),
        (r"head\.out", r"classifier"),
    ),
    "roberta": (
        *_ENCODER,
        (r"head\.dense", r"classifier.dense"),
        (r"head\.out", r"classifier.out_proj"),
    ),
}
# Our leaf, theirs, and whether the matrix is stored transposed there.
_LEAVES = {
    "kernel": ("weight", True),
    "embedding": ("weight", False),
    "scale": ("weight", False),
    "bias": ("bias", False),
}
# Spellings of one name: the base model's prefix, and the norms of TensorFlow's time.
_SPELLINGS = (
    (r"^(bert|roberta)\.", ""),
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
# Weights that a checkpoint may hold and a sequence classifier can do without.
_UNNEEDED = re.compile(
    r"(cls|lm_head|pooler|classifier|qa_outputs)\..+|(.+\.)?position_ids|embeddings\.token_type_ids"
)
_SHOWN_FAULTS = 5


class Shaped(Protocol):
    """Whatever has a shape: an array or a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""


def hf_module(path: str, model_type: str) -> str:
    """Hugging Face's name of a module, or of a parameter, of ours.

    Args:
      path: dotted path of a module (`encoder.layers.0.mlp.up`) or of its parameter (`....kernel`).
      model_type: a key of `TABLES`.

    Returns:
      The name within `BertForSequenceClassification` or its RoBERTa twin.

    Raises:
      LoraxError: no rule of the table matches.

    >>> hf_module("encoder.layers.0.attention.query", "bert")
    'bert.encoder.layer.0.attention.self.query'
    >>> hf_module("head.out.kernel", "roberta")
    'classifier.out_proj.weight'
    """
    module, _, leaf = path.rpartition(".")
    if leaf not in _LEAVES:
        module, leaf = path, ""
    for pattern, template in TABLES[model_type]:
        if match := re.fullmatch(pattern, module):
            name = match.expand(template).format(base=model_type)
            return f"{name}.{_LEAVES[leaf][0]}" if leaf else name
    raise LoraxError(f"{path}: no Hugging Face name in the table of {model_type}")


def is_transposed(path: str) -> bool:
    """Whether Hugging Face stores this parameter of ours transposed, as it does every kernel."""
    return _LEAVES[path.rpartition(".")[2]][1]


def _strip(name: str) -> str:
    for pattern, replacement in _SPELLINGS:
        name = re.sub(pattern, replacement, name)
    return name


def convert(
    tensors: Mapping[str, np.ndarray],
    wanted: Mapping[str, Shaped],
    model_type: str,
    *,
    load_head: bool,
) -> dict[str, np.ndarray]:
    """Picks our parameters out of a checkpoint.

    Args:
      tensors: the checkpoint; names with or without the prefix `bert.` or `roberta.`.
      wanted: dotted path to the shape that our model expects, the head's included.
      model_type: a key of `TABLES`.
      load_head: take the head's modules too where the checkpoint has them. An output layer for
        another number of outputs is left out, as is what the checkpoint does not have.

    Returns:
      Dotted path to array, in our layout: every `encoder.` parameter, and the head's that exist.

    Raises:
      LoraxError: every missing, mis-shaped and unexpected weight, in one line.
    """
    rest = {_strip(name): tensor for name, tensor in tensors.items()}
    found: dict[str, np.ndarray] = {}
    faults: list[str] = []
    absent = _absent_head_modules(wanted, rest, model_type) if load_head else ("head.",)
    for path, want in wanted.items():
        if path.startswith(absent):
            continue
        name = _strip(hf_module(path, model_type))
        if name not in rest:
            faults.append(f"missing {name}")
            continue
        tensor = rest.pop(name)
        array = tensor.T if is_transposed(path) else tensor
        if array.shape == tuple(want.shape):
            found[path] = array
        else:
            expected = tuple(want.shape)[::-1] if is_transposed(path) else tuple(want.shape)
            faults.append(f"{name} has shape {tensor.shape}, expected {expected}")
    faults += [f"unexpected {name}" for name in sorted(rest) if not _UNNEEDED.fullmatch(name)]
    if faults:
        raise LoraxError(f"checkpoint does not fit {model_type}: {_summary(faults)}")
    return found


def _summary(faults: list[str]) -> str:
    more = len(faults) - _SHOWN_FAULTS
    return "; ".join(faults[:_SHOWN_FAULTS] + [f"and {more} more"] * (more > 0))


def _absent_head_modules(
    wanted: Mapping[str, Shaped], tensors: Mapping[str, np.ndarray], model_type: str
) -> tuple[str, ...]:
    """Prefixes of the head's modules that start fresh.

    These have no tensor at all in the checkpoint, or are an output layer of another width.
    """
    absent = []
    for module in sorted({path.rpartition(".")[0] for path in wanted if path.startswith("head.")}):
        name = _strip(hf_module(module, model_type))
        bias = tensors.get(f"{name}.bias")
        no_tensor = bias is None and f"{name}.weight" not in tensors
        resized = bias is not None and bias.shape != tuple(wanted[f"{module}.bias"].shape)
        if no_tensor or (resized and module == "head.out"):
            absent.append(f"{module}.")
    return tuple(absent)
