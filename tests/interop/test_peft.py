"""Adapters out to real PEFT and back in, on small random encoders of transformers."""

import json

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from lorax import LoraSpec, init
from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.interop import load_peft, save_peft
from lorax.lora import adapt, pad, resolve
from lorax.models import load_model

pytestmark = pytest.mark.slow

SMALL = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
    "num_labels": 3,
}
FAMILIES = {"bert": "Bert", "roberta": "Roberta", "electra": "Electra"}
# Ours, and the same in PEFT's words.
CASES = {
    "qv": (LoraSpec(4, 8), {"r": 4, "lora_alpha": 8, "target_modules": ["query", "value"]}),
    "qkvo": (
        LoraSpec(2, 3, targets="qkvo"),
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ["query", "key", "value", "attention.output.dense"],
        },
    ),
    "all-linear": (
        LoraSpec(3, 6, targets="all-linear"),
        {"r": 3, "lora_alpha": 6, "target_modules": "all-linear"},
    ),
    "down": (
        LoraSpec(2, targets="down"),
        {"r": 2, "lora_alpha": 16, "target_modules": r".*layer\.\d+\.output\.dense"},
    ),
    "patterns": (
        LoraSpec(
            4,
            8,
            targets="qkvo",
            rank_pattern={"value": 2, "layers.1.attention.query": 3},
            alpha_pattern={"out": 32, r"encoder\.layers\.[12]\.attention\.key": 5.5},
        ),
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["query", "key", "value", "attention.output.dense"],
            "rank_pattern": {"value": 2, "layer.1.attention.self.query": 3},
            "alpha_pattern": {"output.dense": 32, r"layer\.[12]\.attention\.self\.key": 5.5},
        },
    ),
    "rslora": (
        LoraSpec(4, 8, scaling="rslora"),
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["query", "value"]},
    ),
    "layers": (
        LoraSpec(4, targets="qv", layers=(0, 2)),
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": ["query", "value"],
            "layers_to_transform": [0, 2],
        },
    ),
    "one layer by regex": (
        LoraSpec(4, targets=r"encoder\.layers\.1\.attention\.(query|out)", exclude=("mlp.up",)),
        {
            "r": 4,
            "lora_alpha": 16,
            "target_modules": r".*\.1\.attention\.(self\.query|output\.dense)",
        },
    ),
    "embedding": (
        LoraSpec(4, targets=("word", "q")),
        {"r": 4, "lora_alpha": 16, "target_modules": ["word_embeddings", "query"]},
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def source(family, tmp_path):
    """A random checkpoint of a sequence classifier."""
    config = getattr(transformers, f"{FAMILIES[family]}Config")(**SMALL)
    torch.manual_seed(0)
    model = getattr(transformers, f"{FAMILIES[family]}ForSequenceClassification")(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.15)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def torch_model(family, source, *, bare=False):
    kind = "Model" if bare else "ForSequenceClassification"
    return getattr(transformers, FAMILIES[family] + kind).from_pretrained(source).eval()


def our_model(source, pooling="pooler"):
    config = ModelConfig(source=str(source), pooling=pooling)
    model = load_model(config, SMALL["num_labels"], key=jax.random.key(0))
    return model, nnx.to_pure_dict(nnx.state(model))


def random_tree(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), tree)


def make_batch(family):
    rng = np.random.default_rng(2)
    mask = (np.arange(9)[None] < np.array([9, 4, 7])[:, None]).astype(np.int32)
    ids = np.where(mask, rng.integers(4, 60, mask.shape), {"roberta": 1}.get(family, 0))
    return ids.astype(np.int32), mask


def of_torch(model, family):
    ids, mask = (torch.from_numpy(x).long() for x in make_batch(family))
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask)
    return (output.logits if "logits" in output else output.last_hidden_state).numpy()


def of_ours(model, adapter, family, *, bare=False):
    if adapter.head:
        nnx.update(model, nnx.State({"head": adapter.head}))
    scales = {path: adapter.spec.scale(path) for path in adapter.lora}
    ids, mask = make_batch(family)
    adapted = adapt(model, adapter.lora, scales)
    return np.asarray((adapted.encoder if bare else adapted)(ids, mask))


