"""What a pack leaves on disk and on the screen: what its trials alone would have left."""

import dataclasses
import json
import re
import shutil
import struct
import time

import jax
import numpy as np
import pytest

from lorax.config import MeshConfig
from lorax.errors import LoraxError
from lorax.runs.adapter import load_adapter
from lorax.runs.content import with_content
from lorax.runs.trial_id import trial_dir, trial_id
from lorax.sweep import plan_table, run_packed
from lorax.train import run_trial
from lorax.train.batched_engine import BatchedEngine
from lorax.train.indexed_batch import expand
from lorax.train.single_engine import SingleEngine

in_rows = jax.jit(expand)
pytestmark = pytest.mark.production  # level 0 rounds a lane alone and among others differently
LENGTHS = {"max_shapes": 4, "batch_size": 4}
TRAIN = {"max_steps": 12, "eval_every": 4, "log_every": 1, "keep_checkpoints": False, **LENGTHS}
CONSTANT = {"schedule": "constant", "warmup_ratio": 0.0}
SMALL = {"rank": 1, "targets": "q"}
KINDS = {
    "finishes": {"lora": SMALL, "tracking": {"kind": "wandb", "project": "tests"}},
    "other ranks": {
        "lora": {"rank": 2, "targets": "qv", "rank_pattern": {"value": 3}},
        "optimizer": {"schedule": "cosine", "weight_decay": 0.1},
        "seed": 1,
    },
    "stops early": {
        "lora": SMALL,
        "optimizer": {"lr": 1e-12},
        "train": {"early_stopping": 1},
    },
    "diverges": {"lora": SMALL, "optimizer": {"lr": 1e30, **CONSTANT}},
    "keeps": {
        "lora": SMALL,
        "optimizer": {"lr": 3e-3, **CONSTANT},
        "train": {"keep_checkpoints": True},
        "seed": 2,
    },
    "another": {
        "lora": {**SMALL, "scaling": "rslora", "init": "gaussian"},
        "optimizer": {"clip_norm": 0.1},
        "tracking": {"kind": "wandb", "project": "tests"},
        "seed": 3,
    },
}
# What a trial costs, and on what it was measured: of the pack, not of the trial.
COSTS = {
    "adapter_bytes",
    "began",
    "command",
    "compile_seconds",
    "ended",
    "environment",
    "flops_per_step",
    "lanes",
    "peak_device_bytes",
    "peak_rss_bytes",
    "seconds_per_step",
    "seconds_total",
    "step_memory_bytes",
    "steps_by_tokens",
}


def trial_of(world, root, kind, **more):
    changes = {**KINDS[kind], **more}
    train = {**TRAIN, **changes.pop("train", {})}
    optimizer = {"lr": 0.01, **changes.pop("optimizer", {})}
    return world.trial(root, train=train, optimizer=optimizer, **changes)


@dataclasses.dataclass
class Ran:
    """The trials of `KINDS` in one pack, and each alone: in order, and what was recorded of both.

    Batches are rows of tokens without their padding, by step.
    """

    packed: dict
    alone: dict
    results: dict
    results_alone: dict
    batches: list
    batches_alone: dict
    duplicate: dict


def tokens_of(batch, run):
    """The tokens of each example in a run's batch."""
    own = dataclasses.replace(batch, examples=batch.examples[run], starts=batch.starts[run])
    rows = {name: np.asarray(x) for name, x in in_rows(own).items()}
    ids, segments = rows["input_ids"], rows["segment_ids"]
    return [ids[segments == n].tolist() for n in range(1, segments.max() + 1)]


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    root = tmp_path_factory.mktemp("results")
    packed = {kind: trial_of(world, root / "packed", kind) for kind in KINDS}
    alone = {kind: trial_of(world, root / "alone", kind, tracking={"kind": "none"})
             for kind in KINDS}  # fmt: skip
    seen = []

    def watch(engine_class, patch):
        step = engine_class.step

        def noted(engine, hyper, batch):
            seen.append([tokens_of(batch, run) for run in range(len(batch.examples))])
            return step(engine, hyper, batch)

        patch.setattr(engine_class, "step", noted)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_ENTITY"):
            patch.delenv(name, raising=False)
        patch.setattr("lorax.runs.trackers._has_netrc_key", lambda: False)
        watch(BatchedEngine, patch)
        watch(SingleEngine, patch)
        *results, duplicate = run_packed([*packed.values(), packed["finishes"]])
        batches, batches_alone, results_alone = list(seen), {}, {}
        for kind, trial in alone.items():
            seen.clear()
            results_alone[kind] = run_trial(trial)
            batches_alone[kind] = [step for (step,) in seen]
    return Ran(
        packed,
        alone,
        dict(zip(KINDS, results, strict=True)),
        results_alone,
        batches,
        batches_alone,
        duplicate,
    )


