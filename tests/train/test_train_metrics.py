import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from lorax.errors import LoraxError
from lorax.train.metrics import METRICS, evaluate, is_constant

RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 2, 80)
LOGITS = RNG.normal(size=(80, 2)) + np.eye(2)[LABELS]
SCORES = RNG.uniform(0, 5, 80).astype(np.float32).round(1)
GUESSES = (SCORES + RNG.normal(size=80)).astype(np.float32)[:, None].round(1)


def test_classification_is_scikit_learns():
    predicted = LOGITS.argmax(1)
    assert evaluate(["matthews", "accuracy", "f1"], "classification", LOGITS, LABELS) == {
        "matthews": pytest.approx(sklearn.metrics.matthews_corrcoef(LABELS, predicted), abs=1e-12),
        "accuracy": pytest.approx(sklearn.metrics.accuracy_score(LABELS, predicted), abs=1e-12),
        "f1": pytest.approx(sklearn.metrics.f1_score(LABELS, predicted), abs=1e-12),
    }


def test_f1_is_of_class_one_and_not_symmetric():
    labels, logits = np.array([1, 1, 1, 0]), np.eye(2)[[1, 0, 0, 1]]
    assert evaluate(["f1"], "classification", logits, labels)["f1"] == pytest.approx(0.4)


def test_regression_is_scipys_ties_included():
    got = evaluate(["pearson", "spearman"], "regression", GUESSES, SCORES)
    assert len(set(SCORES)) < len(SCORES)
    assert got["pearson"] == pytest.approx(scipy.stats.pearsonr(GUESSES[:, 0], SCORES)[0])
    assert got["spearman"] == pytest.approx(scipy.stats.spearmanr(GUESSES[:, 0], SCORES)[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["matthews", "f1"])
def test_one_class_for_all_scores_zero(name):
    logits = np.tile([1.0, 0.0], (80, 1))
    assert evaluate([name], "classification", logits, LABELS) == {name: 0.0}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_one_score_for_all_scores_zero(name):
    constant = np.full((80, 1), 2.5, np.float32)
    assert evaluate([name], "regression", constant, SCORES) == {name: 0.0}
    assert evaluate([name], "regression", GUESSES, np.full(80, 2.5)) == {name: 0.0}
    assert evaluate([name], "regression", GUESSES[:1], SCORES[:1]) == {name: 0.0}


def test_constant_predictions_are_those_of_one_class_or_score():
    one_class = np.abs(LOGITS) + np.array([0.0, 9.0])  # unlike logits, and one class
    assert is_constant("classification", one_class)
    assert is_constant("regression", np.full((80, 1), 2.5, np.float32))
    assert not is_constant("classification", LOGITS) and not is_constant("regression", GUESSES)
    assert not is_constant("causal_lm", np.ones((80, 3))) and not is_constant("regression", [[1]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_output_that_is_not_finite_has_no_score(bad):
    outputs = LOGITS.copy()
    outputs[3, 1] = bad
    scores = evaluate(METRICS, "classification", outputs, LABELS)
    assert np.isnan(list(scores.values())).all() and list(scores) == list(METRICS)


def test_an_unknown_metric_is_refused():
    with pytest.raises(LoraxError, match="'bleu' is unknown; use one of matthews, accuracy"):
        evaluate(["bleu"], "classification", LOGITS, LABELS)
