"""Times the same LoRA sweep, run in several ways, from the outside.

    python scripts/bench_sweep.py
    python scripts/bench_sweep.py --task mrpc --ways packed,peft --repeat 3
    python scripts/bench_sweep.py --growth 1,4,16,64

The ways: `packed` (hydra/launcher=packed), `serial` (lorax_serial), `plain` (Hydra's own launcher,
one trial after another in one process), `process` (one process a trial), `peft` (one process a
trial of scripts/peft_trial.py) and `peft-malloc` (the same with the allocator settings that lorax
gives itself). All train the same ranks and seeds for as many steps of as many random examples, and
evaluate the dev split once, at the end. Two things differ: lorax packs several examples in a row
and its head reads the mean over tokens; PEFT's users get batches padded to their longest, and the
head of `AutoModelForSequenceClassification`.

Each way starts fresh processes in a fresh directory, and with an empty cache of compiled programs.
Wall-clock is from the first process's start to the last one's end: imports, data, compilation,
evaluation and saving are in it. `peak MB` is the largest resident size of any one process.

`--growth` times growing numbers of trials instead: n of them are all ranks with n / ranks seeds;
1 is rank 4 with seed 0. Words such as `train.pad_rank=16` go to lorax as Hydra overrides.
`--repeat` takes the ways in turn that many times; tables then show medians.

Figures are written to `<out>/bench_sweep.json` after each way, so an interrupted call resumes
where it stopped; figures in the file are not measured again.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from peft_trial import (
    ALPHA,
    EVAL_BATCH_SIZE,
    MAX_LENGTH,
    TASKS,
    WARMUP_RATIO,
    WEIGHT_DECAY,
    find_folder,
    missing,
)

# lorax is not imported: a child's peak memory counts from its parent's size, so this stays small.

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = {"packed": "packed", "serial": "lorax_serial", "plain": "basic"}
PEFT_WAYS = ("peft", "peft-malloc")
WAYS = (*LAUNCHERS, "process", *PEFT_WAYS)
DEFAULT_WAYS = ("packed", "plain", "process", "peft", "peft-malloc")
# What lorax.runtime.process sets, as the environment says it.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": str(2**28),
    "MALLOC_ARENA_MAX": "1",
}
PACKAGES = {
    "lorax": ("jax", "flax", "hydra-core"),
    "peft": ("torch", "transformers", "peft", "accelerate"),
}
UNSET = "JAX_COMPILATION_CACHE_DIR"
POLL_SECONDS = 0.05
TAIL_LINES = 3
MEGA = 1e6

Record = dict[str, Any]


class BenchError(Exception):
    """A fault of one line."""


class Trial(NamedTuple):
    """One cell of the grid."""

    rank: int
    seed: int


class Cost(NamedTuple):
    """What processes took, seen from outside."""

    wall: float
    cpu: float
    peak_bytes: int


class Measurement(NamedTuple):
    """What is measured in one go."""

    way: str
    grid: tuple[Trial, ...]
    repeat: int

    @property
    def key(self) -> str:
        """Its name in the file."""
        return f"{self.way} {' '.join(axes(self.grid))} repeat={self.repeat}"


# Commands


def grid(ranks: Sequence[int], seeds: Sequence[int]) -> tuple[Trial, ...]:
    """Every rank with every seed."""
    return tuple(Trial(rank, seed) for rank in ranks for seed in seeds)


def growth_grid(number: int, ranks: Sequence[int]) -> tuple[Trial, ...]:
    """`number` trials: all ranks with as many seeds as it takes; one alone is rank 4, seed 0.

    Raises:
      BenchError: a number that is not a multiple of the ranks'.
    """
    if number == 1:
        return (Trial(4 if 4 in ranks else ranks[0], 0),)
    if number < 1 or number % len(ranks):
        raise BenchError(f"--growth {number} is neither 1 nor a multiple of {len(ranks)} ranks")
    return grid(ranks, range(number // len(ranks)))


def commands(
    way: str, trials: Sequence[Trial], options: argparse.Namespace, folder: Path
) -> list[list[str]]:
    """The command lines of a way, one a process, after `python`.

    Args:
      way: one of `WAYS`.
      trials: all of a grid.
      options: see `parse`.
      folder: where the results go.
    """
    if way in PEFT_WAYS:
        return [peft_command(trial, options, folder) for trial in trials]
    module, shared = ["-m", "experiments.finetune"], lorax_words(options, folder)
    if way == "process":
        return [[*module, *axes([trial]), *shared] for trial in trials]
    return [[*module, "-m", *axes(trials), f"hydra/launcher={LAUNCHERS[way]}", *shared]]


def axes(trials: Sequence[Trial]) -> list[str]:
    """The grid in Hydra's words."""
    ranks, seeds = ({trial[n]: None for trial in trials} for n in range(2))
    return [f"lora.rank={','.join(map(str, ranks))}", f"seed={','.join(map(str, seeds))}"]


