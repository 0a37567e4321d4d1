"""The tensors of a PEFT adapter, taken one by one; nothing is passed over in silence."""

import logging
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lorax.errors import refuse
from lorax.interop.peft_fused import cut
from lorax.interop.peft_names import PREFIX, WORDS, fused_part, module_of, name_of, parts_of
from lorax.interop.peft_selection import rank_of, selects
from lorax.lora import LoraTree
from lorax.models.convert import is_transposed
from lorax.models.families import family_of

WEIGHTS = "adapter_model.safetensors"
log = logging.getLogger(__name__)


class Reader:
    """Takes the tensors of a file one by one; what is left over is unexpected.

    Attributes:
      kernels: path of each kernel of the base to PEFT's name of its module.
      faults: what was missing or misshaped.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray],
        shapes: Mapping[str, tuple[int, ...]],
        model_type: str,
    ):
        self.config, self.shapes, self.model_type = config, shapes, model_type
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
        """Every part of a fused module has to be there: its share would be lost."""
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
        return head or None

    def leave_out(self) -> None:
        """Pass over what ours has no place for, with a warning.

        That is a foreign head, and the base's own embeddings, which PEFT stores beside an adapter
        of the embeddings or the output layer.
        """
        heads = {"pooler", "classifier", *self.family.head}
        modules = heads - set(self.family.head) if self.has_pooler else heads
        prefixes = ("", f"{self.family.prefix}.")
        start = tuple(f"{PREFIX}{p}{m}." for p in prefixes for m in modules)
        foreign = [name for name in self._rest() if start and name.startswith(start)]
        if foreign:
            named = ", ".join(name.removeprefix(PREFIX) for name in foreign)
            log.warning("left out of the adapter, as the model's head has no such part: %s", named)
        own = [name for name in self._rest() if self._is_base_weight(name)]
        if own:
            log.warning("left out of the adapter, as the base's are taken: %s", ", ".join(own))
        self.used.update(foreign, own)

    def _is_base_weight(self, name: str) -> bool:
        if not self.family.is_decoder or self.config.get("modules_to_save"):
            return False
        modules = [self.kernels.get(path, "lm_head") for path in (WORDS, "lm_head.kernel")]
        names = {f"{PREFIX}{m}.{leaf}" for m in modules for leaf in ("weight", "base_layer.weight")}
        return name in names and self.tensors[name].shape == self.shapes[WORDS]

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


def _is_spared(path: str) -> bool:
    """Whether `all-linear` of PEFT leaves it out: embeddings and the output layer."""
    return path.endswith(".embedding") or path.startswith(("head.out.", "lm_head."))
