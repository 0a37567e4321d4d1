import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models import BertConfig, SequenceClassifier, abstract_model
from lorax.models.layers.attention import attend
from lorax.models.layers.functions import ACTIVATIONS, dropout
from tests.helpers.encoders import NO_DROPOUT, SMALL, compare, dropout_draws, random_classifier
from tests.helpers.run_model import run

pytestmark = pytest.mark.slow

CONFIG = {"model_type": "bert", **SMALL}
VARIANTS = [
    ("bert", {}),
    ("bert", {"num_attention_heads": 1, "hidden_act": "relu"}),
    ("bert", {"num_attention_heads": 6, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    ("bert", {"num_hidden_layers": 1, "type_vocab_size": 4, "hidden_act": "silu"}),
    ("roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    ("roberta", {"num_attention_heads": 4, "type_vocab_size": 2, "hidden_act": "gelu"}),
    ("xlm-roberta", {"type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    ("camembert", {"type_vocab_size": 1}),
    ("electra", {"embedding_size": 16}),
    ("electra", {"embedding_size": 24, "hidden_act": "relu"}),
    ("distilbert", {}),
    ("distilbert", {"num_attention_heads": 6, "hidden_act": "relu", "sinusoidal_pos_embds": True}),
]


def torch_batch(arrays):
    torch = pytest.importorskip("torch")
    names = ("input_ids", "attention_mask", "token_type_ids")[: len(arrays)]
    return dict(zip(names, (torch.tensor(x, dtype=torch.long) for x in arrays), strict=True))


def classifier(pooling="mean", attention="einsum", **config):
    return random_classifier(BertConfig.from_hf(CONFIG | config), pooling, attention)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def compared(request, tmp_path_factory):
    model_type, options = request.param
    return compare(
        tmp_path_factory.mktemp(model_type),
        model_type,
        options,
        inputs=2 if model_type == "distilbert" else 3,  # it has no token types
        types=options.get("type_vocab_size", 2),
    )


def test_hidden_states_equal_transformers(compared):
    want, got = compared.hidden
    real = compared.real
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-5)


def test_logits_equal_transformers(compared):
    want, got = compared.logits
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_token_types_default_to_zero():
    model, ids = classifier(), jnp.ones((2, 5), jnp.int32)
    np.testing.assert_array_equal(run(model, ids, ids), run(model, ids, ids, jnp.zeros_like(ids)))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_query_gradient_equals_torch(write_checkpoint, load, batch, model_type):
    model = write_checkpoint(model_type, head=True, num_labels=3)
    arrays = batch(model_type)
    model(**torch_batch(arrays)).logits.square().sum().backward()
    layer = getattr(model, model_type).encoder.layer[1]
    want = layer.attention.self.query.weight.grad.numpy().T

    graphdef, state = nnx.split(load(3, pooling="pooler"))
    params = nnx.to_pure_dict(state)

    def loss(kernel):
        params["encoder"]["layers"][1]["attention"]["query"]["kernel"] = kernel
        return jnp.square(nnx.merge(graphdef, params)(*arrays)).sum()

    kernel = params["encoder"]["layers"][1]["attention"]["query"]["kernel"]
    got = jax.jit(jax.grad(loss))(kernel)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_torch(name):
    torch = pytest.importorskip("torch")
    activations = pytest.importorskip("transformers.activations")
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    want = activations.ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x)), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_xla_attention_equals_einsum(batch, side):
    arrays = batch(side=side)
    rates = {"attention_probs_dropout_prob": 0.0}
    plain, fused = (run(classifier(attention=a, **rates), *arrays) for a in ("einsum", "xla"))
    np.testing.assert_allclose(fused, plain, atol=1e-6)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("implementation", ["einsum", "xla"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fully_masked_rows_stay_finite(implementation, dtype):
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 5, 2, 8), dtype)
    mask = jnp.array([[[True] * 5] * 5, [[False] * 5] * 5])
    value, grad = jax.value_and_grad(
        lambda q: attend(q, k, v, mask, implementation=implementation).astype(jnp.float32).sum()
    )(q)
    assert jnp.isfinite(value)
    assert jnp.isfinite(grad).all()


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_an_empty_sequence_gives_finite_logits(pooling):
    ids = jnp.ones((1, 4), jnp.int32)
    assert jnp.isfinite(run(classifier(pooling), ids, jnp.zeros_like(ids))).all()


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_padding_changes_nothing(batch, pooling):
    ids, mask, types = batch(lengths=(6, 6))
    padded = [np.pad(x, ((0, 0), (0, 5))) for x in (ids, mask, types)]
    model = classifier(pooling)
    np.testing.assert_allclose(run(model, *padded), run(model, ids, mask, types), atol=1e-6)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("attention", ["einsum", "xla"])
def test_bf16_is_finite_and_close(write_checkpoint, load, batch, attention, param_dtype):
    write_checkpoint()
    arrays = batch()
    options = {"attention": attention, "dropout": 0.0}
    plain = load(**options)
    half = load(dtype=jnp.bfloat16, param_dtype=param_dtype, **options)
    assert half.encoder.layers[0].attention.query.kernel.dtype == param_dtype
    assert half.head.out.kernel.dtype == jnp.float32
    assert run(half.encoder, *arrays).dtype == jnp.bfloat16
    assert run(half, *arrays).dtype == jnp.float32
    real = arrays[1].astype(bool)
    got = np.asarray(run(half.encoder, *arrays)[real], np.float32)
    want = np.asarray(run(plain.encoder, *arrays)[real])
    assert np.abs(got - want).mean() < 0.02 * np.abs(want).mean()


def test_dropout_needs_rngs(batch):
    arrays, model = batch(), classifier()
    np.testing.assert_array_equal(run(model, *arrays), run(model, *arrays))
    one, again, other = (run(model, *arrays, rngs=nnx.Rngs(dropout=seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one, other)
    assert not np.allclose(one, run(model, *arrays))


@pytest.mark.parametrize(
    "site", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"]
)
@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_each_dropout_acts_alone(batch, model_type, site):
    rates = dict.fromkeys(
        ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"], 0.0
    )
    arrays = batch(model_type)
    model = classifier("pooler", model_type=model_type, **(rates | {site: 0.5}))
    assert not np.allclose(run(model, *arrays), run(model, *arrays, rngs=nnx.Rngs(dropout=0)))


@pytest.mark.parametrize(("model_type", "draws"), [("bert", 1), ("roberta", 2)])
def test_roberta_drops_before_its_pooler_too(batch, model_type, draws):
    model = classifier("pooler", model_type=model_type, classifier_dropout=0.5, **NO_DROPOUT)
    assert dropout_draws(model, batch(model_type)) == draws


def test_dropout_rate_and_scale():
    x = jnp.ones((200, 500))
    y = dropout(x, 0.1, nnx.Rngs(dropout=0))
    assert abs(float((y == 0).mean()) - 0.1) < 0.005
    np.testing.assert_allclose(y[y != 0], 1 / 0.9, rtol=1e-6)
    assert abs(float(y.mean()) - 1) < 0.005


def test_rate_zero_compiles_to_nothing(batch):
    assert dropout_draws(classifier(**NO_DROPOUT), batch()) == 0


@pytest.mark.usefixtures("mixed")
def test_softmax_and_statistics_are_float32_under_bf16(batch):
    model = SequenceClassifier(BertConfig.from_hf(CONFIG), 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    jaxpr = str(jax.make_jaxpr(model)(*batch()))
    lines = [line for line in jaxpr.splitlines() if " = exp " in line or " = rsqrt " in line]
    assert lines
    assert all("f32" in line and "bf16" not in line for line in lines)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "t5"),
        ("position_embedding_type", "relative_key"),
        ("add_cross_attention", True),
        ("is_decoder", True),
        ("hidden_act", "swiglu"),
        ("pruned_heads", {"0": [1]}),
    ],
)
def test_unserved_options_are_refused_by_name(option, value):
    with pytest.raises(LoraxError, match=option):
        BertConfig.from_hf(CONFIG | {option: value})


def test_config_faults_name_the_offender():
    with pytest.raises(LoraxError, match="no vocab_size, hidden_size"):
        BertConfig.from_hf({"model_type": "bert", "num_hidden_layers": 2})
    with pytest.raises(LoraxError, match=r"hidden_size=24 .* num_attention_heads=5"):
        BertConfig.from_hf(CONFIG | {"num_attention_heads": 5})


def test_choices_are_refused_by_name():
    with pytest.raises(LoraxError, match=r"attention='flash' is not one of: einsum, xla, cudnn"):
        classifier(attention="flash")
    with pytest.raises(LoraxError, match=r"pooling='max' is not one of: mean, cls, pooler"):
        classifier(pooling="max")
    for attention in ("xla", "cudnn"):
        with pytest.raises(LoraxError, match="cannot drop attention probabilities"):
            classifier(attention=attention)


@pytest.mark.parametrize(("model_type", "longest"), [("bert", 32), ("roberta", 30)])
def test_sequences_beyond_the_positions_are_refused(model_type, longest):
    model = classifier(model_type=model_type)
    fits = jnp.full((1, longest), 5, jnp.int32)
    assert jnp.isfinite(run(model, fits, jnp.ones_like(fits))).all()
    long = jnp.full((1, longest + 1), 5, jnp.int32)
    with pytest.raises(LoraxError, match=f"has {longest} positions"):
        run(model, long, jnp.ones_like(long))


def test_graph_definitions_are_equal_and_static(write_checkpoint, load, tmp_path, batch):
    write_checkpoint()
    config = ModelConfig(source=str(tmp_path))
    arrays = batch()
    models = [load(seed=0), load(seed=1), abstract_model(config, 3)]
    graphdefs = [nnx.split(model)[0] for model in models]
    assert len(set(graphdefs)) == 1
    assert graphdefs[0] != nnx.split(abstract_model(config, 3, dtype=jnp.bfloat16))[0]

    traces = []

    @jax.jit(static_argnums=0)
    def forward(graphdef, params):
        traces.append(1)
        return nnx.merge(graphdef, params)(*arrays)

    for graphdef, model in zip(graphdefs[:2], models[:2], strict=True):
        forward(graphdef, nnx.to_pure_dict(nnx.state(model)))
    assert len(traces) == 1
