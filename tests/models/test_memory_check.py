"""A base that has no room is told before any of its weights is read, or downloaded."""

import fnmatch
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models import abstract_model, load_model
from lorax.models.checkpoints import memory_check
from tests.helpers.causal_zoo import write_lm
from tests.helpers.loading_zoo import DTYPES, MIB, WEIGHTS, load, params_of, write_deep


def wanted_of(folder):
    """Path to shape, as `check_memory` takes them."""
    state = params_of(abstract_model(ModelConfig(source=str(folder)), 0))
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {".".join(str(key.key) for key in path): leaf for path, leaf in leaves}


def bytes_of(model):
    return sum(x.nbytes for x in jax.tree.leaves(params_of(model)))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep")
    write_deep(folder)
    return folder


@pytest.mark.parametrize("kind", DTYPES)
def test_bytes_are_known_before_loading(deep, kind):
    dtype, quantized = DTYPES[kind].get("param_dtype"), DTYPES[kind].get("quantized")
    expected = memory_check.base_bytes(wanted_of(deep), quantized=quantized, dtype=dtype)
    assert expected == bytes_of(load(deep, **DTYPES[kind]))


@pytest.fixture
def room(monkeypatch):
    """Sets what the devices, and the machine, have."""

    def set_room(*, device=None, host=2**40):
        monkeypatch.setattr(memory_check, "device_memory", lambda: device)
        monkeypatch.setattr(memory_check, "free_host_memory", lambda: host)

    return set_room


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("where", ["device", "host"])
def test_a_base_is_refused_by_the_last_byte_and_no_earlier(tmp_path, room, kind, where):
    write_lm(tmp_path, "llama")
    needed = bytes_of(load(tmp_path, **DTYPES[kind]))
    room(**{where: needed})
    load(tmp_path, **DTYPES[kind], remat=True)  # another request: the weights are read again
    (tmp_path / WEIGHTS).unlink()
    room(**{where: needed - 1})
    with pytest.raises(LoraxError, match="its weights need"):
        load(tmp_path, **DTYPES[kind], dtype=jnp.bfloat16)


def refusal(folder, **options):
    with pytest.raises(LoraxError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def large(folder, **config):
    """A folder of which there are no weights: 7 billion of them."""
    folder.mkdir(exist_ok=True)
    given = {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(given | config))


def test_a_large_base_is_one_line_with_figures_and_remedies(tmp_path, room):
    large(tmp_path / "llama")
    room(device=20 * 2**30)
    message = refusal(tmp_path / "llama")
    figures = r"its weights need 25\.10 GiB a device, but a device has 20\.00 GiB: take "
    remedies = r"train\.base_dtype=bf16 \(12\.55 GiB\) or int8 \(7\.01 GiB\) or nf4 \(4\.37 GiB\)"
    assert re.search(f"model.source=.*llama: {figures}{remedies}, or .*fsdp", message), message


def test_on_a_cpu_it_is_the_machines_free_memory(tmp_path, room):
    large(tmp_path / "llama")
    room(host=8 * 2**30)
    message = refusal(tmp_path / "llama", param_dtype=jnp.bfloat16)
    assert "need 12.55 GiB, but the machine has 8.00 GiB free" in message
    assert "bf16" not in message and "fsdp" not in message


@pytest.fixture
def hub(monkeypatch, deep, tmp_path):
    """The hub's client, giving files of a folder as asked; and what it gave, call by call."""
    module = pytest.importorskip("huggingface_hub")
    given = []

    def snapshot_download(repo, *, revision, allow_patterns, ignore_patterns):
        names = [
            file.name
            for file in deep.iterdir()
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns)
        ]
        for name in names:
            shutil.copy2(deep / name, tmp_path)
        given.append(set(names))
        return str(tmp_path)

    monkeypatch.setattr(module, "snapshot_download", snapshot_download)
    return given


def load_from_hub(**options):
    model = ModelConfig(source="someone/llama")
    return load_model(model, 0, key=jax.random.key(0), **options)


def test_no_weights_are_downloaded_for_a_base_that_does_not_fit(hub, room):
    room(device=MIB)
    with pytest.raises(LoraxError, match=r"model\.source=someone/llama: its weights need"):
        load_from_hub()
    assert all("config.json" in names and WEIGHTS not in names for names in hub)


def test_weights_are_downloaded_for_one_that_does(hub, room, deep):
    room(device=2**30)
    model = load_from_hub()
    assert WEIGHTS not in hub[0] and WEIGHTS in hub[-1]
    jax.tree.map(np.testing.assert_array_equal, params_of(model), params_of(load(deep)))
    again = load_from_hub()  # the same arrays, although the folder has files that it had not
    ours, theirs = (jax.tree.leaves(params_of(m)) for m in (again, model))
    assert all(one is other for one, other in zip(ours, theirs, strict=True))


def test_what_no_machine_has_is_refused_with_the_figures_of_this_one(tmp_path):
    large(tmp_path / "llama", hidden_size=2**19, intermediate_size=2**20, num_hidden_layers=4)
    message = refusal(tmp_path / "llama")
    needed, present = map(float, re.findall(r"([\d.]+) GiB", message)[:2])
    assert needed > 30_000 > present > 0
