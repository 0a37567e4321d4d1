"""A cache of token ids on disk, so that a split is tokenized once and not once per process.

The cache is under `~/.cache/lorax/tokens` (`$XDG_CACHE_HOME` is respected), with one file per
split that only its owner can read. Anyone with the tokenizer can convert the ids back to the
user's texts: `LORAX_TOKEN_CACHE=off` disables the cache, `LORAX_TOKEN_CACHE=<folder>` moves it.
The files may be deleted at any time; beyond `MOST_BYTES` the least recently used are deleted.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lorax.data.documents import Documents
from lorax.data.examples import Examples
from lorax.data.tokens.tokenize import Encoded, encode
from lorax.data.tokens.tokenize_documents import encode_documents, warn_of_dropped

log = logging.getLogger(__name__)
FORMAT = 1  # raise it when the same texts give other tokens, or the file's format changes
MOST_BYTES = 2 * 2**30
OURS = re.compile(r"tokens-[0-9a-f]{64}(\.npz|-.+\.partial)")
OFF = ("off", "false", "no", "none", "0")


def token_dir(home: Path) -> Path | None:
    """The folder of the token cache, or None if the cache is off.

    Args:
      home: the folder of all of lorax's caches; `LORAX_TOKEN_CACHE` (`off` or a folder) takes
        precedence.
    """
    named = os.environ.get("LORAX_TOKEN_CACHE")
    if named is not None and named.lower() in OFF:
        return None
    return Path(named).expanduser() if named else home / "tokens"


def encode_cached(
    tokenizer: tokenizers.Tokenizer,
    content: bytes,
    examples: Examples,
    max_length: int,
    folder: Path | None,
) -> Encoded:
    """`encode` with a cache in `folder`.

    Faults of the folder or of its files are not raised: a warning is logged and the split is
    tokenized.

    Args:
      tokenizer: from `load_tokenizer`.
      content: the `tokenizer.json` that it was loaded from.
      examples: texts or pairs of texts; their labels are not kept.
      max_length: see `encode`.
      folder: from `token_dir`.

    Raises:
      LoraxError: see `encode`.
    """
    encoded = _kept(
        folder,
        key_of(content, examples, max_length),
        lambda: encode(tokenizer, examples, max_length),
        len(examples),
    )
    return replace(encoded, labels=examples.labels)


def encode_documents_cached(
    tokenizer: tokenizers.Tokenizer,
    content: bytes,
    documents: Documents,
    max_length: int,
    folder: Path | None,
    *,
    eos_id: int | None = None,
) -> Encoded:
    """`encode_documents` with a cache as in `encode_cached`.

    A warning counts the documents that are left out.

    Args:
      tokenizer: from `load_tokenizer`.
      content: the `tokenizer.json` that it was loaded from.
      documents: see `encode_documents`.
      max_length: see `encode_documents`.
      folder: from `token_dir`.
      eos_id: see `encode_documents`.

    Raises:
      LoraxError: see `encode_documents`.
    """
    encoded = _kept(
        folder,
        key_of_documents(content, documents, max_length, eos_id),
        lambda: encode_documents(tokenizer, documents, max_length, eos_id=eos_id),
    )
    warn_of_dropped(documents, encoded, max_length)
    return encoded


def _kept(
    folder: Path | None, key: str, compute: Callable[[], Encoded], size: int | None = None
) -> Encoded:
    """The result of `compute`, cached in the file of `key`, which must hold `size` examples."""
    if folder is None:
        return compute()
    path = folder / f"tokens-{key}.npz"
    if (kept := _read(path, size)) is not None:
        return kept
    encoded = compute()
    try:
        _write(path, encoded)
    except OSError as fault:
        log.warning("tokens are not kept: %s", fault)
    else:
        _drop_old(folder)
    return encoded


def key_of(content: bytes, examples: Examples, max_length: int) -> str:
    """A hash of everything that determines the token ids; arguments as in `encode_cached`."""
    columns = [column for column in (examples.first, examples.second) if column is not None]
    return _digest([max_length], content, *(part for column in columns for part in _parts(column)))


def key_of_documents(
    content: bytes, documents: Documents, max_length: int, eos_id: int | None
) -> str:
    """A hash of everything that determines the ids; arguments of `encode_documents_cached`."""
    options = [max_length, documents.form, eos_id]
    spans = json.dumps(documents.targets).encode()
    return _digest(options, content, *_parts(documents.texts), spans)


def _digest(options: list[Any], *parts: bytes) -> str:
    head = json.dumps([FORMAT, tokenizers.__version__, *options]).encode()
    digest = hashlib.sha256()
    for part in (head, *parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def _parts(texts: list[str]) -> tuple[bytes, bytes]:
    """Texts as unambiguous bytes: the end of each text, and all texts concatenated."""
    lengths = np.fromiter(map(len, texts), "<i8", len(texts))
    return lengths.tobytes(), "".join(texts).encode("utf-8", "surrogatepass")


def _read(path: Path, size: int | None) -> Encoded | None:
    try:
        ids, types, lengths = _load(path)
        if size not in (None, len(lengths)) or not ids.shape == types.shape == (lengths.sum(),):
            raise ValueError("its arrays do not fit together")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as fault:  # NumPy and zipfile raise many kinds
        log.warning("%s is ignored, as it is damaged or no file of tokens: %r", path, fault)
        return None
    with contextlib.suppress(OSError):  # a folder that others fill may be read-only
        os.utime(path)  # its last use, for `_drop_old`
    bounds = list(pairwise(accumulate(lengths.tolist(), initial=0)))
    return Encoded(
        [ids[start:end] for start, end in bounds],
        [types[start:end] for start, end in bounds],
        np.zeros(len(bounds), np.int32),
    )


def _load(path: Path) -> list[np.ndarray]:
    with np.load(path) as file:
        # zipfile checks only entries read to their end, and a damaged header may shorten one.
        if damaged := file.zip.testzip():
            raise ValueError(f"{damaged} is damaged")
        if file["key"].item() != path.stem:
            raise ValueError("it is another file, renamed")
        return [file[name].astype(np.int32) for name in ("ids", "types", "lengths")]


def _write(path: Path, encoded: Encoded) -> None:
    """Write a file atomically, even with concurrent writers or after a kill."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(".partial", f"{path.stem}-", path.parent)
    partial = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(
                file,
                key=np.asarray(path.stem),
                ids=_narrow(encoded.input_ids),
                types=_narrow(encoded.token_type_ids),
                lengths=_narrow([encoded.lengths]),
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _narrow(arrays: list[np.ndarray]) -> np.ndarray:
    """The arrays concatenated, in the smallest integer type: mostly 2 bytes per id, 1 per type."""
    flat = np.concatenate(arrays) if arrays else np.zeros(0, np.int32)
    return flat.astype(np.min_scalar_type(flat.max(initial=0)))


def _drop_old(folder: Path) -> None:
    """Delete the least recently used files beyond `MOST_BYTES`, those of killed writers too."""
    with contextlib.suppress(OSError):  # another process deletes, or only it may
        ours = [path for path in folder.glob("tokens-*") if OURS.fullmatch(path.name)]
        found = [(path.stat(), path) for path in ours]
        newest_first = sorted(found, key=lambda entry: entry[0].st_mtime_ns, reverse=True)
        sizes = accumulate(stat.st_size for stat, _ in newest_first)
        for total, (_, path) in zip(sizes, newest_first, strict=True):
            if total > MOST_BYTES:
                path.unlink()
