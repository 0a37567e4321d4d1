"""The user's path: texts, stop texts, adapters, programs compiled once, faults."""

import jax
import numpy as np
import pytest
from flax import nnx

from lorax.errors import LoraxError
from lorax.generation import GenerationConfig, beam, generate, sample
from lorax.generation.text import text_after
from lorax.lora import LoraSpec, adapt, adapt_rows, init, merge, stack_adapters
from lorax.models import DECODERS
from tests.helpers.causal_zoo import load_lm, ragged, write_lm
from tests.helpers.generation import EOS, ids_of, prompts_of, reference

pytestmark = pytest.mark.slow

tokenizers = pytest.importorskip("tokenizers")
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
SPECIAL = ["<pad>", "<s>", "</s>"]


@pytest.fixture(scope="module")
def tokenizer():
    """61 words: letters, pairs of letters, and special tokens."""
    pairs = [*zip(LETTERS, LETTERS[3:] + LETTERS[:3], strict=True), ("a", "b"), ("b", "c")]
    words = [*SPECIAL, *LETTERS, *(a + b for a, b in pairs)]
    vocabulary = {word: n for n, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    made.decoder = tokenizers.decoders.Fuse()
    made.add_special_tokens(SPECIAL)
    assert made.get_vocab_size() == 61
    return made


def programs():
    return [f._cache_size() for f in (sample.start, sample.go_on, beam.search)]


def random_lora(model, seed):
    params, spec = nnx.to_pure_dict(nnx.state(model)), LoraSpec(rank=2, targets="all-linear")
    lora = init(jax.random.key(0), params, spec)
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(lora)))
    return params, jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), lora), spec


@pytest.mark.parametrize("beams", [1, 3])
def test_an_adapted_model_is_the_merged_one(pair, beams):
    _, model = pair("llama")
    prompts = prompts_of(*ragged("left"))
    config = GenerationConfig(max_new_tokens=8, num_beams=beams, eos_token_id=EOS)
    plain, found, counts = generate(model, prompts, config), [], []
    for seed in (1, 2):
        params, lora, spec = random_lora(model, seed)
        found.append(generate(adapt(model, lora, spec), prompts, config))
        counts.append(programs())
        merged = nnx.merge(nnx.graphdef(model), merge(params, lora, spec))
        want = generate(merged, prompts, config)
        assert ids_of(found[-1]) == ids_of(want) != ids_of(plain)
        np.testing.assert_allclose(
            [made.log_prob for made in found[-1]], [made.log_prob for made in want], rtol=1e-4
        )
        assert programs() == counts[-1]  # the merged model takes the plain one's
    assert ids_of(found[0]) != ids_of(found[1])
    assert counts[0] == counts[1]


def test_other_prompts_and_values_take_the_same_programs(pair):
    _, model = pair("gpt2")
    key = jax.random.key(0)
    sampled = {"temperature": 0.5, "top_k": 5, "top_p": 0.5, "max_new_tokens": 3}
    searched = {"num_beams": 2, "length_penalty": 0.5, "max_new_tokens": 3}
    generate(model, [[4], [5, 6]], GenerationConfig(**sampled), key=key)
    generate(model, [[4], [5, 6]], GenerationConfig(**searched))
    before = programs()
    prompts = [list(range(1, 30)), [3]]
    other = {"temperature": 2.0, "top_k": 0, "top_p": 0.9, "max_new_tokens": 9, "eos_token_id": 7}
    generate(model, prompts, GenerationConfig(**other), key=jax.random.key(5))
    other = {"num_beams": 2, "length_penalty": 2.0, "early_stopping": "never", "eos_token_id": 5}
    other |= {"min_new_tokens": 7, "num_return_sequences": 2}
    generate(model, prompts, GenerationConfig(max_new_tokens=20, **other))
    assert programs() == before
    generate(model, [list(range(1, 34)), [3]], GenerationConfig(**searched))
    assert programs() == [*before[:2], before[2] + 1]


def test_the_longest_prompt_that_fits_is_served(tmp_path):
    theirs = write_lm(tmp_path, "gpt2", n_positions=40)
    ids = np.random.default_rng(0).integers(2, 60, (1, 35))
    want, _ = reference(theirs, ids, np.ones_like(ids), new=5)
    model, config = load_lm(tmp_path), GenerationConfig(max_new_tokens=5)
    assert ids_of(generate(model, ids, config)) == want
    with pytest.raises(LoraxError, match=r"prompt 0 of 36 tokens leaves no room.*at most 35 fit"):
        generate(model, [[*ids[0], 3]], config)
    with pytest.raises(LoraxError, match=r"max_new_tokens=40 leaves no room.*40 positions"):
        generate(model, [[3]], GenerationConfig(max_new_tokens=40))


