"""Trains the same model on the same task by PEFT + PyTorch and by lorax, and compares.

    python scripts/agree_with_peft.py --part losses --task mrpc --lr 2e-3 --epochs 2
    python scripts/agree_with_peft.py --part seeds --task cola --seeds 5 --epochs 5
    python scripts/agree_with_peft.py --table

`losses`: from the same A, B and head, on the same batches, step by step. `seeds`: each library
from its own random numbers, over several seeds. Figures are written to `<out>/*.json` at once, so
an interrupted run resumes where it stopped. docs/agreement.md says what is compared and why.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import torch
import transformers
from peft_tables import LIBRARIES, Record, figures, print_tables, read_record
from peft_trainer import PeftTrainer

from lorax import data
from lorax.config import (
    ModelConfig,
    OptimizerConfig,
    SweepConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
)
from lorax.config import TrialConfig as Trial
from lorax.errors import LoraxError
from lorax.interop import save_peft
from lorax.runs.files import write_json
from lorax.train import check_trial, run_trial
from lorax.train.dataset import Dataset, epoch_steps, load_dataset, total_steps
from lorax.train.evaluation import predict_all
from lorax.train.metrics import evaluate
from lorax.train.schedule import lr_factor
from lorax.train.setup import Setup, hyper_of, prepare
from lorax.train.step import State, init_state, train_step

FIRST = 50
TOLERANCE = 1e-3
TASKS = [name for name, task in data.TASKS.items() if task.kind == "classification"]


def say(line: str) -> None:
    """Print at once, wherever the output goes."""
    print(line, flush=True)


def trial(options: argparse.Namespace, seed: int) -> Trial:
    """The trial that both libraries train."""
    return Trial(
        task=TaskConfig(options.task, max_length=options.max_length),
        model=ModelConfig(dropout=0.0),
        optimizer=OptimizerConfig(lr=options.lr, weight_decay=options.weight_decay),
        train=TrainConfig(
            epochs=options.epochs, max_steps=options.max_steps, batch_size=options.batch_size
        ),
        tracking=TrackingConfig("none"),
        seed=seed,
        sweep=SweepConfig(f"lorax-{options.task}"),
        output_dir=str(options.out),
    )


def batches(config: Trial, dataset: Dataset) -> Iterator[np.ndarray]:
    """The examples of each step of the whole trial, in lorax's order."""
    size, count = config.train.batch_size, len(dataset.train)
    for step in range(total_steps(config, dataset)):
        epoch, position = divmod(step, epoch_steps(config, dataset))
        if position == 0:
            order = data.train_batches(count, size, seed=config.seed, epoch=epoch)
        yield order[position]


def batch_for(name: str, dataset: Dataset, indices: np.ndarray) -> dict[str, np.ndarray]:
    """A step's examples as a library takes them: several in a row, or one, padded."""
    if name == "peft":
        return data.pad(dataset.train, indices, dataset.pad_id)
    return data.collate_alike(dataset.train, [indices], dataset.layout, pad_id=dataset.pad_id)[0]


class LoraxTrainer:
    """lorax's own step, one batch at a time."""

    def __init__(self, config: Trial, setup: Setup, steps: int):
        state = init_state(setup.trainable, hyper_of(config), setup.dropout_key)
        # The step donates its state, whose arrays the set-up still holds.
        self.state: State = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state)
        self.config, self.setup, self.done = config, setup, 0
        optimizer = config.optimizer
        self.factor = lr_factor(optimizer.schedule, steps, optimizer.warmup_ratio)

    def step(self, batch: dict[str, np.ndarray]) -> float:
        """One optimizer step; the mean loss over the batch's real examples."""
        hyper = hyper_of(self.config, self.factor(self.done))
        program, frozen = self.setup.program, self.setup.frozen
        self.state, loss = train_step(program, self.state, frozen, hyper, batch)
        self.done += 1
        return float(loss)

    def predict(self, dataset: Dataset, encoded: data.Encoded, batch_size: int) -> np.ndarray:
        """Outputs for a whole split, (n, outputs), in the split's order."""
        return predict_all(self.setup, dataset, encoded, self.state.trainable, batch_size)