def peft_saved(family, source, folder, options, *, bare=False, seed=3):
    """An adapter that PEFT made and saved, with random weights; and the torch model."""
    task = {} if bare else {"task_type": "SEQ_CLS"}
    config = peft.LoraConfig(lora_dropout=0.0, **task, **options)
    model = peft.get_peft_model(torch_model(family, source, bare=bare), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad or "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_ours_to_peft(case, family, source, tmp_path):
    spec = CASES[case][0]
    model, base = our_model(source)
    lora = random_tree(init(jax.random.key(0), base, spec))
    for head in (None, random_tree(base["head"])):
        folder = tmp_path / f"adapter-{head is not None}"
        save_peft(folder, lora, spec, family, str(source), head=head)
        bare = head is None
        theirs = peft.PeftModel.from_pretrained(torch_model(family, source, bare=bare), folder)
        again = load_peft(folder, base, family)
        ours = of_ours(model, again, family, bare=bare)
        np.testing.assert_allclose(ours, of_torch(theirs.eval(), family), atol=1e-5, rtol=1e-5)
        assert sorted(resolve(base, again.spec)) == sorted(lora)
        for path, pair in lora.items():
            jax.tree.map(np.testing.assert_array_equal, pair, again.lora[path])
            assert again.spec.scale(path) == spec.scale(path)
            assert again.spec.rank_of(path) == spec.rank_of(path)


@pytest.mark.parametrize("case", CASES)
def test_peft_to_ours(case, family, source, tmp_path):
    theirs = peft_saved(family, source, tmp_path / "adapter", CASES[case][1])
    model, base = our_model(source)
    adapter = load_peft(tmp_path / "adapter", base, family)
    ours = of_ours(model, adapter, family)
    np.testing.assert_allclose(ours, of_torch(theirs, family), atol=1e-5, rtol=1e-5)
    targets = resolve(base, adapter.spec)
    assert {p: t.rank for p, t in targets.items()} == {
        p: pair["a"].shape[0] for p, pair in adapter.lora.items()
    }
    assert adapter.spec.modules_to_save == ("head",)


def test_the_bare_encoder_of_peft(family, source, tmp_path, caplog):
    options = {"r": 4, "target_modules": "all-linear"}
    theirs = peft_saved(family, source, tmp_path / "adapter", options, bare=True)
    model, base = our_model(source, pooling="mean")
    adapter = load_peft(tmp_path / "adapter", base, family)
    assert adapter.head is None
    assert family == "electra" or "pooler.dense.lora_A.weight" in caplog.text  # it has no pooler
    ours = of_ours(model, adapter, family, bare=True)
    np.testing.assert_allclose(ours, of_torch(theirs, family), atol=1e-5, rtol=1e-5)


def test_a_head_that_pools_by_mean_stays_behind(family, source, tmp_path, caplog):
    peft_saved(family, source, tmp_path / "adapter", {"r": 4, "target_modules": ["query"]})
    adapter = load_peft(tmp_path / "adapter", our_model(source, pooling="mean")[1], family)
    assert adapter.head is None
    assert adapter.spec.modules_to_save == ()
    assert "left out of the adapter" in caplog.text
    assert "classifier" in caplog.text


def test_the_config_reads_as_one_of_peft(family, source, tmp_path):
    spec, _ = CASES["patterns"]
    _, base = our_model(source)
    save_peft(tmp_path, init(jax.random.key(0), base, spec), spec, family, "hub/base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    first = "encoder.layer.1.attention.self"
    assert sorted(config["target_modules"]) == ["attention.output.dense", "key", "query", "value"]
    assert config["rank_pattern"] == {f"{first}.query": 3, "value": 2}
    assert config["alpha_pattern"] == {
        f"{first}.key": 5.5,
        "encoder.layer.2.attention.self.key": 5.5,
        "attention.output.dense": 32,
    }
    assert config["layers_to_transform"] is None
    assert config["task_type"] == "FEATURE_EXTRACTION"
    assert config["base_model_name_or_path"] == "hub/base"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))


def edit_tensors(folder, edit):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


QUERY = "base_model.model.encoder.layer.0.attention.self.query"


def misshape(tensors):
    tensors[f"{QUERY}.lora_A.weight"] = np.zeros((4, 7), np.float32)
    tensors["base_model.model.strange.weight"] = tensors.pop(f"{QUERY}.lora_B.weight")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter on a BERT, and our base's shapes."""
    root = tmp_path_factory.mktemp("peft")
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(root / "base")
    _, base = our_model(root / "base")
    spec = LoraSpec(4)
    lora = init(jax.random.key(0), base, spec)
    return root, base, lora, spec


