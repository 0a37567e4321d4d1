"""Examples per second over an epoch of real training: lorax beside PEFT under the HF Trainer.

    python scripts/bench_epoch.py
    python scripts/bench_epoch.py --tasks cola,rte --max-examples 512 --batch-size 16

LoRA r = 8 on query and value, batches of 32 examples of at most 128 tokens, no dropout, AdamW; one
epoch. Each measurement is a process of its own, in turn: lorax as its entry points set themselves
up, through its own loop; PEFT by scripts/peft_trial.py with the Trainer's defaults (random batches,
padded to their longest), and with `train_sampling_strategy="group_by_length"`; both of them once
more with the allocator settings that lorax gives itself: the better figure counts.

What counts is the training steps with all that belongs to them: batches drawn and collated,
forward, gradient, clipping, update, losses read and recorded. Imports, data, weights and evaluation
do not. Nor does lorax's compilation, which is done for all shapes beforehand, with no programs kept
from earlier runs: it is in `set-up`, with imports, data and weights. PEFT's figure is the Trainer's
own `train_samples_per_second`.

Both sides have the head of `AutoModelForSequenceClassification`, and `--precision` alike (PEFT's
bf16 is the Trainer's). One thing differs: lorax packs several examples in a row; PEFT's users get
padded batches.

`--max-examples` cuts both splits to their first examples, for all ways alike. Each process leaves
its output and its result in a folder of `--out`. Other work on the machine spoils the figures,
PyTorch's most: each comes with the load that it found.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_sweep import (
    MALLOC,
    PACKAGES,
    ROOT,
    BenchError,
    Record,
    default_data_dir,
    installed,
    row,
    run_process,
)
from peft_trial import (
    ALPHA,
    EVAL_BATCH_SIZE,
    MAX_LENGTH,
    SPLITS,
    TASKS,
    WARMUP_RATIO,
    WEIGHT_DECAY,
    find_folder,
    missing,
)

STARTED = time.perf_counter()
RANK, LR, SEED = 8, 1e-3, 0
# A way's variables of the environment; PEFT's flags follow from its name.
WAYS: dict[str, dict[str, str]] = {
    "lorax": {},
    "peft": {},
    "peft-malloc": MALLOC,
    "peft-grouped": {},
    "peft-grouped-malloc": MALLOC,
}
COLUMNS = (
    "task",
    "examples",
    "lorax, ex/s",
    "PEFT, Trainer's defaults, ex/s",
    "PEFT, grouped, ex/s",
    "times defaults",
    "times grouped",
    "lorax set-up, s",
)


class Clock:
    """Stands where the loop's progress bar does: notes when the last step was settled."""

    def __init__(self) -> None:
        self.steps, self.started = 0, time.perf_counter()
        self.seconds = 0.0

    def update(self, steps: int) -> None:
        """So many more steps are done, their losses read and recorded."""
        self.steps += steps
        self.seconds = time.perf_counter() - self.started

    def set_postfix(self, shown: dict[str, str]) -> None:
        """What a bar would show."""

    def set_postfix_str(self, shown: str) -> None:
        """What a bar would show."""


def lorax_epoch(options: argparse.Namespace, out: Path) -> Record:
    """One epoch by lorax's own loop, in this process; all shapes compiled beforehand."""
    from lorax.runtime.process import prepare_process

    prepare_process()
    from lorax.runs.trial import Trial
    from lorax.train.loop import Loop
    from lorax.train.run_trial import open_run
    from lorax.train.setup import check_trial
    from lorax.train.single_engine import SingleEngine
    from lorax.train.start import find_start

    trial = lorax_trial(options, out)
    check_trial(trial)
    opened = Trial.of(trial)
    opened.directory.mkdir(parents=True, exist_ok=True)
    start = find_start(opened)
    run = open_run(opened, start)
    engine = SingleEngine(run.setup, start.state)
    compile_shapes(engine, run)
    # No checkpoint and no result: they would come after the last step.
    loop = Loop(
        run.dataset,
        [run],
        engine,
        step=0,
        save=lambda _: None,
        end=lambda _, run: run.tracker.close(),
    )
    setup, clock = time.perf_counter() - STARTED, Clock()
    loop.run(clock)
    if run.progress.reason or run.progress.last is None:
        raise BenchError(f"lorax diverged: {run.progress.reason}")
    assert run.meter.compile_seconds == 0, "a shape was compiled in the time that counts"
    examples = len(run.dataset.train)
    return {
        "examples": examples,
        "examples_per_second": examples / clock.seconds,
        "seconds_steps": clock.seconds,
        "seconds_setup": setup,
        "steps": clock.steps,
        "last": run.progress.last,
    }


