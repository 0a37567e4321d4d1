"""DeBERTa-v2 against `transformers`' own, and several sequences in a row against each alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.errors import LoraxError
from lorax.lora import LoraSpec, adapt, init, merge, resolve
from lorax.models import hf_module
from lorax.models.families.deberta import DebertaConfig, relative_rows
from tests.helpers.encoders import (
    NO_DROPOUT,
    SMALL,
    compare,
    dropout_draws,
    encoded_texts,
    outputs_alone,
    outputs_packed,
    random_classifier,
)
from tests.helpers.run_model import run

pytestmark = pytest.mark.slow

V3 = {
    "relative_attention": True,
    "pos_att_type": "p2c|c2p",
    "share_att_key": True,
    "position_buckets": 6,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
}
CONFIG = {"model_type": "deberta-v2", **SMALL}
CONV = {"conv_kernel_size": 3, "conv_act": "gelu"}  # as the 1.5B model has it
ONE_LAYER = {"num_hidden_layers": 1}
UNSHARED = V3 | {"share_att_key": False}
POSITIONED = UNSHARED | {"position_biased_input": True}
VARIANTS = [
    V3,
    {},
    {"norm_rel_ebd": "layer_norm", "pos_att_type": ["c2p"], "type_vocab_size": 2},
    UNSHARED | {"type_vocab_size": 3, "embedding_size": 16, "position_biased_input": True},
    UNSHARED | {"pos_att_type": ["c2p"], "norm_rel_ebd": "none", "hidden_act": "relu"},
    UNSHARED | {"pos_att_type": ["p2c"], "position_buckets": -1, "max_relative_positions": 3},
    V3 | {"position_buckets": -1, "num_attention_heads": 1, "layer_norm_eps": 1e-5},
    V3 | {"pos_att_type": "p2c", "embedding_size": 32, "num_attention_heads": 6},
    V3 | {"position_buckets": 5, "max_relative_positions": 7, "num_hidden_layers": 1},
    V3 | {"pos_att_type": [], "position_biased_input": True},
    V3 | CONV,
    {"conv_kernel_size": 5} | ONE_LAYER,
]


LENGTHS = (29, 9, 1, 17)


def types_of(options):
    return max(options.get("type_vocab_size", 0), 1)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def compared(request, tmp_path_factory):
    shape = {"types": types_of(request.param), "lengths": LENGTHS}
    return compare(tmp_path_factory.mktemp("deberta"), "deberta-v2", request.param, **shape)


@pytest.fixture
def write_deberta(write_checkpoint):
    return functools.partial(write_checkpoint, "deberta-v2")


def ragged(batch, side, options):
    return batch("deberta-v2", side=side, types=types_of(options), lengths=LENGTHS)


def torch_outputs(model, arrays):
    torch = pytest.importorskip("torch")
    ids, mask, types = (torch.tensor(x, dtype=torch.long) for x in arrays)
    return model(input_ids=ids, attention_mask=mask, token_type_ids=types)


def classifier(pooling="mean", attention="einsum", remat=False, **options):
    config = DebertaConfig.from_hf(CONFIG | options)
    return random_classifier(config, pooling, attention, remat=remat)


def test_hidden_states_equal_transformers(compared):
    want, got = compared.hidden  # padding's, too
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_logits_equal_transformers(compared):
    want, got = compared.logits
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_every_parameter_has_its_torch_name(compared):
    state = nnx.to_pure_dict(nnx.state(compared.ours))
    paths = [path for path, _ in jax.tree.leaves_with_path(state)]
    ours = [".".join(str(key.key) for key in path) for path in paths]
    theirs = dict(compared.theirs.named_parameters())
    assert sorted(hf_module(path, "deberta-v2") for path in ours) == sorted(theirs)


@pytest.mark.parametrize(("buckets", "farthest"), [(256, 512), (6, 32), (5, 7), (-1, 512), (-1, 9)])
def test_rows_equal_transformers(buckets, farthest):
    modeling = pytest.importorskip("transformers.models.deberta_v2.modeling_deberta_v2")
    torch = pytest.importorskip("torch")
    options = {"position_buckets": buckets, "max_relative_positions": farthest}
    config = DebertaConfig.from_hf(CONFIG | V3 | options)
    states = torch.zeros(600, 1)
    found = modeling.build_relative_position(states, states, buckets, farthest)[0].numpy()
    want = np.clip(found + config.span, 0, 2 * config.span - 1)
    np.testing.assert_array_equal(relative_rows(config, jnp.arange(600)[None])[0], want)


@pytest.mark.parametrize("options", [V3, UNSHARED])
def test_query_gradient_equals_torch(write_deberta, load, batch, options):
    model = write_deberta(head=True, num_labels=3, **options)
    arrays = ragged(batch, "right", options)
    torch_outputs(model, arrays).logits.square().sum().backward()
    theirs = model.deberta.encoder
    graphdef, state = nnx.split(load(3, pooling="pooler"))
    params = nnx.to_pure_dict(state)
    grads = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(*arrays)).sum()))(params)
    encoder = grads["encoder"]
    for got, weight in (
        (encoder["layers"][0]["attention"]["query"]["kernel"].T,
         theirs.layer[0].attention.self.query_proj.weight),
        (encoder["layers"][1]["attention"]["query"]["kernel"].T,
         theirs.layer[1].attention.self.query_proj.weight),
        (encoder["relative"]["embedding"], theirs.rel_embeddings.weight),
    ):  # fmt: skip
        want = weight.grad.numpy()
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_the_head_drops_at_its_own_rate(batch):
    model = classifier("pooler", cls_dropout=0.5, **V3, **NO_DROPOUT)
    arrays = ragged(batch, "right", V3)
    assert not np.allclose(run(model, *arrays), run(model, *arrays, rngs=nnx.Rngs(dropout=0)))
    assert dropout_draws(model, arrays) == 1


@pytest.mark.parametrize(
    ("pooling", "attention", "remat", "options"),
    [  # every pooling, attention and kind of model meets each of the others'
        ("mean", "einsum", True, V3),
        ("mean", "xla", False, POSITIONED),
        ("mean", "einsum", False, V3 | CONV),
        ("mean", "xla", True, CONV | ONE_LAYER),
        ("cls", "xla", True, V3),
        ("cls", "einsum", True, POSITIONED),
        ("cls", "xla", False, V3 | CONV),
        ("cls", "einsum", False, CONV | ONE_LAYER),
        ("pooler", "xla", False, V3),
        ("pooler", "einsum", False, POSITIONED),
        ("pooler", "einsum", True, V3 | CONV),
        ("pooler", "xla", True, CONV | ONE_LAYER),
    ],
)
def test_packed_rows_equal_a_sequence_a_row(pooling, attention, remat, options):
    options = {"type_vocab_size": 2, **options, **NO_DROPOUT}
    model, encoded = classifier(pooling, attention, remat, **options), encoded_texts()
    alone = outputs_alone(model, encoded)
    np.testing.assert_allclose(outputs_packed(model, encoded), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_xla_attention_equals_einsum(batch, side):
    arrays = ragged(batch, side, V3)
    models = (classifier("pooler", attention=a, **V3, **NO_DROPOUT) for a in ("einsum", "xla"))
    plain, fused = (run(model, *arrays) for model in models)
    np.testing.assert_allclose(fused, plain, atol=1e-6)


def test_an_empty_sequence_gives_finite_logits():
    ids = jnp.ones((1, 4), jnp.int32)
    assert jnp.isfinite(run(classifier(**V3), ids, jnp.zeros_like(ids))).all()


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("attention", ["einsum", "xla"])
def test_bf16_is_finite_and_close(write_deberta, load, batch, attention, param_dtype):
    write_deberta(**V3)
    arrays = ragged(batch, "right", V3)
    options = {"attention": attention, "dropout": 0.0}
    half = load(dtype=jnp.bfloat16, param_dtype=param_dtype, **options)
    assert half.encoder.relative.embedding.dtype == param_dtype
    assert run(half.encoder, *arrays).dtype == jnp.bfloat16
    assert run(half, *arrays).dtype == jnp.float32
    real = arrays[1].astype(bool)
    got = np.asarray(run(half.encoder, *arrays)[real], np.float32)
    want = np.asarray(run(load(**options).encoder, *arrays)[real])
    assert np.abs(got - want).mean() < 0.02 * np.abs(want).mean()


@pytest.mark.parametrize("site", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_each_dropout_acts_alone(batch, site):
    arrays = ragged(batch, "right", V3)
    model = classifier("pooler", remat=True, **V3, **(NO_DROPOUT | {site: 0.5}))
    assert not np.allclose(run(model, *arrays), run(model, *arrays, rngs=nnx.Rngs(dropout=0)))


@pytest.mark.parametrize(
    ("targets", "a_layer"), [("q", 1), ("qv", 2), ("qkvo", 4), ("mlp", 2), ("all-linear", 6)]
)
def test_lora_groups_resolve(targets, a_layer):
    base = nnx.to_pure_dict(nnx.state(classifier(**V3 | CONV)))
    found = resolve(base, LoraSpec(rank=2, targets=targets))
    assert len(found) == a_layer * SMALL["num_hidden_layers"]
    assert all(path.startswith("encoder.layers.") for path in found)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "deberta"),
        ("hidden_act", "swiglu"),
        ("conv_kernel_size", 4),
        ("conv_groups", 2),
        ("norm_rel_ebd", "batch_norm"),
        ("pooler_dropout", 0.1),
        ("pooler_hidden_act", "tanh"),
        ("pooler_hidden_size", 12),
        ("pos_att_type", "c2p|p2p"),
    ],
)
def test_unserved_options_are_refused_by_name(option, value):
    with pytest.raises(LoraxError, match=option):
        DebertaConfig.from_hf(CONFIG | {option: value})


def test_sizes_are_refused_by_name():
    with pytest.raises(LoraxError, match=r"hidden_size=24 .* num_attention_heads=5"):
        DebertaConfig.from_hf(CONFIG | {"num_attention_heads": 5})
    long = jnp.full((1, 33), 5, jnp.int32)
    model = classifier(**V3)
    assert jnp.isfinite(run(model, long[:, :32], long[:, :32])).all()
    with pytest.raises(LoraxError, match="has 32 positions"):
        run(model, long, long)


def test_the_table_of_distances_takes_an_adapter():
    model = classifier(**V3, **NO_DROPOUT)
    graphdef, state = nnx.split(model)
    base, spec = nnx.to_pure_dict(state), LoraSpec(rank=2, alpha=4, targets="relative")
    lora = jax.tree.map(lambda x: x + 0.5, init(jax.random.key(0), base, spec))
    ids = jnp.arange(3, 12)[None]
    adapted, merged, plain = (
        run(each, ids, jnp.ones_like(ids))
        for each in (
            adapt(model, lora, spec),
            nnx.merge(graphdef, merge(base, lora, spec)),
            model,
        )
    )
    np.testing.assert_allclose(adapted, merged, rtol=0, atol=1e-5)
    assert not np.allclose(adapted, plain, atol=1e-3)
