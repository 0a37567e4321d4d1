"""A pack over two processes of four forced devices each, on loopback, is the pack of one."""

import json
import socket
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.programs import xla_flags
from tests.helpers.world import write_wide_base

pytestmark = pytest.mark.slow

WORKER = Path(__file__).parents[1] / "helpers" / "mesh_worker.py"
MESHES = [(4, 2, 1), (2, 2, 2)]  # six lanes, which 4 does not divide


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def packs(world, tmp_path_factory):
    """(arrays, facts) of four steps in each process by mesh, and of one process on one device."""
    root = tmp_path_factory.mktemp("processes")
    write_wide_base(root / "wide")

    def start(meshes, devices, *process):
        flags = xla_flags(f"--xla_force_host_platform_device_count={devices}")
        places = root, root / "wide", world.data_dir
        return world.start(WORKER, *places, json.dumps(meshes), *process, XLA_FLAGS=flags)

    def read(name, process):
        facts = json.loads((root / f"{name}.{process}.json").read_text())
        with np.load(root / f"{name}.{process}.npz") as arrays:
            return dict(arrays), facts

    port = free_port()
    pair = [start(MESHES, 4, rank, 2, port) for rank in range(2)]
    ended = [(process.communicate(timeout=300)[1], process.returncode) for process in pair]
    alone = start([None], 8)
    ended.append((alone.communicate(timeout=300)[1], alone.returncode))
    for err, code in ended:
        assert code == 0, err
    both = {sizes: [read("x".join(map(str, sizes)), n) for n in range(2)] for sizes in MESHES}
    return both, read("1", 0)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_both_processes_have_all_numbers_and_the_same_ones(packs, sizes):
    (ours, facts), (theirs, other) = packs[0][sizes]
    assert facts["devices"] == other["devices"] == 8
    assert len(facts["held"]) == len(other["held"]) == 4
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_losses_and_predictions_are_those_of_one_process(packs, sizes):
    (ours, _), (one, _) = packs[0][sizes][0], packs[1]
    assert ours["losses"].shape == (4, 6)
    np.testing.assert_allclose(ours["losses"], one["losses"], rtol=1e-5)
    largest = np.abs(one["outputs"]).max()
    np.testing.assert_allclose(ours["outputs"], one["outputs"], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_what_was_trained_has_moved_as_in_one_process(packs, sizes):
    (ours, _), (one, _) = packs[0][sizes][0], packs[1]
    for name in (name for name in one if name.startswith("end")):
        start = one[name.replace("end", "start")]
        moved = np.linalg.norm(one[name] - start)
        assert np.linalg.norm(ours[name] - one[name]) < 1e-4 * moved, name


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_trials_of_two_processes_never_talk(packs, sizes):
    for _, facts in packs[0][sizes]:
        assert facts["donated"] and facts["placements"] == 1
        assert facts["collectives"]
        assert not any("trial" in crossed for crossed in facts["collectives"])
