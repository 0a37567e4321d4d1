"""A pack on a mesh of devices is the pack on one: eight forced devices of the CPU."""

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from lorax.config import MeshConfig
from lorax.runs.adapter import load_adapter
from tests.helpers.programs import xla_flags
from tests.helpers.world import write_wide_base

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[1] / "helpers" / "mesh_worker.py"
EIGHT = xla_flags("--xla_force_host_platform_device_count=8")
MESHES = [(8, 1, 1), (4, 2, 1), (2, 2, 2), (1, 1, 8)]


@pytest.fixture(scope="module")
def packs(world, tmp_path_factory):
    """(arrays, facts) of six unlike trials after four steps, by mesh; None is one device."""
    root = tmp_path_factory.mktemp("mesh")
    write_wide_base(root / "wide")
    process = world.start(
        WORKER, root, root / "wide", world.data_dir, json.dumps([None, *MESHES]), XLA_FLAGS=EIGHT
    )
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "Involuntary full remat" not in err

    def read(sizes):
        name = "x".join(map(str, sizes or [1]))
        facts = json.loads((root / f"{name}.0.json").read_text())
        with np.load(root / f"{name}.0.npz") as arrays:
            return dict(arrays), facts

    return {sizes: read(sizes) for sizes in (None, *MESHES)}


