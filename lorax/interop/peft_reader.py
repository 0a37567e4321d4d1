"""Reads the tensors of a PEFT adapter one by one; no tensor is silently ignored."""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError, refuse
from lorax.interop.peft_fused import cut
from lorax.interop.peft_head import warn_of_fresh_dense
from lorax.interop.peft_names import PREFIX, WORDS, fused_part, module_of, name_of, parts_of
from lorax.interop.peft_selection import rank_of, selects
from lorax.lora import LoraTree
from lorax.models.checkpoints.tensor_names import is_transposed
from lorax.models.families import family_of

WEIGHTS = "adapter_model.safetensors"
# Where PEFT keeps the weights of a module that it has replaced.
_WITHIN = re.compile(r"\.(base_layer|modules_to_save|original_module)\.")
_WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
    "_checkpoint_wrapped_module": "PyTorch's checkpoint_wrapper",
}
log = logging.getLogger(__name__)


class Reader:
    """Takes the tensors of a file one by one; remaining tensors are unexpected.

    Attributes:
      shapes: of each parameter of the base by path.
      kernels: path of each kernel of the base to PEFT's name of its module.
      faults: what was missing or misshaped.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        base: Mapping[str, Any],
        model_type: str,
    ):
        self.config, self.base, self.model_type = config, base, model_type
        self.shapes = shapes = {path: tuple(leaf.shape) for path, leaf in base.items()}
        self.tensors, self.used = dict(tensors), set[str]()
        self.faults: list[str] = []
        self.family = family_of(model_type)
        self.bare = not any(n.startswith(f"{PREFIX}{self.family.prefix}.") for n in tensors)
        self.has_pooler = "head.dense.kernel" in shapes
        self.kernels = {
            path: name_of(module_of(path), model_type, bare=self.bare)
            for path, shape in shapes.items()
            if len(shape) == 2 and (self.has_pooler or not path.startswith("head."))
        }

    def lora(self) -> LoraTree:
        """The pairs of every module that the config selects."""
        chosen = {
            path: name
            for path, name in self.kernels.items()
            if selects(self.config, name, is_spared=_is_spared(path))
        }
        if not chosen:
            self.faults.append(f"target_modules={self.config['target_modules']!r} match nothing")
        if WORDS in chosen and "lm_head.kernel" not in self.shapes:
            self.faults.append(
                f"{chosen[WORDS]} is adapted as embeddings alone; here they are the output layer, "
                "too"
            )
        self._check_fused(chosen)
        return {path: self._pair(path, name) for path, name in chosen.items()}

    def _check_fused(self, chosen: Mapping[str, str]) -> None:
        """Record a fault for a fused module with a missing part, whose share would be lost."""
        counts = Counter(chosen.values())
        for path, name in chosen.items():
            _, of = fused_part(path, self.model_type) or (0, 1)
            if counts[name] < of:
                self.faults.append(
                    f"{name} is {of} kernels here, but the base has {counts[name]} of them"
                )

    def _pair(self, path: str, name: str) -> dict[str, Any]:
        d_in, d_out = self.shapes[path]
        rank, parts, part = rank_of(self.config, name), parts_of(path), None
        if (fused := fused_part(path, self.model_type)) is not None:
            part, of = fused
            d_out *= of
        a = self._take(f"{name}.{parts['a']}", (rank, d_in))
        b = self._take(f"{name}.{parts['b']}", (d_out, rank))
        if part is not None and not self.faults:
            a, b = cut((a, b), part, of)
        return {"a": a, "b": b}

    def head(self) -> dict[str, Any] | None:
        """The modules of the head that the file holds."""
        head: dict[str, Any] = {}
        places = [path for path in self.shapes if path.startswith("head.") and self.has_pooler]
        for path in places:
            name = name_of(path, self.model_type, bare=self.bare)
            if PREFIX + name in self.tensors:
                _, module, leaf = path.split(".")
                shape, turn = self.shapes[path], is_transposed(path, self.model_type)
                stored = self._take(name, shape[::-1] if turn else shape)
                head.setdefault(module, {})[leaf] = stored.T if turn else stored
        if "out" in head:
            warn_of_fresh_dense(head, self.model_type)
        return head or None

    def leave_out(self) -> None:
        """Skip, with a warning, the parts of a head that the model does not have."""
        heads = {"pooler", "classifier", *self.family.head}
        modules = heads - set(self.family.head) if self.has_pooler else heads
        prefixes = ("", f"{self.family.prefix}.")
        start = tuple(f"{PREFIX}{p}{m}." for p in prefixes for m in modules)
        foreign = [name for name in self._rest() if start and name.startswith(start)]
        if foreign:
            named = ", ".join(name.removeprefix(PREFIX) for name in foreign)
            log.warning("left out of the adapter, as the model's head has no such part: %s", named)
        self.used.update(foreign)

    def compare_with_base(self) -> None:
        """Skip weights of the base that the file stores, if they equal the base's.

        PEFT stores embeddings and output layers beside an adapter: adapted ones, resized ones,
        and those that were trained in full (`modules_to_save`).

        Raises:
          LoraxError: they differ, or the base is given by shapes alone.
        """
        parts: dict[str, list[str]] = {}
        for path in self.shapes:
            if not path.startswith("head."):
                name = name_of(path, self.model_type, bare=self.bare)
                parts.setdefault(name, []).append(path)  # in order: queries, keys, values
        if self.family.is_decoder:
            parts.setdefault("lm_head.weight", [WORDS])  # tied
        differ = []
        for name, tensor in self.tensors.items():
            own = parts.get(_WITHIN.sub(".", name.removeprefix(PREFIX)))
            if own is None:
                continue
            self.used.add(name)
            turned = is_transposed(own[0], self.model_type)
            if not _equals(tensor, [self.base[path] for path in own], turned):
                differ.append(f"{name} {tensor.shape}")
        refuse(
            "the adapter stores weights that are not those of this base; PeftModel.from_pretrained("
            "<base>, <adapter>).unload().save_pretrained(<folder>) writes the base that it was "
            "trained with, on which it loads",
            differ,
        )

    def check(self) -> None:
        """Refuse a file with any fault, or with tensors left over."""
        faults = [*dict.fromkeys(self.faults), *(f"unexpected {name}" for name in self._rest())]
        refuse(f"{WEIGHTS} does not fit this {self.model_type}", faults)

    def _rest(self) -> list[str]:
        return sorted(self.tensors.keys() - self.used)

    def _take(self, name: str, shape: tuple[int, ...]) -> Any:
        tensor = self.tensors.get(PREFIX + name)
        self.used.add(PREFIX + name)
        if tensor is None:
            self.faults.append(f"missing {PREFIX}{name}")
            return None
        if tensor.shape != shape:
            self.faults.append(f"{PREFIX}{name} has shape {tensor.shape}, expected {shape}")
        return jnp.asarray(tensor, jnp.float32)


def check_wrappers(names: Iterable[str]) -> None:
    """Refuse tensor names with the prefix of a wrapper around the model."""
    for name in names:
        if found := next((part for part in name.split(".") if part in _WRAPPERS), None):
            raise LoraxError(
                f"{name}: {found!r} is the prefix of {_WRAPPERS[found]}: save the model inside "
                f"it (model.{found}), or take the prefix out of the tensors' names"
            )


def _equals(tensor: np.ndarray, parts: list[Any], is_turned: bool) -> bool:
    """Whether a stored tensor is the base's, in the coarser precision of the two."""
    if any(isinstance(part, jax.ShapeDtypeStruct) for part in parts):
        raise LoraxError(
            "the adapter stores weights of the base, which have to be compared: give load_peft "
            "the base's parameters, neither their shapes nor kernels in few bits"
        )
    whole = np.concatenate([np.asarray(part) for part in parts], axis=-1)
    whole = whole.T if is_turned else whole
    if tensor.shape != whole.shape or not jnp.issubdtype(tensor.dtype, jnp.floating):
        return False
    coarse = min((tensor.dtype, whole.dtype), key=lambda dtype: jnp.finfo(dtype).nmant)
    return np.array_equal(tensor.astype(coarse), whole.astype(coarse))


def _is_spared(path: str) -> bool:
    """Whether PEFT's `all-linear` excludes it: embeddings and the output layer."""
    return path.endswith(".embedding") or path.startswith(("head.out.", "lm_head."))
