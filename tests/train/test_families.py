"""Every family of encoders through a whole trial: the user's path from checkpoint to adapter."""

import shutil

import pytest

from lorax.models import ENCODERS
from lorax.train import run_trial

pytestmark = pytest.mark.slow

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
CLASSES = {
    "roberta": ("Roberta", SIZES),
    "xlm-roberta": ("XLMRoberta", SIZES),
    "camembert": ("Camembert", SIZES),
    "electra": ("Electra", {**SIZES, "embedding_size": 16}),
    "distilbert": ("DistilBert", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}),
    "mpnet": ("MPNet", SIZES),
    "deberta-v2": ("DebertaV2", {**SIZES, **RELATIVE, "share_att_key": True}),
}


def test_no_family_is_forgotten():
    assert set(ENCODERS) == CLASSES.keys() | {"bert"}  # the other tests' base


@pytest.mark.parametrize("model_type", CLASSES)
def test_a_trial_runs_to_its_end(model_type, world, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, sizes = CLASSES[model_type]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=240, max_position_embeddings=40, **sizes
    )
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path / "base")
    shutil.copy(world.source / "tokenizer.json", tmp_path / "base")
    trial = world.trial(
        tmp_path / "out",
        model={"source": str(tmp_path / "base"), "pooling": "pooler"},
        lora={"targets": "all-linear"},
        train={"max_steps": 3},
    )
    result = run_trial(trial)
    assert result["status"] == "finished"
    assert 0 <= result["best"]["metrics"]["accuracy"] <= 1
    assert result["adapter_params"] > 0
