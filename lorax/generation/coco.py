"""METEOR, ROUGE-L and CIDEr by the coco-caption tool's scorers, which read Java's tokens."""

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from lorax.errors import LoraxError

Texts = Mapping[int, Sequence[str]]
COCO = ("meteor", "rouge_l", "cider")


def has_java() -> bool:
    """Whether `java` runs; macOS has a stub of that name that only prints where to get it."""
    java = shutil.which("java")
    if java is None:
        return False
    return subprocess.run([java, "-version"], check=False, capture_output=True).returncode == 0


def coco_scores(
    hypotheses: Sequence[str], references: Sequence[Sequence[str]], names: Sequence[str]
) -> dict[str, float]:
    """Scores of texts without line breaks by pycocoevalcap, which has coco-caption's code and jars.

    Args:
      hypotheses: a text each.
      references: for each hypothesis, one or more texts.
      names: any of `COCO`.

    Raises:
      LoraxError: Java failed.
    """
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    scorers = {"meteor": Meteor, "rouge_l": Rouge, "cider": Cider}
    lines = [[text, *texts] for text, texts in zip(hypotheses, references, strict=True)]
    try:
        tokens = _ptb_tokens(lines)
        of_references = {i: line[1:] for i, line in enumerate(tokens)}
        of_hypotheses = {i: line[:1] for i, line in enumerate(tokens)}
        return {name: _score(scorers[name](), of_references, of_hypotheses) for name in names}
    except (OSError, ValueError) as error:  # no room, no right to write, no memory for Java
        raise LoraxError(
            f"{', '.join(names)}: pycocoevalcap failed ({error}); its folder has to be writable, "
            "and METEOR's Java needs 2 GB"
        ) from error


def _score(scorer: Any, of_references: Texts, of_hypotheses: Texts) -> float:
    try:
        return float(scorer.compute_score(of_references, of_hypotheses)[0])
    finally:
        # METEOR's, where its Java failed, keeps the lock that its own end waits for.
        if hasattr(scorer, "lock") and scorer.lock.locked():
            scorer.meteor_p.kill()
            scorer.lock.release()


def _ptb_tokens(lines: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each text in lower-case tokens with spaces between, punctuation left out."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    captions = {i: [{"caption": text} for text in texts] for i, texts in enumerate(lines)}
    tokens = list(PTBTokenizer().tokenize(captions).values())
    if [*map(len, tokens)] != [*map(len, lines)]:
        raise ValueError("the tokenizer's output has other lines than its input")
    return tokens
