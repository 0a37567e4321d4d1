"""What a sweep's trials cost before any of them trains: composing, directories, checks.

    python scripts/bench_overhead.py
    python scripts/bench_overhead.py --trials 16,64,256,1000

LoRA trials of the default encoder and data that differ in rank, rate and seed. `Hydra` is its own
composition of a job, which a sweep once needed three times a trial; `composer` is lorax's
(`lorax/launch/composer.py`): the trial, and the whole config that Hydra's launcher writes down.
`directory` is one call of `trial_dir`, which hashes. `checks` are those of a packed sweep before
its packs are planned; they call `trial_dir`, too. Milliseconds of CPU a trial; the last column is
composer and checks of all trials, in seconds.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

COLUMNS = ("trials", "Hydra, ms", "composer, ms", "directory, ms", "checks, ms", "all, s")
RANKS, RATES = (1, 2, 4, 8), (1e-3, 2e-3, 4e-3, 8e-3)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", default="16,64,256", help="how many, a row each")
    counts = [int(count) for count in parser.parse_args().trials.split(",")]

    from lorax.launch.application import register
    from lorax.runtime.process import prepare_process

    prepare_process()
    register()
    measure(1)  # imports, and the first look at the base and the data
    print("|", " | ".join(COLUMNS), "|\n|" + "---|" * len(COLUMNS))
    for count in counts:
        found = measure(count)
        whole = count * (found["composer, ms"] + found["checks, ms"])
        cells = [f"{1e3 * value:.2f}" for value in found.values()]
        print("|", " | ".join([str(count), *cells, f"{whole:.1f}"]), "|", flush=True)


if __name__ == "__main__":
    main()
