"""The memory of a training step by kind, compared with full fine-tuning and cheaper bases.

    python -m experiments.memory task=mrpc lora.rank=8
    python -m experiments.memory model=roberta-large train.precision=bf16 train.batch_size=8

Arguments are the overrides of experiments.finetune. Sizes are those of the arrays and of XLA's
plan for the step in its largest batch shape; nothing is trained. A process needs more memory, for
the libraries and the compiler itself.
"""

from collections.abc import Sequence

from hydra import compose, initialize_config_module

from lorax.errors import LoraxError
from lorax.launch import config_of, run_command
from lorax.sweep.memory_table import alternatives, memory_of, memory_table


def main(overrides: Sequence[str]) -> None:
    """Print the table."""
    if sweeping := [word for word in overrides if word in ("-m", "--multirun")]:
        raise LoraxError(f"{sweeping[0]}: the table is of one trial; give one value a setting")
    with initialize_config_module("conf", version_base=None):
        trial = config_of(compose("finetune", list(overrides)))
    memory_of(trial)  # first, because it checks the trial
    found = {name: memory_of(other) for name, other in alternatives(trial).items()}
    print(memory_table(found))


if __name__ == "__main__":
    run_command(main, __doc__)
