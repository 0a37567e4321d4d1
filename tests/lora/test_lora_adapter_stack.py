"""A stack of adapters: what each slot holds, another adapter in a slot, and what is refused."""

import dataclasses

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

import lorax
from tests.helpers.lora import assert_bit_equal, assert_close

PROFILE = settings.get_profile("lora")
SIZES = {"layers.0.query.kernel": (6, 5), "layers.0.value.kernel": (6, 7), "out.kernel": (5, 6)}
BASE = {path: np.zeros(size, np.float32) for path, size in SIZES.items()}
NUMBERS = st.dictionaries(
    st.sampled_from(list(SIZES)), st.tuples(st.integers(1, 5), st.floats(0.125, 8, width=32))
)


def adapter(numbers, seed=0):
    """Random factors and a scale for the targets that have a rank and a scale."""
    rng = np.random.default_rng(seed)
    lora = {
        path: {
            "a": rng.normal(size=(rank, SIZES[path][0])).astype(np.float32),
            "b": rng.normal(size=(SIZES[path][1], rank)).astype(np.float32),
        }
        for path, (rank, _) in numbers.items()
    }
    return lora, {path: scale for path, (_, scale) in numbers.items()}


def delta(lora, scales):
    """What an adapter adds to each kernel, in NumPy; zero where it has no target."""
    change = {path: np.zeros(size, np.float32) for path, size in SIZES.items()}
    for path, pair in lora.items():
        change[path] = np.float32(scales[path]) * (np.asarray(pair["b"]) @ np.asarray(pair["a"])).T
    return change


def slot_delta(pool, index):
    return delta(*jax.tree.map(lambda x: np.asarray(x)[index], (pool.lora, pool.scales)))


@given(st.lists(NUMBERS, min_size=1, max_size=4).filter(any), st.data())
@settings(PROFILE, max_examples=10)
def test_every_slot_is_its_adapter_and_a_new_one_leaves_the_others(numbers, data):
    adapters = [adapter(n, seed) for seed, n in enumerate(numbers)]
    pool = lorax.stack_adapters(adapters)
    assert len(pool) == len(adapters)
    index, source = (data.draw(st.integers(0, len(adapters) - 1)) for _ in range(2))
    after = pool.replace(index, *adapters[source])
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, pool)
    for n, (lora, scales) in enumerate(adapters):
        assert_close(slot_delta(pool, n), delta(lora, scales), tol=1e-6)
        want = adapters[source] if n == index else (lora, scales)
        assert_close(slot_delta(after, n), delta(*want), tol=1e-6)


def test_specs_give_the_scales():
    path = "layers.0.query.kernel"
    specs = [lorax.LoraSpec(4, 8, scaling, targets="q") for scaling in ("lora", "rslora")]
    lora, _ = adapter({path: (4, 1.0)})
    pool = lorax.stack_adapters([(lora, spec) for spec in specs])
    assert pool.scales[path].tolist() == [2.0, 4.0]
    assert pool.replace(0, lora, specs[1]).scales[path].tolist() == [4.0, 4.0]


def test_a_spec_names_more_targets_than_an_adapter_has():
    lora, scales = adapter({"out.kernel": (2, 3.0)})
    pool = lorax.stack_adapters([(lora, scales | {"elsewhere.kernel": 7.0})])
    assert pool.scales["out.kernel"].tolist() == [3.0]


def test_a_replaced_slot_has_scale_0_for_what_its_adapter_lacks():
    pool = lorax.stack_adapters([adapter({"out.kernel": (2, 3.0)})])
    assert pool.replace(0, {}, {"out.kernel": 7.0}).scales["out.kernel"].tolist() == [0.0]


