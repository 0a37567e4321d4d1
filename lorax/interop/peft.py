"""Adapters in the format of Hugging Face PEFT: `adapter_config.json` and its safetensors.

    save_peft(folder, lora, spec, "bert", "google-bert/bert-base-uncased")
    lora, spec, head = load_peft(folder, base_params, "roberta")

What is written loads with `PeftModel.from_pretrained` onto the `transformers` model: a decoder's
onto `LlamaForCausalLM` and the like; an encoder's with a head that pools by `pooler` onto
`BertForSequenceClassification` (or RoBERTa's), any other onto `BertModel`.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lorax.errors import LoraxError, refuse
from lorax.interop.peft_config import check_config, read_spec, write_config
from lorax.interop.peft_head import (
    HEAD_FILE,
    Head,
    check_head,
    head_tensors,
    merge_head,
    read_beside,
    saved_modules,
    warn_of_fresh_dense,
    write_beside,
)
from lorax.interop.peft_modules import as_module, by_name
from lorax.interop.peft_names import (
    PREFIX,
    WORDS,
    check_family,
    is_conv1d,
    kinds,
    module_of,
    parts_of,
)
from lorax.interop.peft_reader import WEIGHTS, Reader, check_wrappers
from lorax.lora import LoraSpec, LoraTree
from lorax.lora.paths import leaves_by_path
from lorax.models.checkpoints.reading import load_checkpoint
from lorax.models.checkpoints.source import is_repository_id, local_folder, read_json
from lorax.models.families import family_of
from lorax.models.layers.quantization import Quantized

CONFIG = "adapter_config.json"
log = logging.getLogger(__name__)
_NO_ADAPTER = (
    "there is no adapter of the base to write, and PEFT's format needs one: train with "
    "train.mode=lora and targets outside the head"
)


class PeftAdapter(NamedTuple):
    """An adapter read from PEFT's format.

    Attributes:
      lora: as `lorax.init` makes it.
      spec: its spec.
      head: the modules of the head that it holds, as in `params["head"]`; None without any.
    """

    lora: LoraTree
    spec: LoraSpec
    head: dict[str, Any] | None


def save_peft(
    folder: str | Path,
    lora: LoraTree,
    spec: LoraSpec | None,
    model_type: str,
    base_source: str,
    *,
    head: Head | Literal["drop"] | None = None,
    pooling: str | None = None,
    revision: str | None = None,
    is_tied: bool = True,
) -> None:
    """Write a lorax adapter in PEFT's format.

    GPT-2's queries, keys and values are one module in PEFT, whose adapter has the sum of their
    ranks; unequal scales are multiplied into B. An adapter of a module of `head` is merged into it.

    Args:
      folder: created if missing.
      lora: at its true ranks (`lorax.unpad` takes padding off).
      spec: its spec; the None of a trial without an adapter is refused.
      model_type: a family, as in the base's `config.json`.
      base_source: the base that PEFT loads: a repository id of the hub, or a folder, which is
        written as an absolute path with a warning.
      head: the trained head, as in `params["head"]`; `"drop"` leaves a trained one out. With
        pooling `pooler` it is written as PEFT does. With any other pooling, which `transformers`
        does not compute, it goes into `lorax_head.safetensors` beside the adapter, with a warning.
      pooling: of the model; needed for a head without `dense`.
      revision: of the base on the hub.
      is_tied: whether a decoder's output layer is its embeddings; PEFT's format then cannot
        represent their adapter.

    Raises:
      LoraxError: PEFT's format cannot represent the adapter, a trained head is not given, the
        base is neither a folder nor a repository id, or the folder cannot be written.
    """
    check_family(model_type)
    is_decoder = family_of(model_type).is_decoder
    if is_decoder and is_tied and WORDS in lora:
        raise LoraxError(
            f"{WORDS!r} is the output layer, too, and PEFT adapts the embeddings alone: leave it "
            "out, or say is_tied=False if the model has an output layer of its own"
        )
    if is_decoder and isinstance(head, Mapping):
        raise LoraxError(f"{model_type} is a language model: it has no head")
    if spec is None:
        raise LoraxError(_NO_ADAPTER)
    if head == "drop":
        lora = {path: pair for path, pair in lora.items() if not path.startswith("head.")}
    whole, pooling = check_head(head, pooling, spec, model_type)
    lora, whole = merge_head(lora, spec, whole)
    if not lora:
        raise LoraxError(_NO_ADAPTER)
    beside = whole if pooling != "pooler" else None
    stored = whole if pooling == "pooler" else None
    if stored is not None:
        warn_of_fresh_dense(stored, model_type)
    bare = stored is None and not is_decoder
    modules, tensors = {}, {}
    for name, paths in by_name(lora, model_type, bare=bare).items():
        pair, modules[name] = as_module(paths, lora, spec, model_type, bare=bare)
        for part, suffix in parts_of(paths[0]).items():
            tensors[f"{PREFIX}{name}.{suffix}"] = np.ascontiguousarray(pair[part], np.float32)
    tensors |= head_tensors(stored, model_type) if stored is not None else {}
    linear = [path for path in lora if path.endswith(".kernel")]
    bare_type = "CAUSAL_LM" if is_decoder else "FEATURE_EXTRACTION"
    config = write_config(
        spec,
        modules,
        task_type=bare_type if stored is None else "SEQ_CLS",
        base_source=_base_name(base_source),
        revision=revision,
        modules_to_save=None if stored is None else saved_modules(stored, model_type),
        kinds=kinds(model_type),
        # As in PEFT, which sets the option by the last layer that it visits.
        fan_in_fan_out=bool(linear) and all(is_conv1d(path, model_type) for path in linear),
    )
    _write(Path(folder), config, tensors, beside, pooling)


def _base_name(source: str) -> str:
    """The base's name in a form that PEFT resolves from any working directory."""
    folder = local_folder(source)
    if folder is not None:
        log.warning(
            "base_model_name_or_path is a folder of this machine, %s: for PEFT on another one, "
            "give the base's repository id of the hub as base_source",
            folder.resolve(),
        )
        return str(folder.resolve())
    if not is_repository_id(source):
        raise LoraxError(
            f"base_source={source!r} is no folder, and no repository id of the hub, such as "
            "google-bert/bert-base-uncased"
        )
    return source


