"""Rows of one batch with adapters of their own, on our models: equal to each adapter alone."""

from functools import cache
from typing import Any, NamedTuple

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

import lorax
from lorax.errors import LoraxError
from lorax.models import BertConfig, CausalLM, KVCache, SequenceClassifier
from lorax.models.families.gpt2 import Gpt2Config
from lorax.models.families.llama import LlamaConfig
from tests.helpers.causal_zoo import GPT2, LLAMA, ragged
from tests.helpers.encoders import SMALL
from tests.helpers.lora import assert_close, quick_jit, randomised

pytestmark = pytest.mark.slow

PROFILE = settings.get_profile("lora")
SPECS = (
    lorax.LoraSpec(1, 2, targets="q"),
    lorax.LoraSpec(4, 3, "rslora", targets="qkvo"),
    lorax.LoraSpec(16, 16, targets="mlp", alpha_pattern={"down": 5}),
)
ROWS = (2, -1, 0, 1)


def build(name):
    rngs = nnx.Rngs(0)
    if name == "bert":
        return SequenceClassifier(BertConfig(**SMALL), 3, pooling="pooler", rngs=rngs)
    kinds = {"gpt2": (Gpt2Config, GPT2), "llama": (LlamaConfig, LLAMA)}
    config, sizes = kinds[name]
    return CausalLM(config.from_hf({"model_type": name, **sizes}), rngs=rngs)


class Made(NamedTuple):
    """A model in parts, its adapters, and what each of them alone makes of the batch."""

    graphdef: Any
    state: Any
    loras: list[Any]
    together: Any
    alone: np.ndarray  # (1 + K, B, ...): the plain base comes last, as index -1
    traces: list[int]

    @property
    def model(self):
        return nnx.merge(self.graphdef, self.state)

    @property
    def pool(self):
        return lorax.stack_adapters(list(zip(self.loras, SPECS, strict=True)))


@cache
def made(name):
    graphdef, state = nnx.split(build(name))
    noise = randomised(state, std=0.15)
    state = jax.tree.map(jnp.add, state, noise)
    shapes = nnx.to_pure_dict(state)
    loras = [
        randomised(jax.eval_shape(lambda s=s: lorax.init(jax.random.key(0), shapes, s)), n, 0.1)
        for n, s in enumerate(SPECS)
    ]
    ids, mask = ragged()
    traces = []

    @quick_jit
    def together(pool, rows):
        traces.append(1)
        return lorax.adapt_rows(nnx.merge(graphdef, state), pool, rows)(ids, mask)

    def alone(lora, spec):
        return lorax.adapt(nnx.merge(graphdef, state), lora, spec)(ids, mask)

    each = [quick_jit(alone, static_argnums=1)(*one) for one in zip(loras, SPECS, strict=True)]
    each.append(quick_jit(lambda: nnx.merge(graphdef, state)(ids, mask))())
    return Made(graphdef, state, loras, together, np.stack(each), traces)


each_model = pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])


@each_model
@settings(PROFILE)
@given(rows=st.lists(st.integers(-1, 2), min_size=4, max_size=4))
def test_any_assignment_equals_each_adapter_alone_in_one_program(name, rows):
    case = made(name)
    got = case.together(case.pool, jnp.array(rows))
    assert_close(got, case.alone[rows, np.arange(4)], tol=1e-5)
    for row in np.flatnonzero(np.array(rows) < 0):
        assert_close(got[row], case.alone[-1][row], tol=1e-6)
    assert len(case.traces) == 1


@each_model
def test_the_adapters_differ_by_much_more_than_the_tolerance(name):
    alone = made(name).alone.reshape(4, -1)
    for n in range(4):
        others = np.abs(np.delete(alone, n, 0) - alone[n]).max(1)
        assert others.min() > 1e-2


