"""Adapters in the format of Hugging Face PEFT: `adapter_config.json` and its safetensors.

    save_peft(folder, lora, spec, "bert", "google-bert/bert-base-uncased")
    lora, spec, head = load_peft(folder, base_params, "roberta")

What is written loads with `PeftModel.from_pretrained` onto the `transformers` model: with a head
onto `BertForSequenceClassification` (or RoBERTa's), without one onto `BertModel`.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lorax.errors import LoraxError
from lorax.interop.peft_config import check_config, rank_of, read_spec, selects, write_config
from lorax.lora import LoraSpec, LoraTree
from lorax.lora.paths import leaves_by_path
from lorax.models.convert import hf_module, is_transposed
from lorax.models.families import ENCODERS, family_of
from lorax.models.hub import load_checkpoint, read_json

log = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PARTS = {"a": "lora_A.weight", "b": "lora_B.weight"}
_EMBEDDING_PARTS = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
_SHOWN_FAULTS = 5


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
) -> None:
    """Write an adapter of ours as one of PEFT.

    Args:
      folder: made when missing.
      lora: at its true ranks (`lorax.unpad` takes padding off).
      spec: its spec.
      model_type: a family of encoders, as in the base's `config.json`.
      base_source: what PEFT should load as the base: a folder or a repository id.
      head: a trained head with `dense` and `out` (pooling `pooler`), the only one that
        `transformers` has. With any other, leave it out: the adapter is then the encoder's.

    Raises:
      LoraxError: something that PEFT's format cannot say, or a folder that cannot be written.
    """
    _check_family(model_type)
    kernels = {path: _name(_module(path), model_type, bare=head is None) for path in lora}
    tensors = {}
    for path, name in kernels.items():
        _check_pair(path, lora[path], spec)
        for part, suffix in _parts(path).items():
            tensors[f"{_PREFIX}{name}.{suffix}"] = _array(lora[path][part])
    tensors |= _head_tensors(head, model_type) if head is not None else {}
    config = write_config(
        spec,
        kernels,
        task_type="FEATURE_EXTRACTION" if head is None else "SEQ_CLS",
        base_source=base_source,
        modules_to_save=None if head is None else list(family_of(model_type).head),
        kinds=_kinds(model_type),
    )
    _write(Path(folder), config, tensors)


def load_peft(folder: str | Path, base: Any, model_type: str) -> PeftAdapter:
    """Read an adapter of PEFT.

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
    _check_family(model_type)
    folder = Path(folder)
    config = read_json(folder / CONFIG)
    _refuse(str(folder / CONFIG), check_config(config))
    tensors = load_checkpoint(_weights(folder))
    shapes = {path: tuple(leaf.shape) for path, leaf in leaves_by_path(base).items()}
    try:
        reader = _Reader(config, tensors, shapes, model_type)
        lora, head = reader.lora(), reader.head()
        reader.leave_out()
        reader.check()
        spec = read_spec(
            config,
            {path: reader.kernels[path] for path in lora},
            map(_module, reader.kernels),
            ("head",) if head else (),
        )
    except LoraxError as fault:
        raise LoraxError(f"{folder}: {fault}") from None
    except (re.error, TypeError, AttributeError) as fault:
        raise LoraxError(f"{folder / CONFIG}: a value of the wrong form ({fault})") from fault
    return PeftAdapter(lora, spec, head)


