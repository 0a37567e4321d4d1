"""Turns a LLaMA in GGUF into a Hugging Face folder: gguf_to_hf.py MODEL.gguf FOLDER.

Quantized weights are converted to the exact float32 numbers that they represent: bfloat16 would
round them. The folder's files are config.json, model.safetensors, tokenizer.json and
tokenizer_config.json. Needs the extra `large`.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf_tokenizer import GgufError, build_tokenizer, tokenizer_config
from safetensors import SafetensorError
from safetensors.numpy import save_file

# config.json's names of GGUF's sizes.
_SIZES = {
    "hidden_size": "llama.embedding_length",
    "intermediate_size": "llama.feed_forward_length",
    "num_hidden_layers": "llama.block_count",
    "num_attention_heads": "llama.attention.head_count",
    "num_key_value_heads": "llama.attention.head_count_kv",
    "head_dim": "llama.rope.dimension_count",
    "max_position_embeddings": "llama.context_length",
}
_NUMBERS = {
    "rms_norm_eps": "llama.attention.layer_norm_rms_epsilon",
    "rope_theta": "llama.rope.freq_base",
}
_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}
_VOCABULARY = "llama.vocab_size"
_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(source: Path, folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file to `folder`.

    Raises:
      GgufError: the file is damaged, or holds what is not served; nothing is written then.
      OSError: `folder` cannot be written.
    """
    metadata, stored = read(source)
    try:
        tokenizer = build_tokenizer(metadata)
        config = read_config(metadata, is_tied="output.weight" not in stored)
        told = tokenizer_config(metadata)
        weights = read_weights(stored, config)
    except GgufError as error:
        raise GgufError(f"{source.name}: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "config.json", as_json(config))
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"cannot write model.safetensors: {error}") from error
    shutil.copymode(folder / "config.json", folder / "model.safetensors")  # not its owner's alone
    _write(folder / "tokenizer.json", tokenizer.to_str())
    _write(folder / "tokenizer_config.json", as_json(told))


def read(source: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """The metadata and the tensors, as stored, of a GGUF file.

    Raises:
      GgufError: no GGUF file, or a damaged one.
    """
    try:
        reader = gguf.GGUFReader(source)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
    # What the reader finds amiss has no class of its own.
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise GgufError(f"{source.name} is damaged or no GGUF file ({error})") from error
    return metadata, {tensor.name: tensor for tensor in reader.tensors}


def read_config(metadata: Mapping[str, Any], *, is_tied: bool) -> dict[str, Any]:
    """The content of config.json.

    Raises:
      GgufError: no LLaMA, a size that is absent, or an option that is not served.
    """
    if (kind := metadata.get("general.architecture")) != "llama":
        raise GgufError(f"general.architecture={kind!r} is not served; llama is")
    read = {**_SIZES, **_NUMBERS}
    if absent := [name for name in read.values() if name not in metadata]:
        raise GgufError(f"no {', '.join(absent)}")
    options = {name for name in metadata if name.startswith("llama.")}
    if unknown := sorted(options - {*read.values(), _VOCABULARY}):
        raise GgufError(f"{', '.join(unknown)}: not served")
    sizes = {ours: metadata[theirs] for ours, theirs in _SIZES.items()}
    if sizes["head_dim"] * sizes["num_attention_heads"] != sizes["hidden_size"]:
        raise GgufError(f"llama.rope.dimension_count={sizes['head_dim']}: served are whole heads")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        **sizes,
        **{ours: _shortest(metadata[theirs]) for ours, theirs in _NUMBERS.items()},
        **{ours: metadata[theirs] for ours, theirs in _IDS.items() if theirs in metadata},
        "tie_word_embeddings": is_tied,
        "dtype": "float32",
    }


def _shortest(stored: float) -> float:
    """The shortest decimal that is this float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(stored)))


def read_weights(
    stored: Mapping[str, gguf.ReaderTensor], config: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The float32 arrays of model.safetensors, by their names there.

    Raises:
      GgufError: a tensor that has no place in a LLaMA, or none for one of its places.
    """
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in _OUTSIDE.items()}
    for n in range(config["num_hidden_layers"]):
        for theirs, ours in _OF_A_LAYER.items():
            names[f"blk.{n}.{theirs}.weight"] = f"model.layers.{n}.{ours}.weight"
    if config["tie_word_embeddings"]:
        del names["output.weight"]
    if strange := sorted(stored.keys() ^ names.keys()):
        raise GgufError(f"{strange[0]}: {'no place for it' if strange[0] in stored else 'absent'}")
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    weights = {}
    for theirs, tensor in stored.items():
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if turned := re.search(r"\.attn_([qk])\.", theirs):
            array = in_halves(array, heads[turned[1]])
        weights[names[theirs]] = array
    return weights


def in_halves(weight_NxD: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head that rope turns as pairs: neighbours in GGUF, half a head apart with us."""
    rows, width = weight_NxD.shape
    by_pair = weight_NxD.reshape(heads, rows // heads // 2, 2, width)
    return by_pair.swapaxes(1, 2).reshape(rows, width)


def as_json(content: Mapping[str, Any]) -> str:
    """As Hugging Face writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False)


def _write(path: Path, text: str) -> None:
    path.write_text(f"{text}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Command line: 0 is success, 2 a fault."""
    parser = argparse.ArgumentParser(description="Turn a LLaMA in GGUF into a Hugging Face folder.")
    parser.add_argument("source", type=Path, metavar="MODEL.gguf")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    args = parser.parse_args(argv)
    try:
        convert(args.source, args.folder)
    except (GgufError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