@each_model
def test_a_swap_and_another_alpha_need_no_new_program(name):
    case = made(name)
    case.together(case.pool, jnp.array(ROWS))
    before = len(case.traces)
    swapped = case.pool.replace(2, case.loras[0], SPECS[0]).replace(0, {}, {})
    got = case.together(swapped, jnp.array(ROWS))
    assert_close(got, case.alone[[0, -1, -1, 1], np.arange(4)])
    doubled = lorax.Adapters(case.pool.lora, jax.tree.map(lambda s: 2 * s, case.pool.scales))
    got = case.together(doubled, jnp.array([1, 1, 1, 1]))
    assert len(case.traces) == before
    twice = {path: 2 * SPECS[1].scale(path) for path in case.loras[1]}
    alone = quick_jit(lambda: lorax.adapt(case.model, case.loras[1], twice)(*ragged()))
    assert_close(got, alone())


@each_model
def test_the_gradient_of_each_slot_is_that_of_its_rows_alone(name):
    case, (ids, mask) = made(name), ragged()
    rows = np.array([0, 1, 2, 1])  # the third is of one token, whose attention is constant

    def together(pool):
        return jnp.square(lorax.adapt_rows(case.model, pool, rows)(ids, mask)).sum()

    def alone(lora, spec, weights):
        y = lorax.adapt(case.model, lora, spec)(ids, mask)
        return (jnp.square(y).reshape(len(rows), -1).sum(1) * weights).sum()

    got = quick_jit(jax.grad(together))(case.pool)
    for n, (lora, spec) in enumerate(zip(case.loras, SPECS, strict=True)):
        weights = jnp.asarray(rows == n, jnp.float32)
        want = quick_jit(jax.grad(alone), static_argnums=1)(lora, spec, weights)
        assert_close(lorax.unstack(got.lora, n, lora), jax.tree.map(np.asarray, want), tol=2e-5)
        assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(want))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_row_decodes_with_its_own_adapter(name):
    case, (ids, mask) = made(name), ragged("left")
    new, first = 5, ids.shape[1]

    def decode(step, choose):
        """Greedy decoding; the logits and the tokens of each step."""
        cache = KVCache.empty(case.model.config, len(ids), first + new)
        chunk, real, seen, tokens = jnp.asarray(ids), jnp.asarray(mask), [], []
        for n in range(new):
            logits, cache = step(chunk, real, cache)
            seen.append(logits[:, -1])
            tokens.append(choose(n, seen[-1]))
            chunk, real = tokens[-1][:, None], jnp.ones((len(ids), 1), mask.dtype)
        return np.stack(seen, 1), jnp.stack(tokens, 1)

    def own(_, logits):
        return logits.argmax(-1).astype(jnp.int32)

    traces = []

    @quick_jit
    def rows_step(pool, rows, chunk, real, cache):
        traces.append(chunk.shape)
        return lorax.adapt_rows(case.model, pool, rows)(chunk, real, cache=cache)

    rows = jnp.array(ROWS)
    got, tokens = decode(lambda *args: rows_step(case.pool, rows, *args), own)
    assert traces == [(4, first), (4, 1)]
    adapted = [lorax.adapt(case.model, lo, s) for lo, s in zip(case.loras, SPECS, strict=True)]
    for row, n in enumerate(ROWS):
        graphdef, state = nnx.split(case.model if n < 0 else adapted[n])

        @quick_jit
        def step(state, chunk, real, cache, graphdef=graphdef):
            return nnx.merge(graphdef, state)(chunk, real, cache=cache)

        want, _ = decode(lambda *args, st=state: step(st, *args), lambda n, _: tokens[:, n])
        assert_close(got[row], want[row])
        np.testing.assert_array_equal(tokens[row], want[row].argmax(-1))


def test_packed_rows_of_a_head_that_tells_sequences_apart_are_refused():
    model = build("bert")
    lora = lorax.init(jax.random.key(0), nnx.to_pure_dict(nnx.state(model)), SPECS[0])
    adapters = lorax.stack_adapters([(lora, SPECS[0])])
    ids, mask = np.ones((2, 8), np.int32), np.asarray([[1] * 4 + [2] * 4, [3] * 8], np.int32)
    adapted = lorax.adapt_rows(model, adapters, np.asarray([0, -1]))
    with pytest.raises(LoraxError, match="give each sequence a row of its own"):
        adapted(ids, mask, first_tokens_N=np.asarray([0, 4, 8]))
