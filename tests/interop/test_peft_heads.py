"""Classifiers out to real PEFT and back in: what was trained is kept, or its loss is said."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file

from lorax import LoraSpec, adapt, init
from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.interop import load_peft, save_peft
from lorax.models import load_model
from lorax.runs.adapter import head_tree, load_adapter, lora_tree, save_adapter
from tests.helpers.run_model import run

SIZES = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
FAMILIES = {
    "bert": ("Bert", SIZES | {"intermediate_size": 40}, "query"),
    "roberta": ("Roberta", SIZES | {"intermediate_size": 40}, "query"),
    "deberta-v2": ("DebertaV2", SIZES | {"intermediate_size": 40}, "query_proj"),
    "distilbert": (
        "DistilBert",
        {"dim": 24, "n_layers": 1, "n_heads": 3, "hidden_dim": 40},
        "q_lin",
    ),
}
IDS = np.random.default_rng(0).integers(4, 60, (3, 9)).astype(np.int32)
MASK = np.ones_like(IDS)


class Base(NamedTuple):
    """A base on disk, and ours of it with pooling `pooler`."""

    model_type: str
    folder: Path
    query: str
    ours: Any
    params: Any

    def theirs(self, kind="ForSequenceClassification"):
        name = FAMILIES[self.model_type][0] + kind
        return getattr(transformers, name).from_pretrained(self.folder).eval()

    def peft_saved(self, folder, targets, seed=3, **options):
        """An adapter that PEFT made and saved with random weights, and its model."""
        config = peft.LoraConfig(r=2, target_modules=targets, task_type="SEQ_CLS", **options)
        model = peft.get_peft_model(self.theirs(), config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in (w for w in model.parameters() if w.requires_grad):
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
        model.save_pretrained(folder)
        return model

    def from_peft(self, folder):
        return peft.PeftModel.from_pretrained(self.theirs(), folder)

    def outputs(self, adapter, head=None):
        """Our logits with an adapter's head, or another."""
        graphdef, state = nnx.split(self.ours)
        params = nnx.to_pure_dict(state)
        params["head"] = params["head"] | (head or adapter.head or {})
        return run(adapt(nnx.merge(graphdef, params), adapter.lora, adapter.spec), IDS, MASK)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    made = {}

    def make(model_type):
        if model_type not in made:
            name, sizes, query = FAMILIES[model_type]
            folder = tmp_path_factory.mktemp(model_type)
            config = getattr(transformers, f"{name}Config")
            config = config(vocab_size=61, max_position_embeddings=24, num_labels=3, **sizes)
            torch.manual_seed(0)
            model = getattr(transformers, f"{name}ForSequenceClassification")(config)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(0.1 * torch.randn_like(weight))
            model.save_pretrained(folder)
            options = ModelConfig(source=str(folder), pooling="pooler", dropout=0.0)
            ours = load_model(options, 3, key=jax.random.key(0))
            params = nnx.to_pure_dict(nnx.state(ours))
            made[model_type] = Base(model_type, folder, query, ours, params)
        return made[model_type]

    return make


@pytest.fixture(scope="module")
def bert(bases):
    return bases("bert")


def logits(model):
    ids, mask = (torch.from_numpy(x).long() for x in (IDS, MASK))
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, atol=1e-5)


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def noisy(tree, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), tree)


