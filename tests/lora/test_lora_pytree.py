"""`merge` as the way in for a plain function: a scanned llama of nested dicts."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax
from tests.helpers.llama_dict import LAYERS, WIDTHS, forward, forward_unrolled, make_params
from tests.helpers.lora import assert_close, observe, randomised

IDS = jnp.array([[1, 2, 3, 16], [4, 4, 0, 9]])
PARAMS = make_params()
SPEC = lorax.LoraSpec(
    2, alpha=3, targets=("qkvo", "mlp"), rank_pattern={"wv": 1}, kernel_axes={r"layers\.w.": "bio"}
)


@cache
def adapter():
    return randomised(jax.eval_shape(lambda: lorax.init(jax.random.key(0), PARAMS, SPEC)), std=0.5)


def with_low_rank_by_hand(lora):
    def project(name, x, layer, i):
        pair = lora[f"layers.{name}"]
        scale = 3 / (1 if name == "wv" else 2)
        return x @ layer[name] + scale * (x @ pair["a"][i].T) @ pair["b"][i].T

    return forward_unrolled(PARAMS, IDS, project)


@cache
def observed():
    def merged(lora):
        return forward(lorax.merge(PARAMS, lora, SPEC), IDS)

    return observe(lambda: forward(PARAMS, IDS), with_low_rank_by_hand, merged, adapter())


def test_every_matrix_of_every_layer_is_adapted():
    assert set(adapter()) == {f"layers.{name}" for name in WIDTHS}
    assert adapter()["layers.wk"]["b"].shape == (LAYERS, WIDTHS["wk"][1], 2)
    assert adapter()["layers.wv"]["a"].shape == (LAYERS, 1, WIDTHS["wv"][0])


def test_merge_in_a_scan_is_a_low_rank_path_in_every_layer():
    assert_close(observed().merged, observed().adapted)
    assert_close(observed().fresh, observed().base)
    assert np.abs(observed().merged - observed().base).max() > 0.1


def test_gradients_are_those_of_the_low_rank_path():
    assert_close(observed().gradient_of_merge, observed().gradient, tol=2e-5)


def test_all_linear_does_not_take_stacked_norms_for_matrices():
    spec = lorax.LoraSpec(2, targets="all-linear", kernel_axes={r"layers\..*": "bio"})
    with pytest.raises(lorax.LoraxError, match=r"do not describe 'layers\.attention_norm'"):
        lorax.resolve(PARAMS, spec)