def lorax_words(options: argparse.Namespace, folder: Path) -> list[str]:
    """What all trials share, as Hydra overrides."""
    return [
        f"task={options.task}",
        f"task.data_dir={quoted(options.data_dir)}",
        f"task.max_length={MAX_LENGTH}",
        f"model.source={quoted(options.model)}",
        "model.dropout=0",
        "lora.targets=qv",
        f"lora.alpha={ALPHA}",
        "lora.dropout=0",
        f"optimizer.lr={options.lr}",
        f"optimizer.warmup_ratio={WARMUP_RATIO}",
        f"optimizer.weight_decay={WEIGHT_DECAY}",
        f"train.batch_size={options.batch_size}",
        f"train.eval_batch_size={EVAL_BATCH_SIZE}",
        f"train.max_steps={options.steps}",
        f"train.eval_every={options.steps}",
        f"output_dir={quoted(folder)}",
        *options.overrides,
    ]


def quoted(path: Path) -> str:
    r"""A path as a string of Hydra's grammar.

    >>> print(quoted(Path("/it's/a b")))
    '/it\'s/a b'
    """
    escaped = str(path).replace("'", r"\'")
    return f"'{escaped}'"


def peft_command(trial: Trial, options: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of one trial by PEFT."""
    words = {
        "task": options.task,
        "rank": trial.rank,
        "seed": trial.seed,
        "steps": options.steps,
        "lr": options.lr,
        "batch-size": options.batch_size,
        "data-dir": options.data_dir,
        "model": options.model,
        "out": folder / f"r{trial.rank}-s{trial.seed}",
    }
    flags = [str(part) for name, value in words.items() for part in (f"--{name}", value)]
    return [str(ROOT / "scripts/peft_trial.py"), *flags]


# Measuring


def run_process(command: Sequence[str], log: Path, more: dict[str, str] | None = None) -> Cost:
    """Run `python <command>` to its end, its output in `<log>.out` and `<log>.err`.

    Args:
      command: what Python is given.
      log: where its output goes, and beside it compiled programs.
      more: variables of its environment.

    Raises:
      BenchError: it failed; the message ends with the last it said.
    """
    environment = {name: x for name, x in os.environ.items() if name != UNSET}
    environment |= {"XDG_CACHE_HOME": str(log.parent / "cache"), **(more or {})}
    errors = log.with_suffix(".err")
    with log.with_suffix(".out").open("w") as out, errors.open("w") as err:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            cost = wait(process, start)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # with its workers, if it has any
            process.wait()
            raise
    if process.returncode:
        raise BenchError(f"exit status {process.returncode}: {tail(errors)} (all of it: {errors})")
    return cost


def wait(process: subprocess.Popen, start: float) -> Cost:
    """Wait for a process: what it took, with the children that it waited for."""
    with PeakWatch(process.pid) as peak:
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(wall, usage.ru_utime + usage.ru_stime, max(peak.bytes, usage.ru_maxrss * unit))


class PeakWatch:
    """Follows the resident peak of a process.

    `ru_maxrss` alone will not do: lorax starts each trial with a new measurement of its peak, and
    that forgets the kernel's, too.
    """

    def __init__(self, pid: int):
        self.bytes = 0
        self._status = Path(f"/proc/{pid}/status")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(POLL_SECONDS):
            self.bytes = max(self.bytes, self._now())

    def _now(self) -> int:
        try:
            lines = self._status.read_text().splitlines()
        except OSError:  # not Linux, or it has ended
            return 0
        return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), 0)


def tail(path: Path) -> str:
    """The last lines of a file, on one line."""
    lines = [x.strip() for x in path.read_text(errors="replace").splitlines() if x.strip()]
    return " | ".join(lines[-TAIL_LINES:]) or "it said nothing"


def measure(this: Measurement, options: argparse.Namespace) -> Record:
    """Run a way from its first process to its last.

    Raises:
      BenchError: a process failed, or results are missing.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"{this.way}-{len(this.grid)}-", dir=options.out))
    load = os.getloadavg()[0]
    lines = commands(this.way, this.grid, options, folder)
    try:
        start = time.perf_counter()
        more = MALLOC if this.way == "peft-malloc" else {}
        costs = [run_process(line, folder / f"process-{n}", more) for n, line in enumerate(lines)]
        wall = time.perf_counter() - start
        results = read_results(folder, len(this.grid))
    except BenchError as fault:
        raise BenchError(f"{this.way}: {fault}") from fault
    return {
        "way": this.way,
        "trials": len(this.grid),
        "wall_seconds": wall,
        "cpu_seconds": sum(cost.cpu for cost in costs),
        "peak_bytes": max(cost.peak_bytes for cost in costs),
        "processes": len(costs),
        "load_before": load,
        "results": results,
        "command": ["python", *lines[0]],
    }