def lorax_trial(options: argparse.Namespace, out: Path) -> Any:
    """The trial of scripts/peft_trial.py as lorax's config."""
    from lorax.config import (
        LoraConfig,
        ModelConfig,
        OptimizerConfig,
        TaskConfig,
        TrainConfig,
        TrialConfig,
    )

    (task,) = options.tasks
    return TrialConfig(
        TaskConfig(task, str(options.data_dir), max_length=MAX_LENGTH),
        ModelConfig(source=str(options.model), pooling="pooler", dropout=0.0),
        LoraConfig(rank=RANK, alpha=ALPHA, targets="qv"),
        OptimizerConfig(lr=LR, warmup_ratio=WARMUP_RATIO, weight_decay=WEIGHT_DECAY),
        TrainConfig(
            epochs=1,
            batch_size=options.batch_size,
            eval_batch_size=EVAL_BATCH_SIZE,
            precision=options.precision,
            base_dtype=options.precision,
        ),
        seed=SEED,
        output_dir=str(out),
    )


def compile_shapes(engine: Any, run: Any) -> None:
    """Compile the step for every shape of the epoch."""
    from lorax.train.batch_stream import BatchStream
    from lorax.train.hyper_stream import HyperStream

    stream = BatchStream(run.dataset, run.config.train, [run.config.seed])
    batches = map(stream.at, range(run.batches_per_epoch))
    of_shape = {batch.shape: batch for batch in batches}
    hyper = HyperStream([run.config], run.total_steps).at(0)
    for batch in of_shape.values():
        engine.compile(hyper, batch)


def command(
    way: str, task: str, data_dir: Path, options: argparse.Namespace, out: Path
) -> list[str]:
    """The command line of a measurement, after `python`; it leaves `<out>/result.json`."""
    shared = f"--batch-size {options.batch_size} --precision {options.precision}".split()
    shared += ["--data-dir", str(data_dir), "--model", str(options.model), "--out", str(out)]
    if way == "lorax":
        return [str(Path(__file__).resolve()), "--one", "--tasks", task, *shared]
    words = f"--task {task} --epochs 1 --rank {RANK} --seed {SEED} --lr {LR}".split()
    words += ["--group-by-length"] if "grouped" in way else []
    return [str(ROOT / "scripts/peft_trial.py"), *words, *shared]


def measure(way: str, task: str, data_dir: Path, options: argparse.Namespace) -> Record:
    """One epoch in a process of its own.

    Raises:
      BenchError: the process failed.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{task}-{way}-", dir=options.out))
    out, load = folder / "trial", os.getloadavg()[0]
    try:
        line = command(way, task, data_dir, options, out)
        run_process(line, folder / "process", {"PYTHONPATH": str(ROOT), **WAYS[way]})
    except BenchError as fault:
        raise BenchError(f"{task}, {way}: {fault}") from fault
    found = json.loads((out / "result.json").read_text())
    rate = f"{found['examples_per_second']:.1f} examples a second, load before {load:.1f}"
    print(f"{task}, {way}: {rate}", file=sys.stderr, flush=True)
    return found


def shortened(task: str, data_dir: Path, most: int, root: Path) -> Path:
    """A root of GLUE that holds a task's first examples alone."""
    source, target = find_folder(task, data_dir), root / TASKS[task].folder
    assert source is not None
    target.mkdir(parents=True)
    for split in SPLITS:
        lines = (source / f"{split}.tsv").read_bytes().rstrip(b"\n").split(b"\n")
        kept = lines[: TASKS[task].header_lines + most]
        (target / f"{split}.tsv").write_bytes(b"\n".join(kept) + b"\n")
    return root


