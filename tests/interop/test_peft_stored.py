"""PEFT adapters that store weights of the base, or were not saved as plain LoRA."""

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from lorax import adapt
from lorax.config import ModelConfig
from lorax.errors import LoraxError
from lorax.interop import load_peft
from lorax.models import load_model, quantize
from tests.helpers.causal_zoo import load_lm, ragged, torch_logits, write_lm
from tests.helpers.run_model import run

REMEDY = r"\.unload\(\)\.save_pretrained\(<folder>\) writes the base"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A random LLaMA's folder, its parameters here, and a maker of theirs."""
    folder = tmp_path_factory.mktemp("llama")
    write_lm(folder, "llama", tie_word_embeddings=False, num_hidden_layers=1)
    params = nnx.to_pure_dict(nnx.state(load_lm(folder)))
    return folder, params, lambda: transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def with_lora(model, **options):
    config = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(**config)).eval()


def shake(model, names=("",)):
    """Random changes of what trains, where `names` are in its name."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and any(part in name for part in names):
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def assert_same_logits(folder, adapter, theirs):
    ids, mask = ragged()
    with torch.no_grad():
        want = torch_logits(theirs, ids, mask).numpy()
    ours = run(adapt(load_lm(folder), adapter.lora, adapter.spec), ids, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(ours)[real], want[real], rtol=0, atol=1e-5)


def test_embeddings_that_were_trained_need_the_base_that_peft_writes_of_them(llama, tmp_path):
    _, params, make = llama
    theirs = shake(with_lora(make(), modules_to_save=["embed_tokens", "lm_head"]))
    theirs.save_pretrained(tmp_path / "adapter")
    with pytest.raises(LoraxError, match=REMEDY) as fault:
        load_peft(tmp_path / "adapter", params, "llama")
    for name in ("model.embed_tokens.weight (61, 24)", "lm_head.weight (61, 24)"):
        assert f"base_model.model.{name}" in str(fault.value)
    assert "\n" not in str(fault.value)

    restored = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter")
    restored.unload().save_pretrained(tmp_path / "base")
    own = nnx.to_pure_dict(nnx.state(load_lm(tmp_path / "base")))
    assert_same_logits(tmp_path / "base", load_peft(tmp_path / "adapter", own, "llama"), theirs)


def test_embeddings_as_the_base_has_them_are_passed_over(llama, tmp_path):
    folder, params, make = llama
    theirs = shake(with_lora(make(), modules_to_save=["lm_head", "norm"]), names=("lora_",))
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.model.norm.weight", "base_model.model.lm_head.weight"} <= set(stored)
    adapter = load_peft(tmp_path, params, "llama")
    assert_same_logits(folder, adapter, theirs)
    with pytest.raises(LoraxError, match="neither their shapes nor kernels in few bits"):
        load_peft(tmp_path, jax.eval_shape(lambda: params), "llama")
    few_bits = params | {"lm_head": {"kernel": quantize(params["lm_head"]["kernel"], "int8")}}
    with pytest.raises(LoraxError, match="neither their shapes nor kernels in few bits"):
        load_peft(tmp_path, few_bits, "llama")
    # In the coarser precision of the two they are the same, whichever side that is.
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    load_peft(tmp_path, rounded, "llama")
    stored = {name: np.asarray(jnp.asarray(x, jnp.bfloat16)) for name, x in stored.items()}
    save_file(stored, tmp_path / "adapter_model.safetensors")
    load_peft(tmp_path, params, "llama")
    other = jax.tree.map(lambda x: 1.01 * x, params)
    with pytest.raises(LoraxError, match=r"model\.embed_tokens\.weight \(61, 24\).*and 2 more"):
        load_peft(tmp_path, other, "llama")


def test_a_vocabulary_of_another_size_is_named(llama, tmp_path):
    _, params, make = llama
    resized = make()
    resized.resize_token_embeddings(64)
    with_lora(resized, target_modules=["embed_tokens"]).save_pretrained(tmp_path)
    with pytest.raises(LoraxError, match=REMEDY) as fault:
        load_peft(tmp_path, params, "llama")
    assert "embed_tokens.base_layer.weight (64, 24)" in str(fault.value)


def test_a_tied_output_layer_that_was_trained_alone(tmp_path):
    write_lm(tmp_path / "base", "gpt2", n_layer=1)
    params = nnx.to_pure_dict(nnx.state(load_lm(tmp_path / "base")))
    assert "lm_head" not in params
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"], "fan_in_fan_out": True}
    theirs = with_lora(model, **options)
    theirs.save_pretrained(tmp_path / "same")
    load_peft(tmp_path / "same", params, "gpt2")
    shake(theirs, names=("lm_head",)).save_pretrained(tmp_path / "trained")
    with pytest.raises(LoraxError, match=r"base_model\.model\.lm_head\.weight \(61, 24\)"):
        load_peft(tmp_path / "trained", params, "gpt2")


def test_embeddings_of_an_encoder(tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3}
    config = transformers.BertConfig(vocab_size=61, intermediate_size=40, **sizes)
    bert = transformers.BertModel(config)
    bert.save_pretrained(tmp_path / "base")
    ours = load_model(ModelConfig(source=str(tmp_path / "base")), 2, key=jax.random.key(0))
    params = nnx.to_pure_dict(nnx.state(ours))
    options = {"target_modules": ["query"], "task_type": None}
    theirs = with_lora(bert, **options)
    theirs.save_pretrained(tmp_path / "same", save_embedding_layers=True)
    load_peft(tmp_path / "same", params, "bert")
    bert.embeddings.word_embeddings.weight.data[7] += 1
    theirs.save_pretrained(tmp_path / "trained", save_embedding_layers=True)
    with pytest.raises(LoraxError, match=r"embeddings\.word_embeddings\.weight \(61, 24\)"):
        load_peft(tmp_path / "trained", params, "bert")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("base_model.model.", "module.base_model.model.", "DistributedDataParallel.*model.module"),
        ("base_model.model.", "base_model.model._orig_mod.", r"torch.compile.*\(model._orig_mod\)"),
    ],
)
def test_prefixes_of_wrappers_are_named(llama, tmp_path, before, after, said):
    _, params, make = llama
    with_lora(make()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k.replace(before, after): v for k, v in load_file(file).items()}, file)
    with pytest.raises(LoraxError, match=said) as fault:
        load_peft(tmp_path, params, "llama")
    assert "\n" not in str(fault.value)


def test_pissa_and_olora_load_as_the_message_says(llama, tmp_path):
    folder, params, make = llama
    for init in ("pissa", "olora"):
        root = tmp_path / init
        theirs = with_lora(make(), init_lora_weights=init)
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(root / "start")
        theirs.peft_config["default"].init_lora_weights = init
        shake(theirs)
        theirs.save_pretrained(root / "trained")
        with pytest.raises(LoraxError, match=f"init_lora_weights='{init}' is not served, since"):
            load_peft(root / "trained", params, "llama")
        ids, mask = ragged()
        want = torch_logits(theirs, ids, mask).detach().numpy()
        theirs.save_pretrained(
            root / "lora", path_initial_model_for_weight_conversion=str(root / "start")
        )
        adapter = load_peft(root / "lora", params, "llama")
        assert adapter.spec.rank == 4
        ours = run(adapt(load_lm(folder), adapter.lora, adapter.spec), ids, mask)
        real = mask.astype(bool)
        np.testing.assert_allclose(np.asarray(ours)[real], want[real], rtol=0, atol=1e-5)


def test_mica_is_plain_lora_when_it_is_saved(llama, tmp_path):
    folder, params, make = llama
    theirs = shake(with_lora(make(), init_lora_weights="mica"))
    theirs.save_pretrained(tmp_path)
    assert_same_logits(folder, load_peft(tmp_path, params, "llama"), theirs)