def read_results(folder: Path, number: int) -> list[Record]:
    """The metrics of a way's trials on the dev split, after the last step.

    Raises:
      BenchError: not as many as there should be, or one that did not finish.
    """
    paths = sorted(folder.rglob("result.json"))
    found = [json.loads(path.read_text()) for path in paths]
    if len(found) != number:
        raise BenchError(f"{len(found)} of {number} trials left a result in {folder}")
    for path, result in zip(paths, found, strict=True):
        if result["status"] != "finished":
            raise BenchError(f"{path}: {result['status']}, {result.get('reason')}")
    return [{"metric": x["metric"], "metrics": x["last"]["metrics"]} for x in found]


# Tables


def ways_table(measured: Sequence[Record], ways: Sequence[str]) -> list[str]:
    """A row a way; ratios are to packed, or to the first way where packed was not run."""
    by_way = {way: [x for x in measured if x["way"] == way] for way in ways}
    there = {way: records for way, records in by_way.items() if records}
    if not there:
        return []
    base = "packed" if "packed" in there else next(iter(there))
    base_wall = median(there[base], "wall_seconds")
    metric = there[base][0]["results"][0]["metric"]
    head = f"| way | wall-clock s | s a trial | times {base} | CPU s | peak MB "
    lines = [f"{head}| {metric} | dev loss | trials |", "|---" * 9 + "|"]
    for way, records in there.items():
        wall, trials = median(records, "wall_seconds"), records[0]["trials"]
        cells = [way, spread(records), f"{wall / trials:.2f}", f"{wall / base_wall:.2f}"]
        cells += [f"{median(records, 'cpu_seconds'):.1f}", f"{peak(records):.0f}"]
        cells += [f"{mean_of(records, name):z.4f}" for name in (metric, "loss")]
        lines.append(row([*cells, str(trials)]))
    return lines


