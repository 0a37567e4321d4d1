import pytest

from experiments.ablation import AXES, trials
from lorax.errors import LoraxError
from lorax.runs.trial_id import trial_id

pytestmark = pytest.mark.slow


def test_the_default_grid_is_every_rank_rate_and_seed_beside_its_references():
    sweep = trials([])
    assert len({trial_id(trial) for trial in sweep}) == len(sweep) == 42
    lora = [trial for trial in sweep if trial.train.mode == "lora"]
    assert {trial.lora.rank for trial in lora} == {1, 2, 4, 8, 16}
    assert {trial.seed for trial in sweep} == {0, 1, 2}
    assert {trial.train.mode for trial in sweep} == {"head", "lora", "full"}
    assert len({(trial.sweep.name, trial.output_dir) for trial in sweep}) == 1


def test_overrides_hold_for_all_trials():
    sweep = trials(["task=mrpc", "seed=4,5", "lora.alpha=32"])
    assert {trial.seed for trial in sweep} == {4, 5}
    assert {(t.task.name, t.task.max_length, t.lora.alpha) for t in sweep} == {("mrpc", 128, 32.0)}


@pytest.mark.parametrize("axis", AXES)
def test_an_axis_of_the_ablation_is_refused(axis):
    with pytest.raises(LoraxError, match=f"{axis}=1.* is an axis of the ablation"):
        trials([f"{axis}=1"])
