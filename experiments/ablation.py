"""A rank ablation, end to end: the sweep, its reference rows, its report.

    python -m experiments.ablation                    # what `make ablation` runs
    python -m experiments.ablation task=mrpc seed=0,1,2,3,4

LoRA at ranks 1 to 16, compared with the frozen base (only the head is trained) and with full
fine-tuning, at two learning rates each: a rank sweep at one fixed learning rate partly measures
the learning rate. Arguments are Hydra overrides for all trials; `seed=` takes a list. The same
command skips finished trials and resumes an interrupted one.
"""

import itertools
import logging
from collections.abc import Sequence

from hydra import compose, initialize_config_module

from lorax.analysis.report import build_report, save_report
from lorax.config import TrialConfig
from lorax.errors import LoraxError
from lorax.launch import config_of, run_command
from lorax.runs.trial_id import trial_dir
from lorax.sweep import run_packed, show_plan_if_asked

RANKS = (1, 2, 4, 8, 16)
LEARNING_RATES = {"head": (3e-3, 1e-2), "lora": (2e-3, 6e-3), "full": (5e-5, 2e-4)}
SEEDS = "0,1,2"
AXES = ("train.mode", "lora.rank", "optimizer.lr")


def trials(overrides: Sequence[str]) -> list[TrialConfig]:
    """Every trial of the ablation: the reference rows first, then rank by rank."""
    for item in overrides:
        if item.partition("=")[0] in AXES:
            raise LoraxError(f"{item!r} is an axis of the ablation; use experiments.finetune")
    shared = [item for item in overrides if not item.startswith("seed=")]
    asked = [item.removeprefix("seed=") for item in overrides if item.startswith("seed=")]
    seeds = (asked or [SEEDS])[-1].split(",")
    rows = [
        *itertools.product(["head"], [None], LEARNING_RATES["head"], seeds),
        *itertools.product(["lora"], RANKS, LEARNING_RATES["lora"], seeds),
        *itertools.product(["full"], [None], LEARNING_RATES["full"], seeds),
    ]
    with initialize_config_module("conf", version_base=None):
        return [_trial(shared, *row) for row in rows]


def _trial(shared: Sequence[str], mode: str, rank: int | None, lr: float, seed: str) -> TrialConfig:
    own = [f"train.mode={mode}", f"optimizer.lr={lr}", f"seed={seed}"]
    own += [f"lora.rank={rank}"] if rank else []
    config = compose("finetune", ["experiment=ablation", "tracking=jsonl", *own, *shared])
    return config_of(config)


def main(overrides: Sequence[str]) -> None:
    """Run the unfinished trials; print the table and the path of the report."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    sweep = trials(overrides)
    show_plan_if_asked(sweep)
    run_packed(sweep)
    directory = trial_dir(sweep[0]).parent
    report = build_report(directory)
    print(report.text())
    print(f"report: {save_report(report)}")


if __name__ == "__main__":
    run_command(main, __doc__)
