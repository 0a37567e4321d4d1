"""The tensors of a checkpoint: one safetensors file, or the shards that an index names."""

from pathlib import Path

import numpy as np

from lorax.errors import LoraxError, brief, one_line, refuse
from lorax.models.checkpoints.safetensors import LazyTensor, lazy_tensors
from lorax.models.checkpoints.source import read_json

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def load_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Reads safetensors: a file, or a folder with `model.safetensors`, whole or sharded.

    Returns:
      Tensor name to array, as stored.

    Raises:
      LoraxError: no safetensors there, a missing shard, or a damaged file.
    """
    return {name: tensor[...] for name, tensor in open_checkpoint(path).items()}


def open_checkpoint(path: str | Path) -> dict[str, LazyTensor]:
    """As `load_checkpoint`, of the files' headers alone: tensors that are read when indexed."""
    path = Path(path)
    if path.suffix == ".bin":
        raise _pickle_refused(path)
    if path.is_file():
        return lazy_tensors(path)
    if (path / _WEIGHTS).is_file():
        return lazy_tensors(path / _WEIGHTS)
    if (path / _INDEX).is_file():
        return _sharded_tensors(path / _INDEX)
    if pickles := sorted(path.glob("pytorch_model*.bin")):
        raise _pickle_refused(pickles[0])
    raise LoraxError(f"{path} has no {_WEIGHTS} (nor {_INDEX})")


def _sharded_tensors(index: Path) -> dict[str, LazyTensor]:
    """The tensors of all shards; of one that stands in several, that of the index's shard."""
    homes = _weight_map(index)
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted({*homes.values()}):
        for name, tensor in lazy_tensors(index.parent / shard).items():
            if name in tensors and name not in homes:
                other = tensors[name].file.name
                raise LoraxError(
                    f"{index.parent}: {one_line(name)} stands in {other} and in {shard}: say in "
                    f"the weight_map of {index.name} which one counts"
                )
            if homes.get(name, shard) == shard:
                tensors[name] = tensor
    missing = [f"{shard} lacks {name}" for name, shard in homes.items() if name not in tensors]
    refuse(f"{index} does not fit its shards, download them again", missing)
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """The shard of each tensor, all of them files beside the index."""
    homes = read_json(index).get("weight_map")
    if not isinstance(homes, dict) or not all(isinstance(x, str) for x in homes.values()):
        raise LoraxError(f"{index} has no weight_map of file names: download it again")
    shards = sorted({*homes.values()})
    if outside := [name for name in shards if Path(name).name != name or len(name) > 255]:
        raise LoraxError(f"{index}: the shard {brief(outside[0])} is not a file of the same folder")
    if missing := [shard for shard in shards if not (index.parent / shard).is_file()]:
        named = one_line(", ".join(missing))
        raise LoraxError(f"{index.parent} lacks {named}, which {index.name} names")
    return homes


def _pickle_refused(path: Path) -> LoraxError:
    return LoraxError(
        f"{path} is a pickle, which may run code when loaded, so it is refused: convert it with "
        "transformers (from_pretrained, then save_pretrained writes model.safetensors)"
    )
