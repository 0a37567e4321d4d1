"""Training of causal language models: losses against transformers, and the user's path."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax import data
from lorax.errors import LoraxError
from lorax.models import smoothed_losses
from lorax.models.layers.token_loss import token_scores
from lorax.train import check_trial, run_trial
from lorax.train.dataset import load_dataset
from lorax.train.evaluation import predict_all, score
from lorax.train.next_tokens import score_examples
from lorax.train.setup import hyper_of, prepare
from lorax.train.step import init_state, predict, train_step
from tests.helpers.causal_zoo import load_lm, write_lm_base, write_pairs, write_text

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_lm_base(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture
def trial(world, base, pairs, tmp_path):
    def make(**changes):
        model = {"source": str(base), "name": "lm", **changes.pop("model", {})}
        config = world.trial(tmp_path, model=model, **changes)
        config.task = dataclasses.replace(
            config.task,
            **{"name": "instructions", "data_dir": str(pairs), "max_length": 24}
            | changes.get("task", {}),
        )
        return config

    return make


def torch_losses(folder, encoded):
    """Of each example (summed loss in nats, target tokens), by transformers, one at a time."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    found = []
    for ids, marks in zip(encoded.input_ids, encoded.token_type_ids, strict=True):
        labels = torch.tensor(np.where(marks, ids, -100)[None], dtype=torch.long)
        with torch.no_grad():
            loss = model(torch.tensor(ids[None], dtype=torch.long), labels=labels).loss
        found.append((float(loss) * marks.sum(), marks.sum()))
    return np.asarray(found)


def test_losses_of_packed_examples_are_those_of_transformers(trial, base):
    config = trial()
    dataset, setup = load_dataset(config), prepare(config)
    dev = dataset.dev["dev"]
    outputs = predict_all(setup, dataset, dev, setup.trainable, 16)
    expected = torch_losses(base, dev)
    np.testing.assert_allclose(outputs[:, :2], expected, rtol=2e-5)
    metrics = score(dataset, {"dev": outputs})
    mean = expected[:, 0].sum() / expected[:, 1].sum()
    assert metrics["loss"] == pytest.approx(mean, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert 0 <= metrics["token_accuracy"] <= 1


def test_a_padded_batch_scores_as_a_packed_one(trial):
    config = trial()
    dataset, setup = load_dataset(config), prepare(config)
    dev = dataset.dev["dev"]
    packed = predict_all(setup, dataset, dev, setup.trainable, 16)
    padded = predict(
        setup.program, setup.trainable, setup.frozen, data.pad(dev, np.arange(len(dev)))
    )
    np.testing.assert_allclose(padded, packed, rtol=2e-5, atol=1e-6)


def test_the_steps_loss_is_the_mean_over_all_target_tokens(trial, base):
    config = trial()
    dataset, setup = load_dataset(config), prepare(config)
    indices = data.train_batches(len(dataset.train), 16, seed=0, epoch=0)[0]
    (batch,) = data.collate_alike(dataset.train, [indices], dataset.layout)
    hyper = hyper_of(config)
    state = init_state(setup.trainable, hyper, setup.dropout_key)
    copy = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    _, loss = train_step(setup.program, copy, setup.frozen, hyper, batch)
    total, tokens = torch_losses(base, dataset.train.subset(indices)).sum(0)
    assert float(loss) == pytest.approx(total / tokens, rel=1e-5)


def test_micro_batches_of_unlike_token_counts_are_one_batch(trial):
    results = []
    for parts in (1, 4):
        config = trial(train={"grad_accum": parts, "batch_size": 16})
        dataset, setup = load_dataset(config), prepare(config)
        indices = np.arange(16)
        (batch,) = data.collate_alike(dataset.train, [indices], dataset.layout, parts=parts)
        hyper = hyper_of(config)
        state = init_state(setup.trainable, hyper, setup.dropout_key)
        state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
        state, loss = train_step(setup.program, state, setup.frozen, hyper, batch)
        moments = jax.tree.leaves(state.opt_state)
        results.append([np.asarray(loss), *map(np.asarray, moments)])
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("most_logits", [1, 300, 700])
def test_parts_of_the_logits_give_the_same_scores_and_gradients(most_logits):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 7, 5)), jnp.float32)
    table = jnp.asarray(rng.normal(size=(50, 5)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, 50, (3, 7)))

    def total(table, x, most):
        scores = token_scores(lambda h: h @ table.T, x, labels, 50, most_logits=most)
        return (scores.losses * jnp.arange(21.0).reshape(3, 7)).sum(), scores

    (_, whole), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(table, x, 10**9)
    (_, parts), found = jax.value_and_grad(total, (0, 1), has_aux=True)(table, x, most_logits)
    assert (parts.hits == whole.hits).all()
    np.testing.assert_allclose(parts.losses, whole.losses, rtol=1e-6)
    for one, other in zip(found, grads, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_logits_of_all_tokens_never_exist_at_once(base):
    """The step's program holds no array of tokens x vocabulary once that is large."""
    model = load_lm(base)
    config = dataclasses.replace(model.config, vocab_size=2**20)
    batch = {name: jnp.zeros((4, 64), jnp.int32) for name in ("input_ids", "token_type_ids")}
    batch |= {"segment_ids": jnp.ones((4, 64), jnp.int32), "weights": jnp.ones(1)}
    x = jnp.zeros((4, 64, 2))

    def loss(table):
        scores = token_scores(lambda h: h @ table.T, x, batch["input_ids"], config.vocab_size)
        return scores.losses.sum()

    table = jax.ShapeDtypeStruct((config.vocab_size, 2), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(table).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 64 * config.vocab_size * 4 / 2


def test_a_language_model_learns_and_leaves_its_adapter(trial, tmp_path):
    result = run_trial(trial(train={"max_steps": 30, "eval_every": 10}))
    assert result["status"] == "finished" and result["metric"] == "perplexity"
    assert result["head_params"] == 0
    assert result["trainable_params"] == result["adapter_params"] > 0
    records = [json.loads(line) for path in tmp_path.glob("*/*/metrics.jsonl")
               for line in path.open()]  # fmt: skip
    curve = [record["perplexity"] for record in records if record["kind"] == "eval"]
    assert len(curve) == 3 and result["best"]["metrics"]["perplexity"] == min(curve) < curve[0]


def test_blocks_of_a_text_are_trained_on(trial, tmp_path):
    file = write_text(tmp_path / "style.txt")
    config = trial(task={"name": "text", "data_dir": str(file)}, train={"max_steps": 3})
    dataset = load_dataset(config)
    assert dataset.train.lengths.max() == 24 and (dataset.dev["dev"].lengths <= 24).all()
    assert run_trial(config)["status"] == "finished"


def test_full_fine_tuning_moves_tied_embeddings_too(trial):
    config = trial(train={"mode": "full", "max_steps": 2}, optimizer={"lr": 1e-3})
    result = run_trial(config)
    assert result["trainable_params"] == result["base_params"]
    assert result["base_bytes"] == 4 * result["base_params"]


def test_a_gradient_reaches_the_adapter_by_target_tokens_alone(trial):
    config = trial()
    dataset, setup = load_dataset(config), prepare(config)
    batch = data.pad(dataset.train, np.arange(4))
    model_free = {**batch, "token_type_ids": np.zeros_like(batch["token_type_ids"])}
    outputs = predict(setup.program, setup.trainable, setup.frozen, model_free)
    assert (np.asarray(outputs) == 0).all()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train": {"mode": "head"}}, r"train\.mode=head: task instructions has no head"),
        ({"optimizer": {"head_lr": 0.1}}, r"optimizer\.head_lr=0\.1: .* has no head"),
        ({"model": {"pooling": "cls"}}, r"model\.pooling=cls: a language model has no head"),
        ({"task": {"max_length": 65}}, r"task\.max_length=65 is above the 64 positions"),
        ({"task": {"data_dir": None}}, r"task instructions reads your own files"),
    ],
)
def test_what_cannot_be_trained_is_refused(trial, changes, match):
    with pytest.raises(LoraxError, match=match):
        check_trial(trial(**changes))


