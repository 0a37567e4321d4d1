"""Language models in one pack: each trial's numbers are those it has alone."""

import dataclasses

import pytest

from lorax.sweep import run_packed
from lorax.train import run_trial
from tests.helpers.causal_zoo import write_lm_base, write_pairs

pytestmark = pytest.mark.slow

KINDS = (
    {"lora": {"rank": 1, "targets": "qv"}},
    {"lora": {"rank": 5, "targets": "all-linear", "alpha": 7.0}, "seed": 1},
    {"lora": {"rank": 2, "targets": "mlp", "scaling": "rslora"}, "optimizer": {"lr": 3e-3}},
)


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """Of each trial (in a pack, alone)."""
    root = tmp_path_factory.mktemp("language")
    base, pairs = write_lm_base(root / "base"), write_pairs(root / "pairs")

    def trial(folder, changes):
        train = {"max_steps": 12, "eval_every": 6, "batch_size": 8, "grad_accum": 2}
        config = world.trial(root / folder, train=train, **changes)
        task = {"name": "instructions", "data_dir": str(pairs), "max_length": 24}
        config.task = dataclasses.replace(config.task, **task)
        config.model = dataclasses.replace(config.model, source=str(base), name="lm")
        return config

    packed = run_packed([trial("packed", changes) for changes in KINDS])
    return list(zip(packed, [run_trial(trial("alone", c)) for c in KINDS], strict=True))


def test_they_ran_in_one_pack(results):
    assert [packed["lanes"] for packed, _ in results] == [len(KINDS)] * len(KINDS)


def test_each_has_the_numbers_it_has_alone(results):
    for packed, alone in results:
        for epoch in ("best", "last"):
            assert packed[epoch]["step"] == alone[epoch]["step"]
            assert packed[epoch]["metrics"] == pytest.approx(alone[epoch]["metrics"], rel=2e-5)
    values = [alone["last"]["metrics"]["perplexity"] for _, alone in results]
    assert max(values) > 1.01 * min(values)
