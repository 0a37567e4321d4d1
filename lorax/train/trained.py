"""A finished trial's model, for use outside of training."""

from typing import Any

from flax import nnx

from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.lora import adapt, combine
from lorax.runs.adapter import load_adapter, lora_tree
from lorax.runs.trial_id import trial_dir
from lorax.train.setup import Setup


def check_leaves_adapter(trial: TrialConfig) -> None:
    """Refuse a trial whose model `trained_part` cannot return.

    Raises:
      LoraxError: another mode than `lora`.
    """
    if trial.train.mode != "lora":
        raise LoraxError(f"train.mode={trial.train.mode} leaves no adapter: take lora")


def trained_part(trial: TrialConfig, setup: Setup) -> Any:
    """The trainable part of a setup with the adapter of the trial's best evaluation.

    Args:
      trial: a finished trial of a language model, in mode `lora`.
      setup: of `prepare`.

    Raises:
      LoraxError: another mode, or no adapter in the trial's directory.
    """
    check_leaves_adapter(trial)
    leaves, _, _ = load_adapter(trial_dir(trial) / "adapter")
    return {**setup.trainable, "lora": lora_tree(leaves)}


def model_of(setup: Setup, trainable: Any) -> Any:
    """The base with an adapter, without dropout."""
    base = combine(trainable["base"], setup.frozen.params["base"])
    return adapt(nnx.merge(setup.program.graphdef, base), trainable["lora"], setup.frozen.scales)
