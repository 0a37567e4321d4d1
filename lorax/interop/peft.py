"""Adapters in the format of Hugging Face PEFT: `adapter_config.json` and its safetensors.

    save_peft(folder, lora, spec, "bert", "google-bert/bert-base-uncased")
    lora, spec, head = load_peft(folder, base_params, "roberta")

What is written loads with `PeftModel.from_pretrained` onto the `transformers` model: a decoder's
onto `LlamaForCausalLM` and the like; an encoder's with a head onto
`BertForSequenceClassification` (or RoBERTa's), without one onto `BertModel`.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lorax.errors import LoraxError, refuse
from lorax.interop.peft_config import check_config, read_spec, write_config
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
from lorax.interop.peft_reader import WEIGHTS, Reader
from lorax.lora import LoraSpec, LoraTree
from lorax.lora.paths import leaves_by_path
from lorax.models.convert import hf_module, is_transposed
from lorax.models.families import family_of
from lorax.models.hub import load_checkpoint, read_json
from lorax.models.quantization import Quantized

CONFIG = "adapter_config.json"


class PeftAdapter(NamedTuple):
    """An adapter read from PEFT's format.

    Attributes:
      lora: as `lorax.init` makes it.
      spec: what it adapts.
      head: the modules of the head that it holds, as in `params["head"]`; None without any.
    """

    lora: LoraTree
    spec: LoraSpec
    head: dict[str, Any] | None


def save_peft(
    folder: str | Path,
    lora: LoraTree,
    spec: LoraSpec,
    model_type: str,
    base_source: str,
    *,
    head: Mapping[str, Any] | None = None,
    is_tied: bool = True,
) -> None:
    """Write an adapter of ours as one of PEFT.

    GPT-2's queries, keys and values are one module there, whose adapter takes the sum of their
    ranks; unequal scales are multiplied into B.

    Args:
      folder: made when missing.
      lora: at its true ranks (`lorax.unpad` takes padding off).
      spec: its spec.
      model_type: a family, as in the base's `config.json`.
      base_source: what PEFT should load as the base: a folder or a repository id.
      head: a trained head with `dense` and `out` (pooling `pooler`), the only one that
        `transformers` has. With any other, leave it out: the adapter is then the encoder's.
      is_tied: whether a decoder's output layer is its embeddings, whose adapter PEFT's format
        then has no place for.

    Raises:
      LoraxError: something that PEFT's format cannot say, or a folder that cannot be written.
    """
    check_family(model_type)
    is_decoder = family_of(model_type).is_decoder
    if is_decoder and is_tied and WORDS in lora:
        raise LoraxError(
            f"{WORDS!r} is the output layer, too, and PEFT adapts the embeddings alone: leave it "
            "out, or say is_tied=False if the model has an output layer of its own"
        )
    modules, tensors = {}, {}
    for name, paths in by_name(lora, model_type, bare=head is None and not is_decoder).items():
        pair, modules[name] = as_module(paths, lora, spec, model_type)
        for part, suffix in parts_of(paths[0]).items():
            tensors[f"{PREFIX}{name}.{suffix}"] = _array(pair[part])
    tensors |= _head_tensors(head, model_type) if head is not None else {}
    linear = [path for path in lora if path.endswith(".kernel")]
    bare_type = "CAUSAL_LM" if is_decoder else "FEATURE_EXTRACTION"
    config = write_config(
        spec,
        modules,
        task_type=bare_type if head is None else "SEQ_CLS",
        base_source=base_source,
        modules_to_save=None if head is None else list(family_of(model_type).head),
        kinds=kinds(model_type),
        # As PEFT leaves it: it sets the option by the last layer that it meets.
        fan_in_fan_out=bool(linear) and all(is_conv1d(path, model_type) for path in linear),
    )
    _write(Path(folder), config, tensors)


def load_peft(folder: str | Path, base: Any, model_type: str) -> PeftAdapter:
    """Read an adapter of PEFT.

    GPT-2's `c_attn` is read as adapters of queries, keys and values with the same A each.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      base: the parameters of our model, or their shapes (`nnx.to_pure_dict(nnx.state(model))`).
        A classifier or pooler in the file is read if its head pools by `pooler`, and left out
        with a warning otherwise: it was trained on other features than the head's.
      model_type: as in `save_peft`.

    Raises:
      LoraxError: an option that is not served, or tensors that are missing, unexpected or
        misshaped for this base; all of them in one line.
    """
    check_family(model_type)
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    refuse(str(folder / CONFIG), check_config(config, model_type))
    tensors = load_checkpoint(_weights(folder))
    shapes = _shapes(base)
    try:
        reader = Reader(config, tensors, shapes, model_type)
        lora, head = reader.lora(), reader.head()
        reader.leave_out()
        reader.check()
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


def _shapes(base: Any) -> dict[str, tuple[int, ...]]:
    """Of every parameter by path; a kernel in few bits has that of the one it stands for."""

    def shaped(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)

    plain = jax.tree.map(shaped, base, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    return {path: leaf.shape for path, leaf in leaves_by_path(plain).items()}


def _head_tensors(head: Mapping[str, Any], model_type: str) -> dict[str, np.ndarray]:
    if set(head) != {"dense", "out"}:
        raise LoraxError(
            f"a head of {', '.join(head)} has no equivalent in transformers, which pools by "
            "`dense`: export the adapter alone, without head="
        )
    tensors = {}
    for path, leaf in leaves_by_path({"head": head}).items():
        tensors[PREFIX + hf_module(path, model_type)] = _array(
            leaf.T if is_transposed(path, model_type) else leaf
        )
    return tensors


def _array(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(leaf, np.float32)


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if path.is_file():
        return path
    if (pickle := folder / "adapter_model.bin").is_file():
        return pickle  # refused, with the reason, by load_checkpoint
    raise LoraxError(f"{folder} has no {WEIGHTS}")


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors' is the owner's alone
    except (OSError, SafetensorError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise LoraxError(f"cannot write {folder}: {reason}") from fault
