import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lorax.config import TrialConfig
from lorax.lora.paths import leaves_by_path
from lorax.train import optimizer
from lorax.train.setup import hyper_of

pytestmark = pytest.mark.slow


def hyper(**changes):
    defaults = {"lr": 0.01, "weight_decay": 0.0, "clip_norm": None}
    config = TrialConfig()
    config.optimizer = dataclasses.replace(config.optimizer, **(defaults | changes))
    return hyper_of(config)


def moved(trainable, grads, settings):
    """What one update does to each leaf."""
    state = optimizer.init(trainable, settings)
    new, _ = jax.jit(optimizer.update)(grads, state, trainable, settings)
    before = leaves_by_path(trainable)
    return {path: np.asarray(x) - before[path] for path, x in leaves_by_path(new).items()}


def test_adamw_is_torchs(bench):
    torch = pytest.importorskip("torch")
    trainable = bench(train={"mode": "full"}).setup.trainable
    settings = hyper(weight_decay=0.1, lr=0.01, head_lr=0.03)
    ours = leaves_by_path(trainable)
    theirs = {path: torch.nn.Parameter(torch.tensor(np.array(x))) for path, x in ours.items()}
    groups = [
        {
            "params": [x],
            "lr": 0.03 if path.startswith("base.head") else 0.01,
            "weight_decay": 0.0 if path.endswith(("bias", "norm.scale")) else 0.1,
        }
        for path, x in theirs.items()
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    state, update = optimizer.init(trainable, settings), jax.jit(optimizer.update)
    rng = np.random.default_rng(0)
    for _ in range(20):
        draws = {path: np.float32(rng.normal(0, 0.1, x.shape)) for path, x in ours.items()}
        for path, x in theirs.items():
            x.grad = torch.tensor(draws[path])
        adamw.step()
        grads = jax.tree.unflatten(jax.tree.structure(trainable), list(draws.values()))
        trainable, state = update(grads, state, trainable, settings)
    for path, x in leaves_by_path(trainable).items():
        np.testing.assert_allclose(x, theirs[path].detach(), rtol=0, atol=1e-6, err_msg=path)


def test_decay_spares_biases_and_norms(bench):
    trainable = bench(train={"mode": "full"}).setup.trainable
    # a random base has no leaf of zeros, which decay could not move; the head's bias is one
    trainable = jax.tree.map(lambda x: jnp.where(x == 0, 1.0, x), trainable)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    steps = moved(trainable, zeros, hyper(weight_decay=0.5, lr=0.1))
    decayed = {path for path, step in steps.items() if step.any()}
    spared = {path for path in steps if path.endswith(".bias") or ".norm." in path}
    assert decayed == set(steps) - spared
    assert "base.encoder.embeddings.word.embedding" in decayed
    kernel = "base.encoder.layers.0.mlp.up.kernel"
    expected = -0.05 * leaves_by_path(trainable)[kernel]
    np.testing.assert_allclose(steps[kernel], expected, rtol=0, atol=1e-6)


def test_decay_reaches_both_factors_of_an_adapter(bench):
    trainable = jax.tree.map(lambda x: x + 1, bench().setup.trainable)
    zeros = jax.tree.map(jnp.zeros_like, trainable)
    steps = moved(trainable, zeros, hyper(weight_decay=0.5))
    assert {path for path, step in steps.items() if not step.any()} == {"base.head.out.bias"}


def test_the_head_has_its_own_learning_rate(bench):
    trainable = bench().setup.trainable
    ones = jax.tree.map(jnp.ones_like, trainable)
    for path, step in moved(trainable, ones, hyper(lr=0.01, head_lr=0.25)).items():
        np.testing.assert_allclose(step, -0.25 if ".head." in path else -0.01, rtol=1e-5)


def test_head_lr_defaults_to_lr_and_both_follow_the_schedule():
    config = TrialConfig()
    config.optimizer.lr = 0.5
    assert (hyper_of(config, 0.25).lr, hyper_of(config, 0.25).head_lr) == (0.125, 0.125)
    config.optimizer.head_lr = 2.0
    assert (hyper_of(config, 0.25).lr, hyper_of(config, 0.25).head_lr) == (0.125, 0.5)


def gradient(trial):
    """Of a first step, as Adam's first moment holds it."""
    trial.step(trial.batches()[0])
    return jax.tree.map(lambda mu: mu / (1 - trial.hyper.b1), trial.state.opt_state[1].mu)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_gradient_is_clipped_by_the_norm_of_what_is_trained(bench, mode):
    free = gradient(bench(train={"mode": mode}, optimizer={"clip_norm": None}))
    norm = float(optax.tree.norm(free))
    clipped = gradient(bench(train={"mode": mode}, optimizer={"clip_norm": norm / 3}))
    for want, got in zip(jax.tree.leaves(free), jax.tree.leaves(clipped), strict=True):
        np.testing.assert_allclose(got, want / 3, rtol=1e-5, atol=1e-9)
    loose = gradient(bench(train={"mode": mode}, optimizer={"clip_norm": norm * 1.01}))
    for want, got in zip(jax.tree.leaves(free), jax.tree.leaves(loose), strict=True):
        np.testing.assert_array_equal(got, want)
