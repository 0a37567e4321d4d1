"""GLUE's metrics, from scikit-learn and SciPy, and those of language models."""

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from lorax.errors import LoraxError


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of class ids, in [-1, 1]; 0 when one side is constant."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(matthews_corrcoef(labels, predicted))


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of equal class ids."""
    return float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 (GLUE's for MRPC and QQP); 0 without a true positive."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of scores; 0 when one side is constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, labels)


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation of scores; 0 when one side is constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, labels)


def perplexity(outputs: np.ndarray) -> float:
    """The exponential of the mean loss of all target tokens, from `score_examples`."""
    losses, tokens = outputs[:, :2].sum(0, dtype=np.float64)
    with np.errstate(over="ignore"):
        return float(np.exp(losses / tokens))


def token_accuracy(outputs: np.ndarray) -> float:
    """Share of target tokens that were the most probable ones, from `score_examples`."""
    _, tokens, hits = outputs.sum(0, dtype=np.float64)
    return float(hits / tokens)


METRICS = {f.__name__: f for f in (matthews, accuracy, f1, pearson, spearman)}
TOKEN_METRICS = {f.__name__: f for f in (perplexity, token_accuracy)}


def evaluate(
    names: Iterable[str], kind: str, outputs: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Metrics of a task.

    Args:
      names: keys of `METRICS`, or of `TOKEN_METRICS` for a language model.
      kind: `classification` (outputs are logits, (n, classes)), `regression` ((n, 1)) or
        `causal_lm` (from `score_examples`, (n, 3)).
      outputs: of the model, for real examples only.
      labels: class ids or scores, (n,).

    Returns:
      Each metric by name; NaN for outputs that are not finite.

    >>> evaluate(["accuracy"], "classification", np.array([[0., 1.], [1., 0.]]), np.array([1, 1]))
    {'accuracy': 0.5}
    """
    known: Any = TOKEN_METRICS if kind == "causal_lm" else METRICS
    if unknown := [name for name in names if name not in known]:
        raise LoraxError(f"metric {unknown[0]!r} is unknown; use one of {', '.join(known)}")
    if not np.isfinite(outputs).all():
        return dict.fromkeys(names, float("nan"))
    if kind == "causal_lm":
        return {name: known[name](outputs) for name in names}
    predicted = outputs[:, 0] if kind == "regression" else outputs.argmax(-1)
    return {name: METRICS[name](predicted, labels) for name in names}


def is_constant(kind: str, outputs: np.ndarray) -> bool:
    """Whether a classifier's or a regression's predictions are the same for every example.

    Args:
      kind: as in `evaluate`; False for a language model, which has no such predictions.
      outputs: of the model, (n, classes) or (n, 1); False for n below 2.

    >>> is_constant("classification", np.array([[0., 1.], [2., 3.]]))
    True
    """
    if kind == "causal_lm" or len(outputs) < 2:
        return False
    return bool(np.ptp(outputs[:, 0] if kind == "regression" else outputs.argmax(-1)) == 0)


def _correlation(statistic: Callable[..., Any], x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(statistic(x, y).statistic)