def assert_same(ours, theirs):
    """Equal, but for floats: those within 1e-5 of each other, relative."""
    assert type(ours) is type(theirs), (ours, theirs)
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert_same(ours[name], value)
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5)
    else:
        assert ours == theirs


def own(result):
    """A result without what depends on the company."""
    return {name: value for name, value in result.items() if name not in COSTS}


def records(trial):
    lines = (trial_dir(trial) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_same_adapters(ours, theirs):
    (left, spec, about), (right, other, facts) = (
        load_adapter(trial_dir(trial) / "adapter") for trial in (ours, theirs)
    )
    assert spec == other
    assert left.keys() == right.keys()
    for name, leaf in right.items():
        assert left[name].shape == leaf.shape and left[name].dtype == leaf.dtype
        assert np.linalg.norm(left[name] - leaf) <= 1e-5 * np.linalg.norm(leaf), name
    assert_same(about, facts)


def test_the_pack_was_one_and_ended_in_every_way(ran):
    ends = {kind: (r["status"], r["steps"], r["stopped_early"]) for kind, r in ran.results.items()}
    assert ends == {
        "finishes": ("finished", 12, False),
        "other ranks": ("finished", 12, False),
        "stops early": ("finished", 8, True),
        "diverges": ("diverged", 2, False),
        "keeps": ("finished", 12, False),
        "another": ("finished", 12, False),
    }
    assert {result["lanes"] for result in ran.results.values()} == {len(KINDS)}
    assert {result["lanes"] for result in ran.results_alone.values()} == {1}
    assert ran.duplicate == ran.results["finishes"]
    packs = trial_dir(ran.packed["finishes"]).parent / "packs"
    assert len(list(packs.glob("*/pack.json"))) == 1
    assert not list(packs.rglob("checkpoints"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_sees_the_batches_that_it_sees_alone(ran, kind):
    lane = list(KINDS).index(kind)
    in_pack = [step[lane] for step in ran.batches]
    alone = ran.batches_alone[kind]
    assert len(alone) >= ran.results_alone[kind]["steps"]
    assert in_pack[: len(alone)] == alone


@pytest.mark.parametrize("kind", KINDS)
def test_its_records_are_those_of_the_trial_alone(ran, kind):
    ours, theirs = records(ran.packed[kind]), records(ran.alone[kind])
    assert len(theirs) >= ran.results_alone[kind]["steps"]
    assert_same(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_its_result_is_that_of_the_trial_alone(ran, kind):
    ours, theirs = ran.results[kind], ran.results_alone[kind]
    assert list(ours) == list(theirs)
    assert_same(own(ours), own(theirs))
    assert json.loads((trial_dir(ran.packed[kind]) / "result.json").read_text()) == ours
    for name in ("environment", "adapter_params", "trainable_params", "total_params"):
        assert ours[name] == theirs[name]
    steps, alone = ours["steps_by_tokens"], theirs["steps_by_tokens"]
    assert sum(steps.values()) == sum(alone.values()) == ours["steps"]
    tokens, own_tokens = (sum(int(t) * n for t, n in s.items()) for s in (steps, alone))
    assert tokens >= own_tokens  # a pack's batch has the rows that the fullest lane needs


@pytest.mark.parametrize("kind", KINDS)
def test_its_adapter_is_that_of_the_trial_alone(ran, kind):
    assert_same_adapters(ran.packed[kind], ran.alone[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_its_config_is_its_own(ran, kind):
    config = json.loads((trial_dir(ran.packed[kind]) / "config.json").read_text())
    own = with_content(ran.packed[kind])
    assert config == json.loads(json.dumps(dataclasses.asdict(own)))


@pytest.mark.parametrize("kind", KINDS)
def test_its_directory_has_no_trace_of_the_pack(ran, kind):
    def listing(trial):
        folder = trial_dir(trial)
        return {path.name for path in folder.iterdir()} - {"wandb"}

    assert listing(ran.packed[kind]) == listing(ran.alone[kind])
    assert ("checkpoints" in listing(ran.packed[kind])) == (kind == "keeps")


BLOCK, HEADER = 32768, 7
LAST = {1, 4}  # a whole message, or the end of one


def wandb_records(path):
    """The messages of a `.wandb` file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    content, position, message = path.read_bytes(), HEADER, b""
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        size, kind = struct.unpack("<HB", content[position + 4 : position + HEADER])
        message += content[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in LAST and message:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record
            message = b""


def whole_run(trial):
    """All records of a trial's one run; W&B's own process may write the last a little later."""
    (path,) = (trial_dir(trial) / "wandb").glob("offline-run-*/run-*.wandb")
    deadline = time.monotonic() + 20
    while not any(record.HasField("exit") for record in wandb_records(path)):
        assert time.monotonic() < deadline, f"{path} has no exit record"
        time.sleep(0.05)
    return list(wandb_records(path))


@pytest.mark.parametrize("kind", ["finishes", "another"])
def test_each_trial_has_a_wandb_run_of_its_own_with_its_own_numbers(ran, kind):
    trial = ran.packed[kind]
    found = whole_run(trial)
    (run,) = [record.run for record in found if record.HasField("run")]
    assert run.display_name == trial_id(trial)
    assert re.fullmatch(rf"{trial_id(trial)}-[0-9a-f]{{8}}", run.run_id)
    assert run.run_group == "tiny"
    rows = []
    for record in found:
        if record.HasField("history"):
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json)
                     for item in record.history.item}  # fmt: skip
            rows.append({name: value for name, value in items.items() if name[0] != "_"})
    expected = {}
    for record in records(trial):
        kind_of_record, step = record.pop("kind"), record.pop("step")
        row = expected.setdefault(step, {"optimizer_step": step})
        row |= {f"{kind_of_record}/{name}": value for name, value in record.items()}
    assert rows == list(expected.values())


def test_trials_without_wandb_start_no_run(ran):
    assert not (trial_dir(ran.packed["keeps"]) / "wandb").exists()


def test_all_again_trains_and_plans_nothing(ran, monkeypatch):
    for name in ("plan_packs", "run_pack"):
        monkeypatch.setattr(f"lorax.sweep.run_sweep.{name}", None)  # whoever calls it, fails
    paths = [trial_dir(trial) / "result.json" for trial in ran.packed.values()]
    before = [path.stat().st_mtime_ns for path in paths]
    assert run_packed(list(ran.packed.values())) == list(ran.results.values())
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_from_a_checkpoint_that_was_kept_the_trial_alone_goes_on(ran, world, tmp_path):
    """Of more steps at the same rates: the first 12 from the pack, the others alone."""
    short, longer = ran.packed["keeps"], {"train": {"keep_checkpoints": True, "max_steps": 18}}
    more, whole = (
        trial_of(world, tmp_path / name, "keeps", **longer) for name in ("more", "whole")
    )
    trial_dir(more).mkdir(parents=True)
    shutil.copytree(trial_dir(short) / "checkpoints", trial_dir(more) / "checkpoints")
    result, expected = run_trial(more), run_trial(whole)
    assert result["steps"] == 18
    assert_same(records(more), [record for record in records(whole) if record["step"] > 12])
    assert_same(own(result), own(expected))
    assert_same_adapters(more, whole)


def test_a_result_that_was_lost_comes_back_from_a_kept_checkpoint(ran):
    trial, before = ran.packed["keeps"], ran.results["keeps"]
    (trial_dir(trial) / "result.json").unlink()
    result = run_trial(trial)
    assert own(result) == own(before)
    assert result["steps_by_tokens"] == before["steps_by_tokens"]  # nothing was trained again


def test_the_same_trial_in_two_directories_is_trained_in_both(world, tmp_path):
    short = {"max_steps": 1, "keep_checkpoints": False}
    roots = [tmp_path / name for name in ("one", "two")]
    trials = [world.trial(root, lora=SMALL, train=short) for root in roots]
    results = run_packed(trials)
    assert [result["trial_id"] for result in results] == [trial_id(trials[0])] * 2
    assert all((trial_dir(trial) / "result.json").exists() for trial in trials)


def test_no_trials_are_no_results():
    assert run_packed([]) == []


def test_a_plan_counts_a_trial_once_as_a_run_does(world, tmp_path, monkeypatch, capsys):
    planned = []
    monkeypatch.setattr(plan_table, "plan_sweep", lambda trials, **_: planned.extend(trials) or [])
    trials = [world.trial(tmp_path, seed=seed) for seed in (0, 1, 0)]
    plan_table.print_plan(trials)
    assert [trial.config.seed for trial in planned] == [0, 1]
    assert "2 trials" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        ({"max_trials": 0}, "sweep.max_trials=0 is not a whole number of at least 1"),
        ({"lanes": -1}, "sweep.lanes=-1 is not a whole number of at least 1"),
        ({"memory_limit_gib": 0.0}, "sweep.memory_limit_gib=0.0 is not a positive number"),
        ({"mesh": MeshConfig(data=0)}, "sweep.mesh.data=0 is not a whole number of at least 1"),
    ],
)
def test_settings_of_a_sweep_that_cannot_be_are_refused(world, tmp_path, sweep, line):
    with pytest.raises(LoraxError) as fault:
        run_packed([world.trial(tmp_path, sweep={"name": "tiny", **sweep})])
    assert str(fault.value) == line
    assert not list(tmp_path.iterdir())
