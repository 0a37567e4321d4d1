"""Where a base model comes from: a local folder or the Hugging Face hub, and its safetensors."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from lorax.errors import LoraxError, brief, one_line, refuse
from lorax.models.stored import StoredTensor, stored_tensors

_ROOT = Path(__file__).resolve().parents[2]
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
Version = tuple[tuple[str, int], ...]
_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model"]


def resolve_source(source: str, revision: str | None = None, *, weights: bool = False) -> Path:
    """Finds a model's folder, downloading it where need be.

    Args:
      source: a folder (as given, under the project's root, or under `$LORAX_ASSETS`, which stands
        for the project's `assets`), or else a repository id of the Hugging Face hub.
      revision: branch, tag or commit on the hub.
      weights: download these, too; without, a model of the hub is its config and its tokenizer.

    Returns:
      The local folder.

    Raises:
      LoraxError: neither a folder nor a repository that could be downloaded.
    """
    if folder := local_folder(source):
        return folder
    if asset := re.fullmatch(r"assets/([\w.-]{1,96})(/.*)?", source):
        raise LoraxError(
            f"{one_line(source)} is not there yet: run `python scripts/fetch_assets.py {asset[1]}`"
        )
    if not is_repository_id(source):
        raise LoraxError(
            f"model.source={brief(source)} is no folder, and no repository id of the hub"
        )
    return _download(source, revision, [*_PATTERNS, "*.safetensors"] if weights else _PATTERNS)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _candidates(source: str) -> list[Path]:
    given = Path(source)
    with contextlib.suppress(RuntimeError):  # `~name` of a user that does not exist
        given = given.expanduser()
    folders = [given, _ROOT / given]
    if assets := os.environ.get("LORAX_ASSETS"):
        folders += [Path(assets) / source.removeprefix("assets/"), Path(assets) / source]
    return folders


def local_folder(source: str) -> Path | None:
    """The folder that a source names on this machine; None: there is none."""
    return next((folder for folder in _candidates(source) if source and _is_folder(folder)), None)


def is_repository_id(source: str) -> bool:
    """Whether it has the form of a repository id of the hub."""
    return re.fullmatch(r"[\w-][\w.-]{,95}(/[\w.-]{1,96})?", source) is not None


def _download(repo: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise LoraxError(
            f"model.source={repo!r} is no folder; to take it from the hub: "
            "pip install 'lorax-flax[hub]'"
        ) from None
    try:
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]
            )
        )
    # Hub errors come from several packages (HTTP, validation, cache), and all mean the same here.
    except Exception as error:
        at = f" at revision {revision!r}" if revision else ""
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LoraxError(
            f"model.source={repo!r} is no folder, and the hub did not give it{at}: {reason}"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      LoraxError: no such file, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LoraxError(f"{path.parent} has no {path.name}") from None
    except RecursionError:
        raise LoraxError(f"{path} is not readable JSON: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise LoraxError(f"{path} is not readable JSON: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise LoraxError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def load_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Reads safetensors: a file, or a folder with `model.safetensors`, whole or sharded.

    Returns:
      Tensor name to array, as stored.

    Raises:
      LoraxError: no safetensors there, a missing shard, or a damaged file.
    """
    return {name: tensor[...] for name, tensor in open_checkpoint(path).items()}


def open_checkpoint(path: str | Path) -> dict[str, StoredTensor]:
    """As `load_checkpoint`, of the files' headers alone: tensors that are read when indexed."""
    path = Path(path)
    if path.suffix == ".bin":
        raise _pickle_refused(path)
    if path.is_file():
        return stored_tensors(path)
    if (path / _WEIGHTS).is_file():
        return stored_tensors(path / _WEIGHTS)
    if (path / _INDEX).is_file():
        return _sharded_tensors(path / _INDEX)
    if pickles := sorted(path.glob("pytorch_model*.bin")):
        raise _pickle_refused(pickles[0])
    raise LoraxError(f"{path} has no {_WEIGHTS} (nor {_INDEX})")


def _sharded_tensors(index: Path) -> dict[str, StoredTensor]:
    """The tensors of all shards; of one that stands in several, that of the index's shard."""
    homes = _weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted({*homes.values()}):
        for name, tensor in stored_tensors(index.parent / shard).items():
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


def version_of(folder: Path) -> Version:
    """The config and weights in a folder, with the times of their last changes."""
    files = (file for pattern in ("config.json", "*.safetensors*") for file in folder.glob(pattern))
    return tuple((str(file), file.stat().st_mtime_ns) for file in sorted(files))


def _pickle_refused(path: Path) -> LoraxError:
    return LoraxError(
        f"{path} is a pickle, which may run code when loaded, so it is refused: convert it with "
        "transformers (from_pretrained, then save_pretrained writes model.safetensors)"
    )
