"""Training on a base in 8 or 4 bits, and with layers computed again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.models import KINDS, Quantized, dequantize
from lorax.runs.adapter import load_adapter
from lorax.runs.checkpoints import Checkpoints
from lorax.runs.trial_id import trial_dir
from lorax.runtime.compiler import compiler_options
from lorax.sweep.workload import Workload
from lorax.train import run_trial
from lorax.train.step import train_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


def is_quantized(node):
    return isinstance(node, Quantized)


def compiled(trial, batch):
    parts = trial.setup.program, trial.state, trial.setup.frozen, trial.hyper, batch
    return train_step.lower(*parts).compile(compiler_options(trial.setup.program.saves_memory))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_computes_what_its_rounded_weights_do(bench, kind, precision):
    small = bench(train={"base_dtype": kind, "precision": precision})
    nodes = jax.tree.leaves(small.setup.frozen.params, is_leaf=is_quantized)
    assert sum(map(is_quantized, nodes)) == 2 * 6  # layers, Dense layers in each
    full = bench(train={"precision": precision})
    rounded = jax.tree.map(
        lambda node: dequantize(node) if is_quantized(node) else node,
        small.setup.frozen.params,
        is_leaf=is_quantized,
    )
    full.setup.frozen.params.update(rounded)
    batch = small.batches()[0]
    tolerance = 1e-5 if precision == "fp32" else 0.02
    np.testing.assert_allclose(small.predict(batch), full.predict(batch), atol=tolerance)
    losses = [(small.step(batch), full.step(batch)) for _ in range(4)]
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=tolerance)


def test_a_quantized_base_stays_what_it_was_and_training_lowers_the_loss(bench):
    trial = bench(train={"base_dtype": "nf4"})
    before = jax.tree.map(np.array, trial.setup.frozen.params)
    batch = trial.batches()[0]
    losses = [trial.step(batch) for _ in range(12)]
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, before, trial.setup.frozen.params)


def test_adapters_of_all_bases_start_alike(bench):
    plain, small = bench(), bench(train={"base_dtype": "nf4"})
    jax.tree.map(
        np.testing.assert_array_equal, plain.setup.trainable["lora"], small.setup.trainable["lora"]
    )
    assert plain.setup.counts == small.setup.counts


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's plan of a CPU")
def test_no_more_than_a_layers_weights_exist_in_full(bench):
    plain, small = bench(), bench(train={"base_dtype": "int8"})
    batch = plain.batches()[0]
    plans = [compiled(trial, batch).memory_analysis() for trial in (plain, small)]
    kernels = sum(
        4 * leaf.size for leaf in jax.tree.leaves(plain.setup.frozen.params) if leaf.ndim == 2
    )
    assert plans[1].temp_size_in_bytes < plans[0].temp_size_in_bytes + kernels / 4


@pytest.mark.parametrize(
    "changes", [{}, {"model": {"dropout": 0.2}, "lora": {"rank": 2, "dropout": 0.3}}]
)
def test_layers_computed_again_give_the_same_numbers(bench, changes):
    plain = bench(**changes)
    again = bench(**changes, train={"remat": True})
    for batch in plain.batches()[:3]:
        np.testing.assert_allclose(again.step(batch), plain.step(batch), rtol=1e-6)
    ours, theirs = again.leaves(), plain.leaves()
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, atol=1e-5, err_msg=path)


def test_layers_computed_again_take_less_memory(bench):
    trials = bench(), bench(train={"remat": True})
    batch = trials[0].batches()[0]
    plain, again = (compiled(t, batch).memory_analysis().temp_size_in_bytes for t in trials)
    assert again < 0.8 * plain


def test_a_quantized_base_in_half_precision_computes_in_it(bench):
    trial = bench(train={"base_dtype": "nf4", "precision": "bf16"})
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(trial.setup.frozen.params)}
    assert dtypes == {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32), jnp.dtype(jnp.uint8)}


@pytest.mark.parametrize("mode", ["lora", "head"])
def test_a_trial_on_a_quantized_base_goes_on_as_if_never_stopped(world, tmp_path, mode):
    train = {"base_dtype": "nf4", "remat": True, "mode": mode, "grad_accum": 2}
    whole = run_trial(world.trial(tmp_path / "whole", train=train | {"max_steps": 6}))
    trial = world.trial(tmp_path / "cut", train=train | {"max_steps": 6, "checkpoint_every": 3})
    with pytest.raises(KeyboardInterrupt):
        interrupt_after(3, trial)
    assert run_trial(trial)["last"] == whole["last"]
    about = load_adapter(trial_dir(trial) / "adapter")[2]
    assert (about["precision"], about["base_dtype"]) == ("fp32", "nf4")


def interrupt_after(steps, trial):
    """Run a trial until its checkpoint of so many steps is written."""
    with pytest.MonkeyPatch.context() as patch:
        save = Checkpoints.save

        def save_and_stop(self, step, *args):
            save(self, step, *args)
            if step >= steps:
                raise KeyboardInterrupt

        patch.setattr(Checkpoints, "save", save_and_stop)
        run_trial(trial)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base_is_planned_like_any_other(world, kind):
    plain, small = world.trial(), world.trial(train={"base_dtype": kind})
    assert Workload.of(small).base_flops == Workload.of(plain).base_flops > 0
