"""A plan is recorded before its first pack trains, and stays the plan of what is left."""

import json

import pytest

from lorax.runs.pack_dir import read_record, tidy
from lorax.runs.trial_id import trial_dir
from lorax.sweep import pack, planner, run_packed, run_sweep
from lorax.sweep.cost import Probe
from lorax.sweep.pack import Pack
from lorax.train import run_trial
from tests.helpers.world import of


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.fixture(autouse=True)
def cheap_programs(monkeypatch):
    """Another program costs nothing, so that every wasteful rank has a pack of its own.

    What is planned fits: to compile programs for their memory is left out.
    """
    monkeypatch.setattr(planner, "measure_probe", lambda trial: Probe(0.0, 1e-6, 1.0))
    monkeypatch.setattr(planner, "trial_memory", lambda trial: 0)
    monkeypatch.setattr(planner, "pack_memory", lambda trials, **_: (0, len(trials)))


def trials_of(world, root, ranks=(1, 12, 16), **sweep):
    sweep = {"name": "tiny", **sweep}
    return [world.trial(root, lora={"rank": rank}, sweep=sweep) for rank in ranks]


def ranks_of(packs):
    return [[trial.config.lora.rank for trial in one.trials] for one in packs]


def records(root):
    """The packs' records by their trials' ranks."""
    found = [json.loads(path.read_text()) for path in root.glob("tiny/packs/*/pack.json")]
    return {tuple(int(name.split("-r")[1].split("-")[0]) for name in r["trials"]): r for r in found}


def kill_before(monkeypatch, number):
    """Let the process die before it trains its pack of that number."""
    run, seen = run_sweep.run_pack, []

    def run_pack(one):
        seen.append(one)
        if len(seen) == number:
            raise Killed
        return run(one)

    monkeypatch.setattr(run_sweep, "run_pack", run_pack)


def test_a_kill_between_packs_leaves_the_plan_of_the_rest(world, tmp_path, monkeypatch):
    trials = trials_of(world, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 2)
        run_packed(trials)
    assert {ranks: r.get("is_over") for ranks, r in records(tmp_path).items()} == {
        (1,): True,
        (12,): None,
        (16,): None,
    }
    # Planned by themselves, both would fall into one pack, as padding 12 to 16 wastes little.
    assert ranks_of(planner.plan_packs(of(trials[1:]))) == [[12, 16]]
    assert sorted(ranks_of(run_sweep.packs_to_run(of(trials)))) == [[12], [16]]


def test_a_plan_whose_trials_have_ended_does_not_come_back(world, tmp_path):
    trials = [world.trial(tmp_path, seed=n) for n in range(3)]
    assert ranks_and_seeds(run_sweep.packs_to_run(of(trials))) == [[0, 1, 2]]
    for trial in trials:
        run_trial(trial)  # by a command that keeps no plans
    run_packed(trials)
    assert [r.get("is_over") for r in all_records(tmp_path)] == [True]
    (trial_dir(trials[1]) / "result.json").unlink()
    assert ranks_and_seeds(run_sweep.packs_to_run(of(trials))) == [[1]]


def test_a_plan_that_rests_on_other_limits_is_made_again(world, tmp_path):
    seeds = [world.trial(tmp_path, seed=n) for n in range(4)]
    assert [len(one.trials) for one in run_sweep.packs_to_run(of(seeds))] == [4]
    halves = [world.trial(tmp_path, seed=n, sweep={"max_trials": 2}) for n in range(4)]
    for trial in halves:
        trial.sweep.name = "tiny"
    planned = run_sweep.packs_to_run(of(halves))
    assert [len(one.trials) for one in planned] == [2, 2]
    assert sorted(ranks_and_seeds(run_sweep.packs_to_run(of(halves)))) == [[0, 1], [2, 3]]
    assert [r.get("is_over") for r in all_records(tmp_path)].count(True) == 1


def ranks_and_seeds(packs):
    return [[trial.config.seed for trial in one.trials] for one in packs]


def all_records(root):
    return [json.loads(path.read_text()) for path in root.glob("tiny/packs/*/pack.json")]


def test_a_plan_of_which_a_trial_has_ended_elsewhere_is_made_again(world, tmp_path):
    trials = [world.trial(tmp_path, seed=n) for n in range(3)]
    assert ranks_and_seeds(run_sweep.packs_to_run(of(trials))) == [[0, 1, 2]]
    run_trial(trials[0])
    assert ranks_and_seeds(run_sweep.packs_to_run(of(trials))) == [[1, 2]]
    assert sorted(len(r["trials"]) for r in all_records(tmp_path) if not r.get("is_over")) == [2]


def test_of_two_that_plan_at_once_the_first_record_is_the_plan_of_both(
    world, tmp_path, monkeypatch
):
    trials = [world.trial(tmp_path, seed=n) for n in range(4)]
    others = []

    def plan_packs(chosen, **_):
        monkeypatch.undo()
        # While this process plans one pack, another one records two, of which it trains one.
        two = [Pack(tuple(chosen[:2]), 8), Pack(tuple(chosen[2:]), 8)]
        with monkeypatch.context() as patch:
            patch.setattr(run_sweep, "plan_packs", lambda *_, **__: two)
            others.extend(run_sweep.packs_to_run(of(trials)))
        return [Pack(tuple(chosen), 8)]

    monkeypatch.setattr(run_sweep, "plan_packs", plan_packs)
    ours = run_sweep.packs_to_run(of(trials))
    assert sorted(ranks_and_seeds(ours)) == sorted(ranks_and_seeds(others)) == [[0, 1], [2, 3]]
    assert len(all_records(tmp_path)) == 2


@pytest.mark.parametrize(
    "record",
    [
        "5",
        '{"trials": 5, "tokens_at_once": 1, "lanes": null, "predicted": {}}',
        '{"trials": [5], "tokens_at_once": 1, "lanes": null, "predicted": {}}',
        '{"trials": [], "tokens_at_once": "1", "lanes": null, "predicted": {}}',
        '{"trials": [], "tokens_at_once": 1, "lanes": 1.5, "predicted": {}}',
        '{"trials": [], "tokens_at_once": 1, "lanes": null, "predicted": []}',
        "[" * 100_000,
    ],
)
def test_a_record_of_other_types_counts_as_lost(world, tmp_path, record):
    trials = [world.trial(tmp_path, seed=n) for n in range(2)]
    (planned,) = run_sweep.packs_to_run(of(trials))
    (planned.directory / "pack.json").write_text(record)
    assert read_record(planned.directory) is None
    assert pack.recorded_packs(of(trials)) == []
    tidy(pack.sweep_dirs(of(trials)))
    assert run_sweep.packs_to_run(of(trials)) == [planned]