def test_empty_slots_with_room_take_an_adapter_later():
    room = jax.eval_shape(
        lambda: lorax.init(jax.random.key(0), BASE, lorax.LoraSpec(5, targets="qv"))
    )
    pool = lorax.stack_adapters([({}, {})] * 3, like=room)
    assert pool.lora["layers.0.value.kernel"]["a"].shape == (3, 5, 6)
    assert_bit_equal(slot_delta(pool, 1), delta({}, {}))
    lora, scales = adapter({"layers.0.query.kernel": (2, 0.5)})
    pool = pool.replace(1, lora, scales)
    assert_close(slot_delta(pool, 1), delta(lora, scales), tol=1e-6)
    assert_bit_equal(slot_delta(pool, 2), delta({}, {}))


def test_mixed_dtypes_keep_the_exact_one():
    exact, scales = adapter({"out.kernel": (2, 1.0)})
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), exact)
    for slot, pair in ((0, [exact, half]), (1, [half, exact])):
        pool = lorax.stack_adapters([(lora, scales) for lora in pair])
        assert_bit_equal(jax.tree.map(lambda x, n=slot: x[n], pool.lora), exact)


def test_it_is_a_pytree_that_jit_and_grad_take():
    pool = lorax.stack_adapters([adapter({"out.kernel": (2, 3.0)}), adapter({})])
    total = lambda pool: sum(jnp.sum(x) for x in jax.tree.leaves(pool))  # noqa: E731
    gradient = jax.jit(jax.grad(total))(pool)
    assert isinstance(gradient, lorax.Adapters)
    assert_bit_equal(gradient, jax.tree.map(jnp.ones_like, pool))
    swapped = jax.jit(lambda pool, lora: pool.replace(1, lora, {"out.kernel": 2.0}))
    lora, _ = adapter({"out.kernel": (1, 0.0)}, seed=3)
    assert_bit_equal(swapped(pool, lora), pool.replace(1, lora, {"out.kernel": 2.0}))


def test_what_is_refused():
    small, scales = adapter({"out.kernel": (2, 1.0)})
    pool = lorax.stack_adapters([(small, scales)])
    large, other = adapter({"out.kernel": (4, 1.0)}), adapter({"layers.0.query.kernel": (1, 1.0)})
    wide = {"out.kernel": {"a": np.ones((2, 9)), "b": np.ones((6, 2))}}
    torn = {"out.kernel": {"a": np.ones((2, 5)), "b": np.ones((6, 1))}}
    stacked = {"out.kernel": {"a": np.ones((3, 2, 5)), "b": np.ones((3, 6, 2))}}
    cases = [
        (lambda: lorax.stack_adapters([]), "no adapter to stack"),
        (lambda: lorax.stack_adapters([({}, {})]), "empty slots and their like="),
        (lambda: lorax.stack_adapters([(small, {})]), "no scale for .*'out.kernel'"),
        (lambda: lorax.stack_adapters([(small, scales), (wide, scales)]), r"'out.kernel' has A"),
        (
            lambda: lorax.stack_adapters([(small, scales), (stacked, scales)]),
            r"'out.kernel' have a of shapes \(2, 5\) and \(3, 2, 5\), of different bases",
        ),
        (lambda: lorax.stack_adapters([other], like=small), "'layers.0.query.kernel' has no place"),
        (
            lambda: pool.replace(0, *large),
            "'out.kernel' is of rank 4, the stack has room for rank 2",
        ),
        (lambda: pool.replace(0, *other), "'layers.0.query.kernel' has no place in the stack"),
        (lambda: pool.replace(0, wide, scales), r"A \(2, 9\) .*of another base"),
        (lambda: pool.replace(0, torn, scales), r"B \(6, 1\); .*of another base"),
        (lambda: pool.replace(0, small, {}), "no scale for .*'out.kernel'"),
        (lambda: pool.replace(1, small, scales), "no slot 1 in a stack of 1 adapters"),
        (lambda: pool.replace(-1, small, scales), "no slot -1"),
    ]
    for run, said in cases:
        with pytest.raises(lorax.LoraxError, match=said) as error:
            run()
        assert "\n" not in str(error.value)
    with pytest.raises(dataclasses.FrozenInstanceError):
        pool.scales = {}
