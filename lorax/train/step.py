"""The compiled programs: one optimizer step, one forward pass.

Both are module-level jitted functions of plain pytrees. What determines the program is static (a
`Program`, hashable); learning rates, scales, seeds and decay are data. Trials of one process that
differ in data only reuse the same executable.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lorax.lora import adapt, combine
from lorax.models import Prefix, smoothed_losses
from lorax.train import optimizer
from lorax.train.indexed_batch import IndexedBatch, in_rows
from lorax.train.mesh import gather, regather, spread_rows
from lorax.train.next_tokens import score_examples
from lorax.train.optimizer import Hyper

Batch = dict[str, jax.Array]
AnyBatch = Batch | IndexedBatch


@dataclass(frozen=True)
class Program:
    """The static part of a trial.

    Attributes:
      graphdef: of the NNX model whose parameters are `params["base"]`.
      kind: `classification`, `regression` or `causal_lm`.
      lora_dropout: rate on the input of A.
      model_dropout: whether the model's own dropout is on in training.
      grad_accum: micro-batches per step.
      label_smoothing: of the training targets.
      saves_memory: the backward pass recomputes layers or their weights.
      frozen_layers: number of first layers with the same outputs in every step; see
        `lorax.train.prefix`.
      reads_features: all layers are frozen so, and a head reads one vector per example.
    """

    graphdef: Any
    kind: str
    lora_dropout: float = 0.0
    model_dropout: bool = False
    grad_accum: int = 1
    label_smoothing: float = 0.0
    saves_memory: bool = False
    frozen_layers: int = 0
    reads_features: bool = False


class State(NamedTuple):
    """What a step changes. `trainable` is one side of `lorax.split`; `key` is raw key data."""

    trainable: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


class Frozen(NamedTuple):
    """What no step changes: the other side of the split, and each target's scale."""

    params: Any
    scales: dict[str, jax.Array]


def init_state(trainable: Any, hyper: Hyper, key: jax.Array) -> State:
    """The state before the first step; `key` seeds all dropout."""
    opt_state = optimizer.init(trainable, hyper)
    return State(trainable, opt_state, jnp.zeros((), jnp.int32), jax.random.key_data(key))


def forward(
    program: Program,
    trainable: Any,
    frozen: Frozen,
    batch: Batch,
    key: jax.Array | None = None,
    *,
    smoothing: float = 0.0,
) -> jax.Array:
    """Outputs of each example (N, outputs) in fp32; deterministic without a key.

    They are a classifier's logits, or a language model's `score_examples`, with smoothed targets
    on request.

    The batch is packed, as by `lorax.data.collate`, or has one example per row, as by
    `lorax.data.pad`.
    """
    params = combine(trainable, gather(frozen.params))
    model: Any = nnx.merge(program.graphdef, params["base"])
    model = adapt(model, params["lora"], frozen.scales, dropout=program.lora_dropout, key=key)
    rngs = nnx.Rngs(key) if key is not None and program.model_dropout else None
    if "features" in batch:
        return model.head.classify(batch["features"], rngs)
    prefix = Prefix(program.frozen_layers, batch["hidden"]) if "hidden" in batch else None
    if program.kind == "causal_lm":
        return score_examples(model, batch, rngs, smoothing, prefix)
    return model(
        batch["input_ids"],
        batch["segment_ids"] if "segment_ids" in batch else batch["attention_mask"],
        batch["token_type_ids"],
        position_ids_BxT=batch.get("position_ids"),
        first_tokens_N=batch.get("first_tokens"),
        rngs=rngs,
        prefix=prefix,
    )


def example_losses(kind: str, outputs: Any, labels: Any, smoothing: float = 0.0) -> tuple[Any, Any]:
    """Each example's loss and its weight in the mean: (N,) and (N,).

    The loss is the cross-entropy of classes, with smoothed targets on request, or the squared
    error of scores; the weight is 1. For a language model the loss is the summed cross-entropy of
    the target tokens, from `score_examples`, and the weight is their number.
    """
    if kind == "causal_lm":
        return outputs[:, 0], outputs[:, 1]
    if kind == "regression":
        return optax.squared_error(outputs[:, 0], labels), jnp.ones(len(labels))
    return smoothed_losses(outputs, labels, smoothing), jnp.ones(len(labels))


