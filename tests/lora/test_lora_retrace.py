"""Alpha as data: scales by path may be traced, so a new alpha needs no new program."""

import jax.numpy as jnp
import pytest
from flax import nnx

import lorax
from tests.helpers.linen_zoo import CASES as LINEN_CASES
from tests.helpers.lora import assert_close, quick_jit
from tests.helpers.nnx_zoo import CASES as NNX_CASES


def ways():
    model, params, spec, lora = NNX_CASES["sequential"].make()
    x = NNX_CASES["sequential"].inputs

    def by_merge(scales):
        w = lorax.merge(params, lora, scales)["layers"]
        h = nnx.relu(x @ w[0]["kernel"] + w[0]["bias"][None])
        return h @ w[2]["kernel"] + w[2]["bias"][None]

    module, ids, variables, linen_spec, linen_lora = LINEN_CASES["bare conv"].make()
    return {
        "nnx": (lora, spec, lambda s: lorax.adapt(model, lora, s)(x)),
        "merge": (lora, spec, by_merge),
        "linen": (
            linen_lora,
            linen_spec,
            lambda s: lorax.linen_apply(module, variables, linen_lora, s, ids),
        ),
    }


@pytest.mark.parametrize("way", ["nnx", "merge", "linen"])
def test_one_program_serves_every_alpha(way):
    lora, spec, run = ways()[way]
    traces = []

    @quick_jit
    def program(scales):
        traces.append(1)
        return run(scales)

    for alpha in (1.0, 3.0, 64.0):
        scales = {path: jnp.float32(alpha / 2) for path in lora}
        y = program(scales)
        if alpha == spec.alpha:
            assert_close(y, run(spec))
    assert len(traces) == 1
    assert_close(program(dict.fromkeys(lora, jnp.float32(0))), run(dict.fromkeys(lora, 0.0)))


def test_a_spec_is_a_static_argument():
    lora, spec, _ = ways()["nnx"]
    scales = quick_jit(lambda spec: dict(lorax.scales_of(lora, spec)), static_argnums=0)
    assert_close(scales(spec), dict.fromkeys(lora, 1.5))


@pytest.mark.parametrize("way", ["nnx", "merge", "linen"])
def test_a_target_without_a_scale_is_refused(way):
    lora, _, run = ways()[way]
    first, *_ = lora
    with pytest.raises(lorax.LoraxError, match=f"no scale for the adapter's target '{first}'"):
        run({})