def growth_table(measured: Sequence[Record], ways: Sequence[str]) -> list[str]:
    """A row for each way and number of trials; ratios are to the way's smallest number."""
    lines = [row(["way", "trials", "wall-clock s", "s a trial", "times the first", "peak MB"])]
    lines.append("|---" * 6 + "|")
    for way in ways:
        numbers = sorted({x["trials"] for x in measured if x["way"] == way})
        first = None
        for trials in numbers:
            records = [x for x in measured if (x["way"], x["trials"]) == (way, trials)]
            wall = median(records, "wall_seconds")
            first = first or wall
            cells = [way, str(trials), spread(records), f"{wall / trials:.2f}"]
            lines.append(row([*cells, f"{wall / first:.2f}", f"{peak(records):.0f}"]))
    return lines


def row(cells: Sequence[str]) -> str:
    """A line of a Markdown table.

    >>> row(["a", "b"])
    '| a | b |'
    """
    return f"| {' | '.join(cells)} |"


def median(records: Sequence[Record], name: str) -> float:
    """Over a way's repeats."""
    return statistics.median(x[name] for x in records)


def spread(records: Sequence[Record]) -> str:
    """Wall-clock: the median, and from where to where."""
    walls = [x["wall_seconds"] for x in records]
    middle = f"{statistics.median(walls):.1f}"
    return middle if len(walls) == 1 else f"{middle} ({min(walls):.1f} to {max(walls):.1f})"


def peak(records: Sequence[Record]) -> float:
    """In MB, over a way's repeats."""
    return max(x["peak_bytes"] for x in records) / MEGA


def mean_of(records: Sequence[Record], metric: str) -> float:
    """A metric's mean over trials and repeats."""
    return statistics.fmean(y["metrics"][metric] for x in records for y in x["results"])


# The file


def open_record(path: Path, settings: Record) -> Record:
    """What was measured with these settings on this machine before.

    Raises:
      BenchError: the file is of something else.
    """
    if not path.exists():
        return {**settings, "measured": {}}
    try:
        record = json.loads(path.read_text())
    except ValueError as fault:
        raise BenchError(f"{path} is damaged ({fault}); delete it to measure again") from None
    kept = {name: record.get(name) for name in settings}
    if kept != json.loads(json.dumps(settings)):
        raise BenchError(f"{path} is of other settings: give another --out, or delete it")
    return record


def write_record(path: Path, record: Record) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(path)


def machine() -> Record:
    """What figures are measured on."""
    names = (name for group in PACKAGES.values() for name in group)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"python": platform.python_version(), **{name: installed(name) for name in names}}
    return {"cpu": processor(), "cores": usable, "versions": versions}


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """A package's version; None when it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


# The command


def settings_of(options: argparse.Namespace) -> Record:
    """What decides the figures, besides way and grid."""
    names = ("task", "steps", "lr", "batch_size", "overrides")
    chosen = {name: getattr(options, name) for name in names} | {"model": str(options.model)}
    chosen["data_dir"] = str(options.data_dir)
    return {"settings": chosen, "machine": machine(), "revision": revision()}


def revision() -> str | None:
    """The clone's commit, with a mark where it was changed since; None outside of one."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(git, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def plan(options: argparse.Namespace) -> Iterator[Measurement]:
    """All measurements in order: ways in turn, once a repeat."""
    for repeat in range(options.repeat):
        if options.growth is None:
            trials = grid(options.ranks, options.seeds)
            yield from (Measurement(way, trials, repeat) for way in options.ways)
            continue
        for number in options.growth:
            trials = growth_grid(number, options.ranks)
            yield from (Measurement(way, trials, repeat) for way in options.growth_ways)