def test_the_trials_are_unlike_and_all_of_them_learn(packs):
    one, _ = packs[None]
    assert one["losses"].shape == (4, 6)
    assert len({tuple(losses) for losses in one["losses"].T}) == 6
    for name in (name for name in one if name.startswith("end")):
        assert np.linalg.norm(one[name] - one[name.replace("end", "start")]) > 1e-4, name


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_and_predictions_are_those_of_one_device(packs, sizes):
    (ours, facts), (one, _) = packs[sizes], packs[None]
    assert facts["devices"] == 8
    np.testing.assert_allclose(ours["losses"], one["losses"], rtol=1e-5)
    assert ours["outputs"].shape == one["outputs"].shape == (6, 16, 2)
    largest = np.abs(one["outputs"]).max()
    np.testing.assert_allclose(ours["outputs"], one["outputs"], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_what_was_trained_has_moved_as_on_one_device(packs, sizes):
    """As norms: Adam turns the rounding of a vanishing gradient into a step."""
    (ours, _), (one, _) = packs[sizes], packs[None]
    assert ours.keys() == one.keys()
    for name in (name for name in one if name.startswith("end")):
        start = one[name.replace("end", "start")]
        assert ours[name].shape == start.shape
        moved = np.linalg.norm(one[name] - start)
        assert np.linalg.norm(ours[name] - one[name]) < 1e-4 * moved, name


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_every_step_leaves_the_state_where_it_was_and_reuses_its_memory(packs, sizes):
    _, facts = packs[sizes]
    assert facts["donated"]
    assert facts["placements"] == 1


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_lanes_flops_are_those_on_one_device(packs, sizes):
    (_, facts), (_, one) = packs[sizes], packs[None]
    assert facts["flops"] == pytest.approx(one["flops"], rel=0.1)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_device_holds_its_share_of_the_base(packs, sizes):
    _, facts = packs[sizes]
    small = 0.1 * facts["base"]  # embeddings, biases and norms are whole everywhere
    assert len(facts["held"]) == 8
    assert min(facts["held"]) >= facts["base"] / sizes[2]
    assert max(facts["held"]) <= (facts["base"] - small) / sizes[2] + small


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_trials_never_talk_and_weights_move_along_fsdp_alone(packs, sizes):
    """In the compiled step.

    Gradients are summed over rows, weights put together, and once, for the pooling, examples.
    """
    _, facts = packs[sizes]
    over_rows = [axis for axis, size in zip(("data", "fsdp"), sizes[1:], strict=True) if size > 1]
    axes = "+".join(over_rows)
    pooling = f"all-gather {axes}"
    expected = {f"all-reduce {axes}", pooling} if over_rows else set()
    if sizes[2] > 1:
        expected.add("all-gather fsdp")
    assert facts["collectives"].keys() == expected
    if axes == "data":  # the hidden states and which example they belong to
        assert facts["collectives"][pooling] == 2


PACKED = ["-m", "hydra/launcher=packed"]
GRID = [*PACKED, "lora.rank=1,2,4", "seed=0,1", "train.max_steps=8"]
RECORDS = ["train.log_every=1", "train.eval_every=4"]
FAULTS = {
    "sizes that are not the devices'": (
        ["sweep.mesh.trial=3"],
        r"trial=3 x data=1 x fsdp=1 is 3, but there are 8 devices",
    ),
    "a product that is not the devices'": (
        ["sweep.mesh.trial=2", "sweep.mesh.data=2", "sweep.mesh.fsdp=4"],
        r"trial=2 x data=2 x fsdp=4 is 16, but there are 8 devices",
    ),
    "rows over three devices": (["sweep.mesh.data=3"], r"data=3 x fsdp=1 does not divide the 8"),
    "rows that do not divide": (
        ["sweep.mesh.data=8", "train.batch_size=12"],
        r"train.batch_size / train.grad_accum = 12 does not divide over sweep.mesh.data=8",
    ),
    "micro-batches that do not divide": (
        ["sweep.mesh.data=4", "sweep.mesh.fsdp=2", "train.grad_accum=4"],
        r"train.grad_accum = 4 does not divide over sweep.mesh.data=4 x sweep.mesh.fsdp=2",
    ),
    "no devices": (
        ["sweep.mesh.fsdp=0"],
        r"sweep.mesh.fsdp=0 is not a whole number|fsdp=0: each is at least 1",
    ),
}


@pytest.fixture(scope="module")
def swept(world, cli, tmp_path_factory):
    """A sweep on a mesh and on one device, and what became of wrong meshes."""
    root = tmp_path_factory.mktemp("swept")
    lines = [
        world.overrides(root / "mesh", *GRID, *RECORDS, "sweep.mesh.data=2"),
        *(
            world.overrides(root / "wrong", *PACKED, "seed=0,1", *words)
            for words, _ in FAULTS.values()
        ),
    ]
    meshed, *wrong = cli(lines, XLA_FLAGS=EIGHT)
    (one,) = cli([world.overrides(root / "one", *GRID, *RECORDS)])
    for ended in (meshed, one):
        assert ended["code"] == 0, ended["err"]
    return root, dict(zip(FAULTS, wrong, strict=True))


def test_a_sweep_on_a_mesh_records_what_it_records_on_one_device(swept):
    root, _ = swept
    files = {path.parent.name: path for path in root.glob("one/tiny/*/metrics.jsonl")}
    assert len(files) == 6
    assert {path.parent.name for path in root.glob("mesh/tiny/*/metrics.jsonl")} == files.keys()
    for name, path in files.items():
        ours = (root / "mesh" / "tiny" / name / "metrics.jsonl").read_text().splitlines()
        theirs = path.read_text().splitlines()
        assert len(ours) == len(theirs) >= 8 + 2
        for mine, other in zip(map(json.loads, ours), map(json.loads, theirs), strict=True):
            assert_alike(mine, other)


def assert_alike(ours, theirs):
    """The same record, its numbers within 1e-5."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        if isinstance(value, dict):
            assert_alike(ours[key], value)
        elif isinstance(value, float):
            assert ours[key] == pytest.approx(value, rel=1e-5), key
        else:
            assert ours[key] == value, key


def test_a_sweep_on_a_mesh_leaves_results_and_adapters(swept):
    root, _ = swept
    for path in root.glob("one/tiny/*/result.json"):
        ours = root / "mesh" / "tiny" / path.parent.name
        mine, other = json.loads((ours / "result.json").read_text()), json.loads(path.read_text())
        assert mine["status"] == other["status"] == "finished"
        assert mine["lanes"] == other["lanes"] == 6
        assert mine["environment"]["devices"] == 8 and other["environment"]["devices"] == 1
        assert_alike(mine["best"], other["best"])
        adapter, *_ = load_adapter(ours / "adapter")
        expected, *_ = load_adapter(path.parent / "adapter")
        assert adapter.keys() == expected.keys()
        for name, weight in expected.items():
            difference = np.linalg.norm(adapter[name] - weight)
            assert difference <= 1e-4 * np.linalg.norm(weight), name


@pytest.mark.parametrize("case", FAULTS)
def test_a_wrong_mesh_is_one_line(swept, case):
    ended = swept[1][case]
    assert ended["code"] == 2, ended["err"]
    (line,) = ended["err"].splitlines()
    assert line.startswith("error: ")
    assert re.search(FAULTS[case][1], line), line


def test_nothing_was_trained_on_a_wrong_mesh(swept):
    left = {path.name for path in (swept[0] / "wrong").rglob("*") if path.is_file()}
    assert not left & {"metrics.jsonl", "config.json", "result.json"}


# Trains a pickled trial on a mesh that cuts the base, then prints what the devices still hold.
CUT_BASE = """
import collections, pickle, sys
import jax
from lorax.sweep import run_packed

(result,) = run_packed([pickle.loads(bytes.fromhex(sys.argv[1]))])
held = collections.Counter()
for array in jax.live_arrays():
    for shard in array.addressable_shards:
        held[shard.device.id] += shard.data.nbytes
print(result["lanes"], result["base_bytes"], max(held.values(), default=0))
"""


def test_a_single_trial_is_trained_on_the_mesh_and_no_device_keeps_the_whole_base(world, tmp_path):
    write_wide_base(tmp_path / "wide")
    trial = world.trial(tmp_path, sweep={"mesh": MeshConfig(fsdp=8)})
    trial.model.source = str(tmp_path / "wide")
    process = world.start("-c", CUT_BASE, pickle.dumps(trial).hex(), XLA_FLAGS=EIGHT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    lanes, base, held = map(int, out.split())
    assert lanes == 1 and held < base / 4
    (record,) = tmp_path.glob("*/packs/*/pack.json")
    assert json.loads(record.read_text())["measured"]["seconds_per_step"] > 0
