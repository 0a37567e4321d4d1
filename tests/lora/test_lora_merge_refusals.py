import jax
import jax.numpy as jnp
import pytest

from lorax import LoraSpec, LoraxError, init, merge, unmerge
from lorax.models import quantize

BASE = {"query": {"kernel": jnp.ones((8, 6))}, "value": {"kernel": jnp.ones((8, 6))}}
SPEC = LoraSpec(2, targets="q")
LORA = init(jax.random.key(0), BASE, SPEC)
PAIR = LORA["query.kernel"]


@pytest.mark.parametrize("function", [merge, unmerge])
def test_a_target_that_is_not_in_the_base(function):
    with pytest.raises(LoraxError, match=r"'elsewhere\.kernel' is not in the base"):
        function(BASE, {"elsewhere.kernel": PAIR}, SPEC)


@pytest.mark.parametrize(
    "pair",
    [
        {"a": jnp.ones((2, 7)), "b": jnp.ones((6, 2))},
        {"a": jnp.ones((2, 8)), "b": jnp.ones((5, 2))},
        {"a": jnp.ones((2, 8)), "b": jnp.ones((6, 3))},
        {"a": jnp.ones((8, 2)), "b": jnp.ones((2, 6))},
        {"a": jnp.ones((1, 2, 8)), "b": jnp.ones((1, 6, 2))},
    ],
    ids=["d_in", "d_out", "two ranks", "transposed", "stacked"],
)
def test_an_adapter_that_does_not_fit(pair):
    with pytest.raises(LoraxError, match=r"adapter of 'query\.kernel' has A .* needs A"):
        merge(BASE, {"query.kernel": pair}, SPEC)


def test_a_mapping_without_the_target_s_scale():
    with pytest.raises(LoraxError, match=r"no scale for the adapter's target 'query\.kernel'"):
        merge(BASE, LORA, {"value.kernel": 1.0})


def test_a_kernel_of_more_axes_without_a_description():
    base = {"query": {"kernel": jnp.ones((8, 2, 3))}}
    with pytest.raises(LoraxError, match="kernel_axes"):
        merge(base, LORA, SPEC)


@pytest.mark.parametrize("function", [merge, unmerge])
@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        (jnp.ones((8, 6), jnp.int8), "int8"),
        (quantize(jnp.ones((8, 6)), "int8"), "int8"),
        (quantize(jnp.ones((8, 6)), "nf4"), "uint8"),
    ],
    ids=["int8", "Quantized int8", "Quantized nf4"],
)
def test_a_quantized_kernel(function, kernel, dtype):
    message = (
        rf"the kernel of 'query\.kernel' is quantized \({dtype}\).*merge into the base in float"
    )
    with pytest.raises(LoraxError, match=message):
        function(BASE | {"query": {"kernel": kernel}}, LORA, SPEC)
    # One that is not adapted is passed on as it is.
    merged = function(BASE | {"value": {"kernel": kernel}}, LORA, SPEC)
    jax.tree.map(lambda x, y: None if x is y else pytest.fail(), merged["value"]["kernel"], kernel)
