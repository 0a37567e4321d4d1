"""What a sweep costs besides its computation: before it trains, and on the host for each step.

    python scripts/bench_overhead.py
    python scripts/bench_overhead.py --trials 16,64,256,1000
    python scripts/bench_overhead.py --lanes 1,16,64

LoRA trials of the default encoder and data that differ in rank, rate and seed. `Hydra` is its own
composition of a job, which a sweep once needed three times a trial; `composer` is lorax's
(`lorax/launch/composer.py`): the trial, and the whole config that Hydra's launcher writes down.
`directory` is one call of `trial_dir`, which hashes. `checks` are those of a packed sweep before
its packs are planned; they call `trial_dir`, too. Milliseconds of CPU a trial; the last column is
composer and checks of all trials, in seconds.

`--lanes` measures the host's work for a step of a pack: the loop with all that it does between
evaluations (batches, learning rates, transfers, the call of a compiled program, losses, records),
while the program takes and returns what the real one does and computes nothing. `alike` packs have
four seeds, `unlike` ones a seed a lane. The median of 512 steps; the goal is 1 ms + 10 us a lane.
"""

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

COLUMNS = ("trials", "Hydra, ms", "composer, ms", "directory, ms", "checks, ms", "all, s")
RANKS, RATES = (1, 2, 4, 8), (1e-3, 2e-3, 4e-3, 8e-3)
STEPS = 512
FEW = 16  # jobs that Hydra composes for its column


def grid(count: int) -> list[list[str]]:
    """The overrides of so many jobs."""
    values = ((seed, rank, lr) for seed in itertools.count() for rank in RANKS for lr in RATES)
    return [
        [f"lora.rank={rank}", f"optimizer.lr={lr}", f"seed={seed}"]
        for seed, rank, lr in itertools.islice(values, count)
    ]


def seconds(call: Callable[[Any], Any], items: Sequence[Any]) -> float:
    """CPU time of a call for each item."""
    start = time.process_time()
    for item in items:
        call(item)
    return time.process_time() - start


def measure(count: int) -> dict[str, float]:
    """Seconds of each part, for so many trials."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from lorax.launch.application import config_of
    from lorax.launch.composer import Composer
    from lorax.runs.trial_id import trial_dir
    from lorax.sweep.run_sweep import checked

    jobs = grid(count)
    with hydra.initialize_config_module("conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        sweep = loader.load_configuration("finetune", [], RunMode.MULTIRUN)
        by_hydra = seconds(lambda job: config_of(loader.load_sweep_config(sweep, job)), jobs[:FEW])
        composer = Composer(loader)
        composed = seconds(lambda job: composer.trial(sweep, job), jobs)
        composed += seconds(lambda job: composer.load_sweep_config(sweep, job), jobs)
        trials = [composer.trial(sweep, job) for job in jobs]  # kept since
    return {
        "Hydra, ms": by_hydra / len(jobs[:FEW]),
        "composer, ms": composed / count,
        "directory, ms": seconds(trial_dir, trials) / count,
        "checks, ms": seconds(checked, [trials]) / count,
    }


def host_work(lanes: int, seeds: int) -> float:
    """Seconds of the host's work for a step of so many trials of so many seeds."""
    import jax
    import numpy as np

    from lorax.config import LoraConfig, OptimizerConfig, TrackingConfig, TrainConfig, TrialConfig
    from lorax.runs.trial import Trial
    from lorax.runtime.compiler import StepCost
    from lorax.train.batched_engine import BatchedEngine
    from lorax.train.loop import Loop
    from lorax.train.run_trial import open_run, progress_bar
    from lorax.train.start import first_start

    class Idle(BatchedEngine):
        """Its programs have the arguments and results of the real ones, and compute nothing."""

        def compilation(self, hyper: Any, batch: Any, *, is_trained: bool = False) -> Any:
            arguments = self._arguments(hyper, batch)
            step = jax.jit(lambda state, frozen, hyper, batch: (state, hyper.lr), donate_argnums=0)
            program = step.lower(*arguments).compile()
            return lambda: (StepCost(0.0, 0.0, 0), program)

        def predict(self, batch: Any) -> Any:
            return np.zeros((self.count, batch.examples.shape[-1], 2))

    with tempfile.TemporaryDirectory() as out:
        opened = [
            Trial.of(
                TrialConfig(
                    lora=LoraConfig(rank=RANKS[n % len(RANKS)]),
                    optimizer=OptimizerConfig(lr=1e-3 * (1 + n)),
                    train=TrainConfig(max_steps=STEPS, eval_every=STEPS),
                    tracking=TrackingConfig("none"),
                    seed=n % seeds,
                    output_dir=out,
                )
            )
            for n in range(lanes)
        ]
        starts = [first_start(trial.config) for trial in opened]
        for trial in opened:
            trial.directory.mkdir(parents=True)
        runs = [open_run(trial, start) for trial, start in zip(opened, starts, strict=True)]
        engine = Idle(
            [start.setup for start in starts],
            [start.state for start in starts],
            tokens_at_once=1024,
        )
        loop = Loop(
            runs[0].dataset,
            runs,
            engine,
            step=0,
            save=lambda _: None,
            end=lambda _, run: run.tracker.close(),
        )
        with progress_bar(opened, loop) as bar:
            loop.run(bar)
    return float(np.median(loop.full_steps))


def show_host_work(lanes: Sequence[int]) -> None:
    """Print a row for each number of lanes."""
    columns = ("lanes", "alike, ms", "unlike, ms", "goal, ms")
    print("|", " | ".join(columns), "|\n|" + "---|" * len(columns))
    for count in lanes:
        alike, unlike = host_work(count, min(4, count)), host_work(count, count)
        cells = [f"{1e3 * alike:.2f}", f"{1e3 * unlike:.2f}", f"{1 + 0.01 * count:.2f}"]
        print("|", " | ".join([str(count), *cells]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", default="16,64,256", help="how many, a row each")
    parser.add_argument("--lanes", help="of packs whose steps are measured, a row each")
    options = parser.parse_args()
    counts = [int(count) for count in options.trials.split(",")]

    from lorax.launch.application import register
    from lorax.runtime.process import prepare_process

    prepare_process()
    register()
    if options.lanes:
        show_host_work([int(count) for count in options.lanes.split(",")])
        return
    measure(1)  # imports, and the first look at the base and the data
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    for count in counts:
        found = measure(count)
        whole = count * (found["composer, ms"] + found["checks, ms"])
        cells = [f"{1e3 * value:.2f}" for value in found.values()]
        print("|", " | ".join([str(count), *cells, f"{whole:.1f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