def same_start(config: Trial, dataset: Dataset) -> tuple[LoraxTrainer, PeftTrainer]:
    """Both libraries at the same A, B and head, handed over as a PEFT adapter."""
    setup, steps = prepare(config), total_steps(config, dataset)
    assert setup.spec is not None
    lora, head = setup.trainable["lora"], setup.trainable["base"]["head"]["out"]
    task = dataset.task
    with tempfile.TemporaryDirectory() as folder:
        save_peft(folder, lora, setup.spec, "bert", config.model.source, head="drop")
        theirs = PeftTrainer(
            config, task.kind, task.num_outputs, steps, adapter=Path(folder), head=head
        )
    return LoraxTrainer(config, setup, steps), theirs


def compare_losses(config: Trial, report: Callable[[str], None] = say) -> Record:
    """Part `losses`: every step's loss by both, then predictions on the dev split."""
    check_trial(config)
    dataset = load_dataset(config)
    ours, theirs = same_start(config, dataset)
    losses: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    seconds: dict[str, list[float]] = {name: [] for name in LIBRARIES}
    for indices in batches(config, dataset):
        for name, trainer in zip(LIBRARIES, (theirs, ours), strict=True):
            start = time.perf_counter()
            losses[name].append(trainer.step(batch_for(name, dataset, indices)))
            seconds[name].append(time.perf_counter() - start)
        if len(losses["peft"]) % FIRST == 0:
            step = len(losses["peft"])
            report(f"step {step}: largest relative difference {_largest(losses):.1e}")
    record = {
        "settings": settings_of(config),
        "steps": len(losses["peft"]),
        "relative_first": _largest({name: x[:FIRST] for name, x in losses.items()}),
        "relative_all": _largest(losses),
        "seconds_per_step": {name: float(np.median(x)) for name, x in seconds.items()},
        "dev": compare_predictions(config, dataset, ours, theirs),
        "losses": losses,
    }
    return record | {"agrees": _agrees(record)}


def compare_predictions(
    config: Trial, dataset: Dataset, ours: LoraxTrainer, theirs: PeftTrainer
) -> Record:
    """Metrics of both on the dev split, and where they differ."""
    task, encoded = dataset.task, next(iter(dataset.dev.values()))
    size = config.train.eval_batch_size
    outputs = {
        "peft": theirs.predict(dataset, encoded, size),
        "lorax": ours.predict(dataset, encoded, size),
    }
    classes = {name: x.argmax(-1) for name, x in outputs.items()}
    return {
        "examples": len(encoded),
        "largest_output_difference": float(np.abs(outputs["peft"] - outputs["lorax"]).max()),
        "predictions_that_differ": int((classes["peft"] != classes["lorax"]).sum()),
        "right": {name: int((x == encoded.labels).sum()) for name, x in classes.items()},
        "metrics": {
            name: evaluate(task.metrics, task.kind, x, encoded.labels)
            for name, x in outputs.items()
        },
    }


def _largest(losses: dict[str, list[float]]) -> float:
    theirs, ours = (np.asarray(losses[name]) for name in LIBRARIES)
    return float(np.max(np.abs(ours - theirs) / np.abs(theirs)))


def _agrees(record: Record) -> bool:
    right = record["dev"]["right"]
    return record["relative_first"] <= TOLERANCE and abs(right["peft"] - right["lorax"]) <= 1


