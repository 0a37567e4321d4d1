"""A base that is cut over devices: each gets its piece, and reads nothing else."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.causal_zoo import write_lm
from tests.helpers.programs import xla_flags

WORKER = Path(__file__).parents[1] / "helpers" / "loading_worker.py"
MESHES = [(1, 1, 8), (2, 2, 2), (8, 1, 1)]
BASES = ("bert", "gpt2", "llama")


def start(out, folders, meshes, devices, *process):
    flags = xla_flags(f"--xla_force_host_platform_device_count={devices}")
    words = [out, json.dumps([str(f) for f in folders]), json.dumps(meshes), *process]
    return subprocess.Popen(
        [sys.executable, WORKER, *map(str, words)],
        env={**os.environ, "XLA_FLAGS": flags},
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(processes):
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Facts of each base on each mesh: of one process, and of two that share one mesh."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("cut")
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    bert = transformers.BertConfig(vocab_size=61, num_attention_heads=4, **wide)
    transformers.BertModel(bert).save_pretrained(root / "bert")
    write_lm(root / "gpt2", "gpt2", n_embd=256, n_head=4, n_layer=1)
    write_lm(root / "llama", "llama", **wide, head_dim=64)
    folders = [root / name for name in BASES]
    port = free_port()
    both = [start(root / "both", folders, MESHES[:1], 4, rank, 2, port) for rank in range(2)]
    ended([start(root / "one", folders, MESHES, 8), *both])
    return {
        name: json.loads((root / f"{name}.json").read_text())
        for name in ("one.0", "both.0", "both.1")
    }


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pieces_are_those_of_the_base_on_one_device(cut, name, sizes, dtype):
    facts = cut["one.0"][f"{name} {list(sizes)} {dtype}"]
    assert facts["paths"] > 10
    assert not facts["unequal"] and not facts["elsewhere"] and not facts["moved"]
    assert facts["read_again"] == 0


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", BASES)
def test_a_device_holds_its_share_and_no_piece_is_read_twice(cut, name, sizes):
    facts = cut["one.0"][f"{name} {list(sizes)} float32"]
    assert facts["read"] == facts["base"]
    cut_bytes = facts["base"] - facts["whole"]
    assert facts["held"] == [facts["whole"] + cut_bytes / sizes[2]] * 8
    if sizes[2] > 1:
        assert facts["whole"] < facts["base"] / 5  # biases, norms, embeddings


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_reads_what_its_own_devices_hold(cut, name, dtype):
    of_one = cut["one.0"][f"{name} [1, 1, 8] {dtype}"]
    for process in ("both.0", "both.1"):
        facts = cut[process][f"{name} [1, 1, 8] {dtype}"]
        assert facts["paths"] == of_one["paths"]
        assert not facts["unequal"] and not facts["elsewhere"] and not facts["moved"]
        assert len(facts["held"]) == 4
        assert facts["read"] == facts["whole"] + (facts["base"] - facts["whole"]) / 2
