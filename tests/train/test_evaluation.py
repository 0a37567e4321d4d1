"""What a trial reports against scikit-learn and SciPy on outputs computed one by one."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

from lorax import data
from lorax.train.evaluation import predict_all, predict_split, score
from lorax.train.single_engine import SingleEngine

pytestmark = pytest.mark.slow


def outputs_one_by_one(trial, encoded):
    length = int(encoded.lengths.max())
    return np.concatenate(
        [trial.predict(data.pad(encoded, [i], length=length)) for i in range(len(encoded))]
    )


def evaluation(trial):
    engine = SingleEngine(trial.setup, trial.state)
    splits = trial.dataset.dev.items()
    outputs = {
        name: predict_split(engine.predict, trial.dataset, encoded, 32)[0]
        for name, encoded in splits
    }
    return score(trial.dataset, outputs)


def test_a_splits_outputs_are_in_its_order_without_fillers(bench):
    trial = bench(train={"max_shapes": 3, "eval_batch_size": 7})
    dev = trial.dataset.dev["dev"]
    parts = trial.setup, trial.dataset, dev, trial.state.trainable
    outputs = predict_all(*parts, batch_size=7)
    assert outputs.shape == (50, 2)
    np.testing.assert_allclose(outputs, outputs_one_by_one(trial, dev), atol=1e-6)


def test_mnli_scores_both_splits(bench):
    trial = bench(task={"name": "mnli", "max_length": 30})
    got, expected = evaluation(trial), {}
    for split, suffix in (("dev_matched", ""), ("dev_mismatched", "_mismatched")):
        dev = trial.dataset.dev[split]
        outputs = outputs_one_by_one(trial, dev)
        predicted = outputs.argmax(1)
        expected[f"accuracy{suffix}"] = sklearn.metrics.accuracy_score(dev.labels, predicted)
        probabilities = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        log_loss = sklearn.metrics.log_loss(dev.labels, probabilities, labels=[0, 1, 2])
        expected[f"loss{suffix}"] = log_loss
    assert got == pytest.approx(expected, rel=1e-5)
    assert got["loss"] != got["loss_mismatched"]


def test_stsb_is_a_regression(bench):
    trial = bench(task={"name": "stsb", "max_length": 30})
    dev = trial.dataset.dev["dev"]
    outputs = outputs_one_by_one(trial, dev)
    assert outputs.shape == (50, 1)
    assert evaluation(trial) == pytest.approx(
        {
            "pearson": scipy.stats.pearsonr(outputs[:, 0], dev.labels)[0],
            "spearman": scipy.stats.spearmanr(outputs[:, 0], dev.labels)[0],
            "loss": sklearn.metrics.mean_squared_error(dev.labels, outputs[:, 0]),
        },
        rel=1e-5,
    )


def test_mrpc_has_accuracy_and_f1(bench):
    trial = bench(task={"name": "mrpc", "max_length": 30})
    dev = trial.dataset.dev["dev"]
    predicted = outputs_one_by_one(trial, dev).argmax(1)
    got = evaluation(trial)
    assert list(got) == ["accuracy", "f1", "loss"]
    assert got["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(dev.labels, predicted))
    assert got["f1"] == pytest.approx(sklearn.metrics.f1_score(dev.labels, predicted))