# PEFT stores the classifier alone, with what its name ends: DistilBERT's pre_classifier.
@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("bert", []),
        ("bert", ["pooler.dense"]),
        ("roberta", []),
        ("distilbert", []),
        ("deberta-v2", []),
        ("deberta-v2", ["pooler.dense"]),
    ],
)
def test_the_commonest_classifiers_of_peft_in_and_out(bases, model_type, more, tmp_path, caplog):
    base = bases(model_type)
    theirs = base.peft_saved(tmp_path / "theirs", [base.query, *more])
    adapter = load_peft(tmp_path / "theirs", base.params, model_type)
    is_whole = model_type in ("roberta", "distilbert")
    assert set(adapter.head) == ({"dense", "out"} if is_whole else {"out"})
    assert ("head.dense.kernel" in adapter.lora) == bool(more)
    assert_close(base.outputs(adapter), logits(theirs).logits)
    # The pooler belongs to no DebertaV2Model: another base may draw it at random.
    assert ("draws at random" in caplog.text) == (model_type == "deberta-v2")

    lora, spec, head = adapter
    save_peft(
        tmp_path / "ours", lora, spec, model_type, str(base.folder), head=head, pooling="pooler"
    )
    written, again = tensors_of(tmp_path / "theirs"), tensors_of(tmp_path / "ours")
    assert written.keys() == again.keys()
    for name in written:
        np.testing.assert_array_equal(written[name], again[name], err_msg=name)
    assert config_of(tmp_path / "ours")["modules_to_save"][0] == "classifier"
    np.testing.assert_array_equal(
        logits(base.from_peft(tmp_path / "ours")).logits, logits(theirs).logits
    )


def test_an_adapter_of_a_trained_head_is_merged_into_it(bert, tmp_path):
    spec = LoraSpec(2, 6, targets=("q", r"head\.dense", r"head\.out"), modules_to_save=("head",))
    lora = noisy(init(jax.random.key(0), bert.params, spec))
    head = noisy(bert.params["head"], seed=2)
    save_peft(tmp_path, lora, spec, "bert", str(bert.folder), head=head)
    assert not any("pooler.dense.lora" in name for name in tensors_of(tmp_path))
    theirs = logits(bert.from_peft(tmp_path)).logits
    ours = load_peft(tmp_path, bert.params, "bert")._replace(lora=lora, spec=spec)
    assert_close(bert.outputs(ours, head), theirs)
    again = load_peft(tmp_path, bert.params, "bert")
    assert_close(bert.outputs(again), theirs)


def test_an_adapted_pooler_of_the_bare_encoder_in_and_out(bert, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["pooler.dense", "query"], init_lora_weights=False)
    theirs = peft.get_peft_model(bert.theirs("Model"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    lora, spec, head = load_peft(tmp_path / "theirs", bert.params, "bert")
    assert head is None
    assert "head.dense.kernel" in lora
    save_peft(tmp_path / "ours", lora, spec, "bert", str(bert.folder))
    again = peft.PeftModel.from_pretrained(bert.theirs("Model"), tmp_path / "ours")
    want, got = (logits(model).pooler_output for model in (theirs, again))
    np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def mean(bert):
    """A classifier that pools by mean: its model, a trained adapter and a trained head."""
    options = ModelConfig(source=str(bert.folder), pooling="mean", dropout=0.0)
    model = load_model(options, 3, key=jax.random.key(0))
    params = nnx.to_pure_dict(nnx.state(model))
    spec = LoraSpec(2, 6, modules_to_save=("head",))
    return model, params, noisy(init(jax.random.key(0), params, spec)), spec, noisy(params["head"])


def test_a_head_that_pools_by_mean_is_kept_beside_the_adapter(bert, mean, tmp_path, caplog):
    model, params, lora, spec, head = mean
    trained = {"lora": lora, "base": {"head": head}}  # as a trial leaves it
    save_adapter(tmp_path / "trial", trained, spec, {"base": {"pooling": "mean"}})
    leaves, spec, about = load_adapter(tmp_path / "trial")
    written = {"head": head_tree(leaves), "pooling": about["base"]["pooling"]}
    save_peft(tmp_path, lora_tree(leaves), spec, "bert", str(bert.folder), **written)
    assert "PEFT has no place for a head that pools by mean" in caplog.text
    nnx.update(model, nnx.State({"head": head}))
    ours = run(adapt(model, lora, spec), IDS, MASK)
    # What a user of PyTorch would do with the two files.
    encoder = peft.PeftModel.from_pretrained(bert.theirs("Model"), tmp_path)
    stored = {
        k: torch.from_numpy(v) for k, v in load_file(tmp_path / "lorax_head.safetensors").items()
    }
    pooled = logits(encoder).last_hidden_state.mean(1)
    assert_close(ours, torch.nn.functional.linear(pooled, stored["out.weight"], stored["out.bias"]))

    again = load_peft(tmp_path, params, "bert", pooling="mean")
    jax.tree.map(np.testing.assert_array_equal, again.head, head)
    caplog.clear()
    assert load_peft(tmp_path, params, "bert").head is None
    assert "give pooling='mean' to read it" in caplog.text
    with pytest.raises(LoraxError, match="a head that pools by 'mean', not 'cls'"):
        load_peft(tmp_path, params, "bert", pooling="cls")
    save_peft(tmp_path, lora, spec, "bert", str(bert.folder), head="drop")  # the old head goes
    assert load_peft(tmp_path, params, "bert", pooling="mean").head is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "the head was trained: give head=params['head'], or head='drop'"),
        ({"head": "leave"}, "head='leave': give the head's parameters, or 'drop'"),
        ({"head": "out"}, "give the model's, pooling='mean', 'cls' or 'pooler', not None"),
        ({"head": "out", "pooling": "max"}, "'cls' or 'pooler', not 'max'"),
        ({"head": "both", "pooling": "mean"}, "pooling='mean' has no dense, which the head has"),
    ],
)
def test_a_trained_head_is_not_dropped_without_a_word(bert, mean, tmp_path, options, said):
    _, _, lora, spec, head = mean
    heads = {"out": head, "both": bert.params["head"]}
    options = {name: heads.get(value, value) for name, value in options.items()}
    with pytest.raises(LoraxError) as fault:
        save_peft(tmp_path / "adapter", lora, spec, "bert", "hub/base", **options)
    assert said in str(fault.value)
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "adapter").exists()