def check(options: argparse.Namespace, ways: Sequence[str]) -> None:
    """Refuse before any work.

    Raises:
      BenchError: data, base or a package is not there.
    """
    if fault := missing(options):
        raise BenchError(fault)
    needed = [] if set(ways) <= set(PEFT_WAYS) else [*PACKAGES["lorax"]]
    needed += PACKAGES["peft"] if set(ways) & set(PEFT_WAYS) else []
    if absent := [name for name in needed if installed(name) is None]:
        raise BenchError(f"{absent[0]} is not installed: make .venv, or leave out its way")


def run(options: argparse.Namespace) -> None:
    """Measure what is not in the file yet, and print the table."""
    ways = options.ways if options.growth is None else options.growth_ways
    todo = list(plan(options))
    check(options, ways)
    options.out.mkdir(parents=True, exist_ok=True)
    path, settings = options.out / "bench_sweep.json", settings_of(options)
    record = open_record(path, settings)
    say_what(options, ways, settings["machine"])
    for this in todo:
        if this.key in record["measured"]:
            print(f"{this.key}: in {path}")
            continue
        record["measured"][this.key] = done = measure(this, options)
        write_record(path, record)
        said = f"{done['wall_seconds']:.1f} s, load before {done['load_before']:.1f}"
        print(f"{this.key}: {said}", flush=True)
    measured = [record["measured"][this.key] for this in todo]
    table = ways_table if options.growth is None else growth_table
    print("", *table(measured, ways), sep="\n")


def say_what(options: argparse.Namespace, ways: Sequence[str], where: Record) -> None:
    """The settings, the order, and the machine."""
    versions = ", ".join(f"{name} {x}" for name, x in where["versions"].items() if x)
    print(f"{where['cpu']}, {where['cores']} cores; {versions}")
    ranks, extra = ",".join(map(str, options.ranks)), "".join(f", {x}" for x in options.overrides)
    what = f"{options.task}, {options.model.name}, LoRA on qv, ranks {ranks}"
    print(f"{what}, {options.steps} steps of {options.batch_size}, lr {options.lr:g}{extra}")
    print(f"in this order: {', '.join(ways)}", flush=True)


def numbers(text: str) -> list[int]:
    """A list of different whole numbers, as `1,4,16`."""
    found = [int(x) for x in text.split(",")]
    if len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(text)
    return found


def way_names(text: str) -> list[str]:
    """A list of ways, as `packed,peft`."""
    found = text.split(",")
    if unknown := [name for name in found if name not in WAYS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(WAYS)}")
    return list(dict.fromkeys(found))


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", default="cola", choices=TASKS)
    parser.add_argument("--ways", type=way_names, default=list(DEFAULT_WAYS), help=",".join(WAYS))
    parser.add_argument("--ranks", type=numbers, default=[2, 4, 8, 16])
    parser.add_argument("--seeds", type=numbers, default=[0, 1, 2])
    parser.add_argument("--growth", type=numbers, help="numbers of trials to time instead")
    parser.add_argument("--growth-ways", type=way_names, default=["packed"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--data-dir", type=Path, help="GLUE's root or the task's folder")
    parser.add_argument("--model", type=Path, default=ROOT / "assets/minilm")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench-sweep"))
    parser.add_argument("overrides", nargs="*", help="further Hydra overrides for lorax's ways")
    options = parser.parse_intermixed_args(argv)
    options.model, options.out = options.model.resolve(), options.out.resolve()
    options.data_dir = (options.data_dir or default_data_dir(options.task)).resolve()
    return options


def default_data_dir(task: str) -> Path:
    """Where GLUE is when nobody says: the places in which lorax looks."""
    named = os.environ.get("LORAX_GLUE_DIR")
    places = [base / sub for base in (Path.cwd(), ROOT) for sub in ("glue", "../shared/glue")]
    places = [Path(named)] if named else places
    return next((place for place in places if find_folder(task, place)), places[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: 0 is success, 2 a fault."""
    options = parse(argv)
    try:
        run(options)
    except (BenchError, OSError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the child is ended, too
    sys.exit(main())
