import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lorax
from lorax.lora import adapt
from lorax.models import load_model
from lorax.train.setup import HEAD, spec_of
from lorax.train.step import train_step


def flops_of(jitted, *args):
    return jitted.lower(*args).compile().cost_analysis()["flops"]


def step_flops(trial):
    parts = trial.setup.program, trial.state, trial.setup.frozen, trial.hyper
    return flops_of(train_step, *parts, trial.batches()[0])


def reference_flops(trial):
    """The least there is to do: the gradient of adapter and head, and Adam on both."""
    spec = spec_of(trial.config.lora)
    model = load_model(trial.config.model, 2, key=jax.random.key(0))
    graphdef, state = nnx.split(model)
    base = nnx.to_pure_dict(state)
    trained = {"lora": lorax.init(jax.random.key(1), base, spec), HEAD: base[HEAD]}
    encoder, adam = base["encoder"], optax.adam(0.1)

    @jax.jit
    def step(trained, state, encoder, batch):
        def loss(trained):
            params = {"encoder": encoder, HEAD: trained[HEAD]}
            adapted = adapt(nnx.merge(graphdef, params), trained["lora"], spec)
            logits = adapted(
                batch["input_ids"],
                batch["segment_ids"],
                batch["token_type_ids"],
                position_ids_BxT=batch["position_ids"],
                first_tokens_N=batch["first_tokens"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
            return jnp.mean(losses)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(trained, updates), state, value

    return flops_of(step, trained, adam.init(trained), encoder, trial.batches()[0])


def test_a_lora_step_costs_no_more_than_the_adapters_gradient(bench):
    trial = bench(optimizer={"clip_norm": None, "weight_decay": 0.0})
    assert step_flops(trial) <= 1.02 * reference_flops(trial)


def test_lora_is_cheaper_than_full_and_head_only_is_cheapest(bench):
    head, lora, full = (step_flops(bench(train={"mode": m})) for m in ("head", "lora", "full"))
    assert lora < 0.8 * full
    assert head < 0.5 * full
