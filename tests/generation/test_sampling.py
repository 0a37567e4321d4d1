"""What tokens are drawn by: transformers' distributions, a stream of random numbers a row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lorax.generation import GenerationConfig, generate
from lorax.generation.warp import forbid_end, penalize_repeats, warp
from tests.helpers.generation import ids_of
from tests.helpers.lora import quick_jit

pytestmark = pytest.mark.slow


def logits_of(seed, rows=32, words=61):
    return 3 * np.random.default_rng(seed).standard_normal((rows, words)).astype(np.float32)


def warped(logits, temperature, top_k, top_p):
    numbers = jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p)
    return np.asarray(jax.jit(warp)(jnp.asarray(logits), *numbers))


def transformers_warped(logits, temperature, top_k, top_p):
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    steps = [process.TemperatureLogitsWarper(temperature)]
    steps += [process.TopKLogitsWarper(top_k)] if top_k else []
    steps += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    return process.LogitsProcessorList(steps)(None, torch.tensor(logits)).numpy()


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_processed_logits_equal_transformers(temperature, top_k, top_p):
    logits = logits_of(top_k)
    got = warped(logits, temperature, top_k, top_p)
    want = transformers_warped(logits, temperature, top_k, top_p)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
    np.testing.assert_allclose(got, want, rtol=2e-7)  # the last bit of a quotient


def test_penalties_and_least_lengths_before_a_draw_equal_transformers():
    torch = pytest.importorskip("torch")
    process = pytest.importorskip("transformers.generation.logits_process")
    logits, end, eos = logits_of(3), 20, [3, 8]
    ids = np.random.default_rng(0).integers(0, 61, (len(logits), end + 5)).astype(np.int32)
    is_token = np.arange(end + 5)[None] >= np.arange(len(logits))[:, None] % end

    @quick_jit
    def processed(penalty, is_too_early):
        scores = penalize_repeats(jnp.asarray(logits), jnp.asarray(ids), is_token, end, penalty)
        return forbid_end(scores, jnp.array([*eos, -1, -1]), is_too_early)

    for penalty, new in ((1.3, 2), (0.7, 9)):
        theirs = process.LogitsProcessorList(
            [
                process.RepetitionPenaltyLogitsProcessor(
                    penalty, prompt_ignore_length=torch.tensor((~is_token).sum(1))
                ),
                process.MinNewTokensLengthLogitsProcessor(end - new, 5, eos),
            ]
        )
        want = theirs(torch.tensor(ids[:, :end]).long(), torch.tensor(logits)).numpy()
        got = processed(penalty, new < 5)
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        np.testing.assert_allclose(got, want, rtol=2e-7)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.01, 0.999),
    temperature=st.floats(0.1, 5),
)
def test_top_p_keeps_the_fewest_words_that_reach_it(seed, top_k, top_p, temperature):
    logits = logits_of(seed, rows=4)
    got = warped(logits, temperature, top_k, top_p)
    before = warped(logits, temperature, top_k, 1.0)
    for row, all_row in zip(got, before, strict=True):
        probability = np.exp(all_row.astype(np.float64) - all_row.max())
        probability /= probability.sum()
        kept = np.isfinite(row)
        assert kept[all_row.argmax()]
        assert not (~kept).any() or probability[kept].min() > probability[~kept].max()
        assert probability[kept].sum() >= top_p - 1e-5
        assert probability[kept].sum() - probability[kept].min() < top_p + 1e-5
        assert np.isfinite(all_row).sum() == (min(top_k, 61) or 61)


def test_words_as_probable_as_the_last_one_kept_are_kept():
    logits = np.log(np.array([[0.4, 0.2, 0.2, 0.2]], np.float32))
    for top_k, top_p in [(2, 1.0), (0, 0.5)]:
        assert np.isfinite(warped(logits, 1.0, top_k, top_p)).all()
    assert np.isfinite(warped(logits, 1.0, 1, 1.0)).sum() == 1


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (12, 0.95)])
def test_frequencies_follow_the_distribution(pair, top_k, top_p):
    _, model = pair("llama")
    prompt, count = [7, 11, 13], 2000
    options = {"temperature": 2.0, "top_k": top_k, "top_p": top_p}
    config = GenerationConfig(max_new_tokens=1, **options)
    key = jax.random.key(1)
    made = generate(model, [prompt] * count, config, key=key, batch_size=1000)
    seen = np.bincount([row.ids[0] for row in made], minlength=61)
    ids = np.array([prompt], np.int32)
    logits = transformers_warped(np.asarray(model(ids, np.ones_like(ids)))[:, -1], **options)
    want = np.exp(logits[0].astype(np.float64) - logits.max())
    want = count * want / want.sum()
    assert seen[want == 0].sum() == 0
    rare = (want > 0) & (want < 5)
    groups = [*np.flatnonzero(want >= 5)[:, None], *([np.flatnonzero(rare)] if rare.any() else [])]
    assert len(groups) > 5
    counts = [[x[group].sum() for group in groups] for x in (seen, want)]
    assert stats.chisquare(*counts).pvalue > 0.01


def test_a_row_draws_from_a_stream_of_its_own(pair):
    _, model = pair("gpt2")
    prompts = [[7, 11, 13], [5], [9, 9], [5]]
    config = GenerationConfig(max_new_tokens=10, temperature=1.5, top_k=30, eos_token_id=3)
    key = jax.random.key(3)
    together = ids_of(generate(model, prompts, config, key=key))
    assert together[1] != together[3]
    assert ids_of(generate(model, prompts[:2], config, key=key)) == together[:2]
    assert ids_of(generate(model, prompts, config, key=key, batch_size=1)) == together
    other = [prompts[0], [1, 2, 3, 4], *prompts[2:]]
    for n, row in enumerate(ids_of(generate(model, other, config, key=key))):
        assert (row == together[n]) == (n != 1)
    assert ids_of(generate(model, prompts, config, key=jax.random.key(4))) != together
    options = {"temperature": 1.5, "top_k": 30, "eos_token_id": 3, "num_return_sequences": 3}
    config = GenerationConfig(max_new_tokens=10, **options)
    several = ids_of(generate(model, prompts, config, key=key, batch_size=4))
    assert several[::3] == together
    assert len({tuple(row) for row in several}) == len(several) == 12