def train_by_peft(config: Trial) -> Record:
    """One trial by PEFT, from its own initialisation, evaluated after each epoch."""
    start = time.perf_counter()
    dataset = load_dataset(config)
    task, steps = dataset.task, total_steps(config, dataset)
    encoded, labels = (dev := next(iter(dataset.dev.values()))), dev.labels
    trainer = PeftTrainer(config, task.kind, task.num_outputs, steps)
    points, seconds = [], []
    for step, indices in enumerate(batches(config, dataset), 1):
        began = time.perf_counter()
        trainer.step(batch_for("peft", dataset, indices))
        seconds.append(time.perf_counter() - began)
        if step % epoch_steps(config, dataset) == 0 or step == steps:
            outputs = trainer.predict(dataset, encoded, config.train.eval_batch_size)
            points.append(evaluate(task.metrics, task.kind, outputs, labels))
    return {
        "best": max(points, key=lambda metrics: metrics[task.metrics[0]]),
        "last": points[-1],
        "seconds": time.perf_counter() - start,
        "seconds_per_step": float(np.median(seconds)),
    }


def train_by_lorax(config: Trial) -> Record:
    """The same trial by `lorax.train.run_trial`."""
    result = run_trial(config)
    if result["status"] != "finished":
        raise LoraxError(f"seed {config.seed} by lorax did not finish: {result['reason']}")
    names = data.get_task(config.task.name).metrics
    best, last = result["best"], result["last"]
    assert best and last
    points = {
        place: {name: evaluation["metrics"][name] for name in names}
        for place, evaluation in (("best", best), ("last", last))
    }
    seconds = {"seconds": result["seconds_total"], "seconds_per_step": result["seconds_per_step"]}
    return points | seconds


RUNNERS = {"peft": train_by_peft, "lorax": train_by_lorax}


def compare_seeds(options: argparse.Namespace, report: Callable[[str], None] = say) -> Record:
    """Part `seeds`: every seed by both libraries; what the file has is not done again."""
    path = options.out / f"seeds-{options.task}.json"
    record = _open_record(path, settings_of(trial(options, 0)))
    check_trial(trial(options, 0))
    for seed in range(options.seeds):
        for name, train in RUNNERS.items():
            if str(seed) in record[name]:
                continue
            record[name][str(seed)] = result = train(trial(options, seed))
            write_json(path, record)
            best, last = (figures(result[place]) for place in ("best", "last"))
            report(f"seed {seed} {name}: best {best}; last {last}; {result['seconds']:.0f} s")
    return record


def settings_of(config: Trial) -> Record:
    """What decides the figures, besides the seed."""
    content = dataclasses.asdict(config)
    return {name: content[name] for name in ("task", "model", "lora", "optimizer", "train")}


def _open_record(path: Path, settings: Record) -> Record:
    if not path.exists():
        return {"settings": settings, **{name: {} for name in LIBRARIES}}
    record = read_record(path)
    if record.get("settings") != json.loads(json.dumps(settings)):
        raise LoraxError(f"{path} is of other settings: give another --out, or delete it")
    return record


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=("losses", "seeds"), default="losses")
    parser.add_argument("--task", default="mrpc", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=5, help="part seeds: how many")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max-steps", type=int, help="train for this many steps instead")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--out", type=Path, default=Path("outputs/agreement"))
    parser.add_argument("--table", action="store_true", help="print what is there, train nothing")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> bool:
    """Train what was asked for; whether the libraries agree, as far as a single run can say."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.part == "seeds":
        compare_seeds(options)
        return True
    record = compare_losses(trial(options, 0))
    write_json(options.out / f"losses-{options.task}.json", record)
    dev, seconds = record["dev"], record["seconds_per_step"]
    print(f"dev, PEFT:  {figures(dev['metrics']['peft'])}")
    print(f"dev, lorax: {figures(dev['metrics']['lorax'])}")
    print(f"seconds a step: PEFT {seconds['peft']:.3f}, lorax {seconds['lorax']:.3f}")
    print(f"agrees: {'yes' if record['agrees'] else 'no'}")
    return record["agrees"]


def main() -> int:
    options = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, on transformers
    try:
        agrees = True if options.table else run(options)
        print_tables(options.out)
    except LoraxError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
