"""Small GGUF files of random LLaMAs, and byte-level BPE in plain Python to compare with."""

import functools
import itertools

import gguf
import numpy as np
import pytest
import regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "the cat and the dog don't see the theatre, and  they're 1234 years old\n\n",
    "def the(self):\n    return self.total[12]  # naïve café, the überhaupt",
]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
# The pre-tokenizer `smollm` of llama.cpp: digits stand alone, the rest is cut as GPT-2's.
DIGIT = r"\p{N}"
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@functools.cache
def vocabulary():
    """(tokens, merges) learned from the corpus."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, ByteLevel(add_prefix_space=False)])
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    known, merges = set(), []
    for token in tokens:  # each is a pair of earlier ones, or a byte
        cuts = [(token[:n], token[n:]) for n in range(1, len(token))]
        merges += [pair for pair in cuts if known.issuperset(pair)][:1] if token[0] != "<" else []
        known.add(token)
    return tokens, merges


def random_llama(*, tied):
    """A LLaMA of transformers for the vocabulary."""
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary()[0]), tie_word_embeddings=tied, rope_theta=500.0, **SIZES
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return model


def metadata():
    """What a GGUF file of the model says, apart from its tensors."""
    tokens, merges = vocabulary()
    return {
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 2,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.context_length": 128,
        "llama.vocab_size": len(tokens),
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 500.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def stored_tensors(model):
    """A torch model's weights under GGUF's names, rows of heads by pairs that rope turns."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    tensors = {}
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            halves = np.split(array.reshape(heads, 16, 64), 2, axis=1)
            array = np.stack(halves, axis=2).reshape(array.shape)
        tensors[names.get_name(name.removesuffix(".weight")) + ".weight"] = array
    if model.config.tie_word_embeddings:
        tensors.pop("output.weight", None)
    return tensors


def write_gguf(path, model, kind="F32", *, architecture="llama", tensors=None, **changes):
    """Writes a GGUF file; `changes` of metadata, with `__` for a dot, and None for without."""
    writer = gguf.GGUFWriter(path, architecture)
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    for name, value in (metadata() | changes).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add |= {str: writer.add_string, list: writer.add_array}
        if value is not None:
            add[type(value)](name, value)
    for name, array in (stored_tensors(model) | (tensors or {})).items():
        if array is None:
            continue
        as_kind = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        writer.add_tensor(name, gguf.quantize(array, as_kind), raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_characters():
    """GPT-2's printable stand-ins of the 256 bytes (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    table = {byte: chr(byte) for byte in plain}
    return table | {byte: chr(256 + n) for n, byte in enumerate(others)}


def plain_bpe(text, tokens, merges):
    """Ids of a text without special tokens, by the definition: the earliest merge first."""
    ids = {token: n for n, token in enumerate(tokens)}
    ranks = {pair: n for n, pair in enumerate(merges)}
    characters = byte_characters()
    found = []
    for piece in (p for p in regex.split(f"({DIGIT})", text) if p):
        for word in regex.findall(WORDS, piece):
            parts = [characters[byte] for byte in word.encode()]
            while pairs := [p for p in itertools.pairwise(parts) if p in ranks]:
                best = min(pairs, key=ranks.get)
                parts = merged(parts, best)
            found += [ids[part] for part in parts]
    return found


def merged(parts, pair):
    """Parts with every occurrence of the pair made one, from the left."""
    whole, n = [], 0
    while n < len(parts):
        take = 2 if tuple(parts[n : n + 2]) == pair else 1
        whole.append("".join(parts[n : n + take]))
        n += take
    return whole
