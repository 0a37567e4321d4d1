import re
from pathlib import Path

from lorax.data.documents import Documents
from lorax.data.files import read_text
from lorax.errors import LoraxError

_PARAGRAPH, _LINE = re.compile(r"\n[ \t\r]*\n\s*"), re.compile(r"\n\s*")


def load_text(split: str, path: Path, base: Path | None = None) -> Documents:
    """Read plain text; all of it is a target.

    Args:
      split: `train` or `dev`.
      path: a UTF-8 file, whose last tenth is dev (`cut_text` splits it); or a folder with
        `train.txt` and `dev.txt`.
      base: the folder of the tokenizer, which plain text does not need.

    Returns:
      One document, the split's text as it is.

    Raises:
      LoraxError: a file is missing, not UTF-8, empty, or a single line.
    """
    del base
    if path.is_dir():
        text = read_text(path / f"{split}.txt")
        if not text.strip():
            raise LoraxError(f"{path / f'{split}.txt'}: empty file")
    else:
        text = cut_text(read_text(path), str(path))[("train", "dev").index(split)]
    return Documents([text], [((0, len(text)),)], "text")


def cut_text(text: str, where: str) -> tuple[str, str]:
    r"""Split a text into about nine tenths and the last tenth.

    The split is at the end of a paragraph if one ends between 85% and 95% of the text, or else at
    the line end nearest to 90%.

    Raises:
      LoraxError: there is no line end to split at; `where` names the text.

    >>> cut_text("First.\n\nNext line,\nand its last words.\n\nEnd.\n", "a.txt")
    ('First.\n\nNext line,\nand its last words.\n\n', 'End.\n')
    """
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    if not last:
        raise LoraxError(f"{where}: empty file")
    ends = [found.end() for found in _PARAGRAPH.finditer(text, first, last)]
    ends = [end for end in ends if 0.85 <= end / last <= 0.95]
    ends = ends or [found.end() for found in _LINE.finditer(text, first, last)]
    if not ends:
        raise LoraxError(
            f"{where}: a single line, which gives no train and dev: give more lines, or a folder "
            "with train.txt and dev.txt"
        )
    cut = min(ends, key=lambda end: abs(end / last - 0.9))
    return text[:cut], text[cut:]