@pytest.fixture
def adapter(saved, tmp_path):
    root, base, lora, spec = saved
    save_peft(tmp_path, lora, spec, "bert", str(root / "base"))
    return tmp_path, base


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora=True is not served"),
        ({"bias": "all"}, "bias='all' is not served"),
        (
            {"peft_type": "IA3", "new": 1},
            "adapter_config.json: peft_type='IA3' is not served; LORA is",
        ),
        ({"peft_type": "absent"}, "peft_type is missing"),
        ({"target_modules": "absent"}, "target_modules is missing"),
        ({"task_type": "CAUSAL_LM"}, "task_type='CAUSAL_LM' is not served"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion="),
        (
            {"init_lora_weights": "olora"},
            "init_lora_weights='olora' is not served, since it changes",
        ),
        (
            {"init_lora_weights": "loftq"},
            "base's weights: model.unload().save_pretrained(<base>) in",
        ),
        ({"fan_in_fan_out": True, "lora_bias": True}, "fan_in_fan_out=True is not served; lora_b"),
        ({"new_option": {"x": 1}}, "new_option={'x': 1} is not served"),
        ({"target_modules": ["nothing"]}, "target_modules=['nothing'] match nothing"),
        ({"target_modules": ["query", "key"]}, "missing " + QUERY.replace("query", "key")),
        ({"target_modules": "(query"}, "a value of the wrong form"),
        ({"rank_pattern": ["query"]}, "a value of the wrong form"),
        ({"r": 2}, "lora_A.weight has shape (4, 24), expected (2, 24)"),
        ({"lora_alpha": -1}, "lora.alpha=-1 is not a positive number"),
    ],
)
def test_configs_that_are_refused(adapter, changes, said):
    folder, base = adapter
    edit_config(folder, **changes)
    with pytest.raises(LoraxError) as error:
        load_peft(folder, base, "bert")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_all_faults_of_the_tensors_in_one_line(adapter):
    folder, base = adapter
    edit_tensors(folder, misshape)
    with pytest.raises(LoraxError) as error:
        load_peft(folder, base, "bert")
    for said in (
        f"{QUERY}.lora_A.weight has shape (4, 7), expected (4, 24)",
        f"missing {QUERY}.lora_B.weight",
        "unexpected base_model.model.strange.weight",
    ):
        assert said in str(error.value)


def test_a_base_of_another_family_or_depth(adapter, saved):
    folder, base = adapter
    shallow = {**base, "encoder": {**base["encoder"], "layers": {0: base["encoder"]["layers"][0]}}}
    with pytest.raises(LoraxError, match=r"unexpected .*layer\.1.*and 3 more"):
        load_peft(folder, shallow, "bert")
    with pytest.raises(LoraxError, match="model_type='gpt' is not one of: bert, roberta"):
        load_peft(folder, base, "gpt")


def test_files_that_are_not_there(adapter, tmp_path):
    folder, base = adapter
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(LoraxError, match="is a pickle"):
        load_peft(folder, base, "bert")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(LoraxError, match=r"has no adapter_model\.safetensors"):
        load_peft(folder, base, "bert")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(LoraxError, match="not readable JSON"):
        load_peft(folder, base, "bert")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LoraxError, match=r"has no adapter_config\.json"):
        load_peft(folder, base, "bert")


def test_what_the_format_cannot_say(saved, tmp_path):
    root, base, lora, spec = saved
    source = str(root / "base")
    with pytest.raises(LoraxError, match="rank 8, its spec says 4: unpad"):
        save_peft(tmp_path, pad(lora, 8), spec, "bert", source)
    with pytest.raises(LoraxError, match="out alone may follow any pooling: give the model's"):
        save_peft(tmp_path, lora, spec, "bert", source, head={"out": base["head"]["out"]})
    dora = {path: pair | {"magnitude": np.ones(24)} for path, pair in lora.items()}
    with pytest.raises(LoraxError, match="has a, b, magnitude"):
        save_peft(tmp_path, dora, spec, "bert", source)
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraxError, match="cannot write"):
        save_peft(tmp_path / "file", lora, spec, "bert", source)
    (tmp_path / "taken" / "adapter_model.safetensors").mkdir(parents=True)
    with pytest.raises(LoraxError, match=r"cannot write .*taken") as error:
        save_peft(tmp_path / "taken", lora, spec, "bert", source)
    assert "\n" not in str(error.value)


def test_both_files_have_the_same_mode(saved, tmp_path):
    root, _, lora, spec = saved
    save_peft(tmp_path / "adapter", lora, spec, "bert", str(root / "base"))
    (tmp_path / "plain").write_text("")
    modes = {
        path.stat().st_mode for path in [*(tmp_path / "adapter").iterdir(), tmp_path / "plain"]
    }
    assert len(modes) == 1
