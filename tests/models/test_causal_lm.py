"""What holds of every decoder: packed rows, the cache, adapters, names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.lora import LoraSpec, adapt, init, resolve
from lorax.lora.paths import leaves_by_path
from lorax.models import load_causal_lm
from lorax.models.causal_lm import CausalLM, KVCache
from lorax.models.checkpoints.tensor_names import hf_module, is_transposed
from lorax.models.families import DECODERS
from tests.helpers.causal_zoo import SIDES, load_lm, ragged, torch_logits, write_lm
from tests.helpers.run_model import quick_jit, run

pytestmark = pytest.mark.slow

VARIANTS = {
    "llama": {},
    "mistral": {"sliding_window": 3},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gpt2": {},
}
each_model_type = pytest.mark.parametrize("model_type", VARIANTS)


@pytest.fixture
def written(tmp_path):
    return lambda model_type, **options: write_lm(
        tmp_path, model_type, **(VARIANTS[model_type] | options)
    )


@pytest.fixture
def load(tmp_path):
    return functools.partial(load_lm, tmp_path)


def params_of(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_all_decoders_are_tested():
    assert set(VARIANTS) == set(DECODERS)


@each_model_type
def test_every_parameter_has_its_torch_name(written, load, model_type):
    theirs, ours = written(model_type), load()
    names = dict(theirs.named_parameters())
    found = set()
    for path, array in leaves_by_path(params_of(ours)).items():
        name = hf_module(path, model_type)
        found.add(name)
        want = names[name].detach().numpy()
        want = want.T if is_transposed(path, model_type) else want
        if "c_attn" in name:
            part = ("query", "key", "value").index(path.split(".")[-2])
            want = np.split(want, 3, axis=-1)[part]
        np.testing.assert_array_equal(array, want)
    assert found == set(names)


@pytest.mark.parametrize("remat", [False, True])
@each_model_type
def test_query_gradient_equals_torch(written, load, model_type, remat):
    theirs = written(model_type)
    ids, mask = ragged()
    weights = mask[:, :, None].astype(np.float32)
    torch_weights = torch_logits(theirs, ids, mask).new_tensor(weights)
    (torch_logits(theirs, ids, mask) * torch_weights).square().sum().backward()
    path = "decoder.layers.1.attention.query.kernel"
    want = dict(theirs.named_parameters())[hf_module(path, model_type)].grad.numpy()
    want = want[:, :24] if model_type == "gpt2" else want.T

    graphdef, state = nnx.split(load(remat=remat))
    params = nnx.to_pure_dict(state)

    def loss(kernel):
        params["decoder"]["layers"][1]["attention"]["query"]["kernel"] = kernel
        return jnp.square(nnx.merge(graphdef, params)(ids, mask) * weights).sum()

    kernel = params["decoder"]["layers"][1]["attention"]["query"]["kernel"]
    got = quick_jit(jax.grad(loss))(kernel)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@each_model_type
def test_packed_rows_equal_a_sequence_a_row(written, load, model_type):
    written(model_type)
    model, lengths = load(), (5, 3, 7)
    ids, mask = ragged(lengths=lengths)
    alone = run(model, ids, mask)
    packed = np.concatenate([row[:n] for row, n in zip(ids, lengths, strict=True)] + [[0, 0]])
    numbers = np.repeat([1, 2, 3, 0], (*lengths, 2))
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])
    rows = [x[None].astype(np.int32) for x in (packed, numbers, positions)]
    together = run(model, rows[0], rows[1], position_ids_BxT=rows[2])
    want = np.concatenate([row[:n] for row, n in zip(alone, lengths, strict=True)])
    np.testing.assert_allclose(together[0, : sum(lengths)], want, rtol=0, atol=1e-5)


@each_model_type
def test_later_tokens_change_nothing(written, load, model_type):
    written(model_type)
    model, (ids, mask) = load(), ragged(lengths=(9, 9))
    other = ids.copy()
    other[:, 5:] = 7
    got, want = run(model, other, mask), run(model, ids, mask)
    np.testing.assert_allclose(got[:, :5], want[:, :5], rtol=0, atol=1e-6)
    assert not np.allclose(got[:, 5:], want[:, 5:], atol=1e-3)


@pytest.mark.parametrize("side", SIDES)
@each_model_type
def test_steps_with_a_cache_equal_the_whole(written, load, model_type, side):
    written(model_type)
    ids, mask = ragged(side)
    graphdef, state = nnx.split(load())
    want = run(nnx.merge(graphdef, state), ids, mask)
    traces = []

    @quick_jit
    def step(ids, mask, cache):
        traces.append(ids.shape)
        return nnx.merge(graphdef, state)(ids, mask, cache=cache)

    cache = KVCache.empty(nnx.merge(graphdef, state).config, len(ids), 12)
    got = []
    for start, stop in [(0, 4), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)]:
        logits, cache = step(ids[:, start:stop], mask[:, start:stop], cache)
        got.append(logits)
    real = mask.astype(bool)
    np.testing.assert_allclose(np.concatenate(got, 1)[real], want[real], rtol=0, atol=1e-5)
    assert traces == [(4, 4), (4, 1)]
    assert cache.next == 9
    np.testing.assert_array_equal(cache.mask[:, :9], mask)


@each_model_type
def test_greedy_continuations_equal_transformers(written, load, model_type):
    torch = pytest.importorskip("torch")
    theirs, model, new = written(model_type), load(), 12
    ids, mask = ragged("left")
    prompt = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
    want = theirs.generate(**prompt, do_sample=False, max_new_tokens=new).numpy()[:, ids.shape[1] :]
    assert len({tuple(row) for row in want}) > 1

    cache = KVCache.empty(model.config, len(ids), ids.shape[1] + new)
    graphdef, state = nnx.split(model)
    step = quick_jit(lambda ids, mask, cache: nnx.merge(graphdef, state)(ids, mask, cache=cache))
    got, chunk, real = [], ids, mask
    for _ in range(new):
        logits, cache = step(chunk, real, cache)
        got.append(np.asarray(logits[:, -1].argmax(-1)))
        chunk, real = got[-1][:, None].astype(np.int32), np.ones((len(ids), 1), np.int32)
    np.testing.assert_array_equal(np.stack(got, 1), want)


def test_a_full_cache_is_refused(written, load):
    written("llama")
    model, (ids, mask) = load(), ragged()
    cache = KVCache.empty(model.config, len(ids), 12)
    _, cache = model(ids, mask, cache=cache)
    with pytest.raises(LoraxError, match="cache of 12 columns, 9 of them filled: no room for 9"):
        model(ids, mask, cache=cache)


@pytest.mark.usefixtures("mixed")
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
@each_model_type
def test_bf16_is_finite_and_close(written, load, model_type, param_dtype):
    written(model_type)
    ids, mask = ragged("left")
    want = np.asarray(run(load(), ids, mask))
    half = load(dtype=jnp.bfloat16, param_dtype=param_dtype)
    assert {x.dtype for x in jax.tree.leaves(params_of(half))} == {jnp.dtype(param_dtype)}
    got, cached = run(half, ids, mask), KVCache.empty(half.config, len(ids), 12, jnp.bfloat16)
    assert got.dtype == jnp.float32
    assert jnp.isfinite(got).all()  # of padding, too, that attends to nothing
    real = mask.astype(bool)
    assert np.abs(got - want)[real].mean() < 0.02 * np.abs(want[real]).mean()
    logits, cached = run(half, ids, mask, cache=cached)
    assert cached.keys[0].dtype == jnp.bfloat16
    assert np.abs(logits - want)[real].mean() < 0.02 * np.abs(want[real]).mean()


@each_model_type
def test_a_stack_of_adapters_equals_each_alone(written, load, model_type):
    written(model_type)
    model, (ids, mask), spec = load(), ragged(), LoraSpec(rank=2, targets="all-linear")
    graphdef, state = nnx.split(model)
    lora = init(jax.random.key(0), nnx.to_pure_dict(state), spec)
    keys = iter(jax.random.split(jax.random.key(1), 2 * len(lora)))
    # Factors of 0.3 would outweigh the base, and turn a last bit of it into 1e-5 of the logits.
    stacked = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), (3, *x.shape)), lora)

    @jax.jit
    def logits(lora):
        return adapt(nnx.merge(graphdef, state), lora, spec)(ids, mask)

    got = jax.jit(jax.vmap(logits))(stacked)
    for n in range(3):
        want = logits(jax.tree.map(lambda x, n=n: x[n], stacked))
        np.testing.assert_allclose(got[n], want, rtol=0, atol=1e-5)
    assert not np.allclose(got[0], got[1], atol=1e-2)


@each_model_type
def test_groups_of_targets_resolve(written, load, model_type):
    written(model_type)
    params = params_of(load())
    attention = ["query", "key", "value", "out"]
    mlp = ["up", "down"] if model_type == "gpt2" else ["gate", "up", "down"]
    groups = {
        "q": attention[:1],
        "qv": ["query", "value"],
        "qkvo": attention,
        "mlp": mlp,
        "all-linear": attention + mlp,
    }
    for group, modules in groups.items():
        found = resolve(params, LoraSpec(rank=2, targets=group))
        assert {path.split(".")[-2] for path in found} == set(modules)
        assert len(found) == 2 * len(modules)


@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_is_the_embeddings(written, load, tied):
    written("llama", tie_word_embeddings=tied)
    assert ("lm_head" in params_of(load())) == (not tied)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_weights_without_use_are_left(written, load, tmp_path, model_type):
    numpy = pytest.importorskip("safetensors.numpy")
    written(model_type, tie_word_embeddings=True)
    file = tmp_path / "model.safetensors"
    tensors = numpy.load_file(file)
    useless = {
        "llama": ["score.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"],
        "gpt2": ["score.weight", "transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    }[model_type]
    numpy.save_file(tensors | {name: np.ones((2, 2), np.float32) for name in useless}, file)
    assert isinstance(load(), CausalLM)
    numpy.save_file(tensors | {"model.other.weight": np.ones(2, np.float32)}, file)
    with pytest.raises(LoraxError, match="unexpected"):
        load()


def test_what_is_no_decoder_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(LoraxError, match=r"'bert' is an encoder; .* takes one of: .*llama"):
        load_causal_lm(ModelConfig(source=str(tmp_path)))


def test_dropout_of_the_model_replaces_its_rates(written, load):
    written("gpt2")
    config = load(dropout=0.25).config
    assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.25,) * 3
    with pytest.raises(LoraxError, match=r"model\.dropout=1 is not in"):
        load(dropout=1)
