import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.models import (
    abstract_model,
    hf_module,
    load_checkpoint,
    load_config,
    resolve_source,
)

WEIGHTS = "model.safetensors"
FAMILIES_OF_BERT = ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert"]


def leaves(model):
    return jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))


def assert_same(one, other):
    for (path, x), (_, y) in zip(leaves(one), leaves(other), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


@pytest.fixture
def edit(tmp_path):
    """Rewrites the checkpoint's tensors through a function of their dict."""

    def edit(change):
        tensors = dict(load_file(tmp_path / WEIGHTS))
        save_file(change(tensors), tmp_path / WEIGHTS)

    return edit


@pytest.mark.parametrize("model_type", FAMILIES_OF_BERT)
def test_every_parameter_has_its_torch_name(write_checkpoint, load, model_type):
    model = write_checkpoint(model_type, head=True, num_labels=3)
    theirs = dict(model.named_parameters())
    ours = [".".join(str(key.key) for key in path) for path, _ in leaves(load(3, pooling="pooler"))]
    assert sorted(hf_module(path, model_type) for path in ours) == sorted(theirs)


def test_a_path_outside_the_table_is_refused():
    with pytest.raises(LoraxError, match=r"encoder\.conv"):
        hf_module("encoder.conv.kernel", "bert")


@pytest.mark.parametrize("prefix", ["bert.", "roberta.", ""])
def test_prefixes_and_old_names(write_checkpoint, load, edit, prefix):
    write_checkpoint()
    plain = load()

    def rename(name):
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return prefix + old.replace("LayerNorm.bias", "LayerNorm.beta")

    edit(lambda tensors: {rename(name): x for name, x in tensors.items()})
    assert_same(load(), plain)


def test_unneeded_weights_are_dropped(write_checkpoint, load, edit):
    write_checkpoint()
    plain = load()
    extra = ["cls.predictions.bias", "lm_head.dense.weight", "embeddings.position_ids"]
    edit(lambda tensors: tensors | {name: np.zeros(3, np.float32) for name in extra})
    assert_same(load(), plain)


def test_all_faults_in_one_line(write_checkpoint, load, edit):
    write_checkpoint()

    def spoil(tensors):
        del tensors["encoder.layer.1.attention.self.key.bias"]
        tensors["encoder.layer.0.intermediate.dense.weight"] = np.zeros((24, 40), np.float32)
        return tensors | {"encoder.layer.0.adapter.weight": np.zeros(2, np.float32)}

    edit(spoil)
    with pytest.raises(LoraxError) as caught:
        load()
    message = str(caught.value)
    assert "\n" not in message
    assert "missing encoder.layer.1.attention.self.key.bias" in message
    assert "encoder.layer.0.intermediate.dense.weight has shape (24, 40), expected (40, 24)" in (
        message
    )
    assert "unexpected encoder.layer.0.adapter.weight" in message


def test_many_faults_are_counted(write_checkpoint, load, edit):
    write_checkpoint()
    edit(lambda tensors: {"pooler.dense.weight": tensors["pooler.dense.weight"]})
    with pytest.raises(LoraxError, match=r"and 32 more$") as caught:
        load()
    assert str(caught.value).count("missing") == 5


def test_half_a_pooler_is_missing_a_weight(write_checkpoint, load, edit):
    write_checkpoint()
    edit(lambda tensors: {k: v for k, v in tensors.items() if k != "pooler.dense.bias"})
    load(pooling="mean")
    with pytest.raises(LoraxError, match=r"missing pooler\.dense\.bias"):
        load(pooling="pooler")


def test_a_fresh_head_follows_the_key_alone(write_checkpoint, load):
    write_checkpoint(head=True, num_labels=3)
    for pooling in ("mean", "cls"):
        zero, again, one = (load(pooling=pooling, seed=seed).head for seed in (0, 0, 1))
        assert_same(zero, again)
        assert not np.allclose(zero.out.kernel[...], one.out.kernel[...])
        assert not zero.out.bias[...].any()
    assert abs(float(zero.out.kernel[...].std()) - 0.02) < 0.006


@pytest.mark.parametrize(
    ("model_type", "dense"), [("bert", "pooler.dense"), ("roberta", "classifier.dense")]
)
def test_a_head_for_other_outputs_is_fresh(write_checkpoint, load, model_type, dense):
    torch_model = write_checkpoint(model_type, head=True, num_labels=3)
    theirs = {name.removeprefix("bert."): x for name, x in torch_model.state_dict().items()}
    head = load(1, pooling="pooler").head
    np.testing.assert_array_equal(head.dense.kernel[...], theirs[f"{dense}.weight"].numpy().T)
    assert head.out.kernel.shape == (24, 1)
    assert not head.out.bias[...].any()


def test_a_bert_base_gives_its_pooler_and_a_fresh_output(write_checkpoint, load):
    torch_model = write_checkpoint("bert")
    head = load(pooling="pooler").head
    want = torch_model.pooler.dense.weight.detach().numpy().T
    np.testing.assert_array_equal(head.dense.kernel[...], want)
    assert not head.out.bias[...].any()


def test_a_roberta_base_gives_a_fresh_head_as_in_transformers(write_checkpoint, load):
    write_checkpoint("roberta")
    zero, one = (load(pooling="pooler", seed=seed).head.dense.kernel[...] for seed in (0, 1))
    assert not np.allclose(zero, one)


def test_half_precision_checkpoints_load(write_checkpoint, load, tmp_path):
    model = write_checkpoint()
    plain = load()
    model.bfloat16().save_pretrained(tmp_path)
    for (_, x), (_, y) in zip(leaves(load().encoder), leaves(plain.encoder), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, rtol=1e-2)


def split_shards(folder):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        shard = f"model-0000{index + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards(write_checkpoint, load, tmp_path):
    write_checkpoint()
    plain = load()
    split_shards(tmp_path)
    assert_same(load(), plain)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(LoraxError, match=r"lacks model-00002-of-00002\.safetensors"):
        load()


@pytest.mark.parametrize("keep", [0, 5, 200, -40])
def test_a_truncated_file_is_one_clear_line(write_checkpoint, load, tmp_path, keep):
    write_checkpoint()
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(LoraxError, match=r"model\.safetensors is damaged") as caught:
        load()
    assert "\n" not in str(caught.value)


def test_pickles_are_refused(write_checkpoint, load, tmp_path):
    write_checkpoint()
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_model.bin")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(LoraxError, match="may run code"):
            load_checkpoint(path)


def test_absent_files_are_named(tmp_path, load):
    with pytest.raises(LoraxError, match=r"has no config\.json"):
        load()
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(LoraxError, match="not readable JSON"):
        load()
    with pytest.raises(LoraxError, match=r"has no model\.safetensors"):
        load_checkpoint(tmp_path)


def test_config_and_abstract_model_read_no_weights(write_checkpoint, tmp_path):
    write_checkpoint(classifier_dropout=0.3)
    (tmp_path / WEIGHTS).unlink()
    config = ModelConfig(source=str(tmp_path))
    assert load_config(config).classifier_dropout == 0.3
    abstract = abstract_model(config, 2)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for _, x in leaves(abstract))
    config.dropout = 0.0
    replaced = load_config(config)
    assert replaced.hidden_dropout_prob == replaced.attention_probs_dropout_prob == 0
    assert replaced.classifier_dropout == 0
    config.dropout = 1.5
    with pytest.raises(LoraxError, match=r"model\.dropout=1\.5"):
        load_config(config)


def test_sources(tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    assert resolve_source(str(tmp_path / "tiny")) == tmp_path / "tiny"
    monkeypatch.setenv("LORAX_ASSETS", str(tmp_path))
    assert resolve_source("assets/tiny") == tmp_path / "tiny"
    with pytest.raises(LoraxError, match=r"python scripts/fetch_assets\.py absent`"):
        resolve_source("assets/absent")
    for source in ("/absent/folder", "a/b/c", "./absent", ""):
        with pytest.raises(LoraxError, match="no folder"):
            resolve_source(source)


def test_hub_faults_are_one_line(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    calls = []

    def fail(repo, **options):
        calls.append((repo, options["revision"]))
        raise OSError("Repository Not Found\nfor url ...")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(LoraxError, match=r"at revision 'abc': Repository Not Found$"):
        resolve_source("someone/absent-model", "abc")
    assert calls == [("someone/absent-model", "abc")]


def test_the_hub_gives_a_folder(monkeypatch, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda repo, **options: str(tmp_path))
    assert resolve_source("roberta-base") == tmp_path