def line_of(task: str, found: dict[str, Record]) -> list[str]:
    """A task's cells of the table; of each of PEFT's ways the better allocator counts."""
    rates = {way: result["examples_per_second"] for way, result in found.items()}
    ours = rates["lorax"]
    theirs = [max(rates[way], rates[f"{way}-malloc"]) for way in ("peft", "peft-grouped")]
    return [
        task,
        str(found["lorax"]["examples"]),
        *(f"{rate:.1f}" for rate in (ours, *theirs)),
        *(f"{ours / rate:.2f}" for rate in theirs),
        f"{found['lorax']['seconds_setup']:.1f}",
    ]


def data_dir_of(task: str, options: argparse.Namespace) -> Path:
    """Where a task is: as asked, or in the places in which lorax looks."""
    return (options.data_dir or default_data_dir(task)).resolve()


def check(options: argparse.Namespace) -> None:
    """Refuse before any work.

    Raises:
      BenchError: data, base or a package is not there.
    """
    for task in options.tasks:
        asked = {"task": task, "data_dir": data_dir_of(task, options), "model": options.model}
        if fault := missing(argparse.Namespace(**asked)):
            raise BenchError(fault)
    for name in [name for names in PACKAGES.values() for name in names]:
        if installed(name) is None:
            raise BenchError(f"{name} is not installed: make .venv/ready-test")


def run(options: argparse.Namespace) -> None:
    """Measure every way of every task, and print the table."""
    check(options)
    options.out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    try:
        for task in options.tasks:
            data_dir = data_dir_of(task, options)
            if options.max_examples:
                root = Path(tempfile.mkdtemp(prefix=f"{task}-data-", dir=options.out))
                data_dir = shortened(task, data_dir, options.max_examples, root)
            found = {way: measure(way, task, data_dir, options) for way in WAYS}
            lines.append(row(line_of(task, found)))
    finally:  # what was measured is worth showing, whatever came after it
        if lines:
            print(row(COLUMNS), row(["---"] * len(COLUMNS)), *lines, sep="\n", flush=True)


def run_one(options: argparse.Namespace) -> None:
    """Measure lorax in this process, and leave the result.

    Raises:
      BenchError: lorax refuses the trial.
    """
    from lorax.errors import LoraxError

    options.out.mkdir(parents=True, exist_ok=True)
    try:
        result = lorax_epoch(options, options.out)
    except LoraxError as fault:
        raise BenchError(str(fault)) from fault
    (options.out / "result.json").write_text(json.dumps(result, indent=1))


def task_names(text: str) -> list[str]:
    """A list of tasks, as `cola,rte`."""
    found = text.split(",")
    if unknown := [name for name in found if name not in TASKS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(TASKS)}")
    return list(dict.fromkeys(found))


def at_least_one(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=task_names, default=[*TASKS], help=",".join(TASKS))
    parser.add_argument("--max-examples", type=at_least_one, help="of each split; all by default")
    parser.add_argument("--batch-size", type=at_least_one, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--data-dir", type=Path, help="GLUE's root")
    parser.add_argument("--model", type=Path, default=ROOT / "assets/minilm")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-epoch"))
    parser.add_argument("--one", action="store_true", help="one task by lorax, in this process")
    options = parser.parse_args(argv)
    options.model, options.out = options.model.resolve(), options.out.resolve()
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 is success, 2 a fault."""
    options = parse(argv)
    try:
        (run_one if options.one else run)(options)
    except (BenchError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is ended, too
    sys.exit(main())