def test_an_encoder_cannot_go_on_with_a_text_nor_a_decoder_classify(trial, world):
    config = trial()
    config.model.source = str(world.source)
    with pytest.raises(LoraxError, match=r"'bert' is an encoder; a causal language model takes"):
        check_trial(config)
    config = world.trial()
    config.model.source = trial().model.source
    with pytest.raises(LoraxError, match=r"'llama' is a decoder; a classifier takes one of"):
        check_trial(config)


def test_scores_of_no_example_leak_into_another(base):
    """A row of two examples scores each as alone."""
    model = load_lm(base)
    rng = np.random.default_rng(3)
    encoded = data.Encoded(
        [rng.integers(4, 40, n).astype(np.int32) for n in (5, 7)],
        [np.r_[0, np.ones(n - 1)].astype(np.int32) for n in (5, 7)],
        np.zeros(2, np.int32),
    )
    layout = data.Layout(16, (1,), 2)
    both = data.collate(encoded, np.arange(2), [[1, 0]], layout, rows=1)
    alone = [score_examples(model, data.pad(encoded, np.asarray([n])), None)[0] for n in range(2)]
    np.testing.assert_allclose(score_examples(model, both, None), alone, rtol=1e-5)


def test_smoothed_targets_are_those_of_torch(trial, base):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(9, 17)).astype(np.float32), rng.integers(0, 17, 9)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits), torch.tensor(labels), label_smoothing=0.1, reduction="none"
    )
    np.testing.assert_allclose(smoothed_losses(logits, labels, 0.1), expected, rtol=1e-5)
    plain, smooth = trial(), trial(train={"label_smoothing": 0.1})
    outputs = []
    for config in (plain, smooth):
        dataset, setup = load_dataset(config), prepare(config)
        outputs.append(predict_all(setup, dataset, dataset.dev["dev"], setup.trainable, 16))
    np.testing.assert_array_equal(*outputs)  # scores are never smoothed
    hyper, batch = hyper_of(smooth), data.pad(dataset.train, np.arange(8))
    state = init_state(setup.trainable, hyper, setup.dropout_key)
    state = jax.tree.map(lambda x: jnp.array(x, copy=True), state)
    _, loss = train_step(setup.program, state, setup.frozen, hyper, batch)
    model = load_lm(base)
    logits = model(batch["input_ids"], batch["attention_mask"])[:, :-1]
    marks = batch["token_type_ids"][:, 1:] != 0
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(np.asarray(logits)[marks]),
        torch.tensor(batch["input_ids"][:, 1:][marks], dtype=torch.long),
        label_smoothing=0.1,
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
