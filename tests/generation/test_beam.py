"""Greedy and beam search: token for token and score for score as transformers has them."""

import itertools

import jax
import numpy as np
import pytest

from lorax.generation import GenerationConfig, generate
from tests.helpers.causal_zoo import ragged
from tests.helpers.generation import EOS, ids_of, prompts_of, reference

pytestmark = pytest.mark.slow

NEW = 14
OFTEN = (19, 30, 47)  # ids that end several hypotheses soon
each_model_type = pytest.mark.parametrize("model_type", ["gpt2", "llama"])


@each_model_type
def test_greedy_equals_transformers(pair, model_type):
    theirs, model = pair(model_type)
    ids, mask = ragged("left")
    lengths = set()
    for eos in [(), EOS]:
        want, _ = reference(theirs, ids, mask, new=NEW, eos=eos)
        config = GenerationConfig(max_new_tokens=NEW, eos_token_id=eos)
        got = generate(model, prompts_of(ids, mask), config)
        assert ids_of(got) == want
        for made in got:
            assert made.ended_by == ("eos" if made.ids[-1] in eos else "length")
        lengths |= {len(row) for row in want}
    assert len(lengths) > 2


@pytest.mark.parametrize("beams", [2, 4, 10])
@each_model_type
def test_beam_search_equals_transformers(pair, model_type, beams):
    theirs, model = pair(model_type)
    ids, mask = ragged("left")
    found = []
    for penalty in (0.6, 0.9, 1.0, 2.0):
        options = {"num_beams": beams, "length_penalty": penalty}
        want, scores = reference(theirs, ids, mask, new=NEW, eos=EOS, **options)
        config = GenerationConfig(max_new_tokens=NEW, eos_token_id=EOS, **options)
        got = generate(model, prompts_of(ids, mask), config)
        assert ids_of(got) == want
        np.testing.assert_allclose([made.score for made in got], scores, rtol=1e-5)
        found += want
    assert len({len(row) for row in found}) > 2
    assert len({tuple(row) for row in found}) > 5


@pytest.mark.parametrize("early", [True, "never"])
def test_early_stopping_equals_transformers(pair, early):
    theirs, model = pair("llama")
    ids, mask = ragged("left")
    prompts, changes = prompts_of(ids, mask), 0
    for penalty in (-1.0, 1.2, 2.0):
        options = {"num_beams": 4, "length_penalty": penalty}
        want, scores = reference(
            theirs, ids, mask, new=NEW, eos=OFTEN, early_stopping=early, **options
        )
        options |= {"max_new_tokens": NEW, "eos_token_id": OFTEN}
        got = generate(model, prompts, GenerationConfig(early_stopping=early, **options))
        assert ids_of(got) == want
        np.testing.assert_allclose([made.score for made in got], scores, rtol=1e-5)
        changes += got != generate(model, prompts, GenerationConfig(**options))
    assert changes


@pytest.mark.parametrize("beams", [1, 4])
def test_no_ngram_comes_twice_as_in_transformers(pair, beams):
    theirs, model = pair("llama")
    prompts = prompts_of(*ragged("left"))
    config = GenerationConfig(max_new_tokens=NEW, num_beams=beams, no_repeat_ngram_size=2)
    got = generate(model, prompts, config)
    for prompt, made in zip(prompts, got, strict=True):  # alone: theirs counts padding, too
        ids = prompt[None]
        options = {"num_beams": beams, "no_repeat_ngram_size": 2}
        [want], _ = reference(theirs, ids, np.ones_like(ids), new=NEW, **options)
        assert made.ids == want
        both = [*prompt.tolist(), *made.ids]
        pairs = list(itertools.pairwise(both))
        assert len(set(pairs)) == len(pairs)


