"""Second derivatives: forward over reverse goes through an adapted model."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lorax


def test_hessian_vector_products_of_an_adapter_are_those_of_its_merged_model():
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(model)
    base = nnx.to_pure_dict(state)
    spec = lorax.LoraSpec(rank=2, targets="kernel")
    lora = lorax.init(jax.random.key(1), base, spec)
    lora = jax.tree.map(lambda x: x + 0.3, lora)
    x = jax.random.normal(jax.random.key(2), (4, 6))

    def adapted(lora):
        return jnp.sum(jnp.tanh(lorax.adapt(nnx.merge(graphdef, base), lora, spec)(x)) ** 2)

    def merged(lora):
        full = lorax.merge(base, lora, spec)
        return jnp.sum(jnp.tanh(x @ full["kernel"] + full["bias"][None]) ** 2)

    along = jax.tree.map(jnp.ones_like, lora)
    got, want = (jax.jvp(jax.grad(loss), (lora,), (along,))[1] for loss in (adapted, merged))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
