"""Generated texts against references: BLEU, NIST, METEOR, ROUGE-L and CIDEr."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest

from lorax.errors import LoraxError
from lorax.generation.coco import COCO, coco_scores, has_java
from lorax.generation.nist import corpus_nist

References = Sequence[Sequence[str]]
MTEVAL = ("bleu", "nist")
METRICS = (*MTEVAL, *COCO)


def score_texts(
    hypotheses: Sequence[str], references: References, metrics: Sequence[str] = METRICS
) -> dict[str, float]:
    """Scores of a corpus, as the E2E NLG challenge's tool defines and prints them.

    The tool is github.com/tuetschek/e2e-metrics (Dušek, Novikova and Rieser 2020, "Evaluating the
    state-of-the-art of end-to-end natural language generation"). Every metric ignores case.

    | metric    | range   | definition                                       | computed by   |
    |-----------|---------|--------------------------------------------------|---------------|
    | `bleu`    | 0 to 1  | mteval-v13a; papers print 100 times it           | sacrebleu     |
    | `nist`    | 0 up    | mteval-v13a with `corpus_nist`'s length penalty  | `corpus_nist` |
    | `meteor`  | 0 to 1  | METEOR 1.5, English, normalized                  | pycocoevalcap |
    | `rouge_l` | 0 to 1  | coco-caption: F (beta = 1.2) of LCS, mean        | pycocoevalcap |
    | `cider`   | 0 to 10 | coco-caption: CIDEr-D, idf of these references   | pycocoevalcap |

    The last three need Java: METEOR is a Java program, and so is the tokenizer of all three
    (Stanford's PTBTokenizer). METEOR reads 60 MB of paraphrases first, which takes some seconds.
    CIDEr of a single text is 0, since every idf is log 1.

    Args:
      hypotheses: generated texts; one may be empty. Any run of whitespace counts as one space.
      references: for each of them, one or more reference texts, in any order.
      metrics: any of `METRICS`.

    Returns:
      A score for each metric.

    Raises:
      LoraxError: texts and references do not fit, a reference is blank, a metric is unknown, or
        what it needs is not installed.

    >>> scores = score_texts(["The Eagle is a cheap pub."], [["the eagle is a cheap pub ."]],
    ...                      metrics=("bleu", "nist"))
    >>> {name: round(score, 3) for name, score in scores.items()}
    {'bleu': 1.0, 'nist': 2.807}
    """
    check_metrics(metrics)
    _check_texts(hypotheses, references)
    hypotheses = [_one_line(text) for text in hypotheses]
    references = [[_one_line(text) for text in texts] for texts in references]
    scores = {}
    if "bleu" in metrics:
        scores["bleu"] = _bleu(hypotheses, references)
    if "nist" in metrics:
        scores["nist"] = _nist(hypotheses, references)
    if coco := [name for name in COCO if name in metrics]:
        scores |= coco_scores(hypotheses, references, coco)
    return {name: scores[name] for name in metrics}


def _bleu(hypotheses: Sequence[str], references: References) -> float:
    from sacrebleu.metrics import BLEU

    # sacrebleu reads references by column. An empty text in it would be one, of length 0; None is
    # no reference.
    columns = list(zip_longest(*references, fillvalue=None))
    bleu = BLEU(lowercase=True, tokenize="13a", force=True)
    return bleu.corpus_score(hypotheses, columns).score / 100


def _nist(hypotheses: Sequence[str], references: References) -> float:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    tokenizer = Tokenizer13a()

    def tokens(texts: Sequence[str]) -> list[list[str]]:
        return [tokenizer(text.lower()).split() for text in texts]

    return corpus_nist(tokens(hypotheses), [tokens(texts) for texts in references])


def _one_line(text: str) -> str:
    """Spaces for every kind of line break: Java takes one line as one text."""
    return " ".join(text.split())


def check_metrics(metrics: Sequence[str]) -> None:
    """Refuse metrics that `score_texts` cannot compute here.

    Raises:
      LoraxError: a metric is unknown, or what it needs is not installed.
    """
    if isinstance(metrics, str) or not set(metrics) <= set(METRICS):
        raise LoraxError(f"metrics={metrics!r}: give a list of any of {', '.join(METRICS)}")
    for package, needed_by in {"sacrebleu": MTEVAL, "pycocoevalcap": COCO}.items():
        asked = [name for name in metrics if name in needed_by]
        if asked and find_spec(package) is None:
            raise LoraxError(
                f"{', '.join(asked)}: {package} is not installed; pip install 'lorax-flax[nlg]'"
            )
    asked = [name for name in metrics if name in COCO]
    if asked and not has_java():
        raise LoraxError(
            f"{', '.join(asked)}: there is no working `java`; install a Java runtime "
            f"(Debian: default-jre-headless), or ask for metrics={MTEVAL}"
        )


def _check_texts(hypotheses: Sequence[str], references: References) -> None:
    if isinstance(hypotheses, str) or not hypotheses:
        raise LoraxError("hypotheses: give a list of one or more texts")
    if len(hypotheses) != len(references):
        raise LoraxError(
            f"{len(hypotheses)} hypotheses, but references for {len(references)} texts; "
            "give one list of references for each hypothesis"
        )
    for i, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise LoraxError(f"references[{i}] = {texts!r}: give a list of one or more texts")
        for j, text in enumerate(texts):
            if not text.strip():
                raise LoraxError(f"references[{i}][{j}] is blank; leave it out")
