"""What the cluster launchers share, with jobs that run right here."""

import pickle

import pytest
from hydra.core.utils import JobReturn, JobStatus

from lorax.errors import LoraxError
from lorax.launch.jobs import Job, JobFailed, Outcome, run_jobs
from lorax.launch.launcher import with_quiet_faults
from lorax.runs.trial_id import trial_id
from lorax.runtime.provenance import command_line
from lorax.sweep.run_serial import objective


class Cluster:
    """Runs jobs in reverse order; the numbers in `broken` fail."""

    def __init__(self, broken=()):
        self.broken, self.jobs = broken, []

    def __call__(self, jobs):
        for n, job in reversed(list(enumerate(jobs))):
            self.jobs.append([trial_id(trial) for trial in job.trials])
            yield (
                n,
                Outcome("here", None, "no luck") if n in self.broken else Outcome("here", job()),
            )


@pytest.fixture
def trials(world, tmp_path):
    """Four trials of one program, in jobs of two; the first is asked for twice."""
    some = [
        world.trial(tmp_path, lora={"rank": rank}, seed=seed, sweep={"max_trials": 2})
        for seed in (0, 1)
        for rank in (2, 1)
    ]
    return [*some, some[0]]


def test_a_result_comes_back_to_each_trial_whatever_the_order(trials):
    cluster = Cluster()
    results = run_jobs(trials, cluster)
    ids = [trial_id(trial) for trial in trials]
    assert [result["trial_id"] for result in results] == ids
    assert {result["command"] for result in results} == {command_line()}
    assert cluster.jobs == [ids[2:4], ids[:2]]
    again = Cluster()
    assert run_jobs(trials, again) == results
    assert not again.jobs  # nothing left to submit


def test_a_failed_job_leaves_the_others_alone_and_goes_on_as_it_was(trials, caplog):
    with caplog.at_level("INFO"):
        results = run_jobs(trials, Cluster(broken=[0]))
    (line,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert line == "job 1 of 2, 2 trials: failed, no luck (here)"
    assert [isinstance(result, LoraxError) for result in results] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert str(results[0]).startswith("1 of 2 jobs failed and left 2 trials; the same command")
    cluster = Cluster()
    assert all(isinstance(result, dict) for result in run_jobs(trials, cluster))
    assert cluster.jobs == [[trial_id(trial) for trial in trials[:2]]]


def test_a_bad_trial_is_refused_before_anything_is_submitted(world, tmp_path):
    cluster = Cluster()
    with pytest.raises(LoraxError, match="rank 99"):
        run_jobs([world.trial(tmp_path), world.trial(tmp_path, lora={"rank": 99})], cluster)
    assert not cluster.jobs


def test_a_diverged_trial_is_the_worst_of_all():
    assert objective({"status": "diverged", "best": None}) == float("-inf")


def test_a_job_travels_as_bytes_and_its_fault_as_one_line(world, tmp_path):
    job = Job([world.trial("out")], str(tmp_path))
    assert pickle.loads(pickle.dumps(job)) == job
    with pytest.raises(JobFailed, match=r"^FileNotFoundError: .*nowhere'$"):
        Job([world.trial("out")], str(tmp_path / "nowhere"))()


def test_a_fault_is_raised_without_hydras_line(capsys):
    fault = LoraxError("no luck")
    (failed,) = with_quiet_faults([JobReturn(status=JobStatus.FAILED, _return_value=fault)])
    with pytest.raises(LoraxError, match="no luck"):
        _ = failed.return_value
    assert capsys.readouterr().err == ""