def load_peft(
    folder: str | Path, base: Any, model_type: str, *, pooling: str | None = None
) -> PeftAdapter:
    """Read an adapter in PEFT's format.

    GPT-2's `c_attn` is read as adapters of queries, keys and values with the same A. Weights of
    the base that the file stores, such as embeddings, must equal the base's.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      base: the parameters of our model (`nnx.to_pure_dict(nnx.state(model))`), or their shapes
        where the file stores no weights of the base.
        A classifier or pooler in the file is read if its head pools by `pooler`, and left out
        with a warning otherwise: it was trained on other features than the head's.
      model_type: as in `save_peft`.
      pooling: of the model's head; needed to read a head that `save_peft` wrote beside the
        adapter.

    Raises:
      LoraxError: an option that is not served; tensors that are missing, unexpected or
        misshaped for this base, all of them in one line; weights of another base.
    """
    check_family(model_type)
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    refuse(str(folder / CONFIG), check_config(config, model_type))
    tensors = load_checkpoint(_weights(folder))
    leaves = _leaves(base)
    try:
        check_wrappers(tensors)
        reader = Reader(config, tensors, leaves, model_type)
        reader.compare_with_base()
        lora, head = reader.lora(), reader.head()
        reader.leave_out()
        reader.check()
        head = head or read_beside(folder, reader.shapes, pooling)
        spec = read_spec(
            config,
            {path: reader.kernels[path] for path in lora},
            map(module_of, reader.kernels),
            ("head",) if head else (),
        )
    except LoraxError as fault:
        raise LoraxError(f"{folder}: {fault}") from None
    except (re.error, TypeError, AttributeError) as fault:
        raise LoraxError(f"{folder / CONFIG}: a value of the wrong form ({fault})") from fault
    return PeftAdapter(lora, spec, head)


def _leaves(base: Any) -> dict[str, Any]:
    """Every parameter by path; for a quantized kernel, the shape that it represents."""

    def plain(leaf: Any) -> Any:
        is_quantized = isinstance(leaf, Quantized)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if is_quantized else leaf

    plain_base = jax.tree.map(plain, base, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return leaves_by_path(plain_base)


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    if (pickle := folder / "adapter_model.bin").is_file():
        return pickle  # refused, with the reason, by load_checkpoint
    raise LoraxError(f"{folder} has no {WEIGHTS}")


def _write(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, np.ndarray],
    beside: Head | None,
    pooling: str | None,
) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        write_beside(folder, beside, pooling)
        for file in (folder / WEIGHTS, folder / HEAD_FILE):
            if file.is_file():  # safetensors' files are the owner's alone
                shutil.copymode(folder / CONFIG, file)
    except (OSError, SafetensorError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise LoraxError(f"cannot write {folder}: {reason}") from fault
