"""The defaults against PEFT's own, drawn by PEFT."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from lorax import LoraSpec, init

D, RANK = 768, 64


def of_peft(layer, init_lora_weights=True):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, target_modules=["q"], init_lora_weights=init_lora_weights)
    wrapped = peft.get_peft_model(torch.nn.ModuleDict({"q": layer}), config)
    return {
        name: value.detach().numpy()
        for name, value in wrapped.named_parameters()
        if value.requires_grad
    }


def of_lorax(name="kaiming_uniform"):
    base = {"q": {"kernel": jax.ShapeDtypeStruct((D, D), jnp.float32)}}
    lora = init(jax.random.key(0), base, LoraSpec(RANK, targets="q", init=name))
    return jax.tree.map(np.asarray, lora["q.kernel"])


@pytest.mark.parametrize("name", ["kaiming_uniform", "gaussian"])
def test_a_has_the_distribution_of_peft(name):
    theirs, b = of_peft(torch.nn.Linear(D, D), "gaussian" if name == "gaussian" else True).values()
    ours = of_lorax(name)
    assert theirs.shape == ours["a"].shape
    assert ours["a"].std() == pytest.approx(theirs.std(), rel=0.01)
    assert ours["a"].mean() == pytest.approx(
        0, abs=float(4 * theirs.std() / math.sqrt(theirs.size))
    )
    quantiles = np.linspace(0.01, 0.99, 21)
    np.testing.assert_allclose(
        np.quantile(ours["a"], quantiles), np.quantile(theirs, quantiles), atol=0.04 * theirs.std()
    )
    assert not b.any()
    assert not ours["b"].any()


def test_the_bound_is_one_over_the_root_of_d_in():
    bound = np.float32(1 / math.sqrt(D))
    for a in (of_lorax()["a"], next(iter(of_peft(torch.nn.Linear(D, D)).values()))):
        assert bound * 0.999 < np.abs(a).max() <= bound


def test_an_embedding_starts_as_in_peft():
    a, b = of_peft(torch.nn.Embedding(D, D)).values()
    base = {"table": {"embedding": jnp.zeros((D, D))}}
    lora = init(jax.random.key(0), base, LoraSpec(RANK, targets="table"))["table.embedding"]
    assert not a.any()
    assert not lora["a"].any()
    assert lora["b"].shape == b.shape
    assert np.asarray(lora["b"]).std() == pytest.approx(b.std(), rel=0.02)
