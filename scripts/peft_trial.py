"""One LoRA trial on a GLUE task by PEFT, PyTorch and transformers, as their users run it.

    python scripts/peft_trial.py --task cola --rank 8 --seed 0 --steps 100 --out outputs/peft
    python scripts/peft_trial.py --task rte --epochs 1 --group-by-length

`transformers.Trainer` has its defaults apart from what `arguments` names. The base's own dropout is
off, as in lorax's default encoder; the head is the one of `AutoModelForSequenceClassification`.
Neither JAX nor lorax is imported, since PEFT's users would not wait for them. `<out>` gets
`adapter/` and `result.json`, which names the metrics as lorax's own does; `examples_per_second` is
the Trainer's own figure, of its training steps alone.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MAX_LENGTH = 128
EVAL_BATCH_SIZE = 64
ALPHA = 16
WARMUP_RATIO = 0.06
WEIGHT_DECAY = 0.01
LOG_EVERY = 10
SPLITS = ("train", "dev")
WEIGHTS = ("config.json", "model.safetensors", "tokenizer.json")


class Task(NamedTuple):
    """Where a task's columns are, and how it is scored; `matthews` is scikit-learn's.

    `labels` are the classes as the file writes them, in order.
    """

    folder: str
    header_lines: int
    label: int
    texts: tuple[int, ...]
    metrics: tuple[str, ...]
    labels: tuple[str, ...] = ("0", "1")


TASKS = {
    "cola": Task("CoLA", 0, 1, (3,), ("matthews", "accuracy")),
    "mrpc": Task("MRPC", 1, 0, (3, 4), ("accuracy", "f1")),
    "rte": Task("RTE", 1, 3, (1, 2), ("accuracy",), ("entailment", "not_entailment")),
}


class Split(NamedTuple):
    """Texts by column, and class ids."""

    texts: list[list[str]]
    labels: list[int]


class Tokens:
    """A data set in PyTorch's sense: token lists and a label, unpadded."""

    def __init__(self, split: Split, tokenizer: Any):
        self.encoded = tokenizer(*split.texts, truncation=True, max_length=MAX_LENGTH)
        self.labels = split.labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {name: x[n] for name, x in self.encoded.items()} | {"labels": self.labels[n]}


def find_folder(task: str, data_dir: Path) -> Path | None:
    """The folder of a task's TSV files: `data_dir` may be GLUE's root or the folder itself."""
    places = (data_dir / TASKS[task].folder, data_dir)
    return next((p for p in places if all((p / f"{s}.tsv").is_file() for s in SPLITS)), None)


def read_split(task: str, path: Path) -> Split:
    """A file of GLUE: UTF-8, tab-separated, without quoting."""
    kind = TASKS[task]
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")[kind.header_lines :]
    rows = [line.split("\t") for line in lines]
    texts = [[row[column] for row in rows] for column in kind.texts]
    return Split(texts, [kind.labels.index(row[kind.label]) for row in rows])


def build_model(folder: Path, rank: int) -> Any:
    """The base with a classification head, adapted at query and value."""
    import peft
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    lora = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=ALPHA,
        target_modules=["query", "value"],
        lora_dropout=0.0,
    )
    return peft.get_peft_model(base, lora)


def arguments(options: argparse.Namespace) -> Any:
    """The Trainer's arguments, wherever they are not its defaults."""
    from transformers import TrainingArguments

    more: dict[str, Any] = {"max_steps": options.steps}
    if options.epochs is not None:
        more = {"num_train_epochs": options.epochs}
    if options.group_by_length:
        more["train_sampling_strategy"] = "group_by_length"
    return TrainingArguments(
        output_dir=str(options.out),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=EVAL_BATCH_SIZE,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_RATIO,  # below 1 it is a share of all steps
        weight_decay=WEIGHT_DECAY,
        seed=options.seed,
        logging_steps=LOG_EVERY,
        save_strategy="no",
        report_to="none",
        bf16=options.precision == "bf16",
        disable_tqdm=True,
        **more,
    )


def scorer(task: str) -> Any:
    """The Trainer's `compute_metrics`: from logits and labels to the task's metrics."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    known = {"matthews": matthews_corrcoef, "accuracy": accuracy_score, "f1": f1_score}

    def score(outputs: Any) -> dict[str, float]:
        predicted = outputs.predictions.argmax(-1)
        return {name: float(known[name](outputs.label_ids, predicted)) for name in metrics}

    metrics = TASKS[task].metrics
    return score


def build_trainer(options: argparse.Namespace, folder: Path) -> Any:
    """Everything up to the first step."""
    from transformers import AutoTokenizer, DataCollatorWithPadding, Trainer, set_seed

    set_seed(options.seed)  # before the head and the adapter are drawn
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    train, dev = (read_split(options.task, folder / f"{split}.tsv") for split in SPLITS)
    return Trainer(
        model=build_model(options.model, options.rank),
        args=arguments(options),
        train_dataset=Tokens(train, tokenizer),
        eval_dataset=Tokens(dev, tokenizer),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=scorer(options.task),
    )


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and evaluate; the contents of `result.json`."""
    trainer = build_trainer(options, folder)
    start = time.perf_counter()
    trained = trainer.train()
    trained_at = time.perf_counter()
    dev = trainer.evaluate()
    seconds = {
        "seconds_train": trained_at - start,
        "seconds_eval": time.perf_counter() - trained_at,
    }
    trainer.model.save_pretrained(options.out / "adapter")
    metrics = TASKS[options.task].metrics
    return {
        "status": "finished",
        "metric": metrics[0],
        "last": {
            "step": trainer.state.global_step,
            "metrics": {name: dev[f"eval_{name}"] for name in (*metrics, "loss")},
        },
        "examples": len(trainer.train_dataset),
        "examples_per_second": trained.metrics["train_samples_per_second"],
        "seconds_steps": trained.metrics["train_runtime"],
        "train_loss": trained.training_loss,
        "train_losses": [x["loss"] for x in trainer.state.log_history if "loss" in x],
        **seconds,
    }


def missing(options: argparse.Namespace) -> str | None:
    """What is not there, and how to have it; None when all is."""
    if absent := [name for name in WEIGHTS if not (options.model / name).is_file()]:
        return f"no {options.model / absent[0]}: python scripts/fetch_assets.py minilm"
    if find_folder(options.task, options.data_dir) is None:
        where = TASKS[options.task].folder
        return f"no {where}/train.tsv and dev.tsv in {options.data_dir}: name GLUE's root"
    return None


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="cola", choices=TASKS)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=100)
    length.add_argument("--epochs", type=int, help="passes over the training split, not --steps")
    parser.add_argument("--group-by-length", action="store_true", help="batches of like lengths")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--data-dir", type=Path, default=Path("../shared/glue"))
    parser.add_argument("--model", type=Path, default=Path("assets/minilm"))
    parser.add_argument("--out", type=Path, default=Path("outputs/peft"))
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if fault := missing(options):
        print(f"error: {fault}", file=sys.stderr)
        return 2
    folder = find_folder(options.task, options.data_dir)
    assert folder is not None
    options.out.mkdir(parents=True, exist_ok=True)
    result = run(options, folder)
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