def test_what_peft_stores_together_is_given_together(bert, mean, tmp_path):
    _, _, lora, spec, head = mean
    with pytest.raises(LoraxError, match=r"roberta's 'classifier' is dense and out.*has no dense"):
        save_peft(tmp_path, lora, spec, "roberta", "hub/base", head=head, pooling="pooler")
    norms = LoraSpec(2, 6, modules_to_save=("head", "embeddings.norm"))
    with pytest.raises(LoraxError, match=r"modules_to_save=\['embeddings.norm'\]: save_peft"):
        save_peft(tmp_path, lora, norms, "bert", "hub/base", head=head, pooling="mean")
    on_out = LoraSpec(2, targets=r"head\.out")
    pair = init(jax.random.key(0), bert.params, on_out)
    with pytest.raises(LoraxError, match=r"'head.out.kernel' is of the head.*give head="):
        save_peft(tmp_path, pair, on_out, "bert", "hub/base")
    for nothing in ((pair, on_out), ({}, None)):
        with pytest.raises(LoraxError, match=r"no adapter of the base to write.*train\.mode=lora"):
            save_peft(tmp_path, *nothing, "bert", "hub/base", head=bert.params["head"])


def test_the_base_that_is_named(bert, mean, tmp_path, caplog, monkeypatch):
    _, _, lora, spec, _ = mean
    save_peft(tmp_path, lora, spec, "bert", "hub/base", head="drop", revision="v2")
    assert caplog.text == ""
    named = config_of(tmp_path)
    assert (named["base_model_name_or_path"], named["revision"]) == ("hub/base", "v2")
    monkeypatch.chdir(bert.folder.parent)
    save_peft(tmp_path, lora, spec, "bert", bert.folder.name, head="drop")
    assert config_of(tmp_path)["base_model_name_or_path"] == str(bert.folder.resolve())
    assert "is a folder of this machine" in caplog.text
    with pytest.raises(
        LoraxError, match="base_source='/not/there' is no folder, and no repository"
    ):
        save_peft(tmp_path, lora, spec, "bert", "/not/there", head="drop")
