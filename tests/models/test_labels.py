"""A checkpoint's output layer goes by the names of its outputs, not by its width."""

import json

import jax
import numpy as np
import pytest

from lorax.config import ModelConfig
from lorax.data import get_task
from lorax.models import load_model
from lorax.models.labels import output_order

MNLI = get_task("mnli").labels
RTE = get_task("rte").labels
SST2 = get_task("sst2").labels
LOGGER = "lorax.models.load"


def numbered(*names):
    return {"id2label": {str(n): name for n, name in enumerate(names)}}


@pytest.mark.parametrize(
    ("names", "labels", "order"),
    [
        (("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), MNLI, (2, 1, 0)),
        (("entailment", "neutral", "contradiction"), MNLI, (0, 1, 2)),
        (("neutral", "Contradiction", "entails"), MNLI, (2, 0, 1)),
        (("not_entailment", "entailment"), RTE, (1, 0)),
        (("Entailment", "Not Entailment"), RTE, (0, 1)),
        (("non-entailment", "entailment"), RTE, (1, 0)),
        (("POS", "NEG"), SST2, (1, 0)),
        (("NEGATIVE", "POSITIVE"), RTE, None),
        (("LABEL_0", "LABEL_1"), RTE, None),
        (("label_0", "LABEL_1", "LABEL_2"), MNLI, None),
        (("entailment", "neutral", "contradiction"), RTE, None),
        (("entailment", "Entailment"), RTE, None),
        (("entailment", "entail"), RTE, None),
        (("score",), (), None),
        ((), RTE, None),
    ],
)
def test_outputs_are_matched_by_name(names, labels, order):
    assert output_order(numbered(*names), labels) == order


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"id2label": None, "label2id": {"negative": 0, "positive": 1}},
        {"id2label": ["negative", "positive"]},
        {"id2label": {"0": "negative", "1": 1}},
        {"id2label": {"1": "negative", "2": "positive"}},
        {"id2label": {"a": "negative", "b": "positive"}},
        numbered(*SST2) | {"label2id": {"negative": 1, "positive": 0}},
        numbered(*SST2) | {"label2id": []},
        numbered(*SST2) | {"num_labels": 3},
    ],
)
def test_names_are_unknown_where_the_config_says_nothing_clear(config):
    assert output_order(config, SST2) is None


@pytest.fixture
def checkpoint(write_checkpoint, tmp_path):
    """Writes a classifier of three outputs with these names; returns its layer, (D, 3) and (3,)."""

    def write(*names):
        model = write_checkpoint(head=True, num_labels=3)
        file = tmp_path / "config.json"
        content = {k: v for k, v in json.loads(file.read_text()).items() if k != "label2id"}
        file.write_text(json.dumps(content | numbered(*names)))
        return tuple(x.detach().numpy().T for x in model.classifier.parameters())

    return write


def head_of(folder, labels, **options):
    config = ModelConfig(source=str(folder), **{"pooling": "pooler"} | options)
    return load_model(config, 3, key=jax.random.key(0), labels=labels).head


def test_the_output_layer_is_put_into_the_order_of_the_task(checkpoint, tmp_path, caplog):
    kernel, bias = checkpoint("CONTRADICTION", "NEUTRAL", "ENTAILMENT")
    with caplog.at_level("INFO", LOGGER):
        out = head_of(tmp_path, MNLI).out
    np.testing.assert_array_equal(out.kernel[...], kernel[:, [2, 1, 0]])
    np.testing.assert_array_equal(out.bias[...], bias[[2, 1, 0]])
    assert [r.message for r in caplog.records if r.name == LOGGER] == [
        f"model.source={tmp_path}: its output layer is used, matched by label names"
    ]
    caplog.clear()
    with caplog.at_level("INFO", LOGGER):
        head_of(tmp_path, MNLI, pooling="cls")
    assert not [r for r in caplog.records if r.name == LOGGER]
    np.testing.assert_array_equal(head_of(tmp_path, None).out.kernel[...], kernel)


def test_other_names_start_a_fresh_output_layer_and_keep_the_pooler(checkpoint, tmp_path, caplog):
    checkpoint("LABEL_0", "LABEL_1", "LABEL_2")
    with caplog.at_level("INFO", LOGGER):
        head, fresh = (head_of(tmp_path, labels) for labels in (MNLI, ()))
    pooled = head_of(tmp_path, None)
    assert not head.out.bias[...].any()
    np.testing.assert_array_equal(head.out.kernel[...], fresh.out.kernel[...])
    np.testing.assert_array_equal(head.dense.kernel[...], pooled.dense.kernel[...])
    messages = [r.message for r in caplog.records if r.name == LOGGER]
    reason = "the output layer starts fresh, as its label names are not the task's"
    assert messages == [f"model.source={tmp_path}: {reason}"] * 2


def test_a_layer_of_another_width_starts_fresh_with_a_line(checkpoint, tmp_path, caplog):
    checkpoint("entailment", "neutral", "contradiction")
    config = ModelConfig(source=str(tmp_path), pooling="pooler")
    with caplog.at_level("INFO", LOGGER):
        load_model(config, 2, key=jax.random.key(0), labels=RTE)
    assert [r.message for r in caplog.records if r.name == LOGGER] == [
        f"model.source={tmp_path}: the output layer starts fresh, as it has none of this size"
    ]
