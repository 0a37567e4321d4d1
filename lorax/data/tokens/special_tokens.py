"""A tokenizer's special tokens by their roles, as Hugging Face's files name them."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lorax.data.files import read_text
from lorax.errors import LoraxError, brief, one_line


def special_tokens(folder: Path) -> dict[str, str]:
    """The texts of `bos_token`, `eos_token`, `pad_token` and so on.

    They come from `tokenizer_config.json`, else from `special_tokens_map.json`. The first two may
    also come from the ids in `config.json` (GPT-2's own folder has them nowhere else).

    Args:
      folder: of `tokenizer.json` and related files.

    Raises:
      LoraxError: a file is not JSON.
    """
    named: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        found = read_json(folder / file)
        named |= {k: v for k, v in found.items() if v is not None and k.endswith("_token")}
    texts = {name: _text(value) for name, value in named.items()}
    return {**_from_config(folder), **{k: v for k, v in texts.items() if v is not None}}


def _text(value: Any) -> str | None:
    """The text of a token: a string, or a dict with `content`; None for other values."""
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def control_tokens(folder: Path) -> list[str]:
    """The texts that the tokenizer reads as special tokens anywhere in a text."""
    return [token["content"] for token in _added(folder) if token.get("special")]


def find_eos_id(tokenizer: Tokenizer, folder: Path) -> int:
    """The id of the end-of-text token.

    Raises:
      LoraxError: the files name none, or one that the tokenizer does not have.
    """
    name = special_tokens(folder).get("eos_token")
    number = None if name is None else tokenizer.token_to_id(name)
    if number is None:
        raise LoraxError(
            f"{folder}: eos_token={brief(name)} is no token: name one in tokenizer_config.json"
        )
    return number


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if the file does not exist.

    Raises:
      LoraxError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    text = read_text(path)
    try:
        found = json.loads(text)
    except RecursionError:
        raise LoraxError(f"{path}: not JSON (nested too deeply)") from None
    except ValueError as error:
        raise LoraxError(f"{path}: not JSON ({one_line(error)})") from error
    if not isinstance(found, dict):
        raise LoraxError(f"{path}: not a JSON object")
    return found


def _added(folder: Path) -> list[dict[str, Any]]:
    """The added tokens of `tokenizer.json`; each has a `content` and an `id`."""
    path = folder / "tokenizer.json"
    tokens = read_json(path).get("added_tokens") or []
    if not isinstance(tokens, list) or not all(map(_is_added, tokens)):
        raise LoraxError(f"{path}: added_tokens is not a list of tokens with content and id")
    return tokens


def _is_added(token: Any) -> bool:
    if not isinstance(token, dict):
        return False
    return isinstance(token.get("content"), str) and isinstance(token.get("id"), int)


def _from_config(folder: Path) -> dict[str, str]:
    config = read_json(folder / "config.json")
    texts = {token["id"]: token["content"] for token in _added(folder)}
    found = {}
    for name in ("bos_token", "eos_token"):
        number = config.get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and number in texts:
            found[name] = texts[number]
    return found
