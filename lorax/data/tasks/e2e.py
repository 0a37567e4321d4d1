"""The E2E NLG challenge: restaurants described from slots (Novikova et al. 2017, 1706.09254).

A prompt is written as in the data of LoRA's GPT-2 experiments (Hu et al. 2021, section 5.4),
with the beginning-of-text token between it and the reference.
"""

import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path

from lorax.data.documents import Documents, Span
from lorax.data.files import read_text
from lorax.data.tokens.special_tokens import special_tokens
from lorax.errors import LoraxError

FILES = {"train": "trainset.csv", "dev": "devset.csv", "test": "testset_w_refs.csv"}
_NAMES = {"eatType": "Type", "priceRange": "price", "familyFriendly": "family friendly"}
_SLOT = re.compile(r"\s*([^\[\],]+)\[([^\]]*)\]\s*")


def load_e2e(split: str, folder: Path, base: Path | None = None) -> Documents:
    """Read one split: one document per reference, with the reference as its target.

    Args:
      split: `train`, `dev` or `test`.
      folder: of `FILES`, as the challenge released them.
      base: the folder of the tokenizer, whose beginning-of-text token follows the prompt; without
        that token, a line break does.

    Raises:
      LoraxError: a file is missing or malformed; the message gives the file and the line.
    """
    separator = separator_of(base)
    texts: list[str] = []
    targets: list[tuple[Span, ...]] = []
    for mr, reference, where in _rows(folder, split):
        prompt = prompt_of(mr, where) + separator
        texts.append(f"{prompt} {reference}")
        targets.append(((len(prompt), len(texts[-1])),))
    return Documents(texts, targets)


def separator_of(base: Path | None) -> str:
    """The text between a prompt and its reference, given the folder of the tokenizer."""
    return (special_tokens(base) if base else {}).get("bos_token", "\n")


def prompt_of(mr: str, where: str = "mr") -> str:
    """A meaning representation as a prompt in one line.

    Raises:
      LoraxError: it is not a list of `slot[value]`; `where` names it.

    >>> prompt_of("name[Blue Spice], eatType[coffee shop], area[city centre]")
    'name : Blue Spice | Type : coffee shop | area : city centre'
    """
    if not re.fullmatch(rf"{_SLOT.pattern}(,{_SLOT.pattern})*", mr):
        raise LoraxError(f"{where}: {mr!r} is no list of slot[value], slot[value]")
    slots = [(name.strip(), value.strip()) for name, value in _SLOT.findall(mr)]
    return " | ".join(f"{_NAMES.get(name, name)} : {value}" for name, value in slots)


def references_by_mr(split: str, folder: Path) -> dict[str, list[str]]:
    """All references of each meaning representation, both in the order of the file.

    Args:
      split: `train`, `dev` or `test`.
      folder: see `load_e2e`.

    Raises:
      LoraxError: see `load_e2e`.
    """
    groups: dict[str, list[str]] = {}
    for mr, reference, _ in _rows(folder, split):
        groups.setdefault(mr, []).append(reference)
    return groups


def _rows(folder: Path, split: str) -> Iterator[tuple[str, str, str]]:
    """(meaning representation, reference, file and line) of each row."""
    path = folder / FILES[split]
    if not path.is_file():
        raise LoraxError(
            f"task.data_dir={str(folder)!r} holds no {path.name}: give the E2E challenge's "
            f"{', '.join(FILES.values())}, or so rename train-fixed.no-ol.csv, "
            "devel-fixed.no-ol.csv and test-fixed.csv of its cleaned release"
        )
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    is_empty = True
    try:
        if missing := {"mr", "ref"} - {*(reader.fieldnames or ())}:
            raise LoraxError(f"{path}:1: no column {max(missing)!r}; the header must be mr,ref")
        for row in reader:
            mr, reference, where = row["mr"], row["ref"], f"{path}:{reader.line_num}"
            if None in row or not (mr and mr.strip() and reference and reference.strip()):
                raise LoraxError(f"{where}: expected an mr and a ref, neither of them empty")
            is_empty = False
            yield mr.strip(), reference.strip(), where
    except csv.Error as error:
        raise LoraxError(f"{path}:{reader.reader.line_num}: not CSV ({error})") from error
    if is_empty:
        raise LoraxError(f"{path}: no examples, only a header")