@pytest.mark.parametrize("model_type", DECODERS)
def test_every_decoder_generates(tmp_path, model_type):
    theirs = write_lm(tmp_path, model_type)
    ids, mask = ragged("left")
    want, _ = reference(theirs, ids, mask, new=6, num_beams=2)
    config = GenerationConfig(max_new_tokens=6, num_beams=2)
    assert ids_of(generate(load_lm(tmp_path), prompts_of(ids, mask), config)) == want


def test_stop_texts_end_where_transformers_ends(pair, tokenizer):
    transformers = pytest.importorskip("transformers")
    theirs, model = pair("gpt2")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")
    prompts, new = ["abc def", "z", "hello. you", "u. "], 29
    stops = "jmjmt", "yx q", "zt"  # each spans tokens, two end within one
    plain = generate(model, prompts, GenerationConfig(max_new_tokens=new), tokenizer=tokenizer)
    config = GenerationConfig(max_new_tokens=new, stop=stops)
    got = generate(model, prompts, config, tokenizer=tokenizer)
    for prompt, made, full in zip(prompts, got, plain, strict=True):
        ids = np.array([tokenizer.encode(prompt).ids])
        options = {"stop_strings": list(stops), "tokenizer": fast}
        [want], _ = reference(theirs, ids, np.ones_like(ids), new=new, **options)
        assert made.ids == want
        assert full.text == tokenizer.decode(full.ids)
        places = [full.text.find(stop) for stop in stops if stop in full.text]
        assert made.ended_by == ("stop" if places else "length")
        assert made.text == (full.text[: min(places)] if places else full.text)
        assert (made.log_prob > full.log_prob) == bool(places)
    assert [len(made.ids) for made in got] == [23, 29, 20, 12]


def test_a_text_is_without_the_token_that_ends_it(pair, tokenizer):
    _, model = pair("gpt2")
    config = GenerationConfig(max_new_tokens=20, eos_token_id=(6, 50))
    made = generate(model, ["abc", "hello", "z z"], config, tokenizer=tokenizer)
    assert "eos" in {row.ended_by for row in made}
    for row in made:
        assert row.text == tokenizer.decode(row.ids[: -1 if row.ended_by == "eos" else None])


