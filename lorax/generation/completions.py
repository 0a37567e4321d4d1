"""Generates completions of prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from lorax.data.batches.packing import round_up
from lorax.errors import LoraxError
from lorax.generation.config import GenerationConfig, is_whole
from lorax.generation.decode import Made, draw, search
from lorax.generation.program import Options, Program
from lorax.generation.prompts import (
    BUCKET,
    batches,
    check_tokenizer,
    encode_prompts,
    power_of_two,
)
from lorax.generation.text import Stops, cut, text_after
from lorax.lora.nnx_model import LoraLayer
from lorax.lora.per_example import PerExampleLayer
from lorax.models import CausalLM


@dataclass(frozen=True)
class Completion:
    """The text generated after one prompt.

    Attributes:
      ids: new tokens, with the one that ended them.
      text: of them, before the stop text, if there is one, and without the token that ended
        them; None without a tokenizer.
      log_prob: the model's, of `ids` together, before penalties, temperature and cuts; of a beam
        search after `repetition_penalty`.
      score: log_prob / len(ids) ** length_penalty, which a beam search ranks by.
      ended_by: `eos`, `stop` or `length`.
    """

    ids: list[int]
    text: str | None
    log_prob: float
    score: float
    ended_by: str


def generate(
    model: CausalLM,
    prompts: Sequence[Any],
    config: GenerationConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    key: jax.Array | None = None,
    batch_size: int = 32,
) -> list[Completion]:
    """Continue prompts greedily, by sampling, or by beam search.

    One program is compiled per shape: prompts' lengths and `max_new_tokens` are rounded up to
    multiples of 32. Other prompts, weights, adapters and values of options reuse it.

    Args:
      model: plain, merged, or adapted by `lorax.adapt` without dropout.
      prompts: texts, or sequences of token ids.
      config: None: greedy, 64 new tokens.
      tokenizer: the model's (`lorax.data.load_tokenizer`); texts and `stop` need it.
      key: seeds sampling. Each completion draws from a stream of its own, named by its prompt's
        place in `prompts` and its place among the prompt's: what is drawn depends neither on other
        prompts, nor on `batch_size` and `num_return_sequences`.
      batch_size: rows that are generated at a time.

    Returns:
      A completion for each prompt, in their order; with `num_return_sequences` so many for each,
      one after another, those of a search by score.

    Raises:
      LoraxError: before any work, naming the prompt or the option that is not served.

    >>> from lorax.models.families.gpt2 import Gpt2Config
    >>> config = Gpt2Config(8, 8, num_hidden_layers=1, num_attention_heads=2)
    >>> model = CausalLM(config, rngs=nnx.Rngs(0))
    >>> [made] = generate(model, [[1, 2]], GenerationConfig(max_new_tokens=3))
    >>> len(made.ids), made.ended_by, made.text
    (3, 'length', None)
    """
    config = config or GenerationConfig()
    stops = Stops(config.stops, tokenizer)
    ids = _checked(model, prompts, config, tokenizer=tokenizer, key=key, batch_size=batch_size)
    graphdef, state = nnx.split(model)
    program = _program(graphdef, config)
    params, options = nnx.to_pure_dict(state), _options(config, key)
    found: dict[int, list[Completion]] = {n: [] for n in range(len(ids))}
    each, longest = config.num_return_sequences, model.config.max_length
    is_search = config.num_beams > 1
    for batch in batches(ids, batch_size, longest, copies=1 if is_search else each):
        if is_search:
            made = search(program, params, batch, options, each)
        else:
            drawn = draw(program, params, batch, options, stops=stops, prompts=ids)
            made = [[row] for row in drawn]
        for n, rows in zip(batch.row.tolist(), made, strict=False):
            found[n] += [_completion(config, tokenizer, ids[n], row) for row in rows]
    return [completion for n in range(len(ids)) for completion in found[n]]


def _completion(
    config: GenerationConfig, tokenizer: Tokenizer | None, prompt: list[int], made: Made
) -> Completion:
    ids, log_prob, is_stopped = made
    has_eos = ids[-1] in config.eos_ids
    text = None
    if tokenizer is not None:
        text = text_after(tokenizer, prompt, ids[:-1] if has_eos and not is_stopped else ids)
        text = cut(text, config.stops) if is_stopped else text
    score = log_prob / len(ids) ** config.length_penalty
    ended_by = "stop" if is_stopped else "eos" if has_eos else "length"
    return Completion(ids, text, log_prob, score, ended_by)


def _checked(
    model: Any,
    prompts: Sequence[Any],
    config: GenerationConfig,
    *,
    tokenizer: Tokenizer | None,
    key: jax.Array | None,
    batch_size: int,
) -> list[list[int]]:
    """The prompts' ids, after all arguments are checked."""
    if not isinstance(model, CausalLM):
        raise LoraxError(f"a CausalLM generates (load_causal_lm), not a {type(model).__name__}")
    _check_adapters(model)
    if not is_whole(batch_size, 1):
        raise LoraxError(f"batch_size={batch_size!r} is not a whole number from 1")
    if config.temperature and key is None:
        raise LoraxError(f"temperature={config.temperature} samples: give key=jax.random.key(seed)")
    if key is not None and not _is_key(key):
        raise LoraxError(f"key={key!r} is not a PRNG key: give key=jax.random.key(seed)")
    words, longest = model.config.vocab_size, model.config.max_length
    if wrong := [token for token in config.eos_ids if token >= words]:
        raise LoraxError(f"eos_token_id={wrong[0]}: this model's ids are 0 to {words - 1}")
    if config.max_new_tokens >= longest:
        raise LoraxError(
            f"max_new_tokens={config.max_new_tokens} leaves no room for a prompt: "
            f"this model has {longest} positions"
        )
    if tokenizer is not None:
        check_tokenizer(tokenizer, words)
    return encode_prompts(prompts, tokenizer, words, longest - config.max_new_tokens)