def _loss_and_grad(
    program: Program, trainable: Any, frozen: Frozen, batch: Batch, key: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    """(summed loss over one micro-batch, its weight, its gradient)."""

    def loss(part: Any) -> tuple[jax.Array, jax.Array]:
        smoothing = program.label_smoothing
        outputs = forward(program, part, frozen, batch, key, smoothing=smoothing)
        losses_N, counts_N = example_losses(program.kind, outputs, batch["labels"], smoothing)
        return jnp.sum(batch["weights"] * losses_N), jnp.sum(batch["weights"] * counts_N)

    return jax.value_and_grad(regather(loss), has_aux=True)(trainable)


def _accumulated(
    program: Program, trainable: Any, frozen: Frozen, batch: Batch, key: jax.Array | None
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    n = program.grad_accum
    if n == 1:
        return _loss_and_grad(program, trainable, frozen, batch, key)
    micro = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)
    micro = spread_rows(micro, axis=1)

    def add(total: Any, item: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        i, part = item
        part_key = None if key is None else jax.random.fold_in(key, i)
        result = _loss_and_grad(program, trainable, frozen, part, part_key)
        return jax.tree.map(jnp.add, total, result), None

    zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zero, (jnp.arange(n), micro))[0]


def optimizer_step(
    program: Program, state: State, frozen: Frozen, hyper: Hyper, batch: AnyBatch
) -> tuple[State, jax.Array]:
    """One optimizer step: (new state, mean loss over the batch's real examples or target tokens).

    Gradients exist for `state.trainable` only.
    """
    stochastic = program.lora_dropout > 0 or program.model_dropout
    key = jax.random.wrap_key_data(state.key)
    key = jax.random.fold_in(key, state.step) if stochastic else None
    rows = in_rows(batch)
    (loss, count), grads = _accumulated(program, state.trainable, frozen, rows, key)
    grads = jax.tree.map(lambda g: g / count, grads)
    trainable, opt_state = optimizer.update(grads, state.opt_state, state.trainable, hyper)
    return State(trainable, opt_state, state.step + 1, state.key), loss / count


@partial(jax.jit, static_argnames="program", donate_argnames="state")
def train_step(
    program: Program, state: State, frozen: Frozen, hyper: Hyper, batch: AnyBatch
) -> tuple[State, jax.Array]:
    """`optimizer_step`, compiled; `state` is donated."""
    return optimizer_step(program, state, frozen, hyper, batch)


@partial(jax.jit, static_argnames="program")
def predict(program: Program, trainable: Any, frozen: Frozen, batch: AnyBatch) -> jax.Array:
    """Model outputs (B, outputs) without dropout: the same forward as training's."""
    return forward(program, trainable, frozen, in_rows(batch))


@partial(jax.jit, static_argnames="program")
def prefix_outputs(program: Program, trainable: Any, frozen: Frozen, batch: AnyBatch) -> jax.Array:
    """The outputs of the program's frozen layers, without dropout.

    Returns:
      (rows, T, width), the outputs of the last frozen layer; or the features that a head reads,
      (N, width) float32, if `program.reads_features`.
    """
    rows = in_rows(batch)
    model: Any = nnx.merge(program.graphdef, combine(trainable, frozen.params)["base"])
    ids, segments, types = rows["input_ids"], rows["segment_ids"], rows["token_type_ids"]
    positions = rows["position_ids"]
    if program.reads_features:
        first = rows["first_tokens"]
        return model.features(
            ids, segments, types, position_ids_BxT=positions, first_tokens_N=first
        )
    count = program.frozen_layers
    if program.kind == "causal_lm":
        return model.decoder.first_layers(count, ids, segments, position_ids_BxT=positions).outputs
    found = model.encoder.first_layers(count, ids, segments, types, position_ids_BxT=positions)
    return found.outputs
