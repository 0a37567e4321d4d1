"""Time from the command to the first training step, with empty and with filled caches.

    python scripts/bench_start.py
    python scripts/bench_start.py --tasks cola,rte --repeat 5

Starts `experiments.finetune` on the default encoder and waits for the first step's record in its
`metrics.jsonl`; imports, data, tokens, weights and compilation are all in it. `cold` has an empty
cache of programs and tokens, `warm` the one that the run before it left. Medians of `--repeat`.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHES = ("JAX_COMPILATION_CACHE_DIR", "LORAX_TOKEN_CACHE")  # they would go before ours
POLL_SECONDS = 0.01
LIMIT_SECONDS = 300


def seconds_to_first_step(task: str, home: Path) -> float:
    """Run the command until its first record is there; then end it.

    Args:
      task: a task's name.
      home: where programs and tokens are kept.
    """
    with tempfile.TemporaryDirectory() as out, (Path(out) / "stderr").open("w+") as stderr:
        words = [f"task={task}", "train.max_steps=500", "train.log_every=1", "tracking=jsonl"]
        command = [sys.executable, "-m", "experiments.finetune", *words, f"output_dir={out}"]
        kept = {name: value for name, value in os.environ.items() if name not in CACHES}
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            env={**kept, "XDG_CACHE_HOME": str(home)},
            cwd=ROOT,
            stdout=stderr,
            stderr=stderr,
        )
        try:
            while time.perf_counter() - start < LIMIT_SECONDS:
                if any(path.stat().st_size for path in Path(out).glob("*/*/metrics.jsonl")):
                    return time.perf_counter() - start
                if process.poll() is not None:
                    break
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        stderr.seek(0)
        raise SystemExit(f"error: {task}: no step was recorded:\n{stderr.read()[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", default="cola,mrpc,rte")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    columns = ("task", "cold, s", "warm, s")
    for line in (columns, ["---"] * len(columns)):
        print("| " + " | ".join(line) + " |")
    for task in options.tasks.split(","):
        cold, warm = [], []
        for _ in range(options.repeat):
            with tempfile.TemporaryDirectory() as home:
                cold.append(seconds_to_first_step(task, Path(home)))
                warm.append(seconds_to_first_step(task, Path(home)))
        cells = (task, *(f"{statistics.median(x):.1f}" for x in (cold, warm)))
        print("| " + " | ".join(cells) + " |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
