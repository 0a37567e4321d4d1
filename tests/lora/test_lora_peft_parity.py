"""The same numbers as PEFT, run by PEFT: outputs and merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

import lorax
from tests.helpers.lora import with_params

WIDTHS = {"q_proj": (8, 12), "v_proj": (12, 6)}


def torch_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential()
    for name, (d_in, d_out) in WIDTHS.items():
        model.add_module(name, torch.nn.Linear(d_in, d_out))
        model.add_module(f"{name}_tanh", torch.nn.Tanh())
    return model


def of_peft(**options):
    """The wrapped model, with A and B both random."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(WIDTHS), init_lora_weights=False, **options
    )
    return peft.get_peft_model(torch_model(), config).eval()


class Model(nnx.Module):
    def __init__(self, rngs):
        for name, (d_in, d_out) in WIDTHS.items():
            setattr(self, name, nnx.Linear(d_in, d_out, rngs=rngs))

    def __call__(self, x):
        return jnp.tanh(self.v_proj(jnp.tanh(self.q_proj(x))))


def to_jax(tensor):
    return jnp.asarray(tensor.detach().numpy())


def ported(wrapped):
    """(base params, adapter) of a PEFT model, by hand."""
    base, lora = {}, {}
    for name in WIDTHS:
        layer = wrapped.base_model.model.get_submodule(name)
        linear = layer.base_layer
        base[name] = {"kernel": to_jax(linear.weight).T, "bias": to_jax(linear.bias)}
        a, b = (to_jax(part["default"].weight) for part in (layer.lora_A, layer.lora_B))
        lora[f"{name}.kernel"] = {"a": a, "b": b}
    return base, lora


@pytest.mark.parametrize("scaling", ["lora", "rslora"])
@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"v_proj": 2}}])
def test_outputs_and_merged_weights_are_those_of_peft(scaling, patterns):
    if patterns:
        patterns = {**patterns, "alpha_pattern": {"q_proj": 9}}
    wrapped = of_peft(use_rslora=scaling == "rslora", **patterns)
    base, lora = ported(wrapped)
    spec = lorax.LoraSpec(4, 6, scaling, tuple(WIDTHS), **patterns)
    made = jax.eval_shape(lambda: lorax.init(jax.random.key(0), base, spec))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, lora)

    model = with_params(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), base)
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    with torch.no_grad():
        theirs = wrapped(torch.from_numpy(x)).numpy()
        plain = torch_model()(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(model(x), plain, atol=1e-6)
    np.testing.assert_allclose(lorax.adapt(model, lora, spec)(x), theirs, atol=1e-6)
    assert np.abs(theirs - plain).max() > 0.05

    merged = lorax.merge(base, lora, spec)
    unloaded = wrapped.merge_and_unload()
    for name in WIDTHS:
        expected = to_jax(unloaded.get_submodule(name).weight).T
        np.testing.assert_allclose(merged[name]["kernel"], expected, atol=1e-6)
