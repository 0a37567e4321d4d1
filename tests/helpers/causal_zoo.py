"""Small decoders of transformers with random weights, and what their tests share."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from lorax.config import ModelConfig
from lorax.models import load_causal_lm

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "head_dim": 6,
}
GPT2 = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 64}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
SIDES = ("right", "left")


def write_lm(folder, model_type="llama", **options):
    """Writes a random checkpoint and returns the torch model, in eval mode."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    sizes = GPT2 if model_type == "gpt2" else LLAMA
    name = "GPT2LMHeadModel" if model_type == "gpt2" else f"{CLASSES[model_type]}ForCausalLM"
    config = getattr(transformers, "GPT2Config" if model_type == "gpt2" else f"{name[:-11]}Config")
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    model = getattr(transformers, name)(config(**(sizes | special | options))).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = "norm" in name or "ln_" in name
            weight.normal_(1.0 if is_norm and name.endswith("weight") else 0.0, 0.15)
    model.save_pretrained(folder)
    return model


def load_lm(folder, *, dtype=jnp.float32, param_dtype=jnp.float32, remat=False, **options):
    model = ModelConfig(source=str(folder), **options)
    return load_causal_lm(model, dtype=dtype, param_dtype=param_dtype, remat=remat)


def ragged(side="right", lengths=(9, 4, 1, 7), seed=1):
    """Ids and mask, (B, T) each."""
    rng = np.random.default_rng(seed)
    longest, length = max(lengths), np.array(lengths)[:, None]
    column = np.arange(longest)[None]
    mask = column < length if side == "right" else column >= longest - length
    ids = np.where(mask, rng.integers(2, 60, mask.shape), 0)
    return ids.astype(np.int32), mask.astype(np.int32)


def both_sides():
    """The rows of `ragged`, padded on the right, and again on the left: one program for both."""
    return tuple(np.concatenate(pair) for pair in zip(*map(ragged, SIDES), strict=True))


def torch_logits(model, ids, mask, positions=None):
    """With positions that count real tokens, as `generate` gives them."""
    import torch

    if positions is None:
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    tensors = (torch.tensor(np.asarray(x), dtype=torch.long) for x in (ids, mask, positions))
    ids, mask, positions = tensors
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits


WORDS = [f"w{n}" for n in range(40)]


def write_lm_base(folder, model_type="llama"):
    """A tiny decoder of random weights with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", "<unk>", ".", ":", *WORDS]
    write_lm(folder, model_type, tie_word_embeddings=True, vocab_size=len(words), eos_token_id=2)
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


def write_pairs(folder):
    """Prompts of unlike lengths, each with the completion it decides."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(120):
        prompt = " ".join(f"w{(n + i) % 40}" for i in range(1 + n % 9)) + " :"
        rows.append({"prompt": prompt, "completion": f" w{n % 40} w{(n + 3) % 40}"})
    for name, part in (("train", rows[:90]), ("dev", rows[90:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def write_text(path):
    """A text of repeating words, in lines."""
    lines = [f"w{n % 7} w{(n + 1) % 7} w{(2 * n) % 40} w{n % 3}." for n in range(400)]
    path.write_text("\n".join(lines))
    return path
