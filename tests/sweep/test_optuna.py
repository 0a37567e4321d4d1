"""Optuna's search with a storage: the same command continues to n_trials in total."""

import json

import pytest

from lorax.runs.lock import locked

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra `optuna`")
optuna = pytest.importorskip("optuna")

# Runs command lines in a fork each; a trial's score is cheap, and some trials are never scored.
SEARCH = """
import json, os, signal, sys
from lorax.launch import hydra_main

def score(trial):
    n = (trial.lora.rank, trial.optimizer.lr)
    with open(trial.output_dir + "/scored", "a") as file:
        print(*n, file=file)
    if len(open(trial.output_dir + "/scored").readlines()) == limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return -abs(trial.optimizer.lr - 3e-3) - trial.lora.rank / 1000

for limit, words in json.loads(sys.argv[1]):
    pid = os.fork()
    if pid == 0:
        sys.argv = ["finetune.py", *words]
        hydra_main(score, "finetune")
        os._exit(0)
    print("exit", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""
SPACE = ["lora.rank=choice(1,2,4)", "optimizer.lr=tag(log,interval(1e-4,1e-2))"]


def search(world, jobs):
    """(exit statuses, stdout, stderr) of command lines; (number of the trial that kills, root)."""
    lines = []
    for limit, root, *more in jobs:
        root.mkdir(exist_ok=True)
        words = ["-m", "hydra/sweeper=lorax_optuna", "hydra/launcher=basic", *SPACE]
        words += [f"hydra.sweeper.storage=sqlite:///{root}/study.db", f"output_dir={root}"]
        words += ["hydra.sweeper.n_trials=14", "hydra.sweeper.n_jobs=4", "sweep.name=tiny", *more]
        lines.append((limit, words))
    process = world.start("-c", SEARCH, json.dumps(lines, default=str))
    out, err = process.communicate(timeout=300)
    codes = [int(line.split()[1]) for line in out.splitlines() if line.startswith("exit ")]
    return codes, out, err


def trials_of(root):
    """A study's trials, as (state, parameters)."""
    study = optuna.load_study(study_name="tiny", storage=f"sqlite:///{root}/study.db")
    return [(trial.state.name, trial.params) for trial in study.trials]


def test_the_same_command_continues_to_n_trials_in_total(world, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    codes, out, err = search(
        world,
        [
            (6, killed),  # in its second batch
            (0, killed),
            (0, killed),
            (0, whole),
            (0, whole, "hydra.sweeper.n_trials=15"),
            (0, whole, "lora.rank=choice(1,8)", "hydra.sweeper.n_trials=20"),
            (0, whole, "hydra.sweeper.storage=sqlite:////nowhere/study.db"),
        ],
    )
    assert codes == [-9, 0, 0, 0, 0, 2, 2], err
    states = [state for state, _ in trials_of(killed)]
    assert states[:8] == ["COMPLETE"] * 4 + ["FAIL"] * 4
    assert states[8:] == ["COMPLETE"] * 10
    complete = [params for state, params in trials_of(killed) if state == "COMPLETE"]
    failed = [params for state, params in trials_of(killed) if state == "FAIL"]
    assert complete[4:8] == failed  # the same trials, which go on from their checkpoints
    assert complete == [params for _, params in trials_of(whole)][:14]
    assert len({json.dumps(params) for params in complete}) == 14
    assert [state for state, _ in trials_of(whole)][:15] == ["COMPLETE"] * 15
    assert "4 trials of a search that was killed: marked failed" in out
    assert "study tiny: 14 of 14 trials complete" in out
    assert (killed / "scored").read_text().count("\n") == 6 + 10
    space, place = [line for line in err.splitlines() if line.startswith("error: ")]
    assert space.startswith("error: study 'tiny' has another search space of lora.rank; name an")
    assert "cannot use study 'tiny' in hydra.sweeper.storage=sqlite:////nowhere" in place
    assert "Traceback" not in err


def test_a_grid_needs_no_storage_and_one_process_searches(world, tmp_path):
    first, second = tmp_path / "grid", tmp_path / "held"
    (second / "tiny").mkdir(parents=True)
    with locked(second / "tiny"):
        codes, _, err = search(world, [(0, first, "hydra/sweeper/sampler=grid"), (0, second)])
    assert codes == [2, 2], err
    assert "error: hydra/sweeper/sampler=grid needs no storage: give its values to -m" in err
    assert "error: study 'tiny' is searched by another process" in err
