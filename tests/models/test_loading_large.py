"""Weights are read one at a time, and only when all of them are known to be right."""

import tracemalloc

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from safetensors.numpy import load_file, save_file

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models import check_checkpoint, quantize
from lorax.models.checkpoints.lazy_parameter import LazyParameter
from lorax.models.checkpoints.safetensors import LazyTensor, lazy_tensors
from tests.helpers.causal_zoo import write_lm
from tests.helpers.loading_zoo import DTYPES, MIB, WEIGHTS, load, params_of, write_deep


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    write_deep(folder)
    return folder


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A matrix (12, 10) and a vector (12,) in float32, the matrix in bfloat16, too."""
    file = tmp_path_factory.mktemp("stored") / WEIGHTS
    rng = np.random.default_rng(0)
    matrix, vector = rng.normal(size=(12, 10)), rng.normal(size=12)
    arrays = {"w": matrix.astype(np.float32), "b": vector.astype(np.float32)}
    save_file(arrays | {"half": np.asarray(matrix, jnp.bfloat16)}, file)
    return lazy_tensors(file), load_file(file)


def within(length):
    ends = st.tuples(st.integers(0, length), st.integers(0, length))
    return ends.map(lambda pair: tuple(sorted(pair)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_a_part_of_a_weight_is_that_of_the_whole(stored, data):
    """Any bounds, of transposed and of fused weights, in either dtype."""
    tensors, arrays = stored
    name = data.draw(st.sampled_from(["w", "b", "half"]))
    is_transposed = name != "b" and data.draw(st.booleans())
    turned = arrays[name].T if is_transposed else arrays[name]
    of = data.draw(st.sampled_from([n for n in (1, 2, 3, 5) if turned.shape[-1] % n == 0]))
    part = data.draw(st.integers(0, of - 1))
    want = np.split(turned, of, axis=-1)[part]
    weight = LazyParameter(tensors[name], want.shape, is_transposed, part * want.shape[-1])
    np.testing.assert_array_equal(weight.read(), want)
    bounds = tuple(data.draw(within(length)) for length in want.shape)
    got = weight.read(bounds)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want[tuple(slice(*b) for b in bounds)])


def test_a_file_that_goes_away_is_one_line(tmp_path):
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / WEIGHTS)
    (tensor,) = lazy_tensors(tmp_path / WEIGHTS).values()
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(LoraxError, match=r"model\.safetensors is damaged") as caught:
        tensor[...]
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_reads(monkeypatch):
    """Fails whatever reads a weight."""

    def refuse(self, index):
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(LazyTensor, "__getitem__", refuse)


def test_names_and_shapes_are_checked_before_any_weight_is_read(tmp_path, no_reads):
    write_lm(tmp_path, "gpt2")
    check_checkpoint(ModelConfig(source=str(tmp_path)), 0)
    arrays = dict(load_file(tmp_path / WEIGHTS))
    del arrays["transformer.ln_f.bias"]
    arrays["transformer.h.0.attn.c_attn.weight"] = np.zeros((24, 71), np.float32)
    save_file(arrays, tmp_path / WEIGHTS)
    for check in (
        lambda: load(tmp_path),
        lambda: check_checkpoint(ModelConfig(source=str(tmp_path)), 0),
    ):
        with pytest.raises(LoraxError, match=r"missing ln_f\.bias") as caught:
            check()
        assert "h.0.attn.c_attn.weight has shape (24, 71), expected (24, 72)" in str(caught.value)


@pytest.mark.parametrize("kind", DTYPES)
def test_the_host_never_holds_the_base(deep, kind):
    """Whatever it is stored as: a few tensors at a time. Devices' own memory is not counted."""
    arrays = load_file(deep / WEIGHTS)
    largest, total = (f(x.nbytes for x in arrays.values()) for f in (max, sum))
    del arrays
    load(deep, **DTYPES[kind], remat=True)  # once before, for what Python keeps
    tracemalloc.start()
    load(deep, **DTYPES[kind])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total > 30 * largest
    assert peak < 12 * largest + MIB < total / 2, (peak, largest, total)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_kernels_are_those_of_the_whole_weights(deep, kind):
    plain, small = params_of(load(deep)), params_of(load(deep, quantized=kind))
    layer, kept = (p["decoder"]["layers"][7]["mlp"]["down"]["kernel"] for p in (plain, small))
    want = quantize(layer, kind)
    np.testing.assert_array_equal(kept.codes, want.codes)
    np.testing.assert_array_equal(kept.scales, want.scales)
    assert isinstance(kept.codes, jax.Array)


def test_bf16_is_rounded_as_by_jax(deep):
    plain, half = params_of(load(deep)), params_of(load(deep, param_dtype=jnp.bfloat16))
    want = jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain)
    jax.tree.map(np.testing.assert_array_equal, half, want)


def test_few_bits_are_not_cut(deep):
    with pytest.raises(LoraxError, match="a base in nf4 is not cut over devices: take bf16"):
        load(deep, quantized="nf4", shardings=lambda shape: None)
