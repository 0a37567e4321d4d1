"""JSON Lines of prompts with completions, of instructions (Alpaca), or of chats."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lorax.data.documents import Documents, Span
from lorax.data.files import read_text
from lorax.data.tasks.chat import ChatTemplate, load_chat_template
from lorax.errors import LoraxError

_log = logging.getLogger(__name__)
ROLES = ("system", "user", "assistant")
_SURROGATE = re.compile("[\ud800-\udfff]")
_FORMS = "prompt and completion, instruction and output, or messages"


def load_instructions(split: str, path: Path, base: Path | None = None) -> Documents:
    """Read one split of instructions; all lines are chats, or none is.

    Args:
      split: `train` or `dev`.
      path: a `.jsonl` file, or a folder with `train.jsonl` and `dev.jsonl`. A tenth of a file's
        lines is dev: those with the smallest SHA-256, in any place; equal lines stay together.
      base: the folder of the tokenizer, for the template of chats.

    Raises:
      LoraxError: a file is missing, empty or not UTF-8, a line is malformed (named by file and
        number), or the tokenizer has no chat template.
    """
    is_folder = path.is_dir()
    lines = _lines(path / f"{split}.jsonl") if is_folder else _draw(_lines(path), split, path)

    @cache
    def template() -> ChatTemplate:
        if base is None:
            raise LoraxError("chats need the folder of a tokenizer with a chat template")
        return load_chat_template(base)

    documents = _documents(lines, template)
    if split == "train" and documents.form == "chat":
        chats = zip(documents.texts, documents.targets, strict=True)
        if fault := template().fault_of_ends(chats):
            _log.warning("%s: %s", path, fault)
    return documents


def _lines(path: Path) -> list[tuple[str, str]]:
    """(file and number, text) of each line that is not blank."""
    lines = enumerate(read_text(path).split("\n"), 1)
    found = [(f"{path}:{number}", line.strip()) for number, line in lines if line.strip()]
    if not found:
        raise LoraxError(f"{path}: empty file")
    return found


def _draw(lines: list[tuple[str, str]], split: str, path: Path) -> list[tuple[str, str]]:
    hashes = [hashlib.sha256(line.encode()).digest() for _, line in lines]
    last = sorted(hashes)[max(1, len(lines) // 10) - 1]
    kept = [line for line, h in zip(lines, hashes, strict=True) if (h <= last) == (split == "dev")]
    if not kept:
        raise LoraxError(
            f"{path}: at least two unlike lines are needed, for train and dev: give more, or a "
            "folder with train.jsonl and dev.jsonl"
        )
    return kept


def _documents(lines: list[tuple[str, str]], template: Callable[[], ChatTemplate]) -> Documents:
    rows = [(where, _parse(line, where)) for where, line in lines]
    is_chat = "messages" in rows[0][1]
    for where, row in rows:
        if ("messages" in row) != is_chat:
            raise LoraxError(f"{where}: chats and others in one split, from {rows[0][0]} on")
    if is_chat:
        pairs = [_chat(row, where, template) for where, row in rows]
    else:
        pairs = [_pair(row, where) for where, row in rows]
    texts, targets = zip(*pairs, strict=True)
    return Documents([*texts], [*targets], "chat" if is_chat else "prompt")


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise LoraxError(f"{where}: not JSON ({error})") from error
    if not isinstance(row, dict):
        raise LoraxError(f"{where}: not a JSON object")
    return row


def _pair(row: dict[str, Any], where: str) -> tuple[str, tuple[Span, ...]]:
    if "instruction" in row or "output" in row:
        prompt, completion = _alpaca(row, where), _string(row, "output", where)
    elif "prompt" in row or "completion" in row:
        prompt, completion = _string(row, "prompt", where), _string(row, "completion", where)
    else:
        raise LoraxError(f"{where}: needs {_FORMS}; it has {', '.join(row) or 'nothing'}")
    if not completion.strip():
        raise LoraxError(f"{where}: nothing to be predicted, its completion is empty")
    text = prompt + completion
    return text, ((len(prompt), len(text)),)


def _alpaca(row: dict[str, Any], where: str) -> str:
    r"""The sections of an instruction up to the heading of its response.

    >>> _alpaca({"instruction": "Add.", "input": "1 2"}, "a.jsonl:1")
    '### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n'
    """
    sections = [("Instruction", _string(row, "instruction", where))]
    if row.get("input"):
        sections.append(("Input", _string(row, "input", where)))
    return "".join(f"### {name}:\n{text}\n\n" for name, text in sections) + "### Response:\n"


def _chat(
    row: dict[str, Any], where: str, template: Callable[[], ChatTemplate]
) -> tuple[str, tuple[Span, ...]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise LoraxError(f"{where}: messages must be a list of at least one")
    said = [*_roles(messages, where)]
    if "assistant" not in said:
        raise LoraxError(f"{where}: nothing to be predicted, no message is the assistant's")
    try:
        text, spans = template().with_spans(messages)
    except LoraxError as error:
        raise LoraxError(f"{where}: {error}") from error
    if not spans:
        raise LoraxError(f"{where}: nothing to be predicted, the template marks nothing in it")
    return text, spans


def _roles(messages: list[Any], where: str) -> Iterator[str]:
    for number, message in enumerate(messages):
        place = f"{where}: messages[{number}]"
        if not isinstance(message, dict):
            raise LoraxError(f"{place}: not a JSON object")
        role, content = _string(message, "role", place), _string(message, "content", place)
        if role not in ROLES:
            raise LoraxError(f"{place}: unknown role {role!r}; known: {', '.join(ROLES)}")
        if role == "assistant" and not content.strip():
            raise LoraxError(f"{place}: nothing to be predicted, its content is empty")
        yield role


def _string(row: dict[str, Any], key: str, where: str) -> str:
    if key not in row:
        raise LoraxError(f"{where}: no {key!r}; it has {', '.join(row) or 'nothing'}")
    if not isinstance(row[key], str):
        raise LoraxError(f"{where}: {key!r} must be a text, not {json.dumps(row[key])[:40]}")
    if _SURROGATE.search(row[key]):
        raise LoraxError(f"{where}: {key!r} holds half of a surrogate pair, which is no character")
    return row[key]
