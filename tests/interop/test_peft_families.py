"""Adapters of every other family of encoders, out to real PEFT and back in."""

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx

from lorax import LoraSpec, init
from lorax.config import ModelConfig
from lorax.interop import load_peft, save_peft
from lorax.lora import adapt
from lorax.models import ENCODERS, load_model

SMALL = {"vocab_size": 61, "max_position_embeddings": 24, "num_labels": 3}
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
CASES = {
    "distilbert": ("DistilBert", {"dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40}),
    "mpnet": ("MPNet", SIZES),
    "deberta-v2": ("DebertaV2", {**SIZES, **RELATIVE, "share_att_key": True}),
    "xlm-roberta": ("XLMRoberta", SIZES),
    "camembert": ("Camembert", SIZES),
}


def test_no_encoder_is_forgotten():
    assert set(ENCODERS) == CASES.keys() | {"bert", "roberta", "electra"}  # test_peft.py has those


def written(model_type, folder):
    name, sizes = CASES[model_type]
    config = getattr(transformers, f"{name}Config")(**SMALL, **sizes)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    return getattr(transformers, f"{name}ForSequenceClassification")


def inputs():
    ids = np.random.default_rng(0).integers(4, 60, (3, 9)).astype(np.int32)
    return ids, np.ones_like(ids)


def of_torch(model):
    ids, mask = (torch.from_numpy(x).long() for x in inputs())
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=mask).logits.numpy()


@pytest.mark.parametrize("targets", ["qv", "qkvo", "mlp"])
@pytest.mark.parametrize("model_type", CASES)
def test_out_to_peft_and_back(model_type, targets, tmp_path):
    theirs = written(model_type, tmp_path / "base")
    config = ModelConfig(source=str(tmp_path / "base"), pooling="pooler", dropout=0.0)
    model = load_model(config, 3, key=jax.random.key(0))
    base = nnx.to_pure_dict(nnx.state(model))
    spec = LoraSpec(3, 6, targets=targets, modules_to_save=("head",))
    lora = init(jax.random.key(1), base, spec)
    lora = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), lora)
    head = jax.tree.map(lambda x: 1.1 * x, base["head"])
    save_peft(tmp_path / "adapter", lora, spec, model_type, str(tmp_path / "base"), head=head)
    adapted = peft.PeftModel.from_pretrained(
        theirs.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    again = load_peft(tmp_path / "adapter", base, model_type)
    nnx.update(model, {"head": again.head})
    ours = adapt(model, again.lora, again.spec)(*inputs())
    np.testing.assert_allclose(ours, of_torch(adapted), atol=1e-5, rtol=1e-5)
    for path, pair in lora.items():
        np.testing.assert_allclose(again.lora[path]["a"], pair["a"])
