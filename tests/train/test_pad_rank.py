import numpy as np
import pytest

from lorax.runs.adapter import load_adapter
from lorax.runs.trial_id import trial_dir
from lorax.runtime.compiler import compiled_programs
from lorax.train import run_trial
from lorax.train.step import predict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def world(deep_world):
    return deep_world


def losses(trial, epochs=2):
    return np.array([trial.step(batch) for batch in trial.batches(epochs)])


@pytest.mark.parametrize("lora", [{"rank": 1}, {"rank": 3, "dropout": 0.2}])
def test_a_padded_trial_is_the_unpadded_one(bench, lora):
    optimizer = {"lr": 1e-3, "weight_decay": 0.1}
    true = losses(bench(lora=lora, optimizer=optimizer))
    padded = losses(bench(lora=lora, optimizer=optimizer, train={"pad_rank": 6}))
    assert len(true) == 20
    assert np.ptp(true) > 0.05
    np.testing.assert_allclose(padded, true, rtol=1e-6)


def test_one_executable_serves_every_rank_alpha_rate_and_seed(world, tmp_path):
    def run(seed, **lora):
        config = world.trial(
            tmp_path,
            seed=seed,
            lora=lora,
            optimizer={"lr": 0.01 / seed, "warmup_ratio": 0.1 * seed, "clip_norm": 1.0 * seed},
            train={"pad_rank": 5, "batch_size": 8},
        )
        return run_trial(config)

    run(1, rank=5)
    programs = compiled_programs(), predict._cache_size()
    results = [run(2, rank=1, alpha=1.0), run(3, rank=3, scaling="rslora", init="gaussian")]
    assert (compiled_programs(), predict._cache_size()) == programs
    assert [r["adapter_params"] for r in results] == [256, 768]
    assert all(r["compile_seconds"] == 0 for r in results)


def test_the_adapter_is_kept_at_its_true_rank(world, tmp_path):
    lora = {"rank": 2, "rank_pattern": {"value": 3}}
    config = world.trial(tmp_path, lora=lora, train={"pad_rank": 6})
    run_trial(config)
    flat, spec, _ = load_adapter(trial_dir(config) / "adapter")
    for path, leaf in flat.items():
        if path.startswith("lora."):
            rank = 3 if ".value." in path else 2
            assert rank == leaf.shape[0 if path.endswith(".a") else 1] == spec.rank_of(path[5:-2])
