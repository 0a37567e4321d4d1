"""Writes sweep directories of invented numbers: test data, never results."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lorax.config import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TaskConfig,
    TrainConfig,
    TrialConfig,
)

STEPS_AN_EPOCH = 40
BASE_PARAMS = 22_700_000
HEAD_PARAMS = 148_226
ENVIRONMENT = {
    "device": "test device",
    "jax": "0.0",
    "flax": "0.0",
    "python": "3.11",
    "cpu_count": 2,
}


def make_config(mode="lora", rank=8, seed=0, *, alpha=16.0, lr=1e-3, targets="qv", task="reviews"):
    return asdict(
        TrialConfig(
            task=TaskConfig(name=task),
            model=ModelConfig(name="toy"),
            lora=LoraConfig(rank=rank, alpha=alpha, targets=targets),
            optimizer=OptimizerConfig(lr=lr),
            train=TrainConfig(mode=mode),
            seed=seed,
        )
    )


def make_result(config, score=0.8, status="finished", metric="accuracy", extra=None, *, lanes=1):
    mode, rank = config["train"]["mode"], config["lora"]["rank"]
    adapter = 9216 * rank if mode == "lora" else 0
    trainable = BASE_PARAMS + HEAD_PARAMS if mode == "full" else adapter + HEAD_PARAMS
    best = {"step": 80, "epoch": 2.0, "metrics": {"loss": 0.5, metric: score} | (extra or {})}
    last = {"step": 120, "epoch": 3.0, "metrics": {"loss": 0.55, metric: score - 0.004}}
    diverged = status == "diverged"
    return {
        "trial_id": "set by write_trial",
        "status": status,
        "reason": "loss is nan at step 7" if diverged else None,
        "cut": None,
        "metric": metric,
        "best": None if diverged else best,
        "last": None if diverged else last,
        "steps": 120,
        "stopped_early": False,
        "trainable_params": trainable,
        "adapter_params": adapter,
        "head_params": HEAD_PARAMS,
        "base_params": BASE_PARAMS,
        "total_params": BASE_PARAMS + HEAD_PARAMS + adapter,
        "seconds_per_step": {"head": 0.021, "lora": 0.064, "full": 0.112}[mode],
        "seconds_total": 9.5,
        "compile_seconds": 2.0,
        "step_memory_bytes": (180 + rank) * 2**20,
        "peak_rss_bytes": 2**30,
        "lanes": lanes,
        "flops_per_step": 1.5e9,
        "adapter_bytes": 4 * adapter,
        "base_bytes": 4 * BASE_PARAMS,
        "environment": ENVIRONMENT,
    }


def make_cut_result(config, score, *, place, step=40, rung=1, of=12, goes_on=6, lanes=12):
    """As halving leaves a trial: evaluated up to the cut, best and last of equal standing."""
    point = {"step": step, "epoch": step / STEPS_AN_EPOCH, "metrics": {"accuracy": score}}
    cut = {"step": step, "rung": rung, "place": place, "of": of, "goes_on": goes_on}
    result = make_result(config, score, "cut", lanes=lanes)
    return result | {"best": point, "last": point, "steps": step, "cut": cut}


def make_records(score, rng, metric="accuracy"):
    train = [
        {
            "kind": "train",
            "step": s,
            "epoch": s / STEPS_AN_EPOCH,
            "lr": 1e-3,
            "loss": float(0.35 + 0.35 * np.exp(-s / 40) + rng.normal(0, 0.02)),
        }
        for s in range(2, 3 * STEPS_AN_EPOCH + 1, 2)
    ]
    evals = [
        {
            "kind": "eval",
            "step": e * STEPS_AN_EPOCH,
            "epoch": float(e),
            "loss": 0.5,
            metric: score - drop,
        }
        for e, drop in ((1, 0.02), (2, 0.0), (3, 0.004))
    ]
    return [*train, *evals]


def write_trial(sweep: Path, name: str, config, result=None, records=()):
    directory = sweep / name
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "metrics.jsonl").write_text(lines)
    if result is not None:
        (directory / "result.json").write_text(json.dumps(result | {"trial_id": name}))
    return directory


def write_sweep(
    sweep: Path,
    *,
    ranks=(1, 2, 4, 8, 64),
    rates=(1e-3,),
    targets=("qv",),
    seeds=3,
    references=("head", "full"),
    task="reviews",
    noise=0.005,
    gain=0.002,
):
    """A grid of ranks, rates and targets over seeds, and the reference modes; all finished."""
    rng = np.random.default_rng(0)
    cells = [
        (
            make_config("lora", rank, seed, lr=lr, targets=t, task=task),
            0.80 + gain * np.log2(rank) - (0.01 if lr > 2e-3 else 0.0),
        )
        for rank in ranks
        for lr in rates
        for t in targets
        for seed in range(seeds)
    ]
    base = {"head": 0.72, "full": 0.812}
    cells += [
        (
            make_config(mode, seed=seed, lr=1e-4 if mode == "full" else rates[0], task=task),
            base[mode],
        )
        for mode in references
        for seed in range(seeds)
    ]
    for index, (config, mean) in enumerate(cells):
        score = float(mean + rng.normal(0, noise))
        records = make_records(score, rng)
        write_trial(sweep, f"{task}-{index:03d}", config, make_result(config, score), records)
    return sweep


HALVED = {1: (), 2: (0,), 4: (0, 1), 8: (0, 1, 2)}
"""Rank to the seeds that finish, of three: none, one, two, all."""


def write_halved_sweep(sweep: Path):
    """Twelve trials of one pack, cut once: rank 1 is gone, ranks 2 and 4 have lost seeds."""
    cut = [(rank, seed) for rank, kept in HALVED.items() for seed in range(3) if seed not in kept]
    for rank in HALVED:
        for seed in range(3):
            config = make_config(rank=rank, seed=seed)
            score = 0.80 + 0.001 * rank - 0.002 * seed
            if (rank, seed) in cut:
                place = 12 - cut.index((rank, seed))
                result = make_cut_result(config, score - 0.1, place=place)
            else:
                result = make_result(config, score, lanes=6)
            records = make_records(score, np.random.default_rng(rank + seed))
            write_trial(sweep, f"r{rank}-s{seed}", config, result, records)
    write_clutter(sweep)
    return sweep


def write_clutter(sweep: Path):
    """What lies in a sweep directory besides trials."""
    checkpoint = sweep / "packs" / "0123abcd" / "checkpoints" / "40"
    checkpoint.mkdir(parents=True)
    (checkpoint / "record.json").write_text("{}")
    (sweep / "packs" / "0123abcd" / "pack.json").write_text('{"trials": []}')
    (sweep / "multirun.yaml").write_text("hydra: {}\n")
    (sweep / ".submitit" / "17").mkdir(parents=True)
    (sweep / ".submitit" / "17" / "17_0_log.out").write_text("")
