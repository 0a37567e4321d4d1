"""A classifier's head in PEFT's format, and the heads that the format cannot represent.

`transformers` computes one kind of head: pooling `pooler`, through `dense`. PEFT stores its modules
whole. A head that pools by `mean` or `cls` is kept in a file of its own beside the adapter, which
PEFT does not read.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.interop.peft_names import PREFIX, is_within, module_of
from lorax.lora import LoraSpec, LoraTree, merge
from lorax.lora.paths import leaves_by_path
from lorax.models.checkpoints.reading import load_checkpoint
from lorax.models.checkpoints.tensor_names import hf_module, is_transposed
from lorax.models.families import family_of

HEAD_FILE = "lorax_head.safetensors"
_BESIDE = ("mean", "cls")
_TORCH = {"kernel": "weight", "bias": "bias"}
log = logging.getLogger(__name__)
Head = Mapping[str, Any]


def check_head(
    head: Head | Literal["drop"] | None, pooling: str | None, spec: LoraSpec, model_type: str
) -> tuple[Head | None, str | None]:
    """The head to write and its pooling; (None, None) without one.

    Raises:
      LoraxError: the spec says that a head was trained, but none is given; a pooling that is
        unknown, or contradicts the head; modules that `transformers` stores together, of which
        one is missing.
    """
    others = [name for name in spec.modules_to_save if name.partition(".")[0] != "head"]
    if others:
        raise LoraxError(
            f"spec.modules_to_save={others}: save_peft writes the head, and no other module that "
            "was trained in full; take them out of the spec to export the rest"
        )
    if isinstance(head, str):
        if head != "drop":
            raise LoraxError(f"head={head!r}: give the head's parameters, or 'drop'")
        return None, None
    if head is None:
        if spec.modules_to_save:
            raise LoraxError(
                "the spec says that the head was trained: give head=params['head'], or "
                "head='drop' to write the adapter without it"
            )
        return None, None
    if "out" not in head or set(head) - {"dense", "out"}:
        raise LoraxError(f"a head has out, and dense with pooling pooler, not {', '.join(head)}")
    pooling = pooling or ("pooler" if "dense" in head else None)
    if pooling not in (*_BESIDE, "pooler"):
        raise LoraxError(
            "a head of out alone may follow any pooling: give the model's, pooling='mean', "
            f"'cls' or 'pooler', not {pooling!r}"
        )
    if ("dense" in head) and pooling in _BESIDE:
        raise LoraxError(f"pooling={pooling!r} has no dense, which the head has")
    if pooling == "pooler":
        saved_modules(head, model_type)
    return head, pooling


def merge_head(lora: LoraTree, spec: LoraSpec, head: Head | None) -> tuple[LoraTree, Head | None]:
    """(the adapter without its targets in `head`, the head with these merged).

    PEFT stores a module whole or adapts it, never both.
    """
    own = {path: pair for path, pair in lora.items() if _is_in(head, path)}
    if not own or head is None:
        return lora, head
    rest = {path: pair for path, pair in lora.items() if path not in own}
    return rest, merge({"head": head}, own, spec)["head"]


def _is_in(head: Head | None, path: str) -> bool:
    first, _, rest = path.partition(".")
    return first == "head" and rest.partition(".")[0] in (head or ())


def saved_modules(head: Head, model_type: str) -> list[str]:
    """PEFT's names of the modules that hold a head's.

    Raises:
      LoraxError: one of them holds a module that `head` lacks.
    """
    family = family_of(model_type)
    names = {module: hf_module(f"head.{module}", model_type) for module in ("dense", "out")}
    saved = []
    for whole in family.head:
        parts = [module for module, name in names.items() if is_within(name, whole)]
        missing = [module for module in parts if module not in head]
        if missing and len(missing) < len(parts):
            raise LoraxError(
                f"{model_type}'s {whole!r} is {' and '.join(parts)}, and the head has no "
                f"{missing[0]}: give params['head'] of the whole model"
            )
        if not missing:
            saved.append(whole)
    return saved


def warn_of_fresh_dense(head: Head, model_type: str) -> None:
    """Warn if `head` takes its dense layer from a base that may not have one."""
    name = hf_module("head.dense", model_type)
    if "dense" not in head and not name.startswith(f"{family_of(model_type).prefix}."):
        log.warning(
            "the adapter has no %s, which a %s without a trained classifier draws at random: "
            "its logits are right on the base that it was trained on alone",
            name,
            model_type,
        )


def head_tensors(head: Head, model_type: str) -> dict[str, np.ndarray]:
    """The head's parameters by PEFT's names."""
    return {
        PREFIX + hf_module(path, model_type): _array(
            leaf.T if is_transposed(path, model_type) else leaf
        )
        for path, leaf in leaves_by_path({"head": head}).items()
    }


def write_beside(folder: Path, head: Head | None, pooling: str | None) -> None:
    """Write a head that PEFT's format cannot represent; without one, remove an existing file."""
    from safetensors.numpy import save_file

    (folder / HEAD_FILE).unlink(missing_ok=True)
    if head is None or pooling is None:
        return
    tensors = {
        f"{module}.{_TORCH[leaf]}": _array(value.T if leaf == "kernel" else value)
        for module, leaves in head.items()
        for leaf, value in leaves.items()
    }
    save_file(tensors, folder / HEAD_FILE, metadata={"format": "pt", "pooling": pooling})
    log.warning(
        "%s: PEFT has no place for a head that pools by %s: it loads the adapter on the bare "
        "encoder; the head is in %s, which load_peft(..., pooling=%r) reads",
        folder,
        pooling,
        HEAD_FILE,
        pooling,
    )


def read_beside(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], pooling: str | None
) -> dict[str, Any] | None:
    """The head that `write_beside` kept; None without one, or without a pooling to read it for.

    Args:
      folder: of the adapter.
      shapes: of the base's parameters by path.
      pooling: of the model that will take it.

    Raises:
      LoraxError: the head follows another pooling, or has other shapes.
    """
    from safetensors import safe_open

    path = folder / HEAD_FILE
    if not path.is_file():
        return None
    tensors = load_checkpoint(path)
    with safe_open(path, "numpy") as file:
        stored = (file.metadata() or {}).get("pooling")
    if pooling is None:
        log.warning(
            "left out of the adapter: the head in %s; give pooling=%r to read it", path, stored
        )
        return None
    if pooling != stored:
        raise LoraxError(f"{HEAD_FILE} is of a head that pools by {stored!r}, not {pooling!r}")
    own = {name: shape for name, shape in shapes.items() if name.startswith("head.")}
    head: dict[str, Any] = {}
    for name, shape in own.items():
        _, module, leaf = name.split(".")
        tensor = tensors.get(f"{module}.{_TORCH[leaf]}")
        if tensor is None or (tensor.T if leaf == "kernel" else tensor).shape != shape:
            found = "nothing" if tensor is None else f"{tensor.shape}"
            raise LoraxError(f"{HEAD_FILE} has {found} for {module_of(name)!r} of shape {shape}")
        value = jnp.asarray(tensor, jnp.float32)
        head.setdefault(module, {})[leaf] = value.T if leaf == "kernel" else value
    return head or None


def _array(leaf: Any) -> np.ndarray:
    return np.ascontiguousarray(leaf, np.float32)
