"""AdamW whose hyperparameters are data: one compiled step serves every learning rate."""

from typing import Any, NamedTuple

import jax
import optax

from lorax.lora.paths import leaf_path


class Hyper(NamedTuple):
    """The hyperparameters of a step's update, as fp32 scalars that may be traced."""

    lr: Any
    head_lr: Any
    weight_decay: Any
    clip_norm: Any
    b1: Any
    b2: Any
    eps: Any


def init(trainable: Any, hyper: Hyper) -> optax.OptState:
    """Optimizer state of the trainable part only."""
    return _transform(trainable, hyper).init(trainable)


def update(
    grads: Any, state: optax.OptState, trainable: Any, hyper: Hyper
) -> tuple[Any, optax.OptState]:
    """One AdamW step: (new trainable, new state).

    The gradient is clipped by its global norm, over the trainable part; weight decay is
    decoupled and excludes biases and norms; the head may have its own learning rate.
    """
    steps, state = _transform(trainable, hyper).update(grads, state, trainable)

    def move(path: tuple[Any, ...], param: jax.Array, step: jax.Array) -> jax.Array:
        lr = hyper.head_lr if is_head(leaf_path(path)) else hyper.lr
        return param - lr * step

    return jax.tree_util.tree_map_with_path(move, trainable, steps), state


def _transform(trainable: Any, hyper: Hyper) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(hyper.clip_norm),
        optax.scale_by_adam(hyper.b1, hyper.b2, hyper.eps),
        optax.add_decayed_weights(hyper.weight_decay, decay_mask(trainable)),
    )


def decay_mask(trainable: Any) -> Any:
    """True where weight decay applies: on all leaves except biases and norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _decays(leaf_path(path)), trainable)


def is_head(path: str) -> bool:
    """Whether a leaf of `{"base": ..., "lora": ...}` belongs to the task's head."""
    return path.startswith("base.head.")


def _decays(path: str) -> bool:
    *modules, leaf = path.split(".")
    in_norm = any("norm" in name.lower() for name in modules[-1:])
    return leaf not in ("bias", "scale") and not in_norm
