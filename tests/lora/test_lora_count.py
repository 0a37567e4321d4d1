import jax
import jax.numpy as jnp
import pytest

from lorax import LoraSpec, count_bytes, count_lora_params, count_params, init
from tests.helpers.linen_zoo import CASES as LINEN_CASES
from tests.helpers.llama_dict import make_params
from tests.helpers.nnx_zoo import CASES as NNX_CASES


@pytest.mark.parametrize("name", NNX_CASES)
def test_the_count_is_that_of_a_made_adapter_nnx(name):
    _, params, spec, _ = NNX_CASES[name].make()
    check(params, spec)


@pytest.mark.parametrize("name", LINEN_CASES)
def test_the_count_is_that_of_a_made_adapter_linen(name):
    _, _, variables, spec, _ = LINEN_CASES[name].make()
    check(variables["params"], spec)


def test_the_count_is_that_of_a_made_adapter_stacked():
    axes = {r"layers\.w.": "bio"}
    check(make_params(), LoraSpec(2, targets="qv", rank_pattern={"wq": 4}, kernel_axes=axes))


def check(params, spec):
    lora = jax.eval_shape(lambda: init(jax.random.key(0), params, spec))
    assert count_lora_params(params, spec) == count_params(lora)
    assert count_bytes(lora) == 4 * count_params(lora)


def roberta(d, layers):
    matrix = {"kernel": jax.ShapeDtypeStruct((d, d), jnp.float32)}
    attention = dict.fromkeys(("query", "key", "value", "out"), matrix)
    return {"layers": [{"attention": attention} for _ in range(layers)]}


@pytest.mark.parametrize(
    ("d", "layers", "rank", "targets", "published"),
    [
        (768, 12, 8, "qv", 294_912),
        (1024, 24, 8, "qv", 786_432),
        (12288, 96, 4, "qv", 18_874_368),
        (12288, 96, 8, "q", 18_874_368),
        (12288, 96, 2, "qkvo", 18_874_368),
    ],
    ids=["RoBERTa-base", "RoBERTa-large", "GPT-3 r4 qv", "GPT-3 r8 q", "GPT-3 r2 qkvo"],
)
def test_published_counts_from_shapes_alone(d, layers, rank, targets, published):
    assert count_lora_params(roberta(d, layers), LoraSpec(rank, targets=targets)) == published


def test_bytes_count_the_dtype():
    tree = {"a": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16), "b": jnp.zeros(5)}
    assert count_params(tree) == 17
    assert count_bytes(tree) == 44