def test_a_texts_first_space_is_kept():
    words = {"<unk>": 0, "▁is": 1, "▁Paris": 2, ".": 3}
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    assert tokenizer.decode([2, 3]) == "Paris."
    assert text_after(tokenizer, [1], [2, 3]) == " Paris."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, r"top_p=0.0 is not in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 is not in \(0, 1\]"),
        ({"temperature": -1}, r"temperature=-1 is not 0 \(greedy\) or a number from 1e-30"),
        ({"temperature": 1e-39}, "temperature=1e-39 is not"),  # logits / it overflows
        ({"temperature": float("nan")}, "temperature=nan is not"),
        ({"top_k": -1}, "top_k=-1 is not a whole number"),
        ({"num_beams": 0}, "num_beams=0 is not a whole number from 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is not a whole number from 1"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is not a whole number from 1"),
        ({"length_penalty": "long"}, "length_penalty='long' is not a number"),
        ({"length_penalty": -1000}, "length_penalty=-1000 is not a number from -40 to 40"),
        ({"early_stopping": "always"}, "early_stopping='always' is not True, False or 'never'"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' is not one id or several"),
        ({"stop": 3}, "stop=3 is not one text or several"),
        ({"stop": ("a", "")}, "stop=.* is not one text or several"),
        ({"repetition_penalty": 0}, "repetition_penalty=0 is not a number from 0.001 to 1000"),
        ({"repetition_penalty": "1.2"}, "repetition_penalty='1.2' is not a number"),
        ({"min_new_tokens": -1}, "min_new_tokens=-1 is not a whole number from 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 8}, "min_new_tokens=9 is above max_new_tokens=8"),
        ({"num_return_sequences": 0}, "num_return_sequences=0 is not a whole number from 1"),
        ({"num_return_sequences": 2}, "num_return_sequences=2 would be equal, as temperature=0"),
        (
            {"num_return_sequences": 3, "num_beams": 2},
            "num_return_sequences=3 is above num_beams=2",
        ),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams=2 searches, temperature=1.0 samples"),
        ({"num_beams": 2, "stop": "."}, "stop='.' is not served with num_beams=2"),
        ({"beams": 2}, "'beams' is no option of generation; they are: max_new_tokens"),
    ],
)
def test_options_that_are_not_served_are_named(options, message):
    with pytest.raises(LoraxError, match=message) as fault:
        GenerationConfig.from_dict(options)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[3], []], {}, "prompt 1 is empty: begin it with the model's BOS token"),
        ([""], {"words": 61}, "prompt 0 is empty"),
        ("abc", {"words": 61}, "prompts are one text: give a list"),
        (None, {}, "prompts=None: give a list of texts"),
        ([[3], [1, [2, 3]]], {}, "prompt 1 is neither a text nor a sequence of token ids"),
        (["abc"], {}, "prompt 0 is a text: give a tokenizer"),
        ([[3], [61]], {}, "prompt 1 has id 61; this model's are 0 to 60"),
        ([[-1]], {}, "prompt 0 has id -1"),
        ([[0.5]], {}, "prompt 0 is neither a text nor a sequence of token ids"),
        ([[3]], {"eos_token_id": 61}, "eos_token_id=61: this model's ids are 0 to 60"),
        ([[3]], {"temperature": 1.0}, "temperature=1.0 samples: give key"),
        ([[3]], {"stop": "."}, r"stop=\('\.',\) needs a tokenizer"),
        ([[3]], {"stop": "</s>", "words": 61}, "'</s>' is a special token.*set eos_token_id=2"),
        ([[3]], {"words": 62}, "the tokenizer has 62 words and the model 61"),
        ([[3]], {"words": 40}, "the tokenizer has 40 words and the model 61"),
        ([[3]], {"stop": "a</s>", "words": 61}, "stop='a</s>': '</s>' is a special token"),
        ([[3]], {"batch_size": 0}, "batch_size=0 is not"),
        ([[3]], {"batch_size": 2.5}, "batch_size=2.5 is not a whole number from 1"),
        ([[3]], {"temperature": 1.0, "key": 0}, r"key=0 is not a PRNG key: give key=jax\.random"),
    ],
)
def test_prompts_that_cannot_be_served_are_named(pair, prompts, options, message):
    options = {"max_new_tokens": 5} | options
    arguments = {name: options.pop(name) for name in ("batch_size", "key") if name in options}
    if words := options.pop("words", None):
        vocabulary = {"[UNK]": 0} | {f"w{n}": n for n in range(1, words)}
        vocabulary = {name if n != 2 else "</s>": n for name, n in vocabulary.items()}
        words = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
        arguments["tokenizer"] = tokenizers.Tokenizer(words)
        arguments["tokenizer"].add_special_tokens(["</s>"])
    before = programs()
    with pytest.raises(LoraxError, match=message) as fault:
        generate(pair("llama")[1], prompts, GenerationConfig(**options), **arguments)
    assert "\n" not in str(fault.value)
    assert programs() == before


def test_what_is_no_causal_model_is_refused():
    with pytest.raises(LoraxError, match=r"a CausalLM generates .*not a Linear"):
        generate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [[1]])


@pytest.mark.parametrize("beams", [1, 2])
def test_a_model_whose_rows_have_adapters_of_their_own_is_refused(pair, beams):
    # Prompts are ordered by length: the first row's adapter would go on with the second prompt.
    _, model = pair("llama")
    _, lora, spec = random_lora(model, 1)
    rows = adapt_rows(model, stack_adapters([(lora, spec)]), [0, -1])
    with pytest.raises(LoraxError, match=r"generate orders prompts by itself: take lorax\.adapt"):
        generate(rows, [[3, 4], [5]], GenerationConfig(max_new_tokens=2, num_beams=beams))


def test_a_model_that_drops_inputs_is_refused(pair):
    _, model = pair("llama")
    _, lora, spec = random_lora(model, 1)
    config, key = GenerationConfig(max_new_tokens=2), jax.random.key(0)
    with pytest.raises(LoraxError, match=r"drops 0\.5 of its inputs: adapt without key="):
        generate(adapt(model, lora, spec, dropout=0.5, key=key), [[3]], config)
    assert generate(adapt(model, lora, spec, dropout=0.0, key=key), [[3]], config)


@pytest.mark.parametrize("how", ["enable_truncation", "enable_padding"])
def test_a_tokenizer_that_changes_prompts_is_refused(pair, tokenizer, how):
    other, config = tokenizers.Tokenizer.from_str(tokenizer.to_str()), GenerationConfig(5)
    getattr(other, how)(**({"max_length": 2} if how == "enable_truncation" else {"length": 9}))
    with pytest.raises(LoraxError, match=r"cuts or pads prompts: call its no_truncation\(\)"):
        generate(pair("gpt2")[1], ["abc def"], config, tokenizer=other)
