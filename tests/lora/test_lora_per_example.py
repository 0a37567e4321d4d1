"""`adapt_rows` on strangers' NNX models: each row as with its adapter merged, and refusals."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lorax
from tests.helpers.lora import assert_close, merged_model, nnx_params, quick_jit, randomised
from tests.helpers.nnx_zoo import CASES, EinsumAttention

pytestmark = pytest.mark.slow

ROWS = (1, -1, 2, 0, 1)
RANKS = {0: (1, "lora"), 1: (4, "rslora"), 2: (2, "lora")}
every_case = pytest.mark.parametrize("name", CASES)


def batch_of(name):
    """A row for each of ROWS."""
    x = CASES[name].inputs
    shape = x.shape if name == "conv" else x.shape[1:]  # its input there is an image alone
    rng = np.random.default_rng(4)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.asarray(rng.integers(0, 11, (len(ROWS), *shape)))
    return jnp.asarray(rng.normal(size=(len(ROWS), *shape)), jnp.float32)


def adapters_of(name):
    """(model, adapters with specs): three ranks and scales; the second lacks a target."""
    model, params, spec, _ = CASES[name].make()
    found = []
    for seed, (rank, scaling) in RANKS.items():
        own = lorax.LoraSpec(rank, 3, scaling, spec.targets, kernel_axes=lorax.kernel_axes(model))
        lora = jax.eval_shape(lambda own=own: lorax.init(jax.random.key(0), params, own))
        lora = randomised(lora, seed)
        if seed == 1 and len(lora) > 1:
            lora.pop(next(iter(lora)))
        found.append((lora, own))
    return model, found


@cache
def observed(name):
    """Outputs of the rows together and alone, and the gradients of both."""
    model, found = adapters_of(name)
    x, specs = batch_of(name), [spec for _, spec in found]

    def together(pool):
        return lorax.adapt_rows(model, pool, ROWS)(x)

    def alone(loras):
        rows = [
            (model if n < 0 else merged_model(model, loras[n], specs[n]))(x[i : i + 1])
            for i, n in enumerate(ROWS)
        ]
        return jnp.concatenate(rows)

    @quick_jit
    def program(pool, loras):
        y, pullback = jax.vjp(together, pool)
        y_alone, pullback_alone = jax.vjp(alone, loras)
        return y, y_alone, pullback(jnp.cos(y_alone))[0], pullback_alone(jnp.cos(y_alone))[0]

    loras = [lora for lora, _ in found]
    return program(lorax.stack_adapters(found), loras), model(x)


@every_case
def test_each_row_is_that_of_its_adapter_merged(name):
    (y, alone, *_), plain = observed(name)
    assert_close(y, alone)
    rows = np.array(ROWS)
    assert_close(y[rows < 0], plain[rows < 0], tol=1e-6)
    changes = np.abs(y - plain).reshape(len(rows), -1).max(1)
    assert (changes[rows >= 0] > 0.05).all()


@every_case
def test_the_gradient_of_each_slot_is_its_adapter_s_alone(name):
    (_, _, together, alone), _ = observed(name)
    for n, lora in enumerate(alone):
        assert_close(lorax.unstack(together.lora, n, lora), jax.tree.map(np.asarray, lora), 2e-5)


def test_the_model_is_left_alone_and_its_arrays_are_shared():
    model, found = adapters_of("transformer")
    graphdef = nnx.graphdef(model)
    adapted = lorax.adapt_rows(model, lorax.stack_adapters(found), ROWS)
    assert nnx.graphdef(model) == graphdef
    before = {id(leaf) for leaf in jax.tree.leaves(nnx_params(model))}
    assert before <= {id(leaf) for leaf in jax.tree.leaves(nnx_params(adapted))}
    (rows,) = jax.tree.leaves(nnx.state(adapted, lorax.LoraRows))
    assert rows.tolist() == list(ROWS)


def test_a_stored_nan_stays_in_its_own_rows():
    model, found = adapters_of("sequential")
    pool = lorax.stack_adapters(found)
    broken = jax.tree.map(lambda x: x.at[0].set(jnp.nan), pool)
    x = batch_of("sequential")
    got = np.asarray(lorax.adapt_rows(model, broken, ROWS)(x))
    rows = np.array(ROWS)
    assert np.isnan(got[rows == 0]).all()
    np.testing.assert_array_equal(
        got[rows != 0], np.asarray(lorax.adapt_rows(model, pool, ROWS)(x))[rows != 0]
    )


def test_rows_that_name_no_adapter():
    model, found = adapters_of("bare-linear")
    pool, x = lorax.stack_adapters(found), jnp.ones((2, 4))
    for rows, said in [
        ([0, 3], "rows_B has 3; the stack's adapters are 0 to 2, and -1"),
        ([-2, 0], "rows_B has -2"),
        ([[0, 1]], "not ints of shape"),
        ([0.0, 1.0], "not ints of shape"),
    ]:
        with pytest.raises(lorax.LoraxError, match=said):
            lorax.adapt_rows(model, pool, rows)
    traced = quick_jit(lambda rows: lorax.adapt_rows(model, pool, rows)(x))
    for rows in ([0, 3], [0, -2]):
        assert np.isnan(traced(jnp.array(rows))).any(1).tolist() == [False, True]


class SharedPositions(nnx.Module):
    def __init__(self, rngs):
        self.word = nnx.Embed(11, 4, rngs=rngs)
        self.position = nnx.Embed(8, 4, rngs=rngs)

    def __call__(self, ids):
        return self.word(ids) + self.position(jnp.arange(ids.shape[1]))[None]


def stacked(model, targets):
    """One adapter on a model, in a stack."""
    spec = lorax.LoraSpec(1, targets=targets, kernel_axes=lorax.kernel_axes(model))
    shapes = jax.eval_shape(lambda: lorax.init(jax.random.key(0), nnx_params(model), spec))
    return lorax.stack_adapters([(randomised(shapes), spec)])


def test_inputs_that_have_no_rows():
    model = SharedPositions(nnx.Rngs(0))
    ids = jnp.zeros((3, 3), jnp.int32)  # as many tokens as rows: the count alone tells nothing
    assert lorax.adapt_rows(model, stacked(model, "word"), [0, 0, -1])(ids).shape == (3, 3, 4)
    with pytest.raises(lorax.LoraxError, match=r"'position\.embedding' .* shape \(3,\), which is"):
        lorax.adapt_rows(model, stacked(model, "position"), [0, 0, -1])(ids)
    rngs = nnx.Rngs(0)
    linear, conv = nnx.Linear(3, 4, rngs=rngs), nnx.Conv(4, 4, (3, 3), rngs=rngs)
    heads = nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=rngs)
    for layer, x in [
        (linear, jnp.ones((4, 3))),  # four rows, not three
        (linear, jnp.ones(3)),
        (conv, jnp.ones((3, 9, 4))),  # an image without a batch
        (heads, jnp.ones((3, 4))),
        (nnx.Einsum("...i,io->...o", (3, 4), rngs=rngs), jnp.ones(3)),
    ]:
        rows = lorax.adapt_rows(layer, stacked(layer, "kernel"), [0, 0, -1])
        assert jax.eval_shape(layer, x).size
        with pytest.raises(lorax.LoraxError, match=r"'kernel' .*is not one of 3 rows"):
            jax.eval_shape(rows, x)


def test_layers_that_are_refused_before_a_call():
    turned = nnx.Einsum("bti,io->tbo", (3, 4), rngs=nnx.Rngs(0))
    with pytest.raises(lorax.LoraxError, match="'bti,io->tbo' of 'kernel' does not keep its first"):
        lorax.adapt_rows(turned, stacked(turned, "kernel"), [0])
    model = EinsumAttention(nnx.Rngs(0))
    pool = stacked(model, "query")
    with pytest.raises(lorax.LoraxError, match=r"target 'query\.kernel' is not in the model"):
        lorax.adapt_rows(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), pool, [0])
    with pytest.raises(lorax.LoraxError, match="is a PerExampleLayer, which has no low-rank path"):
        lorax.adapt_rows(lorax.adapt_rows(model, pool, [0]), pool, [0])
