"""Where a base model comes from: a local folder or the Hugging Face hub."""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Any

from lorax.errors import LoraxError, brief, one_line

_ROOT = Path(__file__).resolve().parents[3]
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


def version_of(folder: Path) -> Version:
    """The config and weights in a folder, with the times of their last changes."""
    files = (file for pattern in ("config.json", "*.safetensors*") for file in folder.glob(pattern))
    return tuple((str(file), file.stat().st_mtime_ns) for file in sorted(files))
