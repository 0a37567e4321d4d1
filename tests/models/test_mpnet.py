"""MPNet against `transformers`' own, and several sequences in a row against each alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.errors import LoraxError
from lorax.lora import LoraSpec, resolve
from lorax.models import hf_module
from lorax.models.classifier import POOLINGS
from lorax.models.families.mpnet import MPNetConfig, relative_buckets
from tests.helpers.encoders import (
    NO_DROPOUT,
    SMALL,
    compare,
    encoded_texts,
    outputs_alone,
    outputs_packed,
    random_classifier,
)
from tests.helpers.run_model import run

pytestmark = pytest.mark.slow

CONFIG = {"model_type": "mpnet", **SMALL}
VARIANTS = [
    {},
    {"num_attention_heads": 1, "hidden_act": "relu", "layer_norm_eps": 1e-5},
    {"num_attention_heads": 6, "hidden_act": "gelu_new", "num_hidden_layers": 1},
    {"max_position_embeddings": 202},
]


def lengths_of(options):
    """Long sequences where there are positions, so as to fill all buckets."""
    return (200, 4, 150) if options.get("max_position_embeddings") == 202 else (9, 4, 1, 7)


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def compared(request, tmp_path_factory):
    shape = {"types": 1, "lengths": lengths_of(request.param)}
    folder = tmp_path_factory.mktemp("mpnet")
    return compare(folder, "mpnet", request.param, inputs=2, **shape)


@pytest.fixture
def write_mpnet(write_checkpoint):
    return functools.partial(write_checkpoint, "mpnet")


def ragged(batch, side, options):
    """Ids and mask."""
    return batch("mpnet", side=side, types=1, lengths=lengths_of(options))[:2]


def torch_outputs(model, arrays):
    torch = pytest.importorskip("torch")
    ids, mask = (torch.tensor(x, dtype=torch.long) for x in arrays)
    return model(input_ids=ids, attention_mask=mask)


def classifier(pooling="mean", attention="einsum", remat=False, **options):
    config = MPNetConfig.from_hf(CONFIG | options)
    return random_classifier(config, pooling, attention, remat=remat)


def test_hidden_states_equal_transformers(compared):
    want, got = compared.hidden
    real = compared.real
    np.testing.assert_allclose(got[real], want[real], rtol=0, atol=1e-5)


def test_logits_equal_transformers(compared):
    want, got = compared.logits
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_buckets_equal_transformers():
    modeling = pytest.importorskip("transformers.models.mpnet.modeling_mpnet")
    torch = pytest.importorskip("torch")
    positions = np.arange(600)
    ahead = torch.tensor(positions[None] - positions[:, None])
    want = modeling.MPNetEncoder.relative_position_bucket(ahead).numpy()
    assert set(np.unique(want)) == set(range(32)) - {16}  # nothing is zero tokens ahead
    np.testing.assert_array_equal(relative_buckets(jnp.asarray(positions[None]))[0], want)


def test_query_gradient_equals_torch(write_mpnet, load, batch):
    model = write_mpnet(head=True, num_labels=3)
    arrays = ragged(batch, "right", {})
    torch_outputs(model, arrays).logits.square().sum().backward()
    query = model.mpnet.encoder.layer[1].attention.attn.q.weight.grad.numpy().T
    table = model.mpnet.encoder.relative_attention_bias.weight.grad.numpy()

    graphdef, state = nnx.split(load(3, pooling="pooler"))
    params = nnx.to_pure_dict(state)
    grads = jax.jit(jax.grad(lambda p: jnp.square(nnx.merge(graphdef, p)(*arrays)).sum()))(params)
    encoder = grads["encoder"]
    for got, want in (
        (encoder["layers"][1]["attention"]["query"]["kernel"], query),
        (encoder["relative_bias"]["embedding"], table),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


def test_every_parameter_has_its_torch_name(write_mpnet, load):
    theirs = dict(write_mpnet(head=True, num_labels=3).named_parameters())
    state = nnx.to_pure_dict(nnx.state(load(3, pooling="pooler")))
    paths = [path for path, _ in jax.tree.leaves_with_path(state)]
    ours = [".".join(str(key.key) for key in path) for path in paths]
    assert sorted(hf_module(path, "mpnet") for path in ours) == sorted(theirs)


def test_a_base_checkpoint_gives_a_fresh_head(write_mpnet, load):
    write_mpnet()
    zero, one = (load(pooling="pooler", seed=seed).head.dense.kernel[...] for seed in (0, 1))
    assert not np.allclose(zero, one)


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("attention", ["einsum", "xla"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_rows_equal_a_sequence_a_row(pooling, attention, remat):
    model, encoded = classifier(pooling, attention, remat, **NO_DROPOUT), encoded_texts(types=1)
    alone = outputs_alone(model, encoded, pad=1)  # positions are counted from the ids
    np.testing.assert_allclose(outputs_packed(model, encoded), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_xla_attention_equals_einsum(batch, side):
    arrays = ragged(batch, side, {})
    plain, fused = (run(classifier(attention=a, **NO_DROPOUT), *arrays) for a in ("einsum", "xla"))
    np.testing.assert_allclose(fused, plain, atol=1e-6)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("attention", ["einsum", "xla"])
def test_bf16_is_finite_and_close(write_mpnet, load, batch, attention, param_dtype):
    write_mpnet()
    ids, mask = ragged(batch, "right", {})
    options = {"attention": attention, "dropout": 0.0}
    half = load(dtype=jnp.bfloat16, param_dtype=param_dtype, **options)
    assert half.encoder.relative_bias.embedding.dtype == param_dtype
    assert run(half.encoder, ids, mask).dtype == jnp.bfloat16
    assert run(half, ids, mask).dtype == jnp.float32
    real = mask.astype(bool)
    got = np.asarray(run(half.encoder, ids, mask)[real], np.float32)
    want = np.asarray(run(load(**options).encoder, ids, mask)[real])
    assert np.abs(got - want).mean() < 0.02 * np.abs(want).mean()


@pytest.mark.parametrize("site", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("remat", [False, True])
def test_each_dropout_acts_alone(batch, site, remat):
    arrays = ragged(batch, "right", {})
    model = classifier("pooler", remat=remat, **(NO_DROPOUT | {site: 0.5}))
    assert not np.allclose(run(model, *arrays), run(model, *arrays, rngs=nnx.Rngs(dropout=0)))


@pytest.mark.parametrize(
    ("targets", "a_layer"), [("q", 1), ("qv", 2), ("qkvo", 4), ("mlp", 2), ("all-linear", 6)]
)
def test_lora_groups_resolve(targets, a_layer):
    base = nnx.to_pure_dict(nnx.state(classifier()))
    found = resolve(base, LoraSpec(rank=2, targets=targets))
    assert len(found) == a_layer * SMALL["num_hidden_layers"]
    assert all(path.startswith("encoder.layers.") for path in found)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("model_type", "bert"),
        ("hidden_act", "swiglu"),
        ("pad_token_id", 0),
        ("relative_attention_num_buckets", 16),
    ],
)
def test_unserved_options_are_refused_by_name(option, value):
    with pytest.raises(LoraxError, match=option):
        MPNetConfig.from_hf(CONFIG | {option: value})


def test_sizes_are_refused_by_name():
    with pytest.raises(LoraxError, match=r"hidden_size=24 .* num_attention_heads=5"):
        MPNetConfig.from_hf(CONFIG | {"num_attention_heads": 5})
    long = jnp.full((1, 31), 5, jnp.int32)
    model = classifier()
    assert jnp.isfinite(run(model, long[:, :30], long[:, :30])).all()
    with pytest.raises(LoraxError, match="has 30 positions"):
        run(model, long, long)