def _check_adapters(model: CausalLM) -> None:
    for _, layer in nnx.iter_graph(model):
        if isinstance(layer, PerExampleLayer):
            raise LoraxError(
                f"{layer.path!r} has an adapter a row (adapt_rows), but generate orders prompts by "
                "itself: take lorax.adapt, or decode by the model's own cache"
            )
        if isinstance(layer, LoraLayer) and layer.key is not None and layer.rate:
            raise LoraxError(
                f"{layer.path!r} drops {layer.rate} of its inputs: adapt without key= to generate"
            )


def _is_key(key: Any) -> bool:
    try:
        jax.random.fold_in(key, 0)
    except (TypeError, ValueError):
        return False
    return True


def _program(graphdef: Any, config: GenerationConfig) -> Program:
    return Program(
        graphdef,
        room=round_up(config.max_new_tokens, BUCKET),
        num_beams=config.num_beams,
        samples=config.temperature > 0,
        cuts=config.temperature > 0 and (config.top_k > 0 or config.top_p < 1),
        ngram=config.no_repeat_ngram_size,
        penalizes=config.repetition_penalty != 1,
    )


def _options(config: GenerationConfig, key: jax.Array | None) -> Options:
    # Up to a power of two, so that no id and one share a program; -1 is no token.
    eos = list(config.eos_ids) or [-1]
    eos += [-1] * (power_of_two(len(eos)) - len(eos))
    return Options(
        jnp.float32(config.temperature),
        jnp.int32(min(config.top_k, np.iinfo(np.int32).max)),
        jnp.float32(config.top_p),
        jnp.float32(config.length_penalty),
        jnp.asarray(config.early_stopping is True),
        jnp.asarray(config.early_stopping == "never"),
        jnp.int32(config.max_new_tokens),
        jnp.int32(config.min_new_tokens),
        jnp.float32(config.repetition_penalty),
        jnp.asarray(eos, jnp.int32),
        jax.random.key(0) if key is None else key,
    )