class _Reader:
    """Takes the tensors of a file one by one; what is left over in `rest` is unexpected.

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
        self.rest = dict(tensors)
        self.faults: list[str] = []
        self.bare = not any(
            n.startswith(f"{_PREFIX}{family_of(model_type).prefix}.") for n in tensors
        )
        self.has_pooler = "head.dense.kernel" in shapes
        self.kernels = {
            path: _name(_module(path), model_type, bare=self.bare)
            for path, shape in shapes.items()
            if len(shape) == 2 and (self.has_pooler or not path.startswith("head."))
        }

    def lora(self) -> LoraTree:
        """The pairs of every module that the config selects."""
        chosen = {
            path: name
            for path, name in self.kernels.items()
            if selects(self.config, name, is_output=path.startswith("head.out."))
        }
        if not chosen:
            self.faults.append(f"target_modules={self.config['target_modules']!r} match nothing")
        return {path: self._pair(path, name) for path, name in chosen.items()}

    def _pair(self, path: str, name: str) -> dict[str, Any]:
        d_in, d_out = self.shapes[path]
        rank, parts = rank_of(self.config, name), _parts(path)
        return {
            "a": self._take(f"{name}.{parts['a']}", (rank, d_in)),
            "b": self._take(f"{name}.{parts['b']}", (d_out, rank)),
        }

    def head(self) -> dict[str, Any] | None:
        """The modules of the head that the file holds."""
        head: dict[str, Any] = {}
        places = [path for path in self.shapes if path.startswith("head.") and self.has_pooler]
        for path in places:
            name = _name(path, self.model_type, bare=self.bare)
            if _PREFIX + name in self.rest:
                _, module, leaf = path.split(".")
                shape, turn = self.shapes[path], is_transposed(path, self.model_type)
                stored = self._take(name, shape[::-1] if turn else shape)
                head.setdefault(module, {})[leaf] = stored.T if turn else stored
        return head or None

    def leave_out(self) -> None:
        """Drop a head that ours has no place for, with a warning."""
        family = family_of(self.model_type)
        heads = {"pooler", "classifier", *family.head}
        modules = heads - set(family.head) if self.has_pooler else heads
        start = tuple(f"{_PREFIX}{p}{m}." for p in ("", f"{family.prefix}.") for m in modules)
        foreign = [name for name in self.rest if start and name.startswith(start)]
        for name in foreign:
            del self.rest[name]
        if foreign:
            named = ", ".join(name.removeprefix(_PREFIX) for name in foreign)
            log.warning("left out of the adapter, as the model's head has no such part: %s", named)

    def check(self) -> None:
        """Refuse a file with any fault, or with tensors left over."""
        faults = self.faults + [f"unexpected {name}" for name in sorted(self.rest)]
        _refuse(f"{WEIGHTS} does not fit this {self.model_type}", faults)

    def _take(self, name: str, shape: tuple[int, ...]) -> Any:
        tensor = self.rest.pop(_PREFIX + name, None)
        if tensor is None:
            self.faults.append(f"missing {_PREFIX}{name}")
            return None
        if tensor.shape != shape:
            self.faults.append(f"{_PREFIX}{name} has shape {tensor.shape}, expected {shape}")
        return jnp.asarray(tensor, jnp.float32)


def _check_family(model_type: str) -> None:
    if model_type not in ENCODERS:
        raise LoraxError(f"model_type={model_type!r} is not one of: {', '.join(ENCODERS)}")


def _check_pair(path: str, pair: Mapping[str, Any], spec: LoraSpec) -> None:
    if path.startswith("head."):
        raise LoraxError(f"{path!r} is of the head, whose adapter PEFT's format has no place for")
    if set(pair) != set(_PARTS):
        raise LoraxError(f"the adapter of {path!r} has {', '.join(pair)}; PEFT's format has a, b")
    rank, stored = spec.rank_of(path), pair["a"].shape[0]
    if rank != stored:
        raise LoraxError(
            f"the adapter of {path!r} is of rank {stored}, its spec says {rank}: unpad it first"
        )


def _kinds(model_type: str) -> list[str]:
    """Of all linear modules that a layer may have, the name within the layer."""
    modules = [f"attention.{name}" for name in ("query", "key", "value", "out")]
    modules += ["mlp.up", "mlp.down"]
    names = [hf_module(f"encoder.layers.0.{module}", model_type) for module in modules]
    return [name.partition(".0.")[2] for name in names]


def _module(path: str) -> str:
    return path.rpartition(".")[0]


def _name(path: str, model_type: str, *, bare: bool) -> str:
    """The name of a module or parameter of ours in `BertModel` (`bare`), or in its classifier."""
    name = hf_module(path, model_type)
    return name.removeprefix(f"{family_of(model_type).prefix}.") if bare else name


def _parts(path: str) -> dict[str, str]:
    return _EMBEDDING_PARTS if path.endswith(".embedding") else _PARTS


def _head_tensors(head: Mapping[str, Any], model_type: str) -> dict[str, np.ndarray]:
    if set(head) != {"dense", "out"}:
        raise LoraxError(
            f"a head of {', '.join(head)} has no equivalent in transformers, which pools by "
            "`dense`: export the adapter alone, without head="
        )
    tensors = {}
    for path, leaf in leaves_by_path({"head": head}).items():
        tensors[_PREFIX + hf_module(path, model_type)] = _array(
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


def _refuse(place: str, faults: list[str]) -> None:
    if faults:
        more = len(faults) - _SHOWN_FAULTS
        shown = faults[:_SHOWN_FAULTS] + [f"and {more} more"] * (more > 0)
        raise LoraxError(f"{place}: {'; '.join(shown)}")


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    except OSError as fault:
        raise LoraxError(f"cannot write {folder}: {fault.strerror or fault}") from fault
