"""GLUE's metrics, from scikit-learn and SciPy."""

import warnings
from collections.abc import Iterable

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


METRICS = {f.__name__: f for f in (matthews, accuracy, f1, pearson, spearman)}


def evaluate(
    names: Iterable[str], kind: str, outputs: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Metrics of a task.

    Args:
      names: keys of `METRICS`.
      kind: `classification` (outputs are logits, (n, classes)) or `regression` ((n, 1)).
      outputs: what the model gave, real examples only.
      labels: class ids or scores, (n,).

    Returns:
      Each metric by name; NaN for outputs that are not finite.

    >>> evaluate(["accuracy"], "classification", np.array([[0., 1.], [1., 0.]]), np.array([1, 1]))
    {'accuracy': 0.5}
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise LoraxError(f"metric {unknown[0]!r} is unknown; use one of {', '.join(METRICS)}")
    if not np.isfinite(outputs).all():
        return dict.fromkeys(names, float("nan"))
    predicted = outputs[:, 0] if kind == "regression" else outputs.argmax(-1)
    return {name: METRICS[name](predicted, labels) for name in names}


def _correlation(statistic, x: np.ndarray, y: np.ndarray) -> float:
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    return float(statistic(x, y).statistic)
