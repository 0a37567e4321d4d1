"""Fine-tune one model on one task, or sweep over any setting.

    python -m experiments.finetune task=mrpc model=roberta-base lora.rank=8
    python -m experiments.finetune -m lora.rank=1,2,4,8 lora.targets=qv,qkvo seed=0,1,2

Each trial has its own directory, `outputs/<sweep>/<trial>`. The same command skips finished
trials and resumes interrupted ones.
"""

from lorax.config import TrialConfig
from lorax.launch import hydra_main
from lorax.sweep import show_plan_if_asked
from lorax.sweep.run_serial import objective, run_and_log


def finetune(trial: TrialConfig) -> float:
    """Run a trial; return the best value of the main metric, for a sweeper to maximise."""
    show_plan_if_asked([trial])
    return objective(run_and_log(trial))


if __name__ == "__main__":
    hydra_main(finetune, "finetune")
