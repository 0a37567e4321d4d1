"""The byte-level BPE tokenizer of a GGUF file, made with the `tokenizers` package."""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_MODEL_MAX_LENGTH = "llama.context_length"
_SPECIAL = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
# What is served of the options that change the ids; the first is the default.
_SERVED: dict[str, tuple[Any, ...]] = {
    "tokenizer.ggml.model": ("gpt2",),
    "tokenizer.ggml.pre": ("smollm",),
    "tokenizer.ggml.add_space_prefix": (False,),
    "tokenizer.ggml.add_bos_token": (False,),
    "tokenizer.ggml.add_eos_token": (False,),
}


class GgufError(Exception):
    """A GGUF file that is damaged or holds what is not served; the message is one line."""


def build_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of SmolLM2: digits one by one, all else cut as GPT-2's, then merged by bytes.

    Raises:
      GgufError: another kind of tokenizer, or one without its tokens.
    """
    for option, values in _SERVED.items():
        if (value := metadata.get(option, values[0])) not in values:
            raise GgufError(f"{option}={value!r} is not served; {values[0]} is")
    tokens, merges, kinds = (
        metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type")
    )
    if not tokens or not merges or not kinds or len(set(tokens)) != len(kinds):
        raise GgufError("no tokenizer.ggml.tokens, merges and token_type, or not one of each")
    vocabulary = {token: n for n, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(m.split(" ")) for m in merges]))
    except Exception as error:  # the Rust side raises bare Exception
        raise GgufError(f"tokenizer.ggml.merges: {str(error).splitlines()[0]}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_CONTROL, _USER_DEFINED):
            is_special = kind == _CONTROL
            tokenizer.add_tokens([AddedToken(token, special=is_special, normalized=False)])
    return tokenizer


def tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The content of tokenizer_config.json, of what `build_tokenizer` has found sound.

    Raises:
      GgufError: a special token that is none of the tokens.
    """
    tokens = metadata["tokenizer.ggml.tokens"]
    if beyond := [n for n in _SPECIAL.values() if metadata.get(n, 0) >= len(tokens)]:
        raise GgufError(f"{beyond[0]}={metadata[beyond[0]]} is none of {len(tokens)} tokens")
    special = {ours: tokens[metadata[n]] for ours, n in _SPECIAL.items() if n in metadata}
    template = metadata.get("tokenizer.chat_template")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata[_MODEL_MAX_LENGTH],
        "clean_up_tokenization_spaces": False,
        **special,
        **({"chat_template": template} if template else {}),
    }