PROCESSED = {
    "penalty": {"repetition_penalty": 1.3},
    "reward": {"repetition_penalty": 0.8},
    "least": {"min_new_tokens": 9},
    "all": {"repetition_penalty": 1.7, "min_new_tokens": 6, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("case", PROCESSED)
def test_penalties_and_least_lengths_equal_transformers(pair, case, beams):
    theirs, model = pair("llama")
    prompts = prompts_of(*ragged("left"))
    options = PROCESSED[case] | {"num_beams": beams}
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=OFTEN, **options)
    made = generate(model, prompts, config)
    for prompt, row in zip(prompts, made, strict=True):  # alone: theirs counts padding in n-grams
        ids = prompt[None]
        [want], scores = reference(theirs, ids, np.ones_like(ids), new=NEW, eos=OFTEN, **options)
        assert row.ids == want
        if beams > 1:
            np.testing.assert_allclose(row.score, scores, rtol=1e-5)
    plain = GenerationConfig(max_new_tokens=NEW, eos_token_id=OFTEN, num_beams=beams)
    assert ids_of(made) != ids_of(generate(model, prompts, plain))


def test_several_hypotheses_of_a_search_equal_transformers(pair):
    theirs, model = pair("llama")
    ids, mask = ragged("left")
    options = {"num_beams": 4, "num_return_sequences": 3, "repetition_penalty": 1.2}
    want, scores = reference(theirs, ids, mask, new=NEW, eos=EOS, **options)
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=EOS, **options)
    made = generate(model, prompts_of(ids, mask), config, batch_size=3)
    assert ids_of(made) == want
    assert len({tuple(row) for row in want}) == len(want) == 3 * len(ids)
    np.testing.assert_allclose([row.score for row in made], scores, rtol=1e-5)


def test_a_row_of_a_search_does_not_depend_on_the_others(pair):
    _, model = pair("gpt2")
    prompts = prompts_of(*ragged("left"))
    config = GenerationConfig(max_new_tokens=NEW, num_beams=4, eos_token_id=EOS)
    together = generate(model, prompts, config)
    assert ids_of(generate(model, prompts, config, batch_size=3)) == ids_of(together)


def test_log_probabilities_are_the_models(pair):
    _, model = pair("llama")
    prompts = prompts_of(*ragged("left"))
    for beams in (1, 4):
        options = {"num_beams": beams, "length_penalty": 2.0, "eos_token_id": EOS}
        made = generate(model, prompts, GenerationConfig(max_new_tokens=NEW, **options))
        both = [[*prompt, *row.ids] for prompt, row in zip(prompts, made, strict=True)]
        ids, mask = np.zeros((2, len(both), max(map(len, both))), np.int32)
        for n, row in enumerate(both):
            ids[n, : len(row)], mask[n, : len(row)] = row, 1
        log_probs = jax.nn.log_softmax(model(ids, mask))
        for n, (prompt, row) in enumerate(zip(prompts, made, strict=True)):
            places = np.arange(len(prompt), len(both[n])) - 1
            want = float(log_probs[n, places, np.array(row.ids)].sum())
            assert row.log_prob == pytest.approx(want, rel=1e-5)
            assert row.score == pytest.approx(want / len(row.ids) ** 2, rel=1e-5)


def test_ngrams_longer_than_all_columns_forbid_nothing(pair):
    _, model = pair("llama")
    prompts = prompts_of(*ragged("left"))
    plain = ids_of(generate(model, prompts, GenerationConfig(NEW)))
    config = GenerationConfig(NEW, no_repeat_ngram_size=100)
    assert ids_of(generate(model, prompts, config)) == plain


@pytest.mark.parametrize("penalty", [-20.0, -35.0])
def test_the_worst_score_is_before_an_empty_slot(pair, penalty):
    # All hypotheses end at the limit: the penalty scales their scores, to -1e24 and to -inf.
    _, model = pair("llama")
    prompts, options = prompts_of(*ragged("left")), {"max_new_tokens": NEW, "num_beams": 4}
    want = ids_of(generate(model, prompts, GenerationConfig(**options)))
    got = ids_of(generate(model, prompts, GenerationConfig(length_penalty=penalty, **options)))
    assert got == want
